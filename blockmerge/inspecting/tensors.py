"""The tensors of a checkpoint, one by one: where each belongs, and by which name element rules know it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from blockmerge.anatomy import Anatomy, component_of, plain_names_of_ema
from blockmerge.checkpoints import TensorInfo


@dataclass(frozen=True)
class ListedTensor:
    """A tensor as the file has it. `ldm` is its name in LDM naming, that of the tensor which it is a part of
    where LDM joins several; `block` is None without a known U-Net.
    """

    ldm: str
    component: str
    block: str | None
    dtype: str
    shape: tuple[int, ...]


def list_tensors(
    tensors: Mapping[str, TensorInfo], names: Mapping[str, str], anatomy: Anatomy | None
) -> dict[str, ListedTensor]:
    """Return {name in the file: what is known of it}, in the file's order; `names` are the matched names."""
    ldm = names_in_ldm(names.values(), anatomy)
    listed = {}
    for name, info in tensors.items():
        known = ldm.get(names[name], names[name])
        plain = plain_names_of_ema((known,)).get(known, known)  # an EMA copy is in its tensor's block
        block = None if anatomy is None else anatomy.family.block_of(plain)
        component = _component_of(name, names[name], anatomy)
        listed[name] = ListedTensor(known, component, block, info.dtype, info.shape)
    return listed


def names_in_ldm(names: Iterable[str], anatomy: Anatomy | None) -> dict[str, str]:
    """Return {matched name: LDM name}."""
    if anatomy is None:
        return {}
    origins = anatomy.family.origins(names, anatomy.naming, "ldm")
    return {rows.name: ldm for ldm, origin in origins.items() for rows in origin.rows}


def _component_of(name: str, matched: str, anatomy: Anatomy | None) -> str:
    own = component_of(name)  # an EMA copy is one, whatever it is matched with
    if anatomy is None or own == "ema":
        return own
    return anatomy.family.called_component(component_of(matched))
