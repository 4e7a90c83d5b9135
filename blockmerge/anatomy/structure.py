"""How diffusers builds a model: the names that a config makes, and how a U-Net is built, told from its names.

A config is worth writing only where diffusers, given it, has exactly the tensors that there are: it fills
what is missing with random numbers. The names are those of diffusers' and transformers' published classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from typing import Any

_MOST_NAMES = 100_000
"""More than any model has; a config may say any number."""

Depths = tuple[tuple[int, ...], ...]
"""For each level, how many transformer blocks each of its attentions has; empty without attention."""

_BOTH = ("weight", "bias")
_ATTENTION_ENDS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight", "to_out.0.bias")
_NORMED = ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")
_CLIP_LAYER = (
    *(f"self_attn.{which}_proj" for which in ("q", "k", "v", "out")),
    "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2",
)  # fmt: skip


def names_in_config(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the names of all tensors that the class of a config makes, given it; None for other classes.

    >>> sorted(names_in_config(folder_configs(shapes, "sd1")["unet/config.json"]))[0]  # doctest: +SKIP
    'add_embedding.linear_1.bias'

    `config` is that of a `UNet2DConditionModel`, an `AutoencoderKL` or a `CLIPTextModel` (with projection or
    without), with the keys that `folder_configs` writes.
    """
    kind = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    names = _NAMES.get(kind)
    return None if names is None else frozenset(islice(names(config), _MOST_NAMES))


def built_of(names: Collection[str]) -> dict[str, Any]:
    """Return how a U-Net is built, as the keys of its config, from its names in diffusers' naming."""
    levels = range(_count(names, "down_blocks.#."))
    down = tuple(_depths(names, f"down_blocks.{level}") for level in levels)
    up = tuple(_depths(names, f"up_blocks.{level}") for level in range(_count(names, "up_blocks.#.")))
    middle = _depths(names, "mid_block")
    layers = [_count(names, f"down_blocks.{level}.resnets.#.") for level in levels]
    built = {
        "down_block_types": ["CrossAttnDownBlock2D" if depths else "DownBlock2D" for depths in down],
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "up_block_types": ["CrossAttnUpBlock2D" if depths else "UpBlock2D" for depths in up],
        **_transformer_layers(down, middle, up),
    }
    if not middle:
        has_resnet = _count(names, "mid_block.resnets.#.")
        built["mid_block_type"] = "UNetMidBlock2D" if has_resnet else None
    return built


def is_buildable(names: Collection[str]) -> bool:
    """Whether diffusers has a U-Net of exactly these names, whatever its widths."""
    levels = range(_count(names, "down_blocks.#."))
    if len(levels) != _count(names, "up_blocks.#."):
        return False
    widths = [1]
    for level in levels:  # where a width changes, the first unit has a shortcut
        is_wider = level > 0 and f"down_blocks.{level}.resnets.0.conv_shortcut.weight" in names
        widths.append(widths[-1] * (2 if is_wider else 1))
    config: dict[str, Any] = {**built_of(names), "block_out_channels": widths[1:]}
    if "add_embedding.linear_1.weight" in names:
        config["addition_embed_type"] = "text_time"
    return bool(levels) and set(_unet(config)) == set(names)


def _count(names: Iterable[str], template: str) -> int:
    """How many numbers there are for the ``#`` in how names begin."""
    pattern = re.compile(re.escape(template).replace(r"\#", r"(\d{1,6})"))
    return len({match[1] for name in names if (match := pattern.match(name))})


def _depths(names: Collection[str], block: str) -> tuple[int, ...]:
    inside = [name for name in names if name.startswith(f"{block}.attentions.")]
    count = _count(inside, f"{block}.attentions.#.")
    return tuple(_count(inside, f"{block}.attentions.{n}.transformer_blocks.#.") for n in range(count))


def _transformer_layers(down: Depths, middle: tuple[int, ...], up: Depths) -> dict[str, Any]:
    """The depths as diffusers wants them: a number for all, one for each level, or one for each layer, where
    the way up does not mirror the way down.
    """
    depth = middle[0] if middle else 1
    mirrored = all(set(below) == set(above) for below, above in zip(down, reversed(up), strict=False))
    if mirrored and all(len(set(depths)) <= 1 for depths in down):
        # diffusers builds the middle with the depth of the last level.
        each = [*(depths[0] if depths else 1 for depths in down[:-1]), depth]
        if not middle and down and down[-1]:
            each[-1] = down[-1][0]
        alone = {depth for depths in (*down, middle) for depth in depths}
        return {"transformer_layers_per_block": each[-1] if len(alone) == 1 else each}
    lists = [list(depths) if depths else 1 for depths in down]
    if middle and down and not down[-1]:
        lists[-1] = depth
    return {
        "transformer_layers_per_block": lists,
        "reverse_transformer_layers_per_block": [list(depths) if depths else 1 for depths in up],
    }


def _of_both(*stems: str) -> Iterator[str]:
    return (f"{stem}.{end}" for stem in stems for end in _BOTH)


def _resnet(stem: str, *, time: bool = True, shortcut: bool = False) -> Iterator[str]:
    parts = ["norm1", "conv1", "norm2", "conv2", *(["time_emb_proj"] * time), *(["conv_shortcut"] * shortcut)]
    return _of_both(*(f"{stem}.{part}" for part in parts))


def _transformer(stem: str, depth: int) -> Iterator[str]:
    yield from _of_both(f"{stem}.norm", f"{stem}.proj_in", f"{stem}.proj_out")
    for block in (f"{stem}.transformer_blocks.{n}" for n in range(depth)):
        yield from (f"{block}.{which}.{end}" for which in ("attn1", "attn2") for end in _ATTENTION_ENDS)
        yield from _of_both(*(f"{block}.{part}" for part in _NORMED))


def _each(value: Any, count: int) -> list[Any]:
    """A value for each level, of one for all or a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * count


_UNET_DEFAULTS: Mapping[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
}
"""What diffusers takes where a config does not say."""


def _unet(config: Mapping[str, Any]) -> Iterator[str]:
    config = {**_UNET_DEFAULTS, **config}
    widths: Sequence[int] = config["block_out_channels"]
    count = len(widths)
    layers = _each(config["layers_per_block"], count)
    depths = _each(config["transformer_layers_per_block"], count)
    above = config.get("reverse_transformer_layers_per_block") or depths[::-1]
    yield from _of_both("conv_in", "conv_norm_out", "conv_out")
    yield from _of_both("time_embedding.linear_1", "time_embedding.linear_2")
    if config.get("time_cond_proj_dim"):
        yield "time_embedding.cond_proj.weight"
    if config.get("class_embed_type") in ("projection", "timestep"):
        yield from _of_both("class_embedding.linear_1", "class_embedding.linear_2")
    if config.get("addition_embed_type") == "text_time":
        yield from _of_both("add_embedding.linear_1", "add_embedding.linear_2")
    for level, (before, width) in enumerate(pairwise([widths[0], *widths])):
        block = f"down_blocks.{level}"
        for n in range(layers[level]):
            yield from _resnet(f"{block}.resnets.{n}", shortcut=n == 0 and before != width)
        if config["down_block_types"][level].startswith("CrossAttn"):
            yield from _attentions(block, depths[level], layers[level])
        if level < count - 1:
            yield from _of_both(f"{block}.downsamplers.0.conv")
    yield from _middle(config, depths[-1])
    for level, kind in zip(range(count), config["up_block_types"], strict=False):
        block = f"up_blocks.{level}"
        for n in range(layers[count - 1 - level] + 1):
            yield from _resnet(f"{block}.resnets.{n}", shortcut=True)
        if kind.startswith("CrossAttn"):
            yield from _attentions(block, above[level], layers[count - 1 - level] + 1)
        if level < count - 1:
            yield from _of_both(f"{block}.upsamplers.0.conv")


def _attentions(block: str, depths: Any, count: int) -> Iterator[str]:
    for n, depth in enumerate(_each(depths, count)):
        yield from _transformer(f"{block}.attentions.{n}", depth)


def _middle(config: Mapping[str, Any], depth: Any) -> Iterator[str]:
    kind = config.get("mid_block_type", "UNetMidBlock2DCrossAttn")
    if kind == "UNetMidBlock2DCrossAttn":
        yield from _transformer("mid_block.attentions.0", _each(depth, 1)[0])
    for n in range({"UNetMidBlock2DCrossAttn": 2, "UNetMidBlock2D": 1}.get(kind, 0)):
        yield from _resnet(f"mid_block.resnets.{n}")


def _vae(config: Mapping[str, Any]) -> Iterator[str]:
    widths: Sequence[int] = config["block_out_channels"]
    layers = config["layers_per_block"]
    ways = (
        ("encoder", "down", [widths[0], *widths], layers),
        ("decoder", "up", [widths[-1], *reversed(widths)], layers + 1),
    )
    for side, way, extents, count in ways:
        yield from _of_both(f"{side}.conv_in", f"{side}.conv_norm_out", f"{side}.conv_out")
        for level, (before, width) in enumerate(pairwise(extents)):
            block = f"{side}.{way}_blocks.{level}"
            for n in range(count):
                shortcut = n == 0 and before != width
                yield from _resnet(f"{block}.resnets.{n}", time=False, shortcut=shortcut)
            if level < len(widths) - 1:
                yield from _of_both(f"{block}.{way}samplers.0.conv")
        middle = f"{side}.mid_block"
        for n in range(2):
            yield from _resnet(f"{middle}.resnets.{n}", time=False)
        parts = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
        yield from _of_both(*(f"{middle}.attentions.0.{part}" for part in parts))
    for which in ("quant_conv", "post_quant_conv"):
        if config.get(f"use_{which}", True):
            yield from _of_both(which)


def _clip(config: Mapping[str, Any]) -> Iterator[str]:
    embeddings = ("token_embedding", "position_embedding")
    yield from (f"text_model.embeddings.{which}.weight" for which in embeddings)
    for layer in range(config["num_hidden_layers"]):
        yield from _of_both(*(f"text_model.encoder.layers.{layer}.{part}" for part in _CLIP_LAYER))
    yield from _of_both("text_model.final_layer_norm")


def _clip_with_projection(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _clip(config)
    yield "text_projection.weight"


_NAMES: Mapping[Any, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "UNet2DConditionModel": _unet,
    "AutoencoderKL": _vae,
    "CLIPTextModel": _clip,
    "CLIPTextModelWithProjection": _clip_with_projection,
}
