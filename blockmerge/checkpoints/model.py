"""A model as merging and comparing see it: its anatomy, and its tensors under the names by which models are
matched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blockmerge.anatomy import (
    DEFAULT_FAMILY,
    DIFFUSERS_UNET_PREFIX,
    UNET_PREFIX,
    VAE_PARTS,
    Anatomy,
    Origin,
    Rows,
    canonical_name,
    component_of,
    identify,
    origins_in_diffusers,
    origins_in_ldm,
    plain_names_of_ema,
    relation_of,
)
from blockmerge.checkpoints.assembled import Assembled, Assembly, Piece
from blockmerge.checkpoints.checkpoint import Checkpoint, TensorInfo
from blockmerge.errors import CheckpointError, UnknownFamilyError, counted, listing, shown

VAE_PREFIX = "first_stage_model."
EMA_CHOICES = ("drop", "keep", "use")


@dataclass(frozen=True)
class View:
    """A checkpoint's tensors under the names of one naming, and how each is made of the tensors in the
    checkpoint.

    The tensors' offsets are those of `checkpoint`, which puts together what is joined, split or transposed.
    """

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    origins: Mapping[str, Origin]

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, original: Mapping[str, str], naming: str, wanted: str, family: str
    ) -> View:
        """Look at a checkpoint of one naming through another; `original` maps canonical names to the file's
        own.

        Raises CheckpointError for a tensor that is not of the shape it takes.
        """
        origins = {
            name: origin.renamed(original)
            for name, origin in _origins(original, naming, wanted, family).items()
        }
        placed = {name: _placed(checkpoint, origin) for name, origin in origins.items()}
        infos = {name: info for name, info in placed.items() if isinstance(info, TensorInfo)}
        if len(infos) == len(placed):
            return cls(checkpoint, infos, origins)
        assembled = Assembled(checkpoint, placed)
        return cls(assembled, assembled.tensors, origins)

    def read(self, name: str) -> bytes:
        """Return the bytes of one tensor; meant for small ones."""
        buffer = bytearray(self.tensors[name].nbytes)
        with self.checkpoint.reader() as reader:
            reader.read_into(self.tensors[name].offset, memoryview(buffer))
        return bytes(buffer)


@dataclass(frozen=True)
class Model:
    """A checkpoint, what it is, and its tensors: under LDM names (`ldm`), whatever its own naming, or
    diffusers' (`diffusers`).

    EMA copies are left out, unless they are all the U-Net there is, or wanted: `ema_tensors` are those.

    `name` is what messages call it.

    `bare` says that its U-Net's names lack the prefix of whole models.
    """

    source: Checkpoint
    anatomy: Anatomy
    ldm: View
    original_names: Mapping[str, str]
    components: frozenset[str]
    bare: bool
    ema_tensors: tuple[str, ...]
    notes: tuple[str, ...]
    name: str

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """LDM name → tensor; offsets are those of `checkpoint`."""
        return self.ldm.tensors

    @property
    def checkpoint(self) -> Checkpoint:
        """What `tensors` are read from."""
        return self.ldm.checkpoint

    @classmethod
    def of(cls, checkpoint: Checkpoint, ema: str = "drop", name: str | None = None) -> Model:
        """Look at a checkpoint's names and shapes; `ema` is one of EMA_CHOICES: what becomes of EMA copies.

        Messages call it `name`, by default the checkpoint's. Raises UnknownFamilyError, with the name,
        without a known U-Net.
        """
        name = checkpoint.name if name is None else name
        original, notes = _matched_names(checkpoint, ema, name)
        shapes = {canonical: checkpoint.tensors[own].shape for canonical, own in original.items()}
        try:
            anatomy = identify(
                {known: shape for known, shape in shapes.items() if component_of(known) != "ema"}
            )
        except UnknownFamilyError as error:
            raise UnknownFamilyError(f"{shown(name)} {error}") from None
        view = View.of(checkpoint, original, anatomy.naming, "ldm", anatomy.family.name)
        used = set(original.values())
        return cls(
            source=checkpoint,
            anatomy=anatomy,
            ldm=view,
            original_names=original,
            components=frozenset(map(component_of, view.tensors)),
            bare=any(
                canonical in (UNET_PREFIX + own, DIFFUSERS_UNET_PREFIX + own)
                for canonical, own in original.items()
            ),
            ema_tensors=tuple(
                own for own in checkpoint.tensors if component_of(own) == "ema" and own not in used
            ),
            notes=tuple(notes),
            name=name,
        )

    def view(self, naming: str) -> View:
        """The model's tensors under the names of a naming, ``"ldm"`` or ``"diffusers"``."""
        if naming == "ldm":
            return self.ldm
        return View.of(
            self.source, self.original_names, self.anatomy.naming, naming, self.anatomy.family.name
        )


def _origins(names: Iterable[str], naming: str, wanted: str, family: str) -> dict[str, Origin]:
    """How the tensors of one naming are made from those of another, or the same: then only LDM's convolutions
    get their axes.
    """
    if naming != wanted:
        return origins_in_ldm(names, family) if wanted == "ldm" else origins_in_diffusers(names, family)
    if naming == "diffusers":
        return {name: Origin((Rows(name),)) for name in names}
    return {
        name: Origin((Rows(name),), axes=4 if relation_of(name, family).squeezed else None) for name in names
    }


def _placed(checkpoint: Checkpoint, origin: Origin) -> TensorInfo | Assembly:
    """Where a tensor's values lie."""
    first, *others = [checkpoint.tensors[name] for name in origin.names]
    if others:
        return _joined(checkpoint, origin, [first, *others])
    if origin.parts > 1:
        rows, *rest = first.shape or (0,)
        if not first.shape or rows % origin.parts:
            raise CheckpointError(
                f"{shown(checkpoint.name)}: {shown(origin.names[0])} has the shape "
                f"{shown(list(first.shape))}, "
                f"which does not split into {origin.parts} equal parts"
            )
        info = TensorInfo(first.dtype, (rows // origin.parts, *rest), first.offset)
        return TensorInfo(info.dtype, info.shape, first.offset + origin.part * info.nbytes)
    if origin.transposed and len(first.shape) == 2:
        rows, columns = first.shape
        return Assembly(first.dtype, (columns, rows), (Piece(first.offset, (columns, rows), (1, columns)),))
    shape = first.shape
    if origin.axes == 4 and len(shape) == 2:
        shape = (*shape, 1, 1)
    elif origin.axes == 2 and len(shape) == 4 and shape[2:] == (1, 1):
        shape = shape[:2]
    return first if shape == first.shape else TensorInfo(first.dtype, shape, first.offset)


def _joined(checkpoint: Checkpoint, origin: Origin, infos: list[TensorInfo]) -> Assembly:
    kinds = {(info.dtype, info.shape[1:]) for info in infos}
    if len(kinds) > 1 or not infos[0].shape:
        said = ", ".join(f"{info.dtype} {list(info.shape)}" for info in infos)
        raise CheckpointError(
            f"{shown(checkpoint.name)}: {listing(origin.names)} belong together but do not join "
            f"({shown(said)})"
        )
    shape = (sum(info.shape[0] for info in infos), *infos[0].shape[1:])
    return Assembly(
        infos[0].dtype, shape, tuple(Piece.contiguous(info.offset, info.elements) for info in infos)
    )


def _matched_names(checkpoint: Checkpoint, ema: str, label: str) -> tuple[dict[str, str], list[str]]:
    """Return {canonical name: name in the file}, EMA copies treated as asked for, and notes."""
    names: dict[str, str] = {}
    twice: list[str] = []
    for name in checkpoint.tensors:
        if component_of(name) == "ema" and ema != "keep":
            continue
        canonical = canonical_name(name)
        if canonical in names:
            twice.append(name)
            if name != canonical:  # the name that every loader knows wins
                continue
        names[canonical] = name
    notes = (
        [
            f"{shown(label)} holds {counted(len(twice), 'tensor')} under two names ({listing(twice, 1)}): "
            "one of each is used"
        ]
        if twice
        else []
    )
    plain = any(component_of(name) == "unet" for name in names)
    if not plain or ema == "use":
        copies = {plain_name: name for name, plain_name in plain_names_of_ema(checkpoint.tensors).items()}
        if copies and not plain:
            notes.append(f"{shown(label)} has only EMA weights for its U-Net: they are used as the U-Net")
            names = {**copies, **{name: own for name, own in names.items() if component_of(name) != "ema"}}
        elif copies:
            notes.append(f"the U-Net of {shown(label)} is its EMA copy ({counted(len(copies), 'tensor')})")
            names.update(copies)
    return names, notes


def vae_view(checkpoint: Checkpoint, naming: str = "ldm") -> View:
    """Return a VAE's tensors under the names of a naming, from a whole model or a VAE alone, in either naming
    itself.

    Raises CheckpointError for a tensor that is not of the shape it takes.
    """
    bare = {
        name: canonical_name(name).removeprefix(VAE_PREFIX).removeprefix("vae/")
        for name in checkpoint.tensors
    }
    own = {name: short for name, short in bare.items() if short.startswith(VAE_PARTS)}
    if any(short.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for short in own.values()):
        original = {canonical_name(f"vae/{short}"): name for name, short in own.items()}
        own_naming = "diffusers"
    else:
        original = {VAE_PREFIX + short: name for name, short in own.items()}
        own_naming = "ldm"
    return View.of(
        checkpoint, original, own_naming, naming, DEFAULT_FAMILY
    )  # the VAE's names are the same in all families
