"""`Method` and `Number`: what there is to know about a method before any tensor is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockmerge.errors import RecipeError, counted, did_you_mean, shown
from blockmerge.methods.planning import Rows

if TYPE_CHECKING:
    import torch

    Compute = Callable[..., torch.Tensor]

Copies = Callable[..., int | None]
Passes = tuple[Callable[..., Any], Callable[..., Any]]

Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Number:
    """An extra number of a method, as ``Number("gamma", text="how fast likeness falls off", low=0)``.

    `kind` is ``"number"``, ``"whole number"``, or ``"numbers"``: one for each model, whose sum is not 0, and
    by default 1 each. The limits belong to the range, but for `high` where it is `open_above`. A `default` of
    None is that of the function's own parameter. What `option` says is the help text of an option of that
    name on the command line, where a built-in method has one.
    """

    name: str
    default: float | None = None
    text: str = ""
    kind: str = "number"
    low: float = -math.inf
    high: float = math.inf
    open_above: bool = False
    option: str = ""

    @property
    def range(self) -> str:
        """The values it can have, in words."""
        if self.kind == "numbers":
            return "numbers, one for each model, whose sum is not 0"
        if self.open_above:
            return f"a {self.kind} from {self.low} to below {self.high}"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"a {self.kind} from {self.low} to {self.high}"
        return f"a {self.kind}" + (f" of at least {self.low}" if math.isfinite(self.low) else "")

    def check(self, method: str, value: Any, models: int) -> Value:
        """Return the value that was given as the method is to get it.

        Raises RecipeError for one out of range.
        """
        if self.kind == "numbers":
            try:
                return self._check_all(value.split(",") if isinstance(value, str) else list(value), models)
            except (TypeError, ValueError) as error:
                why = f"found {shown(value)}" if isinstance(error, TypeError) else str(error)
                raise RecipeError(f"{shown(method)}: {self.name} are {self.range}; {why}") from None
        try:
            number = int(str(value)) if self.kind == "whole number" else _as_float(value)
            if (
                math.isfinite(number)
                and self.low <= number <= self.high
                and not (self.open_above and number == self.high)
            ):
                return number
        except (TypeError, ValueError, ArithmeticError):
            pass
        raise RecipeError(f"{shown(method)} needs {self.range} as {self.name}: found {shown(value)}")

    def _check_all(self, values: list[Any], models: int) -> tuple[float, ...]:
        """Return a number for each model. Raises ValueError, saying what is wrong with them."""
        numbers = []
        for value in values:
            try:
                numbers.append(_as_float(value))
            except (TypeError, ValueError, OverflowError):
                raise ValueError(f"'{shown(value)}' is not a number") from None
        if len(numbers) != models:
            raise ValueError(f"{counted(len(numbers), 'number')} for {counted(models, 'model')}")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{shown(numbers)} are not all finite")
        try:
            total = math.fsum(numbers)
        except OverflowError:
            raise ValueError(f"the sum of {shown(numbers)} is too large") from None
        if total == 0 or not all(math.isfinite(number / total) for number in numbers):
            raise ValueError(f"the sum of {shown(numbers)} is {'' if total == 0 else 'too near to '}0")
        return tuple(numbers)


@dataclass(frozen=True, eq=False)
class Method:
    """A merge method, as `merge_method` makes it of a function.

    `function(a, b, …, alpha=…, out=…)`, with `beta` and its numbers where it has them, writes the result into
    `out`, a tensor of any float dtype, which may be A's own memory, and returns it. Element-local ones take
    flat tensors, all others tensors in their real shape; all are contiguous.

    `models` is how many it takes; None is any number from `least` on. `weights` has the block weights that it
    takes, with the value of each where none is given, None if one must be; `numbers` are its extra numbers.

    `locality` tells the planner how a tensor may be cut: ``"element"`` anywhere; ``"row"`` between the
    entries of the first axis, where there are two axes or more; ``"tensor"`` not at all; ``"model"`` not at
    all, and figures of all tensors must be gathered first, by its `passes`, which the function then takes as
    `gathered`. `copies(alpha, beta)` is the number of the model (0 = A, 1 = B, 2 = C) whose bytes the result
    is at these weights, or None. Where there is `rows`, the result is always made of whole rows of the
    models: `rows(shape, alpha, beta)` are stretches (start, stop, model) of its first axis.

    The function of a method that is `random` takes a tensor's `key` (`key_of` its seed and name) and the
    `position` in it of the first element, in place of the number `seed`.
    """

    name: str
    models: int | None
    least: int
    locality: str
    formula: str
    source: str
    function: Compute
    copies: Copies
    weights: Mapping[str, float | None]
    numbers: tuple[Number, ...] = ()
    random: bool = False
    rows: Callable[..., Rows] | None = None
    passes: Passes | None = None

    @property
    def own(self) -> Compute | None:
        """The function, where it is the user's own; None for the built-in methods."""
        return self.function if ":" in self.name else None

    @property
    def statistics(self) -> Callable[..., Any]:
        """For a method that looks at the whole model: `f(a, b, …)` gives a tensor's figures, for `gather`."""
        assert self.passes is not None, self.name
        return self.passes[0]

    @property
    def gather(self) -> Callable[..., Any]:
        """For a method that looks at the whole model: `f(figures of all tensors)`, in any order, gives its
        `gathered`.
        """
        assert self.passes is not None, self.name
        return self.passes[1]

    @property
    def count(self) -> str:
        """How many models it takes, in words."""
        return f"{self.least} models or more" if self.models is None else counted(self.models, "model")

    def check_models(self, count: int) -> None:
        """Raise RecipeError when it does not take that many models."""
        if count != self.models if self.models is not None else count < self.least:
            raise RecipeError(f"{shown(self.name)} merges {self.count}; {count} given")

    def check_names(self, given: Iterable[str], others: Iterable[str] = ()) -> None:
        """Raise RecipeError for a name that none of its numbers has; `others` could have been meant as
        well.
        """
        known = [number.name for number in self.numbers]
        for name in given:
            if name not in known:
                near = did_you_mean(name, [*known, *others])
                raise RecipeError(
                    f"unknown argument '{shown(name)}': {shown(self.name)} has no such number{near}"
                )

    def check_numbers(self, given: Mapping[str, Any], models: int) -> dict[str, Value]:
        """Return all its numbers, for so many models: those that are given, checked, and the others as they
        are by default.

        Raises RecipeError for a number that it does not have or that is out of range.
        """
        values: dict[str, Value] = {
            number.name: (1.0,) * models if number.default is None else number.default
            for number in self.numbers
        }
        self.check_names(given)
        known = {number.name: number for number in self.numbers}
        for name, value in given.items():
            values[name] = known[name].check(self.name, value, models)
        return values


MethodLike = str | Method | Callable[..., Any]
"""A merge method: its name, ``"module:function"`` for one of your own, or a function decorated with
`merge_method`.
"""


def _as_float(value: Any) -> float:
    """Return a number as a float. Raises TypeError for True and False, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise TypeError
    return float(value)
