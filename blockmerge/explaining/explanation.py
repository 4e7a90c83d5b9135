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
    """Where a model comes from, or that it does not come from the candidates.

    - `verdict`: all of it in a few sentences.
    - `method`: ``"copy"``, ``"weighted_sum"``, ``"add_difference"``, ``"triple_sum"``, or ``"linear"`` for
      more parents. None where no few candidates explain it.
    - `parents`: the candidates that it was merged from. Empty where `method` is None.
    - `base`: the parent that weight 0 stands for, or the nearest candidate.
    - `exact`: whether the parents, merged again, give the file within two steps of its dtype.
    - `preset`: a preset's name, or ``NAME@RATIO`` for one that was scaled.
    - `blocks`, `components`, `tensors`: {name: an entry}. An entry has `weights` ({parent: number}),
      `uncertainty`, `residual`, `determined`, `explained` and `divided`. `tensors` is empty unless asked for.
    - `added`: {candidate: one line about what it is to the merge}. These are no models, as a LoRA that its
      own recipe puts in.
    - `left_out`: {candidate: one line about why it could not be used}.
    - `screened`: candidates that were too many, and too unlike the model, to be looked at further.
    - `differences`: {candidate: ‖candidate − model‖ / ‖model‖ over the U-Net or transformer}, where measured.
    - `merge`, `family`, `candidates`, `notes`: names, and sentences for the user.
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
    added: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`, and
        `tensors` is there only where it was asked for.
        """
        fields = asdict(self)
        if not self.tensors:
            del fields["tensors"]
        return fields
