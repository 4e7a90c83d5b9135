"""`extract_lora`: the difference of two models as a LoRA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from blockmerge.adapters import Whereabouts, written_names
from blockmerge.anatomy import (
    Family,
    component_of,
    is_leftover,
    is_position_ids,
    is_prediction_marker,
    is_schedule,
)
from blockmerge.checkpoints import CheckpointLike, Model, Opening, Readers, made, names_of, told_prediction
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import IncompatibleModelsError, RecipeError, counted, listing, shown
from blockmerge.expressions import Expression, simplify
from blockmerge.lora_making.making import Job, LoraTarget, shares
from blockmerge.lora_making.metadata import new_metadata, of_family
from blockmerge.lora_making.result import LoraResult
from blockmerge.lora_making.size import Size, check_rank
from blockmerge.lora_making.tasks import Difference, Layer, Made
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike

_USUAL = "F16"
_VAE, _UNET = "vae", "unet"
_VECTORS, _LOOKUPS, _KERNELS, _OTHERS, _OF_VAE = (
    "norms and biases",
    "embeddings",
    "convolutions of more than one place",
    "other matrices",
    "tensors of the VAE",
)
"""What tensors are called that no LoRA holds."""


def extract_lora(
    tuned: CheckpointLike,
    base: CheckpointLike,
    *,
    output: PathLike,
    rank: int | None = None,
    energy: float | None = None,
    conv_rank: int | None = None,
    dtype: DtypeLike | None = None,
    ema: str = "drop",
    variant: str | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoraResult:
    """Write a LoRA that turns `base` into `tuned`, as far as a LoRA can.

    >>> blockmerge.extract_lora("tuned.safetensors", "base.safetensors", output="style.safetensors", rank=32)
    ... # doctest: +SKIP

    - `tuned`, `base`: models, as `merge` takes them.
    - `rank`: the highest rank of a linear layer. `conv_rank`: that of a convolution larger than 1×1. Without
      it those are left out.
    - `energy`: in place of the ranks, the share of each layer's squared difference that is kept.
    - `dtype`: ``"fp16"`` (the default), ``"bf16"`` or ``"fp32"``.
    - `output`, `overwrite`, `threads`, `ema`, `variant`, `progress`: as for `merge`.

    Layers that do not differ are left out. What differs and has no place in a LoRA (norms, biases,
    embeddings) is named in the notes.

    Raises `CheckpointError` or `UnknownFamilyError` for files that cannot be used, `RecipeError` for
    arguments, `NonFiniteError` for values, and `OutputError` for the output. Raises `IncompatibleModelsError`
    for models of different families or shapes.
    """
    size = Size(rank, energy)
    size.check_given()
    sizes = _sizes(size, conv_rank)
    target = LoraTarget.of(output, dtype, threads, overwrite, progress)
    opening = _opening(variant, ema)
    models = [opening.model(one, name) for one, name in ((tuned, "tuned"), (base, "base"))]
    opening.check(models)
    tasks, notes = _differences(models[0], models[1], sizes)
    family = models[0].anatomy.family
    names = [model.name for model in models]
    recipe = {
        "method": "lora extract",
        "models": names,
        "rank": rank,
        "energy": energy,
        "conv_rank": conv_rank,
        "ema": ema,
        "variant": variant,
    }
    metadata = new_metadata(
        of_family(family, prediction=_prediction(models[0])), recipe, Path(names[0]).stem, names
    )
    sources = tuple(model.source for model in models)
    job = Job(target, family, sources, target.dtype_for(_USUAL), metadata)
    layers = [task.layer for task in tasks if task.layer is not None]

    def work(task: Difference, readers: Readers) -> Made:
        from blockmerge.lora_making.computing import extracted

        size = None if task.layer is None else sizes[task.layer.has_kernel]
        return extracted(task, size, job.dtype, readers)

    slots = [(layer, layer.factor_shapes(_most(sizes, layer))) for layer in layers]

    def if_nothing(made: Sequence[Made]) -> str:
        others = _left_out(list(zip(tasks, made, strict=True)))
        alike = f"{names_of(models)} are alike in all layers that it can hold"
        return (
            "; ".join((alike, *others)) if others else f"{names_of(models)} do not differ in what both have"
        )

    done = job.write(tasks, slots, work, lambda task: task.nbytes, size, if_nothing)
    found = list(zip(tasks, done.made, strict=True))
    notes += [_differing(found), *_left_out(found)]
    held = shares(((task.block, one) for task, one in found if one.total), family)
    return job.result(done, layers, notes, held=held)


def _sizes(size: Size, conv_rank: int | None) -> dict[bool, Size | None]:
    """{whether it is for convolutions of more than one place: the size of factors}."""
    check_rank(conv_rank, "conv_rank (--conv-rank)")
    if conv_rank is not None and size.rank is None:
        raise RecipeError("conv_rank (--conv-rank) goes with a rank; energy (--energy) is for all layers")
    of_kernels = size if size.rank is None else None if conv_rank is None else Size(conv_rank)
    return {False: size, True: of_kernels}


def _most(sizes: Mapping[bool, Size | None], layer: Layer) -> int:
    size = sizes[layer.has_kernel]
    return layer.full_rank if size is None else size.most(layer.full_rank)


def _opening(variant: str | None, ema: str) -> Opening:
    if ema == "keep":
        raise RecipeError("EMA copies are not compared beside the U-Net: ema (--ema) is drop or use")
    return Opening(variant, ema)


def _prediction(model: Model) -> str:
    """What a model's U-Net predicts, as far as that is known."""
    if (told := told_prediction(model)) is not None:
        return told.prediction
    if "v_pred" in model.tensors:
        return "v_prediction"
    unmarked = model.anatomy.family.prediction.get(model.anatomy.inputs)
    return "" if unmarked is None else unmarked.prediction


def _differences(
    tuned: Model, base: Model, sizes: Mapping[bool, Size | None]
) -> tuple[list[Difference], list[str]]:
    """What is to be looked at, first the layers in the order of their modules' names, and notes.

    Raises IncompatibleModelsError when the models cannot be compared.
    """
    family = tuned.anatomy.family
    if not base.anatomy.family.is_like(family):
        raise IncompatibleModelsError(
            f"{shown(tuned.name)} is {family.title} and {shown(base.name)} {base.anatomy.family.title}: "
            "a LoRA is the difference of two models of one family"
        )
    names = written_names(family)
    if not names:
        raise RecipeError(f"it is not known what LoRAs of {family.title} are called: none can be written")
    both, notes = _in_both(tuned, base)
    _check_shapes(tuned, base, both)
    layers: list[tuple[str, Difference]] = []
    others: list[Difference] = []
    for ldm in both:
        found = list(_of_tensor(ldm, tuned.tensors[ldm], base.tensors[ldm], family, names, sizes))
        layers += [(one.layer.name, one) for one in found if one.layer is not None]
        others += [one for one in found if one.layer is None]
    layers.sort(key=lambda one: f"{one[0]}.")
    return [*(one for _, one in layers), *others], [*tuned.notes, *base.notes, *notes]


def _in_both(tuned: Model, base: Model) -> tuple[list[str], list[str]]:
    """The weights that both models have, and notes on those of one alone."""
    family = tuned.anatomy.family
    own = [
        {name for name, one in model.tensors.items() if one.dtype in FLOAT_DTYPES and _is_weight(name)}
        for model in (tuned, base)
    ]
    missing = sorted(
        name for name in own[1] - own[0] if component_of(name) == _UNET and name in family.listed
    )
    if missing:
        raise IncompatibleModelsError(
            f"{shown(tuned.name)} lacks {counted(len(missing), 'tensor')} of the U-Net that "
            f"{shown(base.name)} has ({listing(missing)}): a LoRA takes nothing away"
        )
    notes = []
    for here, there, has in ((tuned, base, own[0] - own[1]), (base, tuned, own[1] - own[0])):
        alone = here.components - there.components
        for component in sorted(alone & set(family.components) - {_VAE}):
            notes.append(f"only {shown(here.name)} has a {component}: that is not compared")
        rest = sorted(name for name in has if component_of(name) not in {*alone, _VAE})
        if rest:
            adds = ", which no LoRA adds" if here is tuned else ""
            notes.append(
                f"only {shown(here.name)} has {counted(len(rest), 'tensor')} ({listing(rest)}){adds}"
            )
    return sorted(own[0] & own[1]), notes


def _is_weight(name: str) -> bool:
    special = is_schedule(name) or is_position_ids(name) or is_prediction_marker(name) or is_leftover(name)
    return not special and component_of(name) != "ema"


def _check_shapes(tuned: Model, base: Model, names: Sequence[str]) -> None:
    differing = [
        f"{shown(name)} is {list(one)} and {list(other)}"
        for name in names
        if (one := tuned.tensors[name].shape) != (other := base.tensors[name].shape)
    ]
    if differing:
        raise IncompatibleModelsError(
            f"{names_of([tuned, base])} have {counted(len(differing), 'tensor')} of different shapes "
            f"({listing(differing, 2, 200)}): a LoRA is the difference of two models of one shape"
        )


def _of_tensor(
    ldm: str,
    tuned: Expression,
    base: Expression,
    family: Family,
    names: Mapping[Whereabouts, str],
    sizes: Mapping[bool, Size | None],
) -> Iterator[Difference]:
    """A tensor of two models as the layers that it holds, or as what no LoRA does."""
    is_vae = component_of(ldm) == _VAE
    block = None if is_vae else family.block_of(ldm)
    relation = family.relation_of(ldm)
    is_lookup = any(fnmatchcase(ldm, pattern) for pattern in family.adapters.get("lookups", ()))
    if block is None or is_lookup or len(tuned.shape) < 2:
        kind = _OF_VAE if is_vae else _LOOKUPS if is_lookup else _VECTORS
        yield Difference(ldm, tuned, base, block, kind)
        return
    if Whereabouts(ldm) in names and relation.places:
        yield _layer(Difference(ldm, tuned, base, block, _OTHERS), names[Whereabouts(ldm)], sizes)
        return
    places = relation.origins_in_diffusers(ldm)
    if not places or not all(Whereabouts(ldm, place) in names for place in places):
        yield Difference(ldm, tuned, base, block, _OTHERS)
        return
    for place, origin in places.items():
        own, other = (simplify(made(origin, {ldm: one}, ldm)) for one in (tuned, base))
        yield _layer(Difference(ldm, own, other, block, _OTHERS), names[Whereabouts(ldm, place)], sizes)


def _layer(found: Difference, name: str, sizes: Mapping[bool, Size | None]) -> Difference:
    """The same as a layer of the LoRA, or as a convolution that is left out."""
    assert found.block is not None
    layer = Layer(name, found.block, found.tuned.shape)
    if sizes[layer.has_kernel] is None:
        return Difference(found.ldm, found.tuned, found.base, found.block, _KERNELS)
    return Difference(found.ldm, found.tuned, found.base, found.block, found.kind, layer)


def _differing(found: Sequence[tuple[Difference, Made]]) -> str:
    """Say how many layers the LoRA changes, of all that it could."""
    ranks = [one.rank for task, one in found if task.layer is not None]
    differing = sum(map(bool, ranks))
    if differing == len(ranks):
        return f"all {counted(differing, 'layer')} that it can hold differ"
    alike = len(ranks) - differing
    return f"of {counted(len(ranks), 'layer')} that it can hold, {alike} are alike and left out"


def _left_out(found: Sequence[tuple[Difference, Made]]) -> list[str]:
    """Say what differs and has no place in the LoRA."""
    names: dict[str, list[str]] = defaultdict(list)
    for task, one in found:
        if task.layer is None and one.total:
            names[task.kind].append(task.ldm)
    how = {_KERNELS: ": conv_rank (--conv-rank) takes them in"}
    return [
        f"left out, though they differ: {len(some)} {kind} ({listing(some)}){how.get(kind, '')}"
        for kind, some in names.items()
    ]
