"""`BlockWeights`: one number for each block, and the arithmetic people do with such lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from blockmerge.anatomy import SD_BLOCKS, SDXL_BLOCKS
from blockmerge.errors import WeightsError, counted, did_you_mean, shown

SDXL_MAPS = ("name", "resolution")
"""The ways in which 26 weights go to SDXL's 20 blocks."""

DECIMALS = "; decimals are written with a point, as in 0.5"
"""Said where a comma seems to stand for one."""

_LARGEST = 1e6
"""Larger weights are refused: they are slips of the pen, and the largest floats do not fit torch's
float32.
"""


class BlockWeights(Mapping[str, float | None]):
    """The weight of every block of a family, in the order of its blocks; immutable.

    >>> weights = BlockWeights.from_numbers([0.5] * 26).replace({"BASE": 0})
    >>> weights["BASE"], weights["IN04"], weights.complement()["BASE"]
    (0.0, 0.5, 1.0)

    26 blocks (SD1, SD2) or 20 (SDXL). A weight is how much of B the block takes, 0 all A and 1 all B; values
    outside [0, 1] are allowed. None, or the word "skip", leaves the block out of the merge, and stays None in
    all arithmetic.

    Raises WeightsError for unknown or missing blocks and for values that are not numbers from -1e6 to 1e6.
    """

    __slots__ = ("_weights",)

    def __init__(self, weights: Mapping[str, float | None]) -> None:
        blocks = SDXL_BLOCKS if len(weights) == len(SDXL_BLOCKS) else SD_BLOCKS
        for block in weights:
            if block not in blocks:
                raise unknown_block(block, blocks)
        if missing := [block for block in blocks if block not in weights]:
            raise WeightsError(
                f"no weight for block {missing[0]}: {len(SD_BLOCKS)} or {len(SDXL_BLOCKS)} are needed, "
                f"{len(weights)} given"
            )
        self._weights = {block: checked_weight(weights[block], block) for block in blocks}

    @classmethod
    def from_numbers(cls, numbers: Sequence[float | None]) -> BlockWeights:
        """From 26 or 20 numbers in block order, or 25 or 19 without BASE, which is then 0.

        Raises WeightsError for any other count.
        """
        return cls({"BASE": 0.0, **dict(zip(blocks_of_list(len(numbers)), numbers, strict=True))})

    @classmethod
    def flat(cls, weight: float | None, blocks: Sequence[str] = SD_BLOCKS) -> BlockWeights:
        """The same weight for every one of `blocks`."""
        return cls(dict.fromkeys(blocks, weight))

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
        """Every weight times `factor`. Raises WeightsError when that is no number."""
        factor = _checked_number(factor, "the factor")
        return self._map(lambda weight: weight * factor)

    def complement(self) -> BlockWeights:
        """1 minus every weight: the same merge with A and B exchanged."""
        return self._map(lambda weight: 1.0 - weight)

    def add(self, other: BlockWeights) -> BlockWeights:
        """The sum, block by block; a block that either skips is skipped.

        Raises WeightsError when the two are not of the same family's blocks, or `other` is no BlockWeights.
        """
        if self.blocks != _checked_other(other).blocks:
            raise WeightsError(f"weights of {len(self)} and of {len(other)} blocks cannot be added")
        pairs = ((block, mine, other[block]) for block, mine in self.items())
        return BlockWeights({block: None if a is None or b is None else a + b for block, a, b in pairs})

    def interpolate(self, other: BlockWeights, ratio: float) -> BlockWeights:
        """`(1 − ratio)·self + ratio·other`. Raises WeightsError as `add` and `scale` do."""
        ratio = _checked_number(ratio, "the ratio")
        return self.scale(1.0 - ratio).add(_checked_other(other).scale(ratio))

    def replace(self, changes: Mapping[str, float | None]) -> BlockWeights:
        """The same with the weights of some blocks changed. Raises WeightsError for a block that is not
        there.
        """
        for block in changes:
            if block not in self._weights:
                raise unknown_block(block, self.blocks)
        return BlockWeights({**self._weights, **changes})

    def for_sdxl(self, by: str = "name") -> BlockWeights:
        """The 26 weights carried over to SDXL's 20 blocks; 20 weights stay as they are.

        ``"name"`` keeps the weights of the blocks that SDXL has too (as SuperMerger does). ``"resolution"``
        gives SDXL's OUT*k* what SD1's OUT*(k+3)* has, since those work at the same resolution.
        """
        if len(self) == len(SDXL_BLOCKS):
            return self
        check_sdxl_map(by)
        shift = 3 if by == "resolution" else 0
        source = {f"OUT{k:02}": f"OUT{k + shift:02}" for k in range(9)}
        return BlockWeights({block: self._weights[source.get(block, block)] for block in SDXL_BLOCKS})

    def _map(self, function: Callable[[float], float]) -> BlockWeights:
        return BlockWeights(
            {block: None if weight is None else function(weight) for block, weight in self._weights.items()}
        )


def check_sdxl_map(by: object) -> None:
    """Raise WeightsError for what is none of SDXL_MAPS."""
    if by not in SDXL_MAPS:
        raise WeightsError(f"unknown SDXL mapping '{shown(by)}': {' or '.join(SDXL_MAPS)}")


def blocks_of_list(count: int) -> tuple[str, ...]:
    """The blocks that so many numbers in a row are for. Raises WeightsError when no family has that many."""
    for blocks in (SD_BLOCKS, SDXL_BLOCKS):
        if count in (len(blocks), len(blocks) - 1):
            return blocks[-count:]
    hint = DECIMALS if count == 2 else ""  # 0,5
    raise WeightsError(
        f"{counted(count, 'weight')} given; 26 are needed (25 without BASE), or 20 for SDXL (19 without "
        f"BASE){hint}"
    )


def unknown_block(block: object, blocks: Sequence[str]) -> WeightsError:
    """The error for a block that is none of `blocks`; it tells which there are."""
    is_sdxl = len(blocks) == len(SDXL_BLOCKS)
    # A block that only SD1 and SD2 have is no slip of the pen: another one would not be meant.
    near = "" if is_sdxl and block in SD_BLOCKS else did_you_mean(block, blocks)
    whose, last = ("SDXL has", SDXL_BLOCKS[-1]) if is_sdxl else ("SD1 and SD2 have", SD_BLOCKS[-1])
    existing = f"BASE, IN00-IN{last[3:]}, M00, OUT00-{last}"
    return WeightsError(f"unknown block '{shown(block)}'{near or ':'} {whose} {existing}")


def checked_weight(weight: object, block: str) -> float | None:
    """A weight as a float, None for "skip". Raises WeightsError, naming the block, when it is none or too
    large.
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
