"""The registry of methods: where each built-in one is defined, and which one a user means.

A method is loaded when it is first asked for; none needs torch before it computes.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator, Mapping
from importlib import import_module

from blockmerge.errors import RecipeError, did_you_mean, shown
from blockmerge.methods.method import Method
from blockmerge.methods.own import own_method

PURPOSES: dict[str, dict[str, str]] = {
    "Blend two models": {
        "weighted_sum": "weighted_sums",
        "sigmoid": "weighted_sums",
        "inverse_sigmoid": "weighted_sums",
        "slerp": "slerp",
        "cosine_a": "cosines",
        "cosine_b": "cosines",
    },
    "Take parts of two models as they are": {
        "tensor_sum": "tensor_sums",
        "tensor_sum_columns": "tensor_sums",
    },
    "Blend three models": {
        "triple_sum": "weighted_sums",
        "sum_twice": "weighted_sums",
    },
    "Add to A what B has learned and C has not": {
        "add_difference": "differences",
        "train_difference": "differences",
        "smooth_add_difference": "differences",
    },
    "Join what several models have learned from the same base": {
        "average": "weighted_sums",
        "dare": "chance",
        "ties": "deltas",
        "model_stock": "deltas",
        "extract": "extract",
    },
    "Change one model": {
        "scale": "weighted_sums",
        "add_noise": "chance",
    },
}
"""What methods are for, and the file in `builtin` that defines each; in the order in which they are
listed.
"""

BUILT_IN = ChainMap(*reversed(list(PURPOSES.values())))  # which begins with its last


class _Methods(Mapping[str, Method]):
    def __getitem__(self, name: str) -> Method:
        return _built_in(name, BUILT_IN[name])

    def __iter__(self) -> Iterator[str]:
        return iter(BUILT_IN)

    def __len__(self) -> int:
        return len(BUILT_IN)


def _built_in(name: str, file: str) -> Method:
    method = getattr(import_module(f"blockmerge.methods.builtin.{file}"), name).blockmerge_method
    assert isinstance(method, Method)
    return method


METHODS: Mapping[str, Method] = _Methods()

IDENTITIES = {name: _built_in(name, "convert") for name in ("convert", "bake")}
"""Methods that do nothing, to one model: what converting and baking are merges with. Not among METHODS."""

IDENTITY, BAKE = IDENTITIES.values()


def purpose_of(method: Method) -> str | None:
    """What a method is for, one of PURPOSES; None of the user's own."""
    return next((purpose for purpose, group in PURPOSES.items() if method.name in group), None)


def find_method(method: object) -> Method:
    """Return the method of that name, or the user's own: ``"module:function"``, the decorated function, or a
    Method.

    A module is looked for in the current folder, then where Python looks. Raises RecipeError, with the
    nearest known name, when there is none, and for what is nothing of the kind.
    """
    found = own_method(method)
    if found is not None:
        return found
    if not isinstance(method, str):
        raise RecipeError(
            "a method is a name, a function decorated with @blockmerge.merge_method() "
            f"or a Method; {type(method).__name__} given"
        )
    if method in IDENTITIES:
        return IDENTITIES[method]
    if method not in METHODS:
        raise RecipeError(
            f"unknown method '{shown(method)}'{did_you_mean(method, METHODS)} "
            "('blockmerge methods' lists them)"
        )
    return METHODS[method]
