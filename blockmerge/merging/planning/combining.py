"""How the tensors of several models become one: method, limits, adjustment, and input channels that not all
have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockmerge.anatomy import Family
from blockmerge.dtypes import wide_dtype
from blockmerge.expressions import Cast, Clipped, Expression, Gathered, Joined, Merged, Part, Scaled
from blockmerge.methods import Method, key_of
from blockmerge.weights import Change


@dataclass(frozen=True)
class Combination:
    """A method with its numbers and what is done to its results; merges tensors at whatever weights.

    `gathered` is for methods that look at all tensors first.
    """

    method: Method
    numbers: tuple[tuple[str, Any], ...] = ()
    seed: int = 0
    clip: bool = False
    gathered: Gathered | None = field(default=None, compare=False)

    @classmethod
    def of(cls, method: Method, numbers: Mapping[str, Any], *, clip: bool = False) -> Combination:
        """With numbers as `Method.check_numbers` returns them."""
        own = {name: value for name, value in numbers.items() if not (method.random and name == "seed")}
        return cls(method, tuple(own.items()), numbers.get("seed", 0) if method.random else 0, clip)

    def copied(self, alpha: float | None, beta: float | None) -> int | None:
        """The number of the model whose tensor the result is at these weights; None where it is computed.

        Without a weight, the tensor is left out of the merge: it is A's.
        """
        if alpha is None or beta is None:
            return 0
        source = self.method.copies(alpha, beta)
        # C need not lie between A and B.
        return None if self.clip and source not in (0, 1) else source

    def combine(
        self,
        name: str,
        tensors: Sequence[Expression],
        weights: tuple[float | None, float | None],
        dtype: str,
        change: Change | None = None,
        widest: int | None = None,
    ) -> Combined:
        """The tensors of all models that LDM calls `name`, merged at these weights (alpha, beta), and
        changed.

        `widest` is the number of the tensor whose additional input channels are kept, as `widest_input` tells
        it.
        """
        source = self.copied(*weights)
        inputs = tuple(tensors) if source is None else (tensors[source],)

        def merged(given: Sequence[Expression], dtype: str) -> Expression:
            return Cast(given[0], dtype) if source is not None else self._merged(name, given, weights, dtype)

        def made(dtype: str) -> Expression:
            if widest is None:
                return merged(inputs, dtype)
            shared = min(one.shape[1] for one in tensors)
            return widened(inputs, tensors[widest], shared, dtype, lambda given: merged(given, dtype))

        read = inputs if widest is None else (*inputs, tensors[widest])
        return Combined(adjusted(change, dtype, read, made), inputs, source)

    def _merged(
        self, name: str, tensors: Sequence[Expression], weights: tuple[float | None, float | None], dtype: str
    ) -> Expression:
        method = self.method
        alpha, beta = (
            weight if which in method.weights else None
            for which, weight in zip(("alpha", "beta"), weights, strict=True)
        )
        key = key_of(self.seed, name) if method.random else None
        result: Expression = Merged(
            method, tuple(tensors), dtype, alpha, beta, self.numbers, key, gathered=self.gathered
        )
        # Rows that are taken from A and B as they are lie between them.
        if self.clip and len(tensors) > 1 and method.rows is None:
            result = Clipped(result, *tensors[:2])
        return result


@dataclass(frozen=True)
class Combined:
    """What several tensors became: `expression`, made from `inputs`.

    `source` is the number of the only one, where nothing is computed but a dtype, or None.
    """

    expression: Expression
    inputs: tuple[Expression, ...]
    source: int | None


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


def widest_input(name: str, shapes: Sequence[tuple[int, ...]], family: Family) -> int | None:
    """Return the first model with additional input channels in the U-Net's first convolution; None for any
    other case.
    """
    if name != family.input_layer or len(set(shapes)) == 1 or any(len(shape) < 2 for shape in shapes):
        return None
    if len({(shape[0], *shape[2:]) for shape in shapes}) > 1:
        return None
    channels = [shape[1] for shape in shapes]
    widest = max(channels)
    return channels.index(widest) if set(channels) == {family.shared_channels, widest} else None


def widened(
    tensors: Sequence[Expression],
    wide: Expression,
    shared: int,
    dtype: str,
    make: Callable[[Sequence[Expression]], Expression],
) -> Expression:
    """What `make` gives of the input channels that all share, and beyond them those of the tensor `wide`."""
    rest = Cast(Part(wide, shared, wide.shape[1], axis=1), dtype)
    return Joined((make([Part(one, 0, shared, axis=1) for one in tensors]), rest), axis=1)
