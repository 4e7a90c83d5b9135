"""Which candidates can be held against a merge, and why the others cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blockmerge.checkpoints import CheckpointLike, Model, Opening
from blockmerge.comparing.sources import is_same_file, open_sources
from blockmerge.errors import IncompatibleModelsError, RecipeError, shown

_MOST_CANDIDATES = 24


@dataclass(frozen=True)
class Candidates:
    """Models that a merge may come from, with unique names. `left_out` maps other names to why."""

    names: tuple[str, ...]
    models: tuple[Model, ...]
    left_out: Mapping[str, str]

    @classmethod
    def open(
        cls, candidates: CheckpointLike | Iterable[CheckpointLike], merge: Model, opening: Opening
    ) -> Candidates:
        """Open all that `candidates` names, as the merge was.

        Raises IncompatibleModelsError when none can be compared with the merge, and RecipeError when there
        are too many or none is named.
        """
        left_out: dict[str, str] = {}
        usable: dict[str, Model] = {}
        sources = open_sources(candidates, opening)
        opening.check([merge, *(source.model for source in sources if source.model is not None)])
        for source in sources:
            if source.model is None:
                left_out[source.name] = str(source.error)
            elif source.model.anatomy.family != merge.anatomy.family:
                left_out[source.name] = f"{shown(source.name)} is {source.model.anatomy.family.title}"
            elif not is_same_file(source.model, merge):  # as it is when a whole folder is named
                usable[source.name] = source.model
        if not usable:
            raise IncompatibleModelsError(
                f"no candidate can be compared with {shown(merge.name)}{_why_none(left_out)}"
            )
        if len(usable) > _MOST_CANDIDATES:
            raise RecipeError(
                f"{len(usable)} candidates are too many to try all combinations: at most {_MOST_CANDIDATES}"
            )
        return cls(tuple(usable), tuple(usable.values()), left_out)

    def without(self, faults: Mapping[int, str]) -> Candidates:
        """Leave out more: `faults` maps their places to why."""
        kept = [place for place in range(len(self.names)) if place not in faults]
        return Candidates(
            tuple(self.names[place] for place in kept),
            tuple(self.models[place] for place in kept),
            {**self.left_out, **{self.names[place]: why for place, why in faults.items()}},
        )


def _why_none(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ": the only one is that file itself"
    more = f" and {len(left_out) - 2} more" if len(left_out) > 2 else ""
    return ": " + "; ".join([*left_out.values()][:2]) + more
