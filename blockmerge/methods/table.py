"""The table of methods: what there is to know about each before any tensor is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from blockmerge.errors import RecipeError, counted, did_you_mean, shown
from blockmerge.methods import planning
from blockmerge.methods.planning import Rows

if TYPE_CHECKING:
    import torch

    Compute = Callable[..., torch.Tensor]
    Gather = Callable[..., object]

Value = float | tuple[float, ...]


@dataclass(frozen=True)
class Number:
    """An extra number of a method.

    `kind` is ``"number"``, ``"whole number"``, or ``"numbers"``: one for each model, whose sum is not 0, and
    by default 1 each. The limits belong to the range, but for `high` where it is `open_above`.
    """

    name: str
    default: float | None
    text: str = ""
    kind: str = "number"
    low: float = -math.inf
    high: float = math.inf
    open_above: bool = False

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
        """Return the value that was given as the method is to get it. Raises RecipeError for one out of
        range.
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
    """A merge method.

    `models` is how many it takes; None is any number from `least` on. `weights` has the block weights that it
    takes, with the value of each where none is given, None if one must be; `numbers` are its extra numbers.

    `locality` tells the planner how a tensor may be cut: ``"element"`` anywhere; ``"row"`` between the
    entries of the first axis, where there are two axes or more; ``"tensor"`` not at all; ``"model"`` not at
    all, and figures of all tensors must be gathered first. `copies(alpha, beta)` is the number of the model
    (0 = A, 1 = B, 2 = C) whose bytes the result is at these weights, or None. Where there is `rows`, the
    result is always made of whole rows of A and B: `rows(shape, alpha, beta)` are stretches (start, stop,
    model) of its first axis.

    The function of a method that is `random` takes a tensor's `key` (`key_of` its seed and name) and the
    `position` in it of the first element, in place of the number `seed`.
    """

    name: str
    models: int | None
    locality: str
    formula: str
    source: str
    copies: Callable[..., int | None]
    weights: Mapping[str, float | None] = field(default_factory=lambda: {"alpha": None})
    numbers: tuple[Number, ...] = ()
    least: int = 2
    random: bool = False
    rows: Callable[..., Rows] | None = None
    own: Compute | None = None

    @property
    def function(self) -> Compute:
        """The function itself: `f(a, b, …, alpha=…, out=…)` with `beta` and numbers where it has them.

        Element-local ones take flat tensors, all others tensors in their real shape; all are contiguous.
        Those that look at the whole model take `gathered` as well. In `blockmerge.methods.<locality>wise`, or
        the user's own.
        """
        return self.own or self._named(self.name)

    @property
    def statistics(self) -> Compute:
        """For a method that looks at the whole model: `f(a, b)` gives a tensor's figures, for `gather`."""
        return self._named(f"{self.name}_statistics")

    @property
    def gather(self) -> Gather:
        """For a method that looks at the whole model: `f(figures of all tensors)`, in any order, gives its
        `gathered`.
        """
        return self._named(f"{self.name}_gathered")

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

    def _named(self, name: str) -> Compute:
        function: Any = getattr(import_module(f"blockmerge.methods.{self.locality}wise"), name)
        return function  # type: ignore[no-any-return]


_SEED = Number("seed", 0, "with the tensor's name it decides what chance brings", "whole number")
_ALPHA_BETA: Mapping[str, float | None] = {"alpha": None, "beta": 0.0}

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="weighted_sum",
            models=2,
            locality="element",
            formula="(1 − α)·A + α·B",
            source="the web UI's checkpoint merger",
            copies=planning.a_to_b,
        ),
        Method(
            name="sigmoid",
            models=2,
            locality="element",
            formula="weighted_sum with α²(3 − 2α) in place of α, α limited to [0, 1]",
            source='the web UI\'s old "Sigmoid"',
            copies=planning.a_to_b_limited,
        ),
        Method(
            name="inverse_sigmoid",
            models=2,
            locality="element",
            formula="weighted_sum with ½ − sin(asin(1 − 2α)/3) in place of α, α limited to [0, 1]",
            source='the web UI\'s old "Inverse sigmoid"',
            copies=planning.a_to_b_limited,
        ),
        Method(
            name="slerp",
            models=2,
            locality="tensor",
            formula="(sin((1 − α)Ω)·A/‖A‖ + sin(αΩ)·B/‖B‖)/sin Ω · ((1 − α)‖A‖ + α‖B‖), Ω the angle between "
            "A and B; "
            "weighted_sum where sin Ω or a norm is 0",
            source="Shoemake 1985; sd-mecha's slerp",
            copies=planning.a_to_b,
        ),
        Method(
            name="cosine_a",
            models=2,
            locality="model",
            formula="(1 − k)·B + k·A, k = ((κ + K)/2 − min)/(max − min) − |α| limited to [0, 1], κ the "
            "cosine of each column, "
            "K that of A and B with normalised columns, min and max of all κ but the outermost 1 %",
            source="SuperMerger's cosineA",
            copies=planning.never,
        ),
        Method(
            name="cosine_b",
            models=2,
            locality="model",
            formula="(1 − k)·B + k·A, k = (κ − min)/(max − min) − α limited to [0, 1], κ the mean of the "
            "cosine of each column "
            "and that of A and B, min and max of all κ but the outermost 1 %",
            source="SuperMerger's cosineB",
            copies=planning.never,
        ),
        Method(
            name="tensor_sum",
            models=2,
            locality="row",
            formula="rows ⌊nβ⌋ … ⌊n(α + β)⌋ of n from B, the others from A; if α + β > 1, rows ⌊n(α + β − "
            "1)⌋ … ⌊nβ⌋ from A, the "
            "others from B; α, β limited to [0, 1]",
            source="SuperMerger's tensor, meh",
            weights=_ALPHA_BETA,
            copies=planning.a_to_b_limited,
            rows=planning.swapped_rows,
        ),
        Method(
            name="tensor_sum_columns",
            models=2,
            locality="tensor",
            formula="tensor_sum on the second axis of tensors that have one",
            source="SuperMerger's tensor2",
            weights=_ALPHA_BETA,
            copies=planning.a_to_b_limited,
        ),
        Method(
            name="scale",
            models=1,
            locality="element",
            formula="α·A; A where α = 0",
            source="SuperMerger's self",
            copies=planning.a_at_zero_and_one,
        ),
        Method(
            name="add_noise",
            models=1,
            locality="element",
            formula="A + α·N(0, 1)",
            source="SuperMerger's plus random",
            copies=planning.a_at_zero,
            numbers=(_SEED,),
            random=True,
        ),
        Method(
            name="add_difference",
            models=3,
            locality="element",
            formula="A + α·(B − C)",
            source="the web UI's checkpoint merger",
            copies=planning.a_at_zero,
        ),
        Method(
            name="triple_sum",
            models=3,
            locality="element",
            formula="(1 − α − β)·A + α·B + β·C",
            source="SuperMerger",
            weights=_ALPHA_BETA,
            copies=planning.triple,
        ),
        Method(
            name="sum_twice",
            models=3,
            locality="element",
            formula="(1 − β)·((1 − α)·A + α·B) + β·C",
            source="SuperMerger",
            weights=_ALPHA_BETA,
            copies=planning.twice,
        ),
        Method(
            name="train_difference",
            models=3,
            locality="element",
            formula="A + 1.8α·(B − C)·s, s = |B − A|/(|B − C| + |B − A|), 0/0 = 0",
            source="SuperMerger's trainDifference",
            copies=planning.a_at_zero,
        ),
        Method(
            name="smooth_add_difference",
            models=3,
            locality="tensor",
            formula="A + α·G(M(B − C)), M a median filter of size 3, G a Gaussian of σ = 1 over every axis",
            source="SuperMerger's smoothAdd",
            copies=planning.a_at_zero,
        ),
        Method(
            name="extract",
            models=3,
            locality="row",
            formula="A + ((1 − α)b + αc)·((1 − β)d + β(1 − d)), b = B − A, c = C − A, d = ((κ + 1)/2)^γ, κ "
            "the cosine of b and c "
            "along the last axis; α, β limited to [0, 1]",
            source="SuperMerger's extract",
            weights=_ALPHA_BETA,
            copies=planning.never,
            numbers=(Number("gamma", 1.0, "how fast likeness falls off with the angle", low=0),),
        ),
        Method(
            name="average",
            models=None,
            locality="element",
            formula="(1 − α)·A + α·Σ rᵢXᵢ/Σ rᵢ",
            source="model soups, arXiv 2203.05482",
            weights={"alpha": 1.0},
            copies=planning.a_at_zero,
            numbers=(Number("ratios", None, "how much each model counts, A first", "numbers"),),
        ),
        Method(
            name="dare",
            models=2,
            locality="element",
            formula="A + α·(B − A)·Bernoulli(1 − p)/(1 − p)",
            source="DARE, arXiv 2311.03099",
            copies=planning.a_at_zero,
            numbers=(
                Number(
                    "drop_rate",
                    0.5,
                    "p, the share of the differences that is dropped",
                    low=0,
                    high=1,
                    open_above=True,
                ),
                _SEED,
            ),
            random=True,
        ),
        Method(
            name="ties",
            models=None,
            locality="tensor",
            formula="A + α·mean of the deltas Xᵢ − A that are among their tensor's ⌈k·n⌉ largest and have "
            "the sign of their sum",
            source="TIES, arXiv 2306.01708",
            copies=planning.a_at_zero,
            numbers=(
                Number("density", 0.2, "k, the share of each delta's values that is kept", low=0, high=1),
            ),
        ),
        Method(
            name="model_stock",
            models=None,
            least=3,
            locality="tensor",
            formula="A + α·t·mean of the n deltas Xᵢ − A, t = n·c/(1 + (n − 1)·c) limited to [0, 1], c their "
            "mean cosine",
            source="Model Stock, arXiv 2403.19522",
            copies=planning.a_at_zero,
        ),
    )
}


IDENTITY = Method(
    name="convert",
    models=1,
    locality="element",
    formula="A",
    source="",
    copies=lambda alpha, beta=0.0: 0,
    weights={},
)


def find_method(method: object) -> Method:
    """Return the method of that name, or the user's own: ``"module:function"``, the decorated function, or a
    Method.

    A module is looked for in the current folder, then where Python looks. Raises RecipeError, with the
    nearest known name, when there is none, and for what is nothing of the kind.
    """
    from blockmerge.methods.own import own_method

    found = own_method(method)
    if found is not None:
        return found
    if not isinstance(method, str):
        raise RecipeError(
            "a method is a name, a function decorated with @blockmerge.merge_method() or a Method; "
            f"{type(method).__name__} given"
        )
    if method not in METHODS:
        raise RecipeError(
            f"unknown method '{shown(method)}'{did_you_mean(method, METHODS)} ('blockmerge methods' lists "
            "them)"
        )
    return METHODS[method]


def _as_float(value: Any) -> float:
    """Return a number as a float. Raises TypeError for True and False, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise TypeError
    return float(value)
