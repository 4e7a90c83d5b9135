"""What a merge says of itself: its own recipe, verified before anything is fitted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockmerge.checkpoints import Checkpoint, Model, identity_of
from blockmerge.errors import BlockmergeError, RecipeError, listing, shown
from blockmerge.explaining.candidates import Candidates
from blockmerge.explaining.explanation import BlockOrigin, Explanation
from blockmerge.merging import Recorded, Searched, Verification, preset_of, verified
from blockmerge.streaming import Progress

_TREE = "blockmerge recipe --tree draws it"
_MOST_NAMED = 12


@dataclass(frozen=True)
class OwnRecipe:
    """What became of a merge's own recipe: `verification` where it could be held against the file, and a
    `note` where it is not what made it, or could not be. `others` are the candidates that are no models.
    """

    verification: Verification | None = None
    note: str | None = None
    others: Mapping[str, Checkpoint] = field(default_factory=dict)

    @property
    def is_true(self) -> bool:
        """Whether it makes the file, to the last bit."""
        return self.verification is not None and self.verification.same


def own_recipe(
    merged: Model, candidates: Candidates, threads: int | None, progress: Progress | None
) -> OwnRecipe:
    """Verify the recipe in a merge's metadata, where its models are among the candidates."""
    try:
        recorded = Recorded.of(merged.source)
    except BlockmergeError:
        return OwnRecipe()
    others = candidates.files_of_others() if any(_added(recorded.run)) else {}
    sources = [*(model.source for model in candidates.models), *others.values()]
    among = _Among(sources, recorded.folder, models_of(recorded.run))
    try:
        found = verified(merged.source, recorded, among, threads=threads, progress=progress)
    except BlockmergeError as error:
        return OwnRecipe(note=f"its own recipe could not be verified: {error}; {_TREE}")
    if found.same:
        return OwnRecipe(found, others=others)
    return OwnRecipe(found, f"warning: its own recipe does not give this file: {found.said}")


@dataclass(frozen=True)
class _Among:
    """Finds what was recorded among opened checkpoints."""

    checkpoints: Sequence[Checkpoint]
    folder: str
    models: frozenset[str]

    def find(self, wanted: Sequence[Mapping[str, Any]]) -> dict[str, Checkpoint]:
        """Return {identity: the checkpoint that has it}. What is no model, as a LoRA or a VAE, is looked for
        beside the merge.

        Raises RecipeError for those that are not there.
        """
        there = {
            identity.digest: one for one in self.checkpoints if (identity := identity_of(one)) is not None
        }
        missing = [one for one in wanted if one["identity"] not in there]
        if lost := [str(one["name"]) for one in missing if one["identity"] in self.models]:
            raise RecipeError(f"it names {listing(lost)}, not among the candidates")
        if missing:
            there |= Searched(beside=[self.folder]).find(missing)
        return {one["identity"]: there[one["identity"]] for one in wanted}


def models_of(run: Mapping[str, Any]) -> frozenset[str]:
    """The identities of the models that a recipe and its stages merge."""
    files = [one.get("files") or {} for one in (run, *(run.get("stages") or {}).values())]
    return frozenset(model["identity"] for one in files for model in one.get("models") or () if model)


def added_by(own: OwnRecipe) -> dict[str, str]:
    """What a true recipe adds of the candidates that are no models: {name: what it is to the merge}."""
    assert own.verification is not None
    names = {identity.digest: name for name, one in own.others.items() if (identity := identity_of(one))}
    found: dict[str, list[str]] = {}
    for file, what in _added(own.verification.recipe):
        if file["identity"] in names:
            found.setdefault(names[file["identity"]], []).append(f"the {what}")
    return {name: "; ".join(dict.fromkeys(each)) for name, each in found.items()}


def _added(run: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The files that a recipe and its stages add to models, each with what it is."""
    for one in (run, *(run.get("stages") or {}).values()):
        files = one.get("files") or {}
        for lora, file in zip(one.get("loras") or (), files.get("loras") or (), strict=False):
            by_block = "" if lora.get("blocks") is None else " by block"
            if file:
                yield file, f"LoRA, strength {lora.get('strength', 1.0):g}{by_block}"
        if files.get("vae"):
            yield files["vae"], "VAE"


def explained(merged: Model, candidates: Candidates, own: OwnRecipe) -> Explanation:
    """The explanation that a true recipe gives."""
    assert own.verification is not None
    run, is_flat = own.verification.recipe, not own.verification.recipe.get("stages")
    names = dict(zip((_place(model.source) for model in candidates.models), candidates.names, strict=True))
    parents = [names[_place(one)] for one in own.verification.sources if _place(one) in names]
    tree = "" if is_flat else "; blockmerge recipe --tree draws them"
    return Explanation(
        merge=merged.name,
        family=merged.anatomy.family.name,
        candidates=candidates.names,
        base=parents[0],
        method=str(run.get("method")),
        exact=True,
        preset=preset_of(run),
        parents=tuple(parents),
        blocks=_blocks(run, parents) if is_flat and _is_plain(run, parents) else {},
        components={},
        verdict=(
            f"{shown(merged.name)} is {_made(run, parents)}. Its own recipe says so, and merging again gives "
            f"the same file, to the last bit{tree}."
        ),
        notes=tuple(note for model in (merged, *candidates.models) for note in model.notes),
        left_out=candidates.left_out,
        added=added_by(own),
    )


def said_by_recipe(model: Model) -> str | None:
    """What a model's own recipe says that it is, unverified; None where it has none."""
    try:
        run = Recorded.of(model.source).run
    except BlockmergeError:
        return None
    stages = run.get("stages") or {}
    parents = dict.fromkeys(
        name for one in (run, *stages.values()) for name in one["models"] if name not in stages
    )
    return _made(run, list(parents)) if parents else None


def _made(run: Mapping[str, Any], parents: Sequence[str]) -> str:
    """How something was made, by a recipe, of `parents`."""
    preset, stages = preset_of(run), run.get("stages") or {}
    made = f"made in {len(stages) + 1} merges" if stages else f"made by {shown(str(run.get('method')))}"
    parts = [f"the preset {shown(preset)}"] if preset and not stages else []
    parts += [f"{shown(str(file['name']))} ({what})" for file, what in _added(run)]
    by = f" with {' and '.join(dict.fromkeys(parts))}" if parts else ""
    *first, last = map(shown, parents)
    many = listing(parents, _MOST_NAMED)
    of = many if len(first) >= _MOST_NAMED else f"{', '.join(first)} and {last}" if first else last
    return f"{made} of {of}{by}"


def _place(checkpoint: Checkpoint) -> str:
    """Where a checkpoint lies: verifying has opened it anew."""
    return os.path.realpath(checkpoint.path or "")


def _is_plain(run: Mapping[str, Any], parents: Sequence[str]) -> bool:
    """Whether the weights of a recipe say how much of each parent is in a block."""
    is_changed = run.get("rules") or run.get("loras") or run.get("adjust") or run.get("clip")
    is_said = run.get("method") in ("weighted_sum", "add_difference")
    return is_said and not is_changed and len(parents) == len(run["models"])


def _blocks(run: Mapping[str, Any], parents: Sequence[str]) -> dict[str, BlockOrigin]:
    """How much each block took of every parent but A, as far as the method says it by weights."""
    others = parents[1:]
    alpha, beta = run.get("weights") or {}, run.get("weights_beta") or {}
    found = {}
    for block in alpha:
        first, second = _number(alpha[block]), _number(beta.get(block)) if beta else None
        if run.get("method") == "add_difference" and first is not None:
            second = -first
        weights = dict(zip(others, [first, second, *[None] * len(others)], strict=False))
        found[block] = BlockOrigin(weights, 0.0, 0.0, determined=True, explained=True)
    return found


def _number(weight: Any) -> float | None:
    return float(weight) if isinstance(weight, (int, float)) else 0.0  # what is skipped takes nothing
