"""What a tensor of LDM naming is called in a diffusers folder: the rules that families refer to by name.

Names in a folder are written `component/name`, as in `unet/conv_in.weight`. Nearly all is a renaming. The
exceptions: the VAE's attention is 1×1 convolutions in LDM and matrices in diffusers; OpenCLIP text encoders
keep query, key and value in one tensor that diffusers splits into three; and OpenCLIP's text projection is
transposed. Some tensors have no place in a folder at all.

A rule turns a name, without the prefix that its component has, into a Relation. The structure (three units a
level, resnet before attention) is that of the U-Net's and VAE's published code; that the result is right is
tested against diffusers' own converters. A family whose names need no arithmetic has a table instead
(`renaming.tsv`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from itertools import combinations

from blockmerge.anatomy.origins import ALL, NO_PLACE, Place, Relation

Rule = Callable[[str], Relation]
"""From a tensor's name in its component, LDM naming, to its place in a folder."""

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

_VIDEO_VAE_RESNET = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
_VIDEO_VAE_ENDS = {"conv1": "quant_conv", "conv2": "post_quant_conv"} | {
    f"{side}.{ours}": f"{side}.{theirs}"
    for side in ("encoder", "decoder")
    for ours, theirs in (("conv1", "conv_in"), ("head.0", "norm_out"), ("head.2", "conv_out"))
}
_ENDINGS = ("weight", "bias")

# Units in each level of the U-Net: two of resnet and attention and a sampler, or three on the way up.
_LEVEL = 3
_DIGITS = 6


def _unet(name: str, *, folder: str) -> Relation:
    stem, _, last = name.rpartition(".")
    if stem in _ENDS:
        return _one(f"{folder}{_ENDS[stem]}.{last}")
    match = re.fullmatch(r"(input|output)_blocks\.(\d{1,6})\.(\d)\.(.+)", name)
    if match is not None:
        way, number, place, rest = match[1], int(match[2]), match[3], match[4]
        unit = number - (way == "input")
        level = f"{'down' if way == 'input' else 'up'}_blocks.{unit // _LEVEL}"
        if way == "input" and rest.startswith("op."):
            return _one(f"{folder}{level}.downsamplers.0.conv.{rest[3:]}")
        if way == "output" and rest.startswith("conv."):
            return _one(f"{folder}{level}.upsamplers.0.{rest}")
        return _one(f"{folder}{level}.{_unit(place == '0', unit % _LEVEL, rest)}")
    match = re.fullmatch(r"middle_block\.([012])\.(.+)", name)
    if match is not None:
        return _one(f"{folder}mid_block.{_unit(match[1] != '1', int(match[1]) // 2, match[2])}")
    return NO_PLACE


def _unit(resnet: bool, number: int, rest: str) -> str:
    """A resnet or attention; the names inside attentions are the same."""
    if not resnet:
        return f"attentions.{number}.{rest}"
    stem, _, last = rest.rpartition(".")
    return f"resnets.{number}.{_RESNET.get(stem, stem)}.{last}"


def _vae(name: str, *, folder: str) -> Relation:
    levels = 4
    match = re.fullmatch(
        r"(encoder|decoder)\.(down|up)\.(\d{1,6})\.(?:block\.(\d+)|(?:down|up)sample)\.(.+)", name
    )
    if match is not None:
        side, way, level, block, rest = match[1], match[2], int(match[3]), match[4], match[5]
        if way == "up":  # counted from the other end
            level = levels - 1 - level
        unit = f"{way}samplers.0" if block is None else f"resnets.{block}"
        return _one(
            f"{folder}{side}.{way}_blocks.{level}.{unit}.{rest.replace('nin_shortcut', 'conv_shortcut')}"
        )
    match = re.fullmatch(r"(encoder|decoder)\.mid\.block_([12])\.(.+)", name)
    if match is not None:
        return _one(f"{folder}{match[1]}.mid_block.resnets.{int(match[2]) - 1}.{match[3]}")
    match = re.fullmatch(r"(encoder|decoder)\.mid\.attn_1\.(norm|q|k|v|proj_out)\.(weight|bias)", name)
    if match is not None:
        place = f"{folder}{match[1]}.mid_block.attentions.0.{_VAE_PARTS[match[2]]}.{match[3]}"
        return Relation((Place(place),), squeezed=match[2] != "norm" and match[3] == "weight")
    match = re.fullmatch(r"(encoder|decoder)\.(conv_in|conv_out|norm_out)\.(weight|bias)", name)
    if match is not None:
        return _one(f"{folder}{match[1]}.{match[2].replace('norm_out', 'conv_norm_out')}.{match[3]}")
    return _one(f"{folder}{name}") if re.fullmatch(r"(post_)?quant_conv\.(weight|bias)", name) else NO_PLACE


def _video_vae(name: str, *, folder: str) -> Relation:
    """Wan's VAE, whose levels are one list: on the way up three resnets and a sampler each."""
    stem, _, last = name.rpartition(".")
    if stem in _VIDEO_VAE_ENDS:
        return _one(f"{folder}{_VIDEO_VAE_ENDS[stem]}.{last}")
    match = re.fullmatch(r"(encoder|decoder)\.(middle|downsamples|upsamples)\.(\d{1,6})\.(.+)", stem)
    if match is None:
        return NO_PLACE
    side, way, number, rest = match[1], match[2], int(match[3]), match[4]
    level, unit = divmod(number, 4)
    where = {
        "middle": "mid_block.attentions.0" if number == 1 else f"mid_block.resnets.{number // 2}",
        "downsamples": f"down_blocks.{number}",
        "upsamples": f"up_blocks.{level}.{'upsamplers.0' if unit == _LEVEL else f'resnets.{unit}'}",
    }[way]
    return _one(f"{folder}{side}.{where}.{_VIDEO_VAE_RESNET.get(rest, rest)}.{last}")


@lru_cache(1)
def _video_vae_names() -> tuple[str, ...]:
    resnet = [f"{part}.{end}" for part in ("residual.2", "residual.6", "shortcut") for end in _ENDINGS]
    unit = [*resnet, "residual.0.gamma", "residual.3.gamma"]
    unit += [f"{part}.{end}" for part in ("resample.1", "time_conv") for end in _ENDINGS]
    middle = ["norm.gamma", *(f"{part}.{end}" for part in ("to_qkv", "proj") for end in _ENDINGS)]
    found = [f"{stem}.{end}" for stem in _VIDEO_VAE_ENDS for end in (*_ENDINGS, "gamma")]
    for side, way, count in (("encoder", "downsamples", 11), ("decoder", "upsamples", 15)):
        found += [f"{side}.middle.{n}.{part}" for n in (0, 2) for part in unit]
        found += [f"{side}.middle.1.{part}" for part in middle]
        found += [f"{side}.{way}.{n}.{part}" for n in range(count) for part in unit]
    return tuple(found)


def names_by_rule(rule: str) -> tuple[str, ...]:
    """The original names, without prefix, of a component that a rule describes, as far as they are no more
    than so many: a VAE's, of four levels.
    """
    return {"vae": _vae_names, "video_vae": _video_vae_names}.get(rule, tuple)()


def lacking_by_rule(rule: str, names: Collection[str]) -> list[str]:
    """Return what a component that a rule describes lacks, by original names without prefix: tensors of a
    VAE, and whole units of Wan's, whose resnets and samplers differ.
    """
    if rule == "vae":
        return [name for name in _vae_names() if not _MAY_LACK.search(name) and name not in names]
    units = {_unit_of(name) for name in names}
    return list(dict.fromkeys(unit for name in names_by_rule(rule) if (unit := _unit_of(name)) not in units))


_MAY_LACK = re.compile(r"nin_shortcut|quant_conv|encoder\.down\.3\.downsample|decoder\.up\.0\.upsample")


def _unit_of(name: str) -> str:
    member = re.match(r"(?:encoder|decoder)\.(?:middle|downsamples|upsamples)\.\d{1,6}", name)
    return member[0] if member else name.rpartition(".")[0]


@lru_cache(1)
def _vae_names() -> tuple[str, ...]:
    found = ["quant_conv", "post_quant_conv"]
    for side, way, units in (("encoder", "down", 2), ("decoder", "up", 3)):
        found += [f"{side}.{part}" for part in ("conv_in", "conv_out", "norm_out")]
        found += [f"{side}.mid.attn_1.{part}" for part in _VAE_PARTS]
        blocks = [f"{side}.mid.block_{number}" for number in (1, 2)]
        blocks += [f"{side}.{way}.{level}.block.{unit}" for level in range(4) for unit in range(units)]
        found += [
            f"{block}.{part}"
            for block in blocks
            for part in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut")
        ]
        found += [f"{side}.{way}.{level}.{way}sample.conv" for level in range(4)]
    return tuple(f"{name}.{end}" for name in found for end in _ENDINGS)


def _clip(name: str, *, folder: str, projection: bool = False) -> Relation:
    is_kept = name.startswith("text_model.") or (projection and name == "text_projection.weight")
    return _one(f"{folder}{name}") if is_kept else NO_PLACE


def _open_clip(name: str, *, folder: str, layers: int | None = None, projection: bool = True) -> Relation:
    """OpenCLIP's names; `layers` are those that diffusers keeps, if not all."""
    if name in _OPEN_CLIP_ENDS:
        return _one(f"{folder}{_OPEN_CLIP_ENDS[name]}")
    if name == "text_projection" and projection:
        return Relation((Place(f"{folder}text_projection.weight"),), transposed=True)
    match = re.fullmatch(r"transformer\.resblocks\.(\d{1,6})\.(.+)", name)
    if match is None or (layers is not None and int(match[1]) >= layers):
        return NO_PLACE
    layer, rest = f"{folder}text_model.encoder.layers.{int(match[1])}", match[2]
    joined = re.fullmatch(r"attn\.in_proj_(weight|bias)", rest)
    if joined is not None:
        return Relation.parts(*(f"{layer}.self_attn.{which}_proj.{joined[1]}" for which in "qkv"))
    stem, _, last = rest.rpartition(".")
    return _one(f"{layer}.{_OPEN_CLIP[stem]}.{last}") if stem in _OPEN_CLIP else NO_PLACE


def _same(name: str, *, folder: str) -> Relation:
    return _one(folder + name)


def _one(name: str) -> Relation:
    return Relation((Place(name),))


RULES: Mapping[str, Callable[..., Relation]] = {
    "unet": _unet,
    "vae": _vae,
    "video_vae": _video_vae,
    "clip": _clip,
    "open_clip": _open_clip,
    "same": _same,
}
"""The named rules: of a U-Net, a VAE, Wan's VAE, text encoders as transformers and OpenCLIP name them, and of
components whose names are the same but for the prefix.
"""


@dataclass(frozen=True, slots=True)
class Renaming:
    """One component of a family in both namings: its prefixes, and the rule for the names after them."""

    ldm: str
    diffusers: str
    rule: str
    relation: Rule

    @classmethod
    def of(
        cls, ldm: str, diffusers: str, rule: str, lines: Callable[[], Sequence[str]], **options: object
    ) -> Renaming:
        """The renaming by one of RULES, with its options, or by the lines of a table (rule ``"table"``)."""
        if rule == "table":
            return cls(ldm, diffusers, rule, _Table(lines, diffusers))
        return cls(ldm, diffusers, rule, partial(RULES[rule], folder=diffusers, **options))


class _Table:
    """A rule that is told by lines: original name, diffusers name, and which of the original's rows it holds.

    ``#`` stands for a number, the same in both; a name with the number itself goes before. Rows are ``=`` for
    all, or stretches of so many equal rows in the order in which the diffusers tensor has them, as
    ``1:2 0:1 of 2``. The lines are read when the first name is asked for.
    """

    def __init__(self, lines: Callable[[], Sequence[str]], folder: str) -> None:
        self._lines, self._folder = lines, folder

    def __call__(self, name: str) -> Relation:
        for template, numbers in _readings(name):
            if (places := self._places.get(template)) is not None:
                return Relation(tuple(_numbered(place, numbers) for place in places))
        return NO_PLACE

    @cached_property
    def _places(self) -> Mapping[str, Sequence[Place]]:
        places: dict[str, list[Place]] = {}
        for line in self._lines():
            original, name, rows = line.split("\t")[:3]
            places.setdefault(original, []).append(Place(self._folder + name, *_stretches(rows)))
        return places


def _readings(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield a name with ``#`` for none of its numbers, for one, for two, …, and what these numbers are."""
    parts = name.split(".")
    places = [place for place, part in enumerate(parts) if part.isdecimal() and len(part) <= _DIGITS]
    for count in range(len(places) + 1):
        for chosen in combinations(places, count):
            read = ("#" if place in chosen else part for place, part in enumerate(parts))
            yield ".".join(read), tuple(parts[place] for place in chosen)


def _stretches(text: str) -> tuple[tuple[tuple[int, int], ...], int]:
    if text == "=":
        return ALL, 1
    said, _, of = text.partition(" of ")
    numbers = [tuple(map(int, stretch.split(":"))) for stretch in said.split()]
    unit = math.gcd(int(of), *(number for pair in numbers for number in pair))
    return tuple((start // unit, stop // unit) for start, stop in numbers), int(of) // unit


def _numbered(place: Place, numbers: Sequence[str]) -> Place:
    name = place.name
    for number in numbers:
        name = name.replace("#", number, 1)
    return Place(name, place.stretches, place.of)
