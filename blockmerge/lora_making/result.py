"""What making a LoRA found and did, as plain data; drawing it is `rendering`'s job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class LoraResult:
    """A finished LoRA.

    `kind` is ``"lora"`` or ``"locon"`` (with convolutions of more than one place), or both with a ``+``;
    `rank` the highest of its modules' and `ranks` {rank: modules}. `lost` is {block: share of the energy that
    did not fit}, of all that was asked to be in it; `held`, of an extracted one, {block: share of the
    difference that the LoRA holds}. Energy is the squared Frobenius norm. `notes` are texts for the user.
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
        """Return the result as plain data, ready for JSON, with the keys of `docs/json.md`."""
        found = {**asdict(self), "output": str(self.output)}
        if self.held is None:
            del found["held"]
        return found


@dataclass(frozen=True)
class LoraConversion:
    """A LoRA that has been written in another form, ``"kohya"`` or ``"diffusers"``.

    `modules` counts them, `notes` are texts for the user.
    """

    output: Path
    form: str
    family: str
    modules: int
    bytes: int
    seconds: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON, with the keys of `docs/json.md`."""
        return {**asdict(self), "output": str(self.output)}
