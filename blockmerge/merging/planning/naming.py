"""The names that tensors have in the output, and how a tensor of one naming is made of those of the other."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

from blockmerge.anatomy import (
    UNET_PREFIX,
    Family,
    Origin,
    component_of,
    is_leftover,
    is_prediction_marker,
)
from blockmerge.checkpoints import Checkpoint, DiffusersFolder, Model, made
from blockmerge.errors import counted, listing
from blockmerge.expressions import Dequantised, Expression, Stored, simplify


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the output: its `name` there, what it is, and the LDM tensor that it is or is a part of."""

    name: str
    ldm: str
    expression: Expression

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        return self.expression.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.expression.shape

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return self.expression.nbytes


def what_it_is(naming: str) -> str:
    """What messages call an output of that naming."""
    return "a diffusers folder" if naming == "diffusers" else "a file in LDM names"


def folders_of(family: Family, models: Sequence[Model]) -> frozenset[str]:
    """The subfolders for weights that a diffusers folder of these models has: the family's, and their own."""
    found = {prefix.rstrip("/") for prefix in family.prefixes["diffusers"]}
    return frozenset(found.union(*(one.source.components for one in models if _is_folder(one.source))))


def _is_folder(source: Checkpoint) -> TypeGuard[DiffusersFolder]:
    return isinstance(source, DiffusersFolder)


def has_place(name: str, naming: str, family: Family, folders: Collection[str]) -> bool:
    """Whether an output of that naming has a place for a tensor, by the name that models have it under;
    `folders` are the subfolders of a diffusers folder.
    """
    if naming == "ldm":
        return "/" not in name or (family.takes_any_name and name.startswith(UNET_PREFIX))
    folder, slash, _ = name.partition("/")
    return folder in folders if slash else (family.knows(name) and bool(family.relation_of(name).places))


def named(
    tensors: Mapping[str, Expression], a: Model, naming: str, *, names_components: bool
) -> tuple[list[OutputTensor], list[str]]:
    """Return what an output of that naming has of tensors under LDM names, and notes about what is lost or
    renamed.

    The order is A's where the output's names are diffusers', and else the tensors' own.
    """
    if naming == "diffusers":
        found, notes = _in_diffusers(tensors, a)
    else:
        found, notes = [OutputTensor(name, name, one) for name, one in tensors.items()], []
    family = a.anatomy.family
    if a.alone is not None and not (family.takes_any_name and naming == a.anatomy.naming):
        lost = f"{a.alone.folder}/" if naming == "diffusers" else a.alone.prefix
        return [replace(one, name=one.name.removeprefix(lost)) for one in found], notes
    # Transformers alone are published without prefix, U-Nets with it.
    is_bare = a.bare or naming == "diffusers" if a.anatomy.naming == naming else not family.arms
    if names_components or (naming == "ldm" and not is_bare):
        return found, notes
    if family.takes_any_name and naming == a.anatomy.naming:  # whose program knows no other names
        prefix, own = family.unet_prefix(naming), "" if "/" in a.prefix else a.prefix
        return [replace(one, name=_with(own, one.name, prefix)) for one in found], notes
    # A's spelling where the output is a U-Net alone; else the full names, which every loader accepts.
    if all(
        component_of(name) == "unet" or is_prediction_marker(name) or is_leftover(name) for name in tensors
    ):
        # A folder's is no part of names in a file.
        own = a.prefix if a.anatomy.naming == naming and "/" not in a.prefix else ""
        prefix = family.unet_prefix(naming)
        return [replace(one, name=_with(own, one.name, prefix)) for one in found], notes
    if naming == "ldm" and a.anatomy.naming == naming:
        what = a.anatomy.family.core_title
        notes.append(
            f"the {what}'s names get the prefix {UNET_PREFIX}, as a file with more than a {what} needs it"
        )
    return found, notes


def _with(own: str, name: str, prefix: str) -> str:
    return own + name.removeprefix(prefix) if name.startswith(prefix) else name


def _in_diffusers(tensors: Mapping[str, Expression], a: Model) -> tuple[list[OutputTensor], list[str]]:
    """Most tensors become one, some three."""
    placed: dict[str, OutputTensor] = {}
    doubles: list[str] = []
    # A part that lacks its others keeps its own name; where another model has the whole, that goes first and
    # wins.
    for ldm in sorted(tensors, key=lambda name: "/" in name):
        for place, origin in _places(ldm, a.anatomy.family).items():
            if place in placed:
                doubles.append(place)
            else:
                placed[place] = OutputTensor(place, ldm, made(origin, tensors, a.name))
    order = _order_in(a, list(placed.values()))
    notes = [
        f"{counted(len(doubles), 'tensor')} left out, "
        f"since the output has others of that name ({listing(doubles)})"
    ]
    return sorted(placed.values(), key=lambda one: order.get(one.name, (2, 0))), notes if doubles else []


def _places(ldm: str, family: Family) -> Mapping[str, Origin]:
    return family.origins((ldm,), "ldm", "diffusers")


def _order_in(a: Model, tensors: Sequence[OutputTensor]) -> dict[str, tuple[int, int]]:
    """Where A has each: parts of joined tensors do not stand side by side in every file.

    What is turned comes last.
    """
    order: dict[str, tuple[int, int]] = {}
    for number, one in enumerate(tensors):
        if one.ldm in a.tensors:
            own = simplify(made(_places(one.ldm, a.anatomy.family)[one.name], a.tensors, a.name))
            own = own.codes if isinstance(own, Dequantised) else own
            order[one.name] = (0, own.offset) if isinstance(own, Stored) else (1, number)
    return order
