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
    """A finished merge, or with `dry_run` the plan for one.

    `weights` is what each block took (None: left out of the merge); `bytes` is the output's size; `notes` are
    texts for the user about everything that was decided for them. `preset` is the preset's name, if one was
    asked for. `recipe` decides the output, given the models, as its metadata has it; models, a VAE file and
    configs are there by name, without folders. `loras` say of each LoRA its name, kind, strength, blocks,
    how many of its modules met a tensor, and as ``"change"`` how large what it adds is in each block that it
    changes: ‖ΔW‖/‖W‖, ‖W‖ being that of the weights that any LoRA changes there. `change` is that of all
    together. None stands for what is not known, as where one LoRA looks at weights that another has changed.
    `stages` are what the recipe merges on the way, each as `recipe` has it.
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
        """Return the result as plain data, ready for JSON, with the keys of `docs/json.md`."""
        return {**asdict(self), "output": str(self.output)}
