"""`explain`: where a merge comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from blockmerge.anatomy import TITLES, Family, component_of
from blockmerge.checkpoints import CheckpointLike, Model
from blockmerge.comparing.sources import opening_to_compare
from blockmerge.errors import IncompatibleModelsError, NonFiniteError, counted, listing, shown
from blockmerge.explaining.candidates import Candidates
from blockmerge.explaining.compared import ComparedTensors
from blockmerge.explaining.explanation import BlockOrigin, Explanation
from blockmerge.explaining.fits import GroupFit, MergeFit, fit_parents
from blockmerge.explaining.groups import MergeSums
from blockmerge.explaining.own_recipe import added_by, explained, own_recipe, said_by_recipe
from blockmerge.explaining.parents import find_parents, nearest_pair
from blockmerge.explaining.verdict import write_verdict
from blockmerge.streaming import Progress

if TYPE_CHECKING:
    from blockmerge.explaining.chunks import MergeStream


def explain(
    merge: CheckpointLike,
    candidates: CheckpointLike | Iterable[CheckpointLike],
    *,
    tensors: bool = False,
    variant: str | None = None,
    ema: str = "drop",
    threads: int | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Find out which of several candidates a model was merged from, and with which weights.

    >>> origin = blockmerge.explain("merged.ckpt", ["a.safetensors", "b.safetensors"])  # doctest: +SKIP
    >>> origin.method, origin.preset, origin.parents  # doctest: +SKIP
    ('weighted_sum', 'high_res', ('a.safetensors', 'b.safetensors'))

    - `merge`: a path, an opened checkpoint, a state dict or a recipe.
    - `candidates`: what `similarity` takes for references.
    - `tensors`: list every tensor, too.
    - `variant`, `ema`, `threads`: as for `merge`.
    - `progress`: called as ``progress(done, total)``, in the bytes of each pass.

    Each block's weights are found by least squares over all its values: M = Σ cᵢXᵢ with Σ cᵢ = 1. This covers
    weighted sums, add difference and averages. The fewest parents that leave nothing but rounding are taken.

    Then the merge is made again in memory and compared with the file, with these weights and with rounder
    ones and presets near them.

    If the merge carries its own recipe and the candidates include all its models, that recipe is tried first.
    Where it gives the same bits, nothing is fitted.

    Of more than 24 candidates, those that look most useful are examined. A note names the others.

    Raises an error where the merge itself cannot be used, and `RecipeError` without any candidate. Raises
    `IncompatibleModelsError` or `NonFiniteError` where no candidate can be compared.
    """
    opening = opening_to_compare(variant, ema)
    merged = opening.model(merge, "merge")
    from blockmerge.explaining.screening import screened

    opened = Candidates.open(candidates, merged, opening)
    own = own_recipe(merged, opened, threads, progress)
    added = added_by(own) if own.is_true else {}
    opened = opened.with_used(added)
    by_recipe = explained(merged, opened, own) if own.is_true else None
    if by_recipe is not None and not tensors:
        return by_recipe
    named = screened(merged, opened, threads, progress)
    evidence = _gather(merged, named, threads, progress)
    found = _explanation(merged, evidence, _find_origin(evidence, merged.anatomy.family), tensors)
    if found.method == "copy" and found.exact:
        base = evidence.candidates.models[evidence.candidates.names.index(found.base)]
        if (said := said_by_recipe(base)) is not None:
            verdict = f"{found.verdict} By its own recipe, {shown(found.base)} is {said}."
            found = replace(found, verdict=verdict)
    note = own.note if by_recipe is None else by_recipe.verdict
    return replace(found, notes=found.notes if note is None else (note, *found.notes), added=added)


@dataclass(frozen=True)
class _Evidence:
    """What the first pass tells of a merge, and what the second needs."""

    candidates: Candidates
    compared: ComparedTensors
    sums: MergeSums
    stream: MergeStream
    differences: Mapping[str, float]


@dataclass(frozen=True)
class _Origin:
    """How candidates explain a merge: its parents where `is_merge`, else the two that come nearest.

    `agrees`: merged again, all that was compared is the same.
    """

    fit: MergeFit
    is_merge: bool
    agrees: bool


def _gather(
    merged: Model, candidates: Candidates, threads: int | None, progress: Progress | None
) -> _Evidence:
    """Read everything once. Where candidates hold NaN or infinity, begin anew without them."""
    from blockmerge.explaining.chunks import MergeStream
    from blockmerge.explaining.gram import gram_matrices, nonfinite_candidates

    while True:
        compared = ComparedTensors.of(merged, candidates.models)
        stream = MergeStream(merged, candidates.models, threads, progress)
        gram = gram_matrices(stream, compared)
        faults = nonfinite_candidates(merged, candidates.models, compared, gram)
        if not faults:
            break
        if len(faults) == len(candidates.models):
            raise NonFiniteError("; ".join(faults.values()))
        candidates = candidates.without(faults)
    sums = MergeSums.of(compared, gram, merged.anatomy.family)
    if not sums.unet_blocks.names:
        raise IncompatibleModelsError(
            f"no candidate has {merged.anatomy.family.core_title} tensors of the same shapes as "
            f"{shown(merged.name)}"
        )
    unet = [place for place, name in enumerate(compared.names) if component_of(name) == "unet"]
    found = gram.relative_differences(unet).tolist()
    able = sums.unet_blocks.complete_candidates
    differences = {candidates.names[n]: found[n] for n in able if np.isfinite(found[n])}
    return _Evidence(candidates, compared, sums, stream, differences)


def _find_origin(evidence: _Evidence, family: Family) -> _Origin:
    """Find the parents of the U-Net, and merge them again to see whether they are."""
    from blockmerge.explaining.variants import refine

    sums = evidence.sums
    copy: _Origin | None = None
    for at_least in (1, 2):
        parents = find_parents(sums, family, at_least)
        if parents is None:
            break
        fit, wrong = refine(evidence.stream, evidence.compared, fit_parents(sums, parents))
        origin = _Origin(fit, is_merge=True, agrees=not wrong)
        if origin.agrees or parents.method != "copy":
            return origin if origin.agrees else copy or origin
        # Where only the rest is not the same, two or more may explain that, too. Else it is no copy after
        # all: what is left is as small as rounding, but it is none.
        copy = None if fit.unet.keys() & wrong else origin
    return copy or _Origin(fit_parents(sums, nearest_pair(sums)), is_merge=False, agrees=False)


def _explanation(merged: Model, evidence: _Evidence, origin: _Origin, tensors: bool) -> Explanation:
    names, fit = evidence.candidates.names, origin.fit

    def origins(groups: Mapping[str, GroupFit]) -> dict[str, BlockOrigin]:
        return {name: _block_origin(name, group, fit, names) for name, group in groups.items()}

    found = Explanation(
        merge=merged.name,
        family=merged.anatomy.family.name,
        candidates=names,
        base=names[fit.parents.base],
        method=fit.parents.method if origin.is_merge else None,
        exact=origin.agrees and not evidence.compared.skipped,
        preset=fit.preset,
        parents=tuple(names[n] for n in fit.parents.candidates) if origin.is_merge else (),
        blocks=origins(fit.blocks),
        components=origins(fit.components),
        verdict="",
        tensors=origins(fit.tensors) if tensors else {},
        notes=(
            *(note for model in (merged, *evidence.candidates.models) for note in model.notes),
            *_notes(evidence, fit),
        ),
        left_out=evidence.candidates.left_out,
        screened=evidence.candidates.screened,
        differences=evidence.differences,
    )
    by_tensor = any(one.divided for block, one in found.blocks.items() if block != "BASE")
    return replace(found, verdict=write_verdict(found, agrees=origin.agrees, by_tensor=by_tensor))


def _block_origin(name: str, group: GroupFit, fit: MergeFit, names: Sequence[str]) -> BlockOrigin:
    coefficients = (group.coefficients + 0.0).tolist()  # no -0.0
    weights = dict(zip(group.candidates, coefficients, strict=True))
    return BlockOrigin(
        weights={
            names[n]: weights.get(n) if group.determined else None
            for n in fit.parents.candidates
            if n != fit.parents.base
        },
        uncertainty=group.uncertainty if np.isfinite(group.uncertainty) else None,
        residual=group.residual,
        determined=group.determined,
        explained=group.explained,
        divided=name in fit.divided,
    )


def _notes(evidence: _Evidence, fit: MergeFit) -> Iterator[str]:
    names, compared = evidence.candidates.names, evidence.compared
    if aside := evidence.candidates.screened:
        count = len(names) + len(aside)
        yield (
            f"{count} candidates are too many to try all combinations: they were screened by similarity, and "
            f"{len(names)} looked at further, without {listing(aside)}"
        )
    if compared.skipped:
        skipped = f"{counted(len(compared.skipped), 'tensor')} that not every candidate has"
        yield f"not looked at: {skipped} ({listing(compared.skipped)})"
    within = [_called(name) for name in fit.components if name in fit.divided]
    within += [name for name in fit.blocks if name in fit.divided and name != "BASE"]
    if "BASE" in fit.divided and len(fit.parts_of("BASE")) > 1:
        yield "BASE has no single weight: its components have weights of their own"
    if within:
        yield f"weights change within {listing(within, limit=len(within))} (--tensors shows them)"
    for component, group in fit.components.items():
        each = (fit.tensors[compared.names[place]] for place in group.members)
        if group.explained or all(tensor.explained for tensor in each):
            continue
        alone = [name for n, name in enumerate(names) if evidence.sums.is_copy(component, n)]
        yield f"{_called(component)} is {'that of ' + shown(alone[0]) if alone else 'not from these'}"


def _called(component: str) -> str:
    return f"the {TITLES.get(component, 'rest')}"
