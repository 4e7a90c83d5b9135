"""What a merge found and did, as plain data; drawing it is `rendering`'s job."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Counts:
    """How many of the output's tensors were computed, how many taken from which model, how many left out, and
    all written.

    Those written are the output's own; the others are counted as LDM has them. A tensor that is only cast to
    another dtype counts as taken from its model.
    """

    computed: int = 0
    from_a: int = 0
    from_b: int = 0
    from_c: int = 0
    from_others: int = 0
    from_vae: int = 0
    dropped: int = 0
    written: int = 0


@dataclass(frozen=True)
class MergeResult:
    """What a merge did, or with `dry_run` what it would do.

    - `output`: the file or folder.
    - `family`, `variant`, `naming`: what kind of model it is.
    - `method`, `preset`: their names. `preset` is None where none was given.
    - `weights`, `weights_beta`: {block: weight}. None stands for a block that was left out of the merge.
    - `models`: the models' names, A first.
    - `tensors`: how many were `computed`, taken `from_a`, `from_b`, `from_c`, `from_others` and `from_vae`,
      `dropped`, and `written`.
    - `bytes`: the size of the output. `seconds`: how long it took.
    - `notes`: sentences for the user about what was decided for them.
    - `runs`: in how many stretches of bytes it was written.
    - `recipe`: what was merged and how, as the output's metadata has it.
    - `loras`: for each LoRA its name, kind, strength, blocks, modules and `change`.
    - `change`: {block: ‖ΔW‖ / ‖W‖} of all LoRAs together. None stands for what is not known.
    - `stages`: recipes that were merged on the way.
    - `dry_run`: whether nothing was written.
    """

    output: Path
    family: str
    variant: str
    naming: str
    method: str
    preset: str | None
    weights: Mapping[str, float | None]
    weights_beta: Mapping[str, float | None] | None
    models: tuple[str, ...]
    tensors: Counts
    bytes: int
    seconds: float
    notes: tuple[str, ...]
    runs: int
    recipe: Mapping[str, Any]
    dry_run: bool = False
    loras: tuple[Mapping[str, Any], ...] = ()
    change: Mapping[str, float | None] = field(default_factory=dict)
    stages: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        return {**asdict(self), "output": str(self.output)}
