"""`explain`: where a merge comes from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from blockmerge.checkpoints import CheckpointLike, Model
from blockmerge.comparing.sources import is_same_file, open_model, open_sources
from blockmerge.errors import IncompatibleModelsError, NonFiniteError, RecipeError, counted, listing, shown
from blockmerge.explaining.explanation import BlockOrigin, Explanation
from blockmerge.explaining.parents import Parents, find_parents, nearest_pair
from blockmerge.explaining.units import (
    Compared,
    Sight,
    Told,
    ToldUnit,
    Units,
    group_by_block,
    group_by_component,
    tell,
)
from blockmerge.explaining.verdict import write_verdict
from blockmerge.streaming import Progress

if TYPE_CHECKING:
    from blockmerge.explaining.gram import Gram

_MOST_CANDIDATES = 24


def explain(
    merge: CheckpointLike,
    candidates: CheckpointLike | Iterable[CheckpointLike],
    *,
    tensors: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Explanation:
    """Say from which of the `candidates` a checkpoint was merged, with which weights, or that it was not.

    >>> origin = blockmerge.explain("merged.ckpt", ["a.safetensors", "b.safetensors"])  # doctest: +SKIP

    Every block's weights are found by least squares over all its values: M = Σ cᵢXᵢ with Σ cᵢ = 1, which
    covers weighted sums, add difference and averages, whichever candidate is the base. The fewest parents
    that leave nothing but rounding are taken; then the merge is made again in memory, with these weights and
    with rounder ones and presets near them, and held against the file. With `tensors` every tensor is told as
    well. `candidates` are what `similarity` takes for references. Reads the merge and the candidates twice;
    `progress(done, total)` is told the bytes of each pass.

    Candidates that cannot be used are named in `left_out`. Raises what is wrong with the merge itself,
    RecipeError without any candidate, IncompatibleModelsError or NonFiniteError when none can be compared.
    """
    from blockmerge.explaining.gram import Pass
    from blockmerge.explaining.merging_again import merge_again

    merged = open_model(merge, "merge")
    usable, left_out = _usable(merged, candidates)
    names = tuple(name for name, _ in usable)
    models = [merged, *(model for _, model in usable)]
    compared = Compared.of(merged, models[1:])
    work = Pass(models, compared.names, compared.holders)
    gram = work.gram(threads, progress)
    if bad := _nonfinite(compared, models, gram):
        if 0 in bad or len(bad) == len(usable):
            raise NonFiniteError("; ".join(bad.values()))
        # They are left out like all others that cannot be used, and it is begun anew without them.
        rest = [models[number].source for number in range(1, len(models)) if number not in bad]
        found = explain(merged.source, rest, tensors=tensors, threads=threads, progress=progress)
        return replace(
            found, left_out={**left_out, **{names[number - 1]: why for number, why in bad.items()}}
        )
    family = merged.anatomy.family

    def units(groups: dict[str, list[int]]) -> Units:
        return Units.of(groups, compared, gram)

    each = {name: [number] for number, name in enumerate(compared.names)}
    sight = Sight(
        blocks=units(group_by_block(compared, family.name, family.blocks)),
        components=units(group_by_component(compared)),
        tensors=units(each),
    )
    if not any(block != "BASE" for block in sight.blocks.names):
        raise IncompatibleModelsError(
            f"no candidate has U-Net tensors of the same shapes as {shown(merged.name)}"
        )
    parents, told, agrees = find_parents(sight, family.name), None, False
    while parents is not None:
        told, agrees = merge_again(work, tell(sight, parents), sight.blocks.names, threads, progress)
        if agrees or parents.method != "copy":
            break
        # No copy after all: what is left is as small as rounding, but it is none. Several parents may leave
        # less.
        parents, told = find_parents(sight, family.name, least=2), None
    told = told or tell(sight, nearest_pair(sight.blocks))
    blocks, components = (
        {name: _origin(unit, told.parents, names) for name, unit in part.items()}
        for part in (told.blocks, told.components)
    )
    found = Explanation(
        merge=merged.name,
        family=family.name,
        candidates=names,
        base=names[told.parents.base],
        method=told.parents.method if parents is not None else None,
        exact=agrees and not compared.skipped,
        preset=told.preset,
        parents=tuple(names[n] for n in told.parents.subset) if parents is not None else (),
        blocks=blocks,
        components=components,
        verdict="",
        tensors={name: _origin(unit, told.parents, names) for name, unit in told.tensors.items()}
        if tensors
        else {},
        notes=tuple(_notes(merged, compared, sight, told, names)),
        left_out=left_out,
    )
    return replace(found, verdict=write_verdict(found, agrees=agrees, by_tensor=told.parents.by_tensor))


def _usable(
    merged: Model, candidates: CheckpointLike | Iterable[CheckpointLike]
) -> tuple[list[tuple[str, Model]], dict[str, str]]:
    """Return the candidates that can be compared with the merge, by name, and why the others cannot."""
    left_out: dict[str, str] = {}
    usable: list[tuple[str, Model]] = []
    for source in open_sources(candidates):
        if source.model is None:
            left_out[source.name] = str(source.error)
        elif source.model.anatomy.family != merged.anatomy.family:
            left_out[source.name] = f"{shown(source.name)} is {source.model.anatomy.family.title}"
        elif not is_same_file(source.model, merged):  # as it is when a whole folder is named
            usable.append((source.name, source.model))
    if not usable:
        more = f" and {len(left_out) - 2} more" if len(left_out) > 2 else ""
        why = (
            ": " + "; ".join([*left_out.values()][:2]) + more
            if left_out
            else ": the only one is that file itself"
        )
        raise IncompatibleModelsError(f"no candidate can be compared with {shown(merged.name)}{why}")
    if len(usable) > _MOST_CANDIDATES:
        raise RecipeError(
            f"{len(usable)} candidates are too many to try all combinations: at most {_MOST_CANDIDATES}"
        )
    return usable, left_out


def _origin(unit: ToldUnit, parents: Parents, names: Sequence[str]) -> BlockOrigin:
    found = dict(zip(unit.subset, unit.coefficients.tolist(), strict=True))
    return BlockOrigin(
        weights={
            names[n]: (found.get(n) if unit.determined else None) for n in parents.subset if n != parents.base
        },
        uncertainty=unit.uncertainty if np.isfinite(unit.uncertainty) else None,
        residual=unit.residual,
        determined=unit.determined,
        explained=unit.explained,
    )


def _nonfinite(compared: Compared, models: Sequence[Model], gram: Gram) -> dict[int, str]:
    """Return {model: one line about its NaN or infinity} for the merge (0) or, when that is sound, for
    candidates.
    """
    from blockmerge.comparing.sums import NOT_FINITE

    bad: dict[int, list[str]] = {}
    for number, name in enumerate(compared.names):
        if not gram.finite[number]:
            bad.setdefault(0, []).append(name)
            continue
        for n in np.flatnonzero(~np.isfinite(np.diagonal(gram.plain[number]))):
            bad.setdefault(int(n) + 1, []).append(name)
    return {n: f"{shown(models[n].name)} {NOT_FINITE} in {listing(found)}" for n, found in bad.items()}


def _notes(
    merged: Model, compared: Compared, sight: Sight, told: Told, names: Sequence[str]
) -> Iterable[str]:
    if compared.skipped:
        skipped = f"{counted(len(compared.skipped), 'tensor')} that not every candidate has"
        yield f"not looked at: {skipped} ({listing(compared.skipped)})"
    for name, unit in told.components.items():
        if unit.explained or all(told.tensors[compared.names[member]].explained for member in unit.members):
            continue
        title = {"text_encoder": "text encoder", "text_encoder_2": "second text encoder", "vae": "VAE"}.get(
            name, name
        )
        alone = [n for n in range(len(names)) if sight.is_copy(name, n)]
        yield f"the {title} is {'that of ' + shown(names[alone[0]]) if alone else 'not from these'}"
