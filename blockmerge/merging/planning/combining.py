"""How the tensors of several models become one: method, limits, adjustment, and input channels that not all
have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockmerge.adapters import Changes
from blockmerge.anatomy import Family, plain_names_of_ema
from blockmerge.dtypes import DTYPES, wide_dtype
from blockmerge.expressions import (
    Arrangement,
    Cast,
    Clipped,
    Dequantised,
    Expression,
    Gathered,
    Held,
    Joined,
    Merged,
    Part,
    Scaled,
)
from blockmerge.methods import Method, key_of
from blockmerge.weights import Change

Weights = tuple[float | None, float | None]
"""Alpha and beta of a tensor; without one of them it is left out of the merge."""


@dataclass(frozen=True)
class Combination:
    """A method with its numbers and what is done to its results; merges tensors of a family at whatever
    weights.

    `figures` are for methods that look at all tensors first.
    """

    method: Method
    family: Family
    numbers: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    clip: bool = False
    figures: Gathered | None = field(default=None, compare=False)
    changes: Changes | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls, method: Method, family: Family, numbers: Mapping[str, Any], *, clip: bool = False
    ) -> Combination:
        """With numbers as `Method.check_numbers` returns them."""
        own = {name: value for name, value in numbers.items() if not (method.random and name == "seed")}
        seed = numbers.get("seed", 0) if method.random else 0
        return cls(method, family, tuple(own.items()), seed, clip)

    @property
    def clips(self) -> bool:
        """Whether what is computed is clipped. Rows that are taken from A and B as they are lie between
        them.
        """
        return self.clip and self.method.rows is None

    def copied(self, weights: Weights) -> int | None:
        """The number of the model whose tensor the result is at these weights; None where it is computed.

        What is left out of the merge is A's.
        """
        alpha, beta = weights
        if alpha is None or beta is None:
            return 0
        model = self.method.copies(alpha, beta)
        # C need not lie between A and B.
        return None if self.clip and model not in (0, 1) else model

    def combine(
        self,
        name: str,
        tensors: Sequence[Expression],
        weights: Weights,
        dtype: str,
        change: Change | None = None,
    ) -> Combined:
        """The tensors of all models that LDM calls `name`, merged at these weights, and changed."""
        model = self.copied(weights)
        if model is not None:
            return self.copy(name, tensors, model, dtype, change)
        method = self.method
        alpha, beta = (
            weight if which in method.weights else None
            for which, weight in zip(("alpha", "beta"), weights, strict=True)
        )
        key = key_of(self.seed, name) if method.random else None

        def merged(given: Sequence[Expression], dtype: str) -> Expression:
            held = _clippable_dtype(given, dtype) if self.clips else dtype
            result = Merged(method, tuple(given), held, alpha, beta, self.numbers, key, gathered=self.figures)
            return Cast(Clipped(result, *given[:2]), dtype) if self.clips else result

        return Combined(self._made(name, tensors, tensors, dtype, change, merged), tuple(tensors), None)

    def copy(
        self,
        name: str,
        tensors: Sequence[Expression],
        model: int,
        dtype: str,
        change: Change | None = None,
    ) -> Combined:
        """One model's tensor, with the additional input channels that another has."""
        inputs = (tensors[model],)
        cast = self._made(name, tensors, inputs, dtype, change, lambda given, dtype: rounded(given[0], dtype))
        return Combined(cast, inputs, model)

    def _made(
        self,
        name: str,
        tensors: Sequence[Expression],
        inputs: Sequence[Expression],
        dtype: str,
        change: Change | None,
        make: Callable[[Sequence[Expression], str], Expression],
    ) -> Expression:
        """What `make` gives for the inputs and a dtype: of a first convolution, of the input channels that
        all `tensors` share, and beyond them those of the first that has more.
        """
        widest = widest_input(name, [one.shape for one in tensors], self.family)
        if widest is None:
            return self.finished(name, change, dtype, inputs, lambda dtype: make(inputs, dtype))
        wide, shared = tensors[widest], self.family.shared_channels

        def widened(dtype: str) -> Expression:
            narrow = [Part(one, 0, shared, axis=1) for one in inputs]
            rest = rounded(Part(wide, shared, wide.shape[1], axis=1), dtype)
            return Joined((make(narrow, dtype), rest), axis=1)

        return self.finished(name, change, dtype, (*inputs, wide), widened)

    def is_changed(self, name: str) -> bool:
        """Whether adapters change a tensor."""
        return self.changes is not None and name in self.changes

    def finished(
        self,
        name: str,
        change: Change | None,
        dtype: str,
        inputs: Sequence[Expression],
        make: Callable[[str], Expression],
    ) -> Expression:
        """What `make` gives for a dtype, changed by adapters, then adjusted, and rounded once to `dtype`;
        `inputs` are what it is made from.
        """
        if self.changes is None or name not in self.changes:
            return adjusted(change, dtype, inputs, make)
        changes, wide = self.changes, wide_dtype(tuple(one.dtype for one in inputs), dtype)
        merged = make(wide)
        return adjusted(change, dtype, inputs, lambda dtype: changes.of(name, merged, dtype))


@dataclass(frozen=True)
class Combined:
    """What several tensors became: `expression`, made from `inputs`.

    `model` is the number of the only one, where nothing is computed but a dtype, or None.
    """

    expression: Expression
    inputs: tuple[Expression, ...]
    model: int | None


def adjusted(
    change: Change | None, dtype: str, inputs: Sequence[Expression], make: Callable[[str], Expression]
) -> Expression:
    """What `make` gives for a dtype, changed, and rounded once to `dtype`; `inputs` are what it is made
    from.
    """
    if change is None:
        return make(dtype)
    wide = wide_dtype(tuple(one.dtype for one in inputs), dtype)
    return Scaled(make(wide), dtype, change.scale, change.shift)


def _clippable_dtype(inputs: Sequence[Expression], dtype: str) -> str:
    """The dtype of what is to be clipped and then rounded to `dtype`: that itself, where rounding keeps the
    order of all numbers, so that it may as well come first. Without infinity, too large ones would be NaN.
    """
    return dtype if DTYPES[dtype].infinity else wide_dtype(tuple(one.dtype for one in inputs), dtype)


def rounded(tensor: Expression, dtype: str) -> Expression:
    """A tensor in another dtype; one that a stage holds more digits of is rounded from these, once."""
    return tensor.rounded(dtype) if isinstance(tensor, Held) else Cast(tensor, dtype)


def kept_dtype(tensor: Expression) -> str:
    """The dtype of a tensor that keeps its own: of one that was quantised, bfloat16, as programs compute with
    it; of what a stage makes, that of its file.
    """
    if isinstance(tensor, Held):
        return tensor.kept
    return "BF16" if quantised_as(tensor) else tensor.dtype


def quantised_as(tensor: Expression) -> str | None:
    """The dtype of the codes of a tensor that was quantised in its file; None for all that a stage makes."""
    while isinstance(tensor, Arrangement):
        tensor = tensor.inputs[0]
    return tensor.codes.dtype if isinstance(tensor, Dequantised) else None


def widest_input(name: str, shapes: Sequence[tuple[int, ...]], family: Family) -> int | None:
    """Return the first model with additional input channels in a first convolution; None for any other
    case.
    """
    if len(set(shapes)) == 1 or any(len(shape) < 2 for shape in shapes):
        return None
    if plain_names_of_ema((name,)).get(name, name) != family.input_layer:
        return None
    if len({(shape[0], *shape[2:]) for shape in shapes}) > 1:
        return None
    channels = [shape[1] for shape in shapes]
    widest = max(channels)
    return channels.index(widest) if set(channels) == {family.shared_channels, widest} else None
