"""A model as merging and comparing see it: its anatomy, and its tensors under the names by which models are
matched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from blockmerge.anatomy import (
    DIFFUSERS_UNET_PREFIX,
    FAMILIES,
    UNET_PREFIX,
    VAE_PARTS,
    Anatomy,
    AnyCore,
    Core,
    Family,
    Origin,
    Rows,
    any_core_of,
    canonical_name,
    canonical_names,
    component_of,
    core_of,
    damaged,
    has_signs_of_a_unet,
    identify,
    is_leftover,
    is_position_ids,
    is_prediction_marker,
    lone_component,
    other_kind,
    plain_names_of_ema,
    unwrapped_name,
)
from blockmerge.anatomy.configs import latent_channels
from blockmerge.checkpoints.checkpoint import Checkpoint, TensorInfo
from blockmerge.checkpoints.quantised import Quantised, quantised
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import CheckpointError, UnknownFamilyError, counted, listing, shown
from blockmerge.expressions import Expression, Joined, Part, Reshaped, Stored, Transposed, leaves_of, simplify

VAE_PREFIX = "first_stage_model."
EMA_CHOICES = ("drop", "keep", "use")
_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")


@dataclass(frozen=True)
class Alone:
    """That a model is one component: the `folder` that diffusers has it in, and the prefix that LDM's names
    lose where nothing else is there, as single components are published.

    `others` are more families that have the very same; `is_part` says that it was a part of a whole model.
    """

    folder: str
    prefix: str
    others: tuple[Family, ...] = ()
    is_part: bool = False


@dataclass(frozen=True, eq=False)
class Model:
    """A checkpoint, what it is, and its `tensors` under LDM names, whatever its own naming.

    EMA copies are left out, unless they are all the U-Net there is, or wanted: `ema_tensors` are those.
    `name` is what messages call it. `prefix` is what the names of its diffusion model begin with in the file.
    `notes` are texts for the user about what was decided when it was opened. What `quantised` sets aside is
    none of the tensors. `alone` is for what is one component.
    """

    source: Checkpoint
    anatomy: Anatomy
    tensors: Mapping[str, Expression]
    components: frozenset[str]
    prefix: str
    ema_tensors: tuple[str, ...]
    notes: tuple[str, ...]
    name: str
    quantised: Quantised = field(default_factory=Quantised)
    alone: Alone | None = None

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, ema: str = "drop", name: str | None = None, *, to_compute: bool = True
    ) -> Model:
        """Look at a checkpoint's names and shapes; `ema` is one of EMA_CHOICES: what becomes of EMA copies.

        Messages call it `name`, by default the checkpoint's. Raises UnknownFamilyError, with the name,
        without a known U-Net, and CheckpointError for a tensor that is not of the shape it takes, and for
        quantised weights that cannot be read, unless nothing is `to_compute` with them.
        """
        name = checkpoint.name if name is None else name
        how = quantised(checkpoint, _looked_at(checkpoint, ema))
        shapes = {own: how.shape_of(info) for own, info in checkpoint.tensors.items()}
        if to_compute and how.fault is not None:
            if not has_signs_of_a_unet(shapes) and (kind := other_kind_of(checkpoint)):
                raise UnknownFamilyError(f"{shown(name)} {kind}")
            how.check(name)
        core: Core | None = core_of(checkpoint.tensors)
        original, twice, notes = _matched_names(checkpoint, ema, name, how, core)
        known = {one: shapes[own] for one, own in original.items() if component_of(one) != "ema"}
        try:
            anatomy = anatomy_of(checkpoint, known)
        except UnknownFamilyError as error:
            if (found := _any_core_of(checkpoint, shapes)) is None:
                raise UnknownFamilyError(f"{shown(name)} {error}") from None
            core, anatomy = found, found.anatomy
            original, twice, notes = _matched_names(checkpoint, ema, name, how, core)
            notes.append(_found_lists(found, name))
        tensors = in_ldm(checkpoint, original, anatomy.naming, anatomy.family, how)
        if to_compute:
            refuse_integers(tensors, anatomy.family, name)
        used = set(original.values())
        twice += sorted(used - set(_stored_in(tensors)))
        return cls(
            source=checkpoint,
            anatomy=anatomy,
            tensors=tensors,
            components=frozenset(map(component_of, tensors)),
            prefix=core.prefix if core else _prefix_of_a_unet(original, anatomy.naming),
            ema_tensors=tuple(
                own
                for own in checkpoint.tensors
                if component_of(own) == "ema" and own not in used | how.aside
            ),
            notes=(*_doubles(twice, name), *notes),
            name=name,
            quantised=how,
        )

    @property
    def bare(self) -> bool:
        """Whether its diffusion model's names lack the prefix of whole models."""
        return self.prefix != self.anatomy.family.unet_prefix(self.anatomy.naming)

    @property
    def is_file(self) -> bool:
        """Whether it is there already, and not what a stage of a recipe makes."""
        return True

    @property
    def vae_name(self) -> str:
        """What that is called which its VAE is from."""
        return self.name

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """All that it is read from."""
        return (self.source,)

    def names_in_file(self, name: str) -> tuple[str, ...]:
        """What the source calls the tensors that one is made of."""
        return tuple(one.name for one in leaves_of(self.tensors[name]) if isinstance(one, Stored))


def anatomy_of(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> Anatomy:
    """Return a checkpoint's anatomy, by the canonical names of its tensors.

    Raises UnknownFamilyError as `identify` does, and for one shard of several, which may look like a model.
    """
    if (shard := _shard(checkpoint)) is not None:
        raise UnknownFamilyError(shard)
    return identify(shapes)


def recognised(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], copies: Mapping[str, str]
) -> tuple[dict[str, str], Anatomy | None, str | None]:
    """Return {name in the file: canonical name}, and a checkpoint's anatomy, or why it has none.

    `copies` are {EMA name: plain name}, which count where there is nothing else.
    """
    core = core_of(shapes)
    names = canonical_names(checkpoint.tensors, core)
    if not any(component_of(name) == "unet" for name in names.values()):
        names.update(copies)
    try:
        return names, anatomy_of(checkpoint, {names[own]: shape for own, shape in shapes.items()}), None
    except UnknownFamilyError as error:
        if (found := _any_core_of(checkpoint, shapes)) is None:
            return names, None, str(error)
        return canonical_names(checkpoint.tensors, found), found.anatomy, None


def _any_core_of(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> AnyCore | None:
    return None if _shard(checkpoint) else any_core_of(shapes)


def other_kind_of(checkpoint: Checkpoint) -> str | None:
    """Say what a checkpoint is that is neither a model nor a VAE, in the words that all commands have for it;
    None where that is unknown.
    """
    alone = lone_component(checkpoint.tensors)
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    return (
        _shard(checkpoint)
        or _whole_transformer(shapes)
        or damaged(shapes)
        or other_kind(shapes)
        or ("is a text encoder alone" if alone is not None and alone[0] == "text_encoder" else None)
    )


def _whole_transformer(names: Mapping[str, object]) -> str | None:
    core = core_of(names)
    return f"is a {core.family.title} model" if core else None


def _shard(checkpoint: Checkpoint) -> str | None:
    name = "" if checkpoint.path is None else checkpoint.path.name
    count = int(match[1]) if (match := _SHARD.search(name)) else 1
    return f"is one of the {count} shards of a model: give the folder with all of them" if count > 1 else None


def made(origin: Origin, tensors: Mapping[str, Expression], whose: str) -> Expression:
    """Return the tensor that an origin describes, of tensors by the names that it has for them.

    Raises CheckpointError, with the name `whose` they are, when they are not of the shapes that it takes.
    """
    rows = [_rows(tensors[one.name], one, whose) for one in origin.rows]
    tensor = rows[0] if len(rows) == 1 else _joined(rows, [tensors[one.name] for one in origin.rows], whose)
    shape = tensor.shape
    if origin.transposed and len(shape) == 2:
        return Transposed(tensor)
    if origin.axes == 4 and len(shape) == 2:
        return Reshaped(tensor, (*shape, 1, 1))
    if origin.axes == 2 and len(shape) == 4 and shape[2:] == (1, 1):
        return Reshaped(tensor, shape[:2])
    return tensor


def _joined(rows: Sequence[Expression], tensors: Sequence[Expression], whose: str) -> Expression:
    if not rows[0].shape or len({(one.dtype, one.shape[1:]) for one in rows}) > 1:
        said = {_name_in_file(one): f"{one.dtype} {list(one.shape)}" for one in tensors}
        raise CheckpointError(
            f"{shown(whose)}: {listing(said)} belong together but do not join ({', '.join(said.values())})"
        )
    return Joined(tuple(rows))


def _rows(tensor: Expression, rows: Rows, whose: str) -> Expression:
    if rows.of == 1:
        return tensor
    if not tensor.shape or tensor.shape[0] % rows.of:
        raise CheckpointError(
            f"{shown(whose)}: {shown(_name_in_file(tensor))} has the shape {shown(list(tensor.shape))}, "
            f"which does not split into {rows.of} equal parts"
        )
    unit = tensor.shape[0] // rows.of
    return Part(tensor, rows.start * unit, rows.stop * unit)


def _name_in_file(tensor: Expression) -> str:
    return next(one.name for one in leaves_of(tensor) if isinstance(one, Stored))


def in_ldm(
    checkpoint: Checkpoint, original: Mapping[str, str], naming: str, family: Family, how: Quantised
) -> dict[str, Expression]:
    """A checkpoint's tensors under LDM names; `original` maps canonical names to the file's own."""
    stored = {name: how.tensor(checkpoint, own) for name, own in original.items()}
    found = {
        name: simplify(made(origin, stored, checkpoint.name))
        for name, origin in family.origins(original, naming, "ldm").items()
    }
    if naming == "diffusers":
        return found
    # What is not known of a file keeps the name that it has there.
    return {original.get(name, name) if "/" in name else name: one for name, one in found.items()}


def refuse_integers(tensors: Mapping[str, Expression], family: Family, label: str) -> None:
    """Raise CheckpointError for weights that are none: what the layout has as floats is something else."""
    odd = {
        _name_in_file(one): one.dtype
        for name, one in tensors.items()
        if one.dtype not in FLOAT_DTYPES and _is_weight(name, one, family)
    }
    if odd:
        raise CheckpointError(
            f"{shown(label)} has {' and '.join(sorted(set(odd.values())))} in place of floats "
            f"({listing(odd)}): of quantised weights only fp8 can be read, plain or scaled; "
            "take the model in fp16 or bf16"
        )


def _is_weight(name: str, tensor: Expression, family: Family) -> bool:
    """Whether a tensor is a weight: the layout's are, and where there is none, matrices. Numbers of 8 bytes
    count something.
    """
    if is_position_ids(name):
        return False
    is_matrix = len(tensor.shape) > 1 and tensor.dtype not in ("I64", "U64", "BOOL")
    return name in family.layout or (family.takes_any_name and is_matrix and component_of(name) == "unet")


def _looked_at(checkpoint: Checkpoint, ema: str) -> Mapping[str, TensorInfo]:
    """A checkpoint's tensors without EMA copies that are dropped: they may be quantised in any way."""
    others = {name: info for name, info in checkpoint.tensors.items() if component_of(name) != "ema"}
    is_dropped = ema == "drop" and any(component_of(name) == "unet" for name in others)
    return others if is_dropped else checkpoint.tensors


def _matched_names(
    checkpoint: Checkpoint, ema: str, label: str, how: Quantised, core: Core | None
) -> tuple[dict[str, str], list[str], list[str]]:
    """Return {canonical name: name in the file}, EMA copies treated as asked for, which tensors are there a
    second time, and notes.
    """
    names: dict[str, str] = {}
    twice: list[str] = []
    spelled = canonical_names(checkpoint.tensors, core)
    for name in checkpoint.tensors:
        if name in how.aside or (component_of(name) == "ema" and ema != "keep"):
            continue
        canonical = spelled[name]
        if canonical in names:
            twice.append(name)
            if name != canonical:  # the name that every loader knows wins
                continue
        names[canonical] = name
    names = names if core else _all_of_a_unet(names)
    notes = [f"{shown(label)} {note}" for note in checkpoint.notes]
    notes += _wrappers(checkpoint.tensors, label)
    plain = any(component_of(name) == "unet" for name in names)
    if not plain or ema == "use":
        copies = {plain_name: name for name, plain_name in plain_names_of_ema(checkpoint.tensors).items()}
        if copies and not plain:
            notes.append(f"{shown(label)} has only EMA weights for its U-Net: they are used as the U-Net")
            names = {**copies, **{name: own for name, own in names.items() if component_of(name) != "ema"}}
        elif copies:
            notes.append(f"the U-Net of {shown(label)} is its EMA copy ({counted(len(copies), 'tensor')})")
            names.update(copies)
    return names, twice, notes


def _found_lists(core: AnyCore, label: str) -> str:
    """Say which blocks were found in a model of no known family."""
    lists = " and ".join(f"{one.count} of {shown(one.path)}" for one in core.family.found)
    found = f"its blocks are its numbered lists ({lists}), all else is BASE"
    return f"{shown(label)} is of {core.family.title}: {found}"


def _all_of_a_unet(names: dict[str, str]) -> dict[str, str]:
    """The same, but where a U-Net stands alone without prefix, what is not known is a part of it, too."""
    prefixes = {
        prefix
        for canonical, own in names.items()
        for prefix in (UNET_PREFIX, DIFFUSERS_UNET_PREFIX)
        if canonical == prefix + unwrapped_name(own)
    }
    if (
        len(prefixes) != 1
        or not has_signs_of_a_unet(dict.fromkeys(names, ()))
        or any(component_of(name) not in ("unet", "ema", "other") for name in names)
    ):
        return names
    (prefix,) = prefixes
    return {prefix + name if _is_nobodys(name) else name: own for name, own in names.items()}


def _is_nobodys(name: str) -> bool:
    """Whether a tensor is of no component, and nothing is known of it."""
    special = is_leftover(name) or is_prediction_marker(name) or "/" in name
    known = special or any(family.knows(name) for family in FAMILIES.values())
    return component_of(name) == "other" and not known


def _prefix_of_a_unet(original: Mapping[str, str], naming: str) -> str:
    """The prefix of a U-Net's names, none where any stands without."""
    prefix = UNET_PREFIX if naming == "ldm" else DIFFUSERS_UNET_PREFIX
    prefixes = (UNET_PREFIX, DIFFUSERS_UNET_PREFIX)
    plain = ((canonical, unwrapped_name(own)) for canonical, own in original.items())
    return "" if any(canonical == one + own for canonical, own in plain for one in prefixes) else prefix


def _stored_in(tensors: Mapping[str, Expression]) -> Iterator[str]:
    for one in tensors.values():
        if isinstance(one, Stored):  # nearly all
            yield one.name
        else:
            yield from (leaf.name for leaf in leaves_of(one) if isinstance(leaf, Stored))


def _doubles(names: Sequence[str], label: str) -> Iterator[str]:
    if names:
        held = f"{shown(label)} holds {counted(len(names), 'tensor')} under two names"
        yield f"{held} ({listing(names, 1)}): one of each is used"


def _wrappers(names: Iterable[str], label: str) -> Iterator[str]:
    """Say what was taken off names."""
    wrapped = [name for name in names if unwrapped_name(name) != name]
    if wrapped:
        taken = f"{shown(wrapped[0])} is {shown(unwrapped_name(wrapped[0]))}"
        count = counted(len(wrapped), "name")
        yield f"{shown(label)}: what training or saving put around {count} is taken off ({taken})"


def vae_tensors(checkpoint: Checkpoint, family: Family) -> dict[str, Expression]:
    """Return a VAE's tensors under LDM names, from a whole model or a VAE alone, in either naming itself.

    Raises CheckpointError for a tensor that is not of the shape it takes, and for quantised weights that
    cannot be read.
    """
    how = quantised(checkpoint)
    how.check(checkpoint.name)
    bare = {
        name: canonical_name(name).removeprefix(VAE_PREFIX).removeprefix("vae/")
        for name in checkpoint.tensors
        if name not in how.aside
    }
    prefix = next(
        (one for one, component in family.prefixes["ldm"].items() if component == "vae"), VAE_PREFIX
    )
    own = {
        name: short
        for name, short in bare.items()
        if short.startswith(VAE_PARTS) or family.relation_of(prefix + short).places
    }
    if any(short.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for short in own.values()):
        original, naming = {canonical_name(f"vae/{short}"): name for name, short in own.items()}, "diffusers"
    else:
        original, naming = {VAE_PREFIX + short: name for name, short in own.items()}, "ldm"
    tensors = in_ldm(checkpoint, original, naming, family, how)
    # Where the layout has a VAE, this is held against it later.
    strange = [] if family.arms else [name for name in tensors if not family.knows(name)]
    if strange or not (family.arms or tensors):
        raise CheckpointError(
            f"{shown(checkpoint.name)} holds no VAE that {family.title} is used with "
            f"({listing(strange or own)}): give another"
        )
    channels = latent_channels(family)
    first = tensors.get(prefix + "decoder.conv_in.weight")
    if channels and first is not None and first.shape[1:2] != (channels,):
        shape = f"{shown(_name_in_file(first))} is {list(first.shape)}"
        raise CheckpointError(
            f"the VAE of {shown(checkpoint.name)} is for latent images of another kind than those of "
            f"{family.title}, which have {channels} channels ({shape})"
        )
    refuse_integers(tensors, family, checkpoint.name)
    return tensors
