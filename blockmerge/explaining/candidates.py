"""Which candidates can be held against a merge, and why the others cannot or need not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from blockmerge.checkpoints import Checkpoint, CheckpointLike, Model, Opening, open_checkpoint
from blockmerge.comparing.sources import is_same_file, open_sources
from blockmerge.errors import BlockmergeError, IncompatibleModelsError, shown


@dataclass(frozen=True)
class Candidates:
    """Models that a merge may come from, with unique names. `left_out` maps other names to why; `screened`
    are those that are too unlike the merge to be looked at further. `others` are those left out because they
    are not models, as LoRAs are not: {name: what was given}.
    """

    names: tuple[str, ...]
    models: tuple[Model, ...]
    left_out: Mapping[str, str]
    screened: tuple[str, ...] = ()
    others: Mapping[str, CheckpointLike] = field(default_factory=dict)

    @classmethod
    def open(
        cls, candidates: CheckpointLike | Iterable[CheckpointLike], merge: Model, opening: Opening
    ) -> Candidates:
        """Open all that `candidates` names, as the merge was.

        Raises IncompatibleModelsError when none can be compared with the merge, and RecipeError when none is
        named.
        """
        left_out: dict[str, str] = {}
        usable: dict[str, Model] = {}
        sources = open_sources(candidates, opening)
        opening.check([merge, *(source.model for source in sources if source.model is not None)])
        for source in sources:
            if source.model is None:
                left_out[source.name] = str(source.error)
            elif not source.model.anatomy.family.is_like(merge.anatomy.family):
                left_out[source.name] = f"{shown(source.name)} is {source.model.anatomy.family.title}"
            elif not is_same_file(source.model, merge):  # as it is when a whole folder is named
                usable[source.name] = source.model
        if not usable:
            raise IncompatibleModelsError(
                f"no candidate can be compared with {shown(merge.name)}{_why_none(left_out)}"
            )
        others = {source.name: source.given for source in sources if source.given is not None}
        return cls(tuple(usable), tuple(usable.values()), left_out, others=others)

    def files_of_others(self) -> dict[str, Checkpoint]:
        """Open `others` as far as they are files that can be read."""
        found: dict[str, Checkpoint] = {}
        for name, given in self.others.items():
            with suppress(BlockmergeError):
                found[name] = open_checkpoint(given)
        return found

    def with_used(self, names: Iterable[str]) -> Candidates:
        """Leave out all but `names`, which turned out to be of use."""
        kept = set(names)
        return replace(self, left_out={name: why for name, why in self.left_out.items() if name not in kept})

    def without(self, faults: Mapping[int, str]) -> Candidates:
        """Leave out more: `faults` maps their places to why."""
        kept = self._only([place for place in range(len(self.names)) if place not in faults])
        why = {self.names[place]: why for place, why in faults.items()}
        return replace(kept, left_out={**self.left_out, **why})

    def screen(self, kept: Sequence[int]) -> Candidates:
        """Keep those at some places, and put the others aside."""
        aside = [name for place, name in enumerate(self.names) if place not in kept]
        return replace(self._only(sorted(kept)), screened=(*self.screened, *aside))

    def _only(self, kept: Sequence[int]) -> Candidates:
        return replace(
            self,
            names=tuple(self.names[place] for place in kept),
            models=tuple(self.models[place] for place in kept),
        )


def _why_none(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ": the only one is that file itself"
    more = f" and {len(left_out) - 2} more" if len(left_out) > 2 else ""
    return ": " + "; ".join([*left_out.values()][:2]) + more
