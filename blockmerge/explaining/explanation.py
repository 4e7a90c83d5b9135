"""What `explain` found, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class BlockOrigin:
    """Where a block (or component, or tensor) comes from.

    `weights` maps every parent but the base to how much of it the block took, None where that cannot be told.
    `uncertainty` is how far rounding may have moved the weights at most. `residual` is what the weights leave
    unexplained, divided by the largest difference between a candidate and the base. Not `determined`: the
    parents are equal or collinear here, or too much alike for the merge's dtype. `explained`: nothing is left
    but rounding. `divided`: the weights change within it, as element rules make them; these are the best
    single ones, and what it is made of is told apart.
    """

    weights: Mapping[str, float | None]
    uncertainty: float | None
    residual: float | None
    determined: bool
    explained: bool
    divided: bool = False


@dataclass(frozen=True)
class Explanation:
    """Where a merge comes from, or that it does not come from the candidates.

    `method` is ``"copy"``, ``"weighted_sum"``, ``"add_difference"``, ``"triple_sum"``, ``"linear"`` (more
    parents), or None when no few of the candidates explain the U-Net; then `parents` is empty, and the blocks
    tell of the two candidates that come nearest. `base` is the parent (or nearest candidate) that weight 0
    stands for. `exact`: merging the parents again with these weights gives the file, within two steps of its
    dtype everywhere. `preset` is a preset's name, or ``NAME@RATIO`` for one that was scaled. `tensors` is
    empty unless asked for. `left_out` maps candidates that could not be used to one line about why, and
    `screened` are those that were too many, and too unlike the merge, to be looked at further. `differences`
    maps the others to ‖candidate − merge‖ / ‖merge‖ over the U-Net or transformer, where that was measured.
    """

    merge: str
    family: str
    candidates: tuple[str, ...]
    base: str
    method: str | None
    exact: bool
    preset: str | None
    parents: tuple[str, ...]
    blocks: Mapping[str, BlockOrigin]
    components: Mapping[str, BlockOrigin]
    verdict: str
    tensors: Mapping[str, BlockOrigin] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    screened: tuple[str, ...] = ()
    differences: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON, with the keys of `docs/json.md`: `tensors` only
        where they were asked for.
        """
        fields = asdict(self)
        if not self.tensors:
            del fields["tensors"]
        return fields
