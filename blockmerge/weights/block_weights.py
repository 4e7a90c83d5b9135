"""`BlockWeights`: one number for each block, and the arithmetic people do with such lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from blockmerge.anatomy import DEFAULT_FAMILY, FAMILIES, OUTSIDE, Family
from blockmerge.errors import WeightsError, shown
from blockmerge.weights.block_lists import (
    blocks_of_count,
    blocks_of_names,
    family_named,
    kindred,
    owners,
    runs,
    unknown_block,
    ways_to,
    without_base,
)
from blockmerge.weights.gradients import spread

_SDXL = "sdxl"  # a word of the interface: for_sdxl, --sdxl-map

SDXL_MAPS = ("name", "resolution")
"""The ways in which 26 weights go to SDXL's 20 blocks."""

_LARGEST = 1e6
"""Larger weights are refused: they are slips of the pen, and the largest floats do not fit torch's
float32.
"""


class BlockWeights(Mapping[str, float | None]):
    """The weight of every block of a family, in the order of its blocks; immutable.

    >>> weights = BlockWeights.from_numbers([0.5] * 26).replace({"BASE": 0})
    >>> weights["BASE"], weights["IN04"], weights.complement()["BASE"]
    (0.0, 0.5, 1.0)

    - `weights`: {block: weight}. A weight is how much of B the block takes: 0 is all A and 1 is all B. Values
      outside of [0, 1] are allowed. None or ``"skip"`` leaves the block out of the merge.
    - `blocks`: the names of all blocks in order. The default follows from `weights`.

    Weights can be added and subtracted, and multiplied and divided by numbers. A skipped block stays skipped.

    >>> mixed = 0.6 * load_preset("high_res") + 0.4 * load_preset("GRAD_A")

    Raises `WeightsError` for unknown or missing blocks, and for values that are not numbers from -1e6 to 1e6.
    """

    __slots__ = ("_weights",)

    __array_ufunc__ = None  # so that NumPy's numbers leave multiplying to it

    def __init__(self, weights: Mapping[str, float | None], blocks: Sequence[str] | None = None) -> None:
        if not isinstance(weights, Mapping):
            raise WeightsError(
                f"BlockWeights are made from a mapping of blocks to weights; {type(weights).__name__} given: "
                "BlockWeights.flat(0.5) has one weight for all blocks, BlockWeights.from_numbers([…]) a list"
            )
        blocks = blocks_of_names(weights.keys()) if blocks is None else tuple(blocks)
        for block in weights:
            if block not in blocks:
                raise unknown_block(block, blocks)
        if missing := [block for block in blocks if block not in weights]:
            counts = dict.fromkeys(str(len(other)) for other in kindred(blocks))
            raise WeightsError(
                f"no weight for block {missing[0]}: {' or '.join(counts)} are needed, {len(weights)} given"
            )
        self._weights = {block: checked_weight(weights[block], block) for block in blocks}

    @classmethod
    def from_numbers(
        cls, numbers: Sequence[float | None], blocks: Sequence[str] | None = None
    ) -> BlockWeights:
        """Return the weights that a list holds, in block order.

        >>> BlockWeights.from_numbers([0.5] * 25)["BASE"]
        0.0

        SD1 and SD2 have 26 blocks and SDXL has 20. Lists of one number less have no BASE, which is then 0.
        `blocks` are meant where a count fits several families.

        Raises `WeightsError` for a count that fits none, and for anything that is not a list.
        """
        if isinstance(numbers, (str, bytes)) or not hasattr(numbers, "__len__"):
            raise WeightsError(
                f"from_numbers takes a list of numbers, one for each block; {type(numbers).__name__} given "
                "(BlockWeights.flat(0.5) has one weight for all blocks)"
            )
        found = blocks_of_count(len(numbers), None if blocks is None else tuple(blocks))
        given = dict(zip(found[-len(numbers) :], numbers, strict=True))
        return cls({found[0]: 0.0, **given}, found)

    @classmethod
    def flat(
        cls, weight: float | None, blocks: Sequence[str] = FAMILIES[DEFAULT_FAMILY].blocks
    ) -> BlockWeights:
        """Return the same weight for every one of `blocks`.

        >>> BlockWeights.flat(0.5)["M00"]
        0.5
        """
        return cls(dict.fromkeys(blocks, weight), blocks)

    def __getitem__(self, block: str) -> float | None:
        return self._weights[block]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def __hash__(self) -> int:
        return hash(tuple(self._weights.items()))

    def __repr__(self) -> str:
        return f"BlockWeights({self})"

    def __str__(self) -> str:
        return ",".join("skip" if weight is None else f"{weight:.12g}" for weight in self._weights.values())

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks' names in order."""
        return tuple(self._weights)

    def scale(self, factor: float) -> BlockWeights:
        """Return every weight times `factor`. Raises `WeightsError` where that is not a number."""
        factor = _checked_number(factor, "the factor")
        return self._map(lambda weight: weight * factor)

    def __add__(self, other: BlockWeights) -> BlockWeights:
        return self.add(other)

    def __radd__(self, other: object) -> BlockWeights:
        return self if other == 0 else self.add(_checked_other(other))  # sum() begins with 0

    def __sub__(self, other: BlockWeights) -> BlockWeights:
        return self.add(-_checked_other(other))

    def __mul__(self, factor: float) -> BlockWeights:
        return self.scale(factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> BlockWeights:
        number = _checked_number(divisor, "the divisor")
        if number == 0:
            raise WeightsError("weights cannot be divided by 0")
        return self._map(lambda weight: weight / number)

    def __neg__(self) -> BlockWeights:
        return self.scale(-1.0)

    def complement(self) -> BlockWeights:
        """Return 1 minus every weight: the same merge with A and B exchanged."""
        return self._map(lambda weight: 1.0 - weight)

    def add(self, other: BlockWeights) -> BlockWeights:
        """Return the sum, block by block. A block that either skips is skipped.

        Raises `WeightsError` where the two have different blocks.
        """
        if self.blocks != _checked_other(other).blocks:
            whose = [f"{len(weights)}" for weights in (self, other)]
            if len(self) == len(other):
                whose = [f"{owners(weights.blocks)}'s" for weights in (self, other)]
            raise WeightsError(f"weights of {whose[0]} and of {whose[1]} blocks cannot be added")
        pairs = ((block, mine, other[block]) for block, mine in self.items())
        sums = {block: None if a is None or b is None else a + b for block, a, b in pairs}
        return BlockWeights(sums, self.blocks)

    def interpolate(self, other: BlockWeights, ratio: float) -> BlockWeights:
        """Return `(1 − ratio)·self + ratio·other`. Raises `WeightsError` as `add` and `scale` do."""
        ratio = _checked_number(ratio, "the ratio")
        return self.scale(1.0 - ratio).add(_checked_other(other).scale(ratio))

    def replace(self, changes: Mapping[str, float | None]) -> BlockWeights:
        """Return the same with the weights of some blocks changed.

        Raises `WeightsError` for a block that is not there.
        """
        for block in changes:
            if block not in self._weights:
                raise unknown_block(block, self.blocks)
        return BlockWeights({**self._weights, **changes}, self.blocks)

    def for_sdxl(self, by: str = "name") -> BlockWeights:
        """Return 26 weights carried over to SDXL's 20 blocks. 20 weights stay as they are.

        ``"name"`` keeps the weights of the blocks that SDXL has, as SuperMerger does. ``"resolution"`` gives
        SDXL's OUT*k* the weight of SD1's OUT*(k+3)*, which works at the same resolution.
        """
        if self.blocks != FAMILIES[_SDXL].blocks:
            check_sdxl_map(by)
        return self.for_family(_SDXL, by)

    def for_family(self, family: Family | str, by: str | None = None) -> BlockWeights:
        """Return the weights carried over to the blocks of a family, such as ``"flux1"``.

        Between U-Nets, blocks of the same name keep their weights, or `by` names another way. For a
        transformer the weights are spread by depth: the first block gets the first weight, the last the last.
        Those between are interpolated linearly; between a weight and a skip it is a skip. BASE stays BASE.

        Raises `WeightsError` where the family takes no weights of these blocks.
        """
        wanted = family_named(family)
        if self.blocks == wanted.blocks:
            return self
        if self.go_by_depth_to(wanted):
            if by is not None:
                check_sdxl_map(by)
            inner = [weight for block, weight in self.items() if block != OUTSIDE]
            theirs = [block for block in wanted.blocks if block != OUTSIDE]
            spread_out = dict(zip(theirs, spread(inner, len(theirs)), strict=True))
            return BlockWeights({OUTSIDE: self.get(OUTSIDE, 0.0), **spread_out}, wanted.blocks)
        sources = self._carried_to(wanted, by)
        return BlockWeights({block: self._weights[sources[block]] for block in wanted.blocks}, wanted.blocks)

    def lost_for(self, family: Family | str, by: str | None = None) -> dict[str, float | None]:
        """Return the weights that `for_family` drops although they matter.

        A weight does not matter where it is 0, or where the nearest block that is kept has the same.

        Raises `WeightsError` as `for_family` does.
        """
        wanted = family_named(family)
        if self.blocks == wanted.blocks or self.go_by_depth_to(wanted):
            return {}
        kept = set(self._carried_to(wanted, by).values())
        return {
            block: self._weights[block]
            for run in runs(self.blocks)
            for place, block in enumerate(run)
            if block not in kept and self._is_missed(run, place, kept)
        }

    def go_by_depth_to(self, family: Family | str) -> bool:
        """Return whether `for_family` spreads the weights by depth."""
        wanted = family_named(family)
        is_other = self.blocks != wanted.blocks and set(self.blocks) != {OUTSIDE}
        return is_other and wanted.arms is None and ways_to(wanted, self.blocks) is None

    def _is_missed(self, run: Sequence[str], place: int, kept: Collection[str]) -> bool:
        """Whether a block's weight is neither 0 nor that of the nearest of its run that is kept."""
        distances = {block: abs(place - other) for other, block in enumerate(run) if block in kept}
        near = [block for block, distance in distances.items() if distance == min(distances.values())]
        weight = self._weights[run[place]]
        return weight != 0 and all(self._weights[block] != weight for block in near)

    def _carried_to(self, wanted: Family, by: str | None) -> Mapping[str, str]:
        """{block of a family: the own block whose weight it takes}."""
        ways = ways_to(wanted, self.blocks)
        if ways is None:
            raise WeightsError(
                f"weights for {owners(self.blocks)}'s {len(self)} blocks given; {wanted.name} needs "
                f"{len(wanted.blocks)}{without_base(wanted.blocks)}"
            )
        if by is not None:
            check_sdxl_map(by)
        return ways[by or next(iter(ways))]

    def _map(self, function: Callable[[float], float]) -> BlockWeights:
        changed = {
            block: None if weight is None else function(weight) for block, weight in self._weights.items()
        }
        return BlockWeights(changed, self.blocks)


def check_sdxl_map(by: object) -> None:
    """Raise WeightsError for anything that is not one of SDXL_MAPS."""
    if by not in SDXL_MAPS:
        raise WeightsError(f"unknown SDXL mapping '{shown(by)}': {' or '.join(SDXL_MAPS)}")


def checked_weight(weight: object, block: str) -> float | None:
    """A weight as a float, None for "skip".

    Raises WeightsError, naming the block, when it is none or too large.
    """
    if weight is None or (isinstance(weight, str) and weight.casefold() == "skip"):
        return None
    number = _checked_number(weight, f"weight of {block}")
    if abs(number) > _LARGEST:
        raise WeightsError(
            f"weight of {block} is {number:.12g}: at most {_LARGEST:,.0f} is allowed, and 0 to 1 is usual"
        )
    return number + 0.0  # -0.0 becomes 0.0


def _checked_number(value: object, what: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, (str, bool)) or not math.isfinite(number):
        raise WeightsError(f"{what} is not a number: '{shown(value)}'")
    return number


def _checked_other(other: object) -> BlockWeights:
    if not isinstance(other, BlockWeights):
        raise WeightsError(
            f"BlockWeights are needed; {type(other).__name__} given (load_preset gives those of a preset)"
        )
    return other
