"""What was decided: which tensors the output has and what each is, whose they are, and what was found on the
way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from blockmerge.checkpoints import Checkpoint, Model
from blockmerge.expressions import Expression
from blockmerge.merging.planning.naming import OutputTensor
from blockmerge.merging.result import Counts
from blockmerge.weights import FamilyRules


@dataclass(frozen=True, eq=False)
class VaeFile:
    """A stand-alone VAE that is baked in, under LDM names."""

    source: Checkpoint
    tensors: Mapping[str, Expression]

    @property
    def vae_name(self) -> str:
        """What the file or folder is called."""
        return self.source.name

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """What it is read from."""
        return (self.source,)


@dataclass(frozen=True)
class Decision:
    """What becomes of the tensor that LDM calls `ldm`: it is `expression`, made from `inputs`.

    `donor` is whose tensor it is where nothing is computed but its dtype, else None.
    """

    ldm: str
    expression: Expression
    inputs: tuple[Expression, ...] = ()
    donor: Model | VaeFile | None = None


@dataclass
class Findings:
    """What was found on the way, for notes: `vae` is whose VAE is taken whole; the lists are of tensors'
    names.

    `blended` are the merged ones with their blocks, `clipped` and `adjusted` those that are so changed;
    `faults` are what the merge is refused for.
    """

    vae: Model | VaeFile | None
    rules: FamilyRules
    kept: list[str] = field(default_factory=list)
    kept_tables: list[str] = field(default_factory=list)
    kept_encoders: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    restored: list[str] = field(default_factory=list)
    homeless: list[str] = field(default_factory=list)
    homeless_unknown: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    lost_with_a_vae: list[str] = field(default_factory=list)
    pruned: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    only_in: dict[tuple[Model, ...], list[str]] = field(default_factory=dict)
    only_of_shape: dict[Model, list[str]] = field(default_factory=dict)
    blended: list[tuple[str, str]] = field(default_factory=list)
    clipped: list[str] = field(default_factory=list)
    adjusted: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Decisions:
    """All tensors of the output in A's order, then what only others have; what they are read from, the VAE's
    own file where there is one; counts and notes.
    """

    tensors: tuple[OutputTensor, ...]
    checkpoints: tuple[Checkpoint, ...]
    vae_file: Checkpoint | None
    counts: Counts
    notes: tuple[str, ...]
