"""What making a LoRA found and did, as plain data; drawing it is `rendering`'s job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoraResult:
    """A LoRA that was written.

    - `output`, `family`, `dtype`, `bytes`, `seconds`: as for `MergeResult`.
    - `kind`: ``"lora"``, ``"locon"`` (with convolutions larger than 1×1), or both with a ``+``.
    - `rank`: the highest rank of a module. `ranks`: {rank: modules}. `modules`: how many there are.
    - `lost`: {block: the share of the energy that did not fit}. Energy is the squared Frobenius norm.
    - `held`: of an extracted LoRA, {block: the share of the difference that it holds}. Else None.
    - `notes`: sentences for the user.
    """

    output: Path
    family: str
    kind: str
    rank: int
    ranks: Mapping[int, int]
    modules: int
    lost: Mapping[str, float]
    dtype: str
    bytes: int
    seconds: float
    notes: tuple[str, ...]
    held: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        found = {**asdict(self), "output": str(self.output)}
        if self.held is None:
            del found["held"]
        return found


@dataclass(frozen=True)
class LoraConversion:
    """A LoRA that was written in another form.

    - `form`: ``"kohya"`` or ``"diffusers"``.
    - `modules`: how many it has.
    - `output`, `family`, `bytes`, `seconds`, `notes`: as for `MergeResult`.
    """

    output: Path
    form: str
    family: str
    modules: int
    bytes: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        return {**asdict(self), "output": str(self.output)}
