"""What a tensor of LDM naming is called in a diffusers folder, and how its values stand there.

Names in a folder are written `component/name`, as in `unet/conv_in.weight`. Nearly all is a renaming. The
exceptions: the VAE's attention is 1×1 convolutions in LDM and matrices in diffusers; OpenCLIP text encoders
keep query, key and value in one tensor that diffusers splits into three; and OpenCLIP's text projection is
transposed. Some tensors have no place in a folder at all.

The structure (three units a level, resnet before attention) is that of the U-Net's and VAE's published code;
that the result is right is tested against diffusers' own converters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from blockmerge.anatomy.layouts import layout


@dataclass(frozen=True, slots=True)
class Origin:
    """How a tensor is made from those of a source: `names` joined along the first axis, or one part of
    `parts` of one of them.

    `transposed` says that rows and columns change places; `axes` how many axes it gets (the source may have
    fewer or more of length 1), or None for as many as it has.
    """

    names: tuple[str, ...]
    part: int = 0
    parts: int = 1
    transposed: bool = False
    axes: int | None = None

    @property
    def rows(self) -> tuple[Rows, ...]:
        """Transitional."""
        if self.parts > 1:
            return (Rows(self.names[0], self.part, self.part + 1, self.parts),)
        return tuple(map(Rows, self.names))

    def renamed(self, names: Mapping[str, str]) -> Origin:
        """Transitional."""
        return replace(self, names=tuple(names[one] for one in self.names))


@dataclass(frozen=True, slots=True)
class Rows:
    """Transitional."""

    name: str
    start: int = 0
    stop: int = 1
    of: int = 1


@dataclass(frozen=True, slots=True)
class Relation:
    """The diffusers tensors that hold an LDM tensor's values: none, one, or three (rows of query, key and
    value).
    """

    diffusers: tuple[str, ...] = ()
    transposed: bool = False
    squeezed: bool = False


NO_PLACE = Relation()

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_VAE_PARTS = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_OPEN_CLIP = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}

_LEVEL = (
    3  # units in each level of the U-Net: two of resnet and attention and a sampler, or three on the way up
)


def _unet(name: str) -> Relation:
    stem, _, last = name.rpartition(".")
    if stem in _ENDS:
        return _one(f"unet/{_ENDS[stem]}.{last}")
    match = re.fullmatch(r"(input|output)_blocks\.(\d{1,6})\.(\d)\.(.+)", name)
    if match is not None:
        way, number, place, rest = match[1], int(match[2]), match[3], match[4]
        unit = number - (way == "input")
        level = f"{'down' if way == 'input' else 'up'}_blocks.{unit // _LEVEL}"
        if way == "input" and rest.startswith("op."):
            return _one(f"unet/{level}.downsamplers.0.conv.{rest[3:]}")
        if way == "output" and rest.startswith("conv."):
            return _one(f"unet/{level}.upsamplers.0.{rest}")
        return _one(f"unet/{level}.{_unit(place == '0', unit % _LEVEL, rest)}")
    match = re.fullmatch(r"middle_block\.([012])\.(.+)", name)
    if match is not None:
        return _one(f"unet/mid_block.{_unit(match[1] != '1', int(match[1]) // 2, match[2])}")
    return NO_PLACE


def _unit(resnet: bool, number: int, rest: str) -> str:
    """A resnet or attention; the names inside attentions are the same."""
    if not resnet:
        return f"attentions.{number}.{rest}"
    stem, _, last = rest.rpartition(".")
    return f"resnets.{number}.{_RESNET.get(stem, stem)}.{last}"


def _vae(name: str) -> Relation:
    levels = 4
    match = re.fullmatch(
        r"(encoder|decoder)\.(down|up)\.(\d{1,6})\.(?:block\.(\d+)|(?:down|up)sample)\.(.+)", name
    )
    if match is not None:
        side, way, level, block, rest = match[1], match[2], int(match[3]), match[4], match[5]
        if way == "up":  # counted from the other end
            level = levels - 1 - level
        unit = f"{way}samplers.0" if block is None else f"resnets.{block}"
        return _one(f"vae/{side}.{way}_blocks.{level}.{unit}.{rest.replace('nin_shortcut', 'conv_shortcut')}")
    match = re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", name)
    if match is not None:
        return _one(f"vae/{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}")
    match = re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(norm|q|k|v|proj_out)\.(weight|bias)", name)
    if match is not None:
        place = f"vae/{match[1]}.mid_block.attentions.0.{_VAE_PARTS[match[2]]}.{match[3]}"
        return Relation((place,), squeezed=match[2] != "norm" and match[3] == "weight")
    match = re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(weight|bias)", name)
    if match is not None:
        return _one(f"vae/{match[1]}.{match[2].replace('norm_out', 'conv_norm_out')}.{match[3]}")
    return _one(f"vae/{name}") if re.fullmatch(r"(post_)?quant_conv\.(weight|bias)", name) else NO_PLACE


def _clip(component: str) -> Callable[[str], Relation]:
    return lambda name: _one(f"{component}/{name}") if name.startswith("text_model.") else NO_PLACE


def _open_clip(
    component: str, *, layers: int | None = None, projection: bool = True
) -> Callable[[str], Relation]:
    """OpenCLIP's names; `layers` are those that diffusers keeps, if not all."""

    def relation(name: str) -> Relation:
        if name in _OPEN_CLIP_ENDS:
            return _one(f"{component}/{_OPEN_CLIP_ENDS[name]}")
        if name == "text_projection" and projection:
            return Relation((f"{component}/text_projection.weight",), transposed=True)
        match = re.fullmatch(r"transformer\.resblocks\.(\d{1,6})\.(.+)", name)
        if match is None or (layers is not None and int(match[1]) >= layers):
            return NO_PLACE
        layer, rest = f"{component}/text_model.encoder.layers.{int(match[1])}", match[2]
        joined = re.fullmatch(r"attn\.in_proj_(weight|bias)", rest)
        if joined is not None:
            return Relation(tuple(f"{layer}.self_attn.{which}_proj.{joined[1]}" for which in "qkv"))
        stem, _, last = rest.rpartition(".")
        return _one(f"{layer}.{_OPEN_CLIP[stem]}.{last}") if stem in _OPEN_CLIP else NO_PLACE

    return relation


def _one(name: str) -> Relation:
    return Relation((name,))


_SD2_TEXT_LAYERS = 23  # of 24: diffusers leaves out the last, whose output SD2 does not use

_RULES: Mapping[str, Mapping[str, Callable[[str], Relation]]] = {
    "sd1": {"cond_stage_model.transformer.": _clip("text_encoder")},
    "sd2": {"cond_stage_model.model.": _open_clip("text_encoder", layers=_SD2_TEXT_LAYERS, projection=False)},
    "sdxl": {
        "conditioner.embedders.0.transformer.": _clip("text_encoder"),
        "conditioner.embedders.1.model.": _open_clip("text_encoder_2"),
    },
    "sdxl_refiner": {"conditioner.embedders.0.model.": _open_clip("text_encoder_2")},
}
_COMMON: Mapping[str, Callable[[str], Relation]] = {
    "model.diffusion_model.": _unet,
    "first_stage_model.": _vae,
}


@lru_cache(1 << 13)
def relation_of(name: str, family: str) -> Relation:
    """Return where a folder of that family keeps the values of an LDM tensor; NO_PLACE where it does not."""
    for prefix, rule in (*_COMMON.items(), *_RULES[family].items()):
        if name.startswith(prefix):
            return rule(name.removeprefix(prefix))
    return NO_PLACE


@cache
def _ldm_names(family: str) -> Mapping[str, str]:
    """{diffusers name: LDM name} of every tensor that both namings have."""
    names = list(layout(family))
    # Not in every file, nor in the lists.
    names += [
        f"{prefix}text_model.embeddings.position_ids"
        for prefix in _RULES[family]
        if prefix.endswith(".transformer.")
    ]
    return {place: name for name in names for place in relation_of(name, family).diffusers}


def origins_in_ldm(names: Iterable[str], family: str) -> dict[str, Origin]:
    """Return {LDM name: origin} for the tensors of a diffusers folder; those unknown to LDM keep their names.

    So do the parts of a tensor of which others are missing.
    """
    have = dict.fromkeys(names)
    known = _ldm_names(family)
    found: dict[str, Origin] = {}
    for name in have:
        ldm = known.get(name)
        relation = relation_of(ldm, family) if ldm is not None else NO_PLACE
        if ldm is None or not all(place in have for place in relation.diffusers):
            found[name] = Origin((name,))
        elif ldm not in found:
            found[ldm] = Origin(
                relation.diffusers, transposed=relation.transposed, axes=4 if relation.squeezed else None
            )
    return found


def origins_in_diffusers(names: Iterable[str], family: str) -> dict[str, Origin]:
    """Return {diffusers name: origin} for tensors of LDM naming; what has no place in a folder is left out.

    Names of a folder's own, which LDM does not know, stay, but for those that an LDM tensor gets.
    """
    found: dict[str, Origin] = {}
    for name in sorted(names, key=lambda name: "/" in name):
        if "/" in name:
            found.setdefault(name, Origin((name,)))
            continue
        relation = relation_of(name, family)
        for part, place in enumerate(relation.diffusers):
            found[place] = Origin(
                (name,),
                part,
                len(relation.diffusers),
                relation.transposed,
                axes=2 if relation.squeezed else None,
            )
    return found
