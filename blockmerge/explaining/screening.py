"""Which of very many candidates are looked at further: those most like the merge, and those that explain most
of what these leave. A few tensors of each tell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blockmerge.anatomy import OUTSIDE
from blockmerge.checkpoints import Model
from blockmerge.errors import NonFiniteError
from blockmerge.explaining.candidates import Candidates
from blockmerge.explaining.chunks import MergeStream
from blockmerge.explaining.compared import ComparedTensors
from blockmerge.explaining.gram import gram_matrices, nonfinite_candidates
from blockmerge.explaining.groups import GroupSums
from blockmerge.streaming import Progress

MOST = 24
"""Of so many candidates, all combinations of three can be tried."""

_EXPLAINING = 8  # of those that are kept, so many for what they explain; the others for being like the merge
_ENOUGH = 1 << 16  # elements of a block's tensor that tell how alike models are


def screened(
    merged: Model, candidates: Candidates, threads: int | None, progress: Progress | None
) -> Candidates:
    """Return the candidates, or MOST of them where there are more.

    As many new ones at a time are held against those that were kept so far. Raises NonFiniteError when the
    merge holds NaN or infinity, or all candidates do.
    """
    if len(candidates.names) <= MOST:
        return candidates
    kept: list[int] = []
    faults: dict[int, str] = {}
    for start in range(0, len(candidates.names), MOST):
        places = [*kept, *range(start, min(start + MOST, len(candidates.names)))]
        while places:
            models = [candidates.models[place] for place in places]
            found, wrong = _most_telling(merged, models, threads, progress)
            faults |= {places[n]: why for n, why in wrong.items()}
            kept = [places[n] for n in found]
            if not wrong:
                break
            # NaN in one spoils the figures of all.
            places = [place for n, place in enumerate(places) if n not in wrong]
    sound = [place for place in range(len(candidates.names)) if place not in faults]
    if not sound:
        raise NonFiniteError("; ".join(faults.values()))
    return candidates.without(faults).screen([n for n, place in enumerate(sound) if place in kept])


def _most_telling(
    merged: Model, models: Sequence[Model], threads: int | None, progress: Progress | None
) -> tuple[list[int], Mapping[int, str]]:
    """Return the places of MOST models at most; or none, and what is wrong with those that hold NaN or
    infinity.
    """
    sample = _sample(ComparedTensors.of(merged, models), merged)
    gram = gram_matrices(MergeStream(merged, models, threads, progress), sample)
    if faults := nonfinite_candidates(merged, models, sample, gram):
        return [], faults
    groups = GroupSums.of(_unet_blocks(sample, merged), sample, gram)
    return _chosen(groups, groups.complete_candidates), {}


def _sample(compared: ComparedTensors, merged: Model) -> ComparedTensors:
    """One tensor of each block of the U-Net: the smallest of those that are large enough, or the largest."""

    def fitness(place: int) -> tuple[bool, int]:
        elements = merged.tensors[compared.names[place]].elements
        return (True, -elements) if elements >= _ENOUGH else (False, elements)

    blocks = _unet_blocks(compared, merged).values()
    return compared.select(sorted(max(places, key=fitness) for places in blocks if places))


def _unet_blocks(compared: ComparedTensors, merged: Model) -> dict[str, list[int]]:
    groups = compared.by_block(merged.anatomy.family)
    return {block: places for block, places in groups.items() if block != OUTSIDE}


def _chosen(groups: GroupSums, able: Sequence[int]) -> list[int]:
    """The places of those candidates that explain most, one after the other, then of those nearest."""

    def left_by(candidates: tuple[int, ...]) -> float:
        return float((groups.fit(candidates).error ** 2).sum())

    chosen: list[int] = []
    while len(chosen) < min(_EXPLAINING, len(able)):
        rest = [n for n in able if n not in chosen]
        chosen.append(min(rest, key=lambda n: left_by((*chosen, n))))
    nearest = sorted((n for n in able if n not in chosen), key=lambda n: left_by((n,)))
    return [*chosen, *nearest][:MOST]
