"""`merge_method`: the one way in which a method is defined, built-in or the user's own.

Loads no torch: the function itself may.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypedDict, TypeVar, Unpack, overload

from blockmerge.errors import RecipeError, shown
from blockmerge.methods import planning
from blockmerge.methods.guard import Guard, name_of
from blockmerge.methods.method import Copies, Method, Number, Passes
from blockmerge.methods.planning import Rows

_Function = TypeVar("_Function", bound=Callable[..., Any])

_LOCALITIES = ("element", "row", "tensor", "model")
_WEIGHTS = ("alpha", "beta")
_BUILT_IN = "blockmerge.methods.builtin."
_SEED = Number("seed", 0, "with the tensor's name it decides what chance brings", "whole number")
_TAKEN = (
    "about", "adjust", "allow_nonfinite", "changes", "changes_beta", "check_finite", "clip", "configs",
    "device", "dry_run", "dtype", "ema", "hash", "loras", "method", "module", "naming", "out", "output",
    "overwrite", "partial", "preset", "preset_beta", "progress", "prune", "rounding", "rules", "sdxl_map",
    "text_encoder", "threads", "vae", "variant", "weights", "weights_beta",
)  # fmt: skip
"""Arguments of merging, which a number of the same name would never get past. `seed` is not among them:
methods get it.
"""


class _Options(TypedDict, total=False):
    locality: str
    formula: str
    source: str
    copies: Copies
    numbers: Sequence[Number]
    chance: bool
    rows: Callable[..., Rows] | None
    passes: Passes | None


@overload
def merge_method(function: _Function, /, **options: Unpack[_Options]) -> _Function: ...
@overload
def merge_method(**options: Unpack[_Options]) -> Callable[[_Function], _Function]: ...
def merge_method(
    function: Any = None,
    /,
    *,
    locality: str = "element",
    formula: str = "",
    source: str = "",
    copies: Copies = planning.never,
    numbers: Sequence[Number] = (),
    chance: bool = False,
    rows: Callable[..., Rows] | None = None,
    passes: Passes | None = None,
) -> Any:
    """Make a function a merge method, for the argument `method` or the option ``--method module:function``.

    >>> @merge_method(formula="A + α·γ·(B − A)")
    ... def soften(a, b, *, alpha, gamma=0.5):
    ...     return a + alpha * gamma * (b - a)

    The function gets one tensor of each model, in float32 or float64, and returns a tensor of the same shape,
    which is rounded once. It must depend on nothing else, and not change what it gets.

    Its parameters say what it takes:

    - by position: the models. With ``*others`` it takes any number of them.
    - `alpha` and `beta`, by keyword: the weights. One with a default need not be given.
    - other keywords: numbers with their defaults. A default of type int means a whole number. No number may
      have the name of an argument of `merge`, except `seed`.
    - `out`, without a default: the result is written into it, rounded. The tensors then come as they are, of
      any float dtype, and `out` may be the memory of A.

    The options of the decorator:

    - `locality`: what the function must see at once. ``"element"``: any stretch of a tensor, flat. ``"row"``:
      any entries of the first axis. ``"tensor"``: the whole tensor. ``"model"``: the whole tensor, and
      figures of all tensors by its `passes`.
    - `formula`, `source`: texts for `blockmerge methods`.
    - `copies`: a function of alpha and beta. It returns which model the result is a copy of: 0 for A, 1 for
      B, None for none. `blockmerge.methods.planning` has the usual ones.
    - `numbers`: more about numbers, such as ``Number("gamma", text="how fast it falls off", low=0, high=1)``.
    - `chance`: the function takes the keywords `key` and `position`, for `normal` and `chosen` of
      `blockmerge.methods.randomness`. A merge then takes a `seed`.
    - `rows`: a function of shape, alpha and beta, for methods that take whole rows from their models. It
      returns stretches (start, stop, model) of the first axis, in order and without gaps.
    - `passes`: two functions. The first gives one tensor's figures. The second makes of those of all tensors,
      in any order, the keyword `gathered`.

    The parentheses may be left out.

    Raises `RecipeError`, which names the function and what it lacks.
    """

    def decorate(function: _Function) -> _Function:
        definition = _Definition(
            function, locality, formula, source, copies, tuple(numbers), chance, rows, passes
        )
        method = definition.method()
        try:
            function.blockmerge_method = method  # type: ignore[attr-defined]
        except AttributeError:
            what = "is a method of an object" if inspect.ismethod(function) else "is not a plain function"
            raise RecipeError(f"{shown(method.name)} {what}: decorate a function of its own") from None
        return function

    return decorate if function is None else decorate(function)


@dataclass(eq=False, repr=False)
class _Definition:
    """What was given to the decorator, and the function, whose signature says the rest."""

    function: Callable[..., Any]
    locality: str
    formula: str
    source: str
    copies: Copies
    numbers: tuple[Number, ...]
    chance: bool
    rows: Callable[..., Rows] | None
    passes: Passes | None

    @property
    def built_in(self) -> bool:
        return str(getattr(self.function, "__module__", "")).startswith(_BUILT_IN)

    @property
    def name(self) -> str:
        return self.function.__name__ if self.built_in else name_of(self.function)

    def method(self) -> Method:
        """Return the method. Raises RecipeError for what is wrong with it."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # it cannot be called, or is a builtin that does not tell
            raise RecipeError(
                f"{shown(self.function)} is not a Python function: a method is f(a, b, *, alpha)"
            ) from None
        self._check_options()
        models, others = self._models(parameters)
        least = max(2, models) if others else models
        keywords = {one.name: one for one in parameters if one.kind == one.KEYWORD_ONLY}
        writes = "out" in keywords and keywords["out"].default is inspect.Parameter.empty
        for name in self._given_by_merging(writes):
            if keywords.pop(name, None) is None:
                raise self._refusal(f"does not take the keyword {name}")
        weights = {name: self._usual_weight(keywords.pop(name)) for name in _WEIGHTS if name in keywords}
        # What is always A needs no weights.
        if "alpha" not in weights and self.copies is not planning.always_a:
            raise self._refusal("takes no weight: a method is f(a, b, *, alpha)")
        guard = Guard(self.name, own=not self.built_in, writes=writes, models=least)
        return Method(
            name=self.name,
            models=None if others else models,
            least=least,
            locality=self.locality,
            formula=self.formula or next(iter((inspect.getdoc(self.function) or "").splitlines()), ""),
            source=self.source or ("" if self.built_in else "your own"),
            function=guard.function(self.function),
            copies=guard.copies(self.copies),
            weights=weights,
            numbers=self._numbers(keywords),
            random=self.chance,
            rows=None if self.rows is None else guard.rows(self.rows),
            passes=None if self.passes is None else guard.passes(*self.passes),
        )

    def _refusal(self, what: str) -> RecipeError:
        return RecipeError(f"{shown(self.name)} {what}")

    def _check_options(self) -> None:
        for what, text in (("formula", self.formula), ("source", self.source)):
            if not isinstance(text, str):
                raise RecipeError(f"{shown(self.name)}: {what} is a text; {type(text).__name__} given")
        if self.locality not in _LOCALITIES:
            raise RecipeError(
                f"{shown(self.name)}: unknown locality '{shown(self.locality)}' ({', '.join(_LOCALITIES)})"
            )
        if (self.passes is not None) != (self.locality == "model"):
            raise RecipeError(
                f"{shown(self.name)}: passes=(statistics, gather) "
                "are what the locality 'model' needs, and no other"
            )
        if self.rows is not None and self.locality != "row":
            raise RecipeError(f"{shown(self.name)}: rows are for the locality 'row'")
        for what, fits, wanted in (
            ("copies", callable(self.copies), "a function"),
            ("rows", self.rows is None or callable(self.rows), "a function"),
            ("passes", self.passes is None or _are_two(self.passes), "two functions, statistics and gather"),
            ("numbers", all(isinstance(one, Number) for one in self.numbers), "Numbers"),
        ):
            if not fits:
                raise RecipeError(f"{shown(self.name)}: {what} wants {wanted}")

    def _models(self, parameters: Iterable[inspect.Parameter]) -> tuple[int, bool]:
        """Return how many models it takes, and whether any number of others."""
        kinds = [one.kind for one in parameters]
        empty = inspect.Parameter
        models = kinds.count(empty.POSITIONAL_ONLY) + kinds.count(empty.POSITIONAL_OR_KEYWORD)
        others = empty.VAR_POSITIONAL in kinds
        if not models and not others:
            raise self._refusal("takes no models: a method is f(a, b, *, alpha)")
        if empty.VAR_KEYWORD in kinds:
            raise self._refusal("takes any keyword (**): name each number, with its default")
        return models, others

    def _given_by_merging(self, writes: bool) -> list[str]:
        """The keywords that are neither weights nor numbers."""
        return [
            *(["out"] if writes else []),
            *(["key", "position"] if self.chance else []),
            *(["gathered"] if self.passes is not None else []),
        ]

    def _usual_weight(self, parameter: inspect.Parameter) -> float | None:
        if parameter.default is parameter.empty:
            return None
        if (default := _finite(parameter.default)) is None:
            raise RecipeError(
                f"{shown(self.name)}: "
                f"the weight {parameter.name} needs a finite number as its default, or none"
            )
        return float(default)

    def _numbers(self, keywords: dict[str, inspect.Parameter]) -> tuple[Number, ...]:
        described = {number.name: number for number in self.numbers}
        for name in described:
            if name not in keywords:
                raise RecipeError(f"{shown(self.name)}: the number {shown(name)} is not one of its keywords")
        numbers = [self._number(one, described.get(one.name, Number(one.name))) for one in keywords.values()]
        return (*numbers, _SEED) if self.chance else tuple(numbers)

    def _number(self, parameter: inspect.Parameter, number: Number) -> Number:
        """Return a number with the default and the kind that its parameter has."""
        name = parameter.name
        if name in _TAKEN:
            raise RecipeError(
                f"{shown(self.name)}: a number cannot be called {name}, "
                "which is an argument of merging itself"
            )
        if name == "seed" and self.chance:
            raise self._refusal("is of chance: it takes key and position in place of the seed")
        if number.kind == "numbers":
            return replace(number, default=None)
        given = number.default if parameter.default is parameter.empty else parameter.default
        if number.default not in (None, given):
            raise RecipeError(f"{shown(self.name)}: the number {name} has two defaults")
        if (default := _finite(given)) is None:
            raise RecipeError(
                f"{shown(self.name)}: the number {name} needs a finite default, a whole number or a float"
            )
        if name == "seed" and (type(default), default) != (int, 0):
            raise RecipeError(
                f"{shown(self.name)}: the seed is the merge's own, "
                "and 0 when nobody says: give it that default"
            )
        kind = "whole number" if isinstance(default, int) else "number"
        found = replace(number, default=default, kind=kind)
        found.check(self.name, default, 1)
        return found


def _are_two(functions: object) -> bool:
    return isinstance(functions, tuple) and len(functions) == 2 and all(map(callable, functions))


def _finite(value: Any) -> int | float | None:
    """Return a number, of NumPy's too, as one of Python's; None for anything else, infinity and NaN among
    them.
    """
    with suppress(OverflowError):
        if isinstance(value, Real) and not isinstance(value, bool):
            number = int(value) if isinstance(value, Integral) else float(value)
            return number if math.isfinite(number) else None
    return None
