"""Which tensor a module of an adapter means: a table for each family, made from its layout.

Names with underscores for dots cannot be taken apart again, so none ever is: all that can be written is
written down once, and looked up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from blockmerge.anatomy import Family
from blockmerge.anatomy.families import remembered
from blockmerge.anatomy.origins import ALL, Place, Relation

Shape = tuple[int, ...]

_WEIGHT, _BIAS = ".weight", ".bias"
_VAE = "vae"

_Variants = tuple[tuple[re.Pattern[str], tuple[str, ...]], ...]

_ALL_VARIANTS: _Variants = ((re.compile(r"\Atext_model\."), ("",)),)
"""What else a module is called whose diffusers name fits: text encoders as transformers 5 has them."""

_DOTTED_VARIANTS: _Variants = (
    # Attention processors, as diffusers wrote them before PEFT, and what it called a text encoder's then.
    (re.compile(r"\.to_([qkv])\Z"), (r".processor.to_\1_lora", r".processor.to_\1")),
    (re.compile(r"\.to_out\.0\Z"), (".processor.to_out_lora", ".processor.to_out")),
    (re.compile(r"\.self_attn\.([qkv])_proj\Z"), (r".self_attn.to_\1_lora",)),
    (re.compile(r"\.self_attn\.out_proj\Z"), (".self_attn.to_out_lora",)),
)
"""The same, of names with dots."""


class Whereabouts(NamedTuple):
    """An LDM tensor, or the part of it that is the diffusers tensor `place` (None: all, as it stands)."""

    ldm: str
    place: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """The tensor that a module changes, by its LDM name, and its block.

    >>> targets_of(FAMILIES["sdxl"])["lora_te2_text_model_encoder_layers_0_self_attn_k_proj"].place
    'text_encoder_2/text_model.encoder.layers.0.self_attn.k_proj.weight'

    `place` is None where the module's weight is that whole tensor as it stands. Else it is the diffusers name
    of what is: one of the `places` of `Family.relation_of(ldm)`, as the middle third of OpenCLIP's q|k|v is
    here, or its text projection, transposed. `shape` is that of the module's own weight in the layout, and
    `bias` where the module's bias is, if it has one.
    """

    ldm: str
    place: str | None
    block: str
    shape: Shape
    bias: Whereabouts | None = None

    def shape_in(self, family: Family, shapes: Mapping[str, Shape]) -> Shape | None:
        """The shape of the module's own weight in a model, by the shapes of its tensors under LDM names; None
        where the model lacks the tensor.
        """
        shape = shapes.get(self.ldm)
        return None if shape is None else _own_shape(family.relation_of(self.ldm), self.place, shape)


@remembered(None)
def targets_of(family: Family) -> Mapping[str, Target]:
    """Return {name of a module, in any spelling: its target} for a family.

    >>> targets_of(FAMILIES["sd1"])["lora_unet_mid_block_attentions_0_proj_in"].block
    'M00'

    Spellings of one place have equal targets. The VAE has none.
    """
    return dict(spellings_of(family))


@remembered(None)
def written_names(family: Family) -> Mapping[Whereabouts, str]:
    """Return {a tensor, or a part of it: what new files call the module}, sd-scripts' names of a family.

    >>> written_names(FAMILIES["sdxl"])[Whereabouts("model.diffusion_model.time_embed.0.weight")]
    'lora_unet_time_embed_0'

    What the usual naming of a component has no name for is called as the other naming calls it. It is empty
    for a family of which nothing says how that is done.
    """
    said = family.adapters.get("written", {}).get("names", {})
    found: dict[Whereabouts, str] = {}
    others: dict[Whereabouts, str] = {}
    for component, naming, stem, target in _modules(family):
        if component in said:
            names = found if naming == said[component]["naming"] else others
            place = Whereabouts(target.ldm, target.place)
            names.setdefault(place, said[component]["prefix"] + stem.replace(".", "_"))
    return {**others, **found}


@remembered(None)
def diffusers_names(family: Family) -> Mapping[Whereabouts, str]:
    """Return {a tensor, or a part of it: what diffusers calls the module, with its component}.

    >>> diffusers_names(FAMILIES["sdxl"])[Whereabouts("model.diffusion_model.time_embed.0.weight")]
    'unet.time_embedding.linear_1'
    """
    found: dict[Whereabouts, str] = {}
    for component, naming, stem, target in _modules(family):
        if naming == "diffusers":
            found.setdefault(Whereabouts(target.ldm, target.place), f"{component}.{stem}")
    return found


def spellings_of(family: Family) -> Iterator[tuple[str, Target]]:
    """Yield every spelling of every module, with its target."""
    names = family.adapters.get("names", {})
    for component, naming, stem, target in _modules(family):
        said = names.get(component, {})
        stems = _variants({stem}, _ALL_VARIANTS) if naming == "diffusers" else {stem}
        dotted = _variants(stems, _DOTTED_VARIANTS) if naming == "diffusers" else stems
        for prefix in said.get("underscored", ()):
            yield from ((prefix + one.replace(".", "_"), target) for one in stems)
        for prefix in said.get("dotted", ()):
            yield from ((prefix + one, target) for one in dotted)


def _modules(family: Family) -> Iterator[tuple[str, str, str, Target]]:
    """Yield (component, naming, name without prefix, target) of every module."""
    places = dict(_places(family))
    for ldm, listed in family.listed.items():
        if listed.component == _VAE:
            continue
        relation = family.relation_of(ldm)
        whole = Target(ldm, None, listed.block, listed.shape, _bias_of(ldm, family))
        if ldm.endswith(_WEIGHT):
            yield listed.component, "ldm", _without_prefix(ldm, family).removesuffix(_WEIGHT), whole
        for place in relation.places:
            if not place.name.endswith(_WEIGHT):
                continue
            stem = place.name.removesuffix(_WEIGHT)
            target = whole
            if places[place.name].place is not None:
                shape = _own_shape(relation, place.name, listed.shape)
                target = Target(ldm, place.name, listed.block, shape, places.get(stem + _BIAS))
            yield listed.component, "diffusers", stem.partition("/")[2], target


def _places(family: Family) -> Iterator[tuple[str, Whereabouts]]:
    """Yield (diffusers name, where that tensor is) of all that is listed."""
    for ldm in family.listed:
        relation = family.relation_of(ldm)
        for place in relation.places:
            yield place.name, Whereabouts(ldm, None if _is_whole(relation, place) else place.name)


def _bias_of(ldm: str, family: Family) -> Whereabouts | None:
    """Where the bias beside a whole weight is."""
    bias = ldm.removesuffix(_WEIGHT) + _BIAS
    return Whereabouts(bias) if ldm.endswith(_WEIGHT) and bias in family.listed else None


def _is_whole(relation: Relation, place: Place) -> bool:
    return place.stretches == ALL and place.of == 1 and not relation.transposed


def _own_shape(relation: Relation, name: str | None, shape: Shape) -> Shape:
    """The shape of the part of a tensor that is a diffusers tensor."""
    if name is None:
        return shape
    place = next(one for one in relation.places if one.name == name)
    rows = sum(stop - start for start, stop in place.stretches)
    first = shape[0] * rows // place.of
    return (*reversed(shape[1:]), first) if relation.transposed else (first, *shape[1:])


def _without_prefix(ldm: str, family: Family) -> str:
    prefix = next((one.ldm for one in family.renamings if ldm.startswith(one.ldm)), "")
    return ldm.removeprefix(prefix)


def _variants(stems: set[str], variants: _Variants) -> set[str]:
    """Names without prefix, and all that those modules are called instead."""
    found = set(stems)
    for pattern, others in variants:
        found |= {pattern.sub(other, one, count=1) for one in found for other in others}
    return found
