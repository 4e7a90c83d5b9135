"""The configuration files of a diffusers folder that is made from a single file, worked out from its tensors'
shapes.

What shapes do not tell (heads, activations, schedules) is that of the published folders, as each family's
description has it. Single files hold no tokenizer and no safety checker.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from blockmerge.anatomy.families import FAMILIES
from blockmerge.anatomy.family import Family
from blockmerge.anatomy.structure import built_of
from blockmerge.errors import UnknownFamilyError, shown

Shapes = Mapping[str, tuple[int, ...]]
Described = Mapping[str, Any]
"""What a family says of one component in its `configs`."""

_TEXT_HEAD_WIDTH = 64
_SAMPLES = 8  # pixels a latent
_DIFFUSERS = "0.30.0"  # whose configs these are; some pipelines ask for it


def folder_configs(
    shapes: Shapes, family: Family | str, *, prediction: str = "epsilon", zero_snr: bool = False
) -> dict[str, dict[str, Any]]:
    """Return {path in the folder: content} of model_index.json and of a config for each component and the
    scheduler.

    `shapes` are those of tensors in diffusers' names (``"unet/conv_in.weight"``), `family` is one of
    FAMILIES or its name, `prediction` ``"epsilon"`` or ``"v_prediction"``; `zero_snr` says that the model is
    trained on a schedule that ends in pure noise (https://arxiv.org/abs/2305.08891). Raises
    UnknownFamilyError when a component lacks a tensor that tells how it is built.
    """
    family = FAMILIES[family] if isinstance(family, str) else family
    known = family.configs
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        component, _, rest = name.partition("/")
        parts.setdefault(component, {})[rest] = shape
    configs = {}
    for component in parts.keys() & known["components"].keys():
        described = dict(known["components"][component])
        image_size = known["image_size"].get(prediction, known["image_size"]["epsilon"])
        make = _MAKERS[described.pop("maker")]
        configs[component] = make(_Part(component, parts[component]), described, image_size)
    scheduler = scheduler_config(family, prediction, zero_snr=zero_snr)
    channels = configs["unet"].get("in_channels") if "unet" in configs else None
    variant = family.variants.get(channels or 0, "base")
    return {
        "model_index.json": model_index(family, configs, variant, scheduler["_class_name"]),
        "scheduler/scheduler_config.json": scheduler,
    } | {f"{component}/config.json": configs[component] for component in sorted(configs)}


def model_index(
    family: Family | str, components: Collection[str], variant: str, scheduler: str
) -> dict[str, Any]:
    """Return model_index.json: which class loads each component, and null for those that are not among
    `components`.
    """
    known = (FAMILIES[family] if isinstance(family, str) else family).configs
    made: Mapping[str, Any] = known.get("index", {}).get(variant, known)
    index: dict[str, Any] = _of_diffusers(known["pipelines"].get(variant, known["pipelines"]["base"]))
    for part in made["parts"]:
        index[part] = list(known["components"][part]["class"]) if part in components else [None, None]
    index["scheduler"] = ["diffusers", scheduler]
    settings: dict[str, Any] = made["settings"]
    return index | settings


def scheduler_config(family: Family | str, prediction: str, *, zero_snr: bool = False) -> dict[str, Any]:
    """Return the published scheduler of a family, with the schedule of noise that all of them were trained
    on.
    """
    known = (FAMILIES[family] if isinstance(family, str) else family).configs
    kind = "v_prediction" if prediction == "v_prediction" or zero_snr else "epsilon"
    made: dict[str, Any] = dict(known["scheduler"][kind])
    named = _of_diffusers(made.pop("_class_name"))
    noise: dict[str, Any] = known["noise"]
    return named | made | noise | prediction_settings(prediction, zero_snr=zero_snr)


def prediction_settings(prediction: str, *, zero_snr: bool = False) -> dict[str, Any]:
    """Return what of a scheduler's config the model decides, whatever the scheduler."""
    if not zero_snr:
        return {"prediction_type": prediction}
    # The paper's: the last step must be among those taken.
    return {"prediction_type": prediction, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def _of_diffusers(name: str) -> dict[str, Any]:
    return {"_class_name": name, "_diffusers_version": _DIFFUSERS}


class _Part:
    """One component's shapes."""

    def __init__(self, component: str, shapes: Shapes) -> None:
        self.component = component
        self._shapes = shapes

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    @property
    def names(self) -> Collection[str]:
        """The names of its tensors."""
        return self._shapes.keys()

    def extent(self, name: str, axis: int) -> int:
        """The extent of a tensor along an axis."""
        shape = self._shapes.get(name)
        if shape is None or len(shape) <= axis:
            found = "is missing" if shape is None else f"has the shape {list(shape)}"
            raise UnknownFamilyError(f"holds no whole {self.component}: {shown(name)} {found}")
        return shape[axis]

    def axes(self, name: str) -> int:
        """The number of a tensor's axes."""
        self.extent(name, 0)
        return len(self._shapes[name])

    def count(self, template: str) -> int:
        """How many numbers from 0 up there are for the ``#`` in a name's start."""
        pattern = re.compile(re.escape(template).replace(r"\#", r"(\d{1,6})") + r"\.")
        return len({match[1] for name in self._shapes if (match := pattern.match(name))})

    def widths(self, template: str) -> list[int]:
        """The first extents of the tensors with the numbers from 0 up for ``#``."""
        start = template[: template.index("#") + 1]
        return [self.extent(template.replace("#", str(level)), 0) for level in range(self.count(start))]


def _unet(part: _Part, described: Described, image_size: int) -> dict[str, Any]:
    widths = part.widths("down_blocks.#.resnets.0.conv1.weight")
    built = built_of(part.names)
    where = [f"down_blocks.{n}" for n, kind in enumerate(built["down_block_types"]) if "CrossAttn" in kind]
    first = f"{where[0] if where else 'mid_block'}.attentions.0"
    config = _of_diffusers(described["class"][1]) | {
        "act_fn": "silu",
        "attention_head_dim": _heads(widths, described),
        "block_out_channels": widths,
        "cross_attention_dim": part.extent(f"{first}.transformer_blocks.0.attn2.to_k.weight", 1),
        "in_channels": part.extent("conv_in.weight", 1),
        "norm_num_groups": math.gcd(32, *widths),
        "out_channels": part.extent("conv_out.weight", 0),
        "sample_size": image_size // _SAMPLES,
        "upcast_attention": described["upcast_attention"],
        # A 1×1 convolution has four axes.
        "use_linear_projection": part.axes(f"{first}.proj_in.weight") == 2,
        **built,
    }
    config = dict(sorted(config.items()))
    if "add_embedding.linear_1.weight" in part:
        width = part.extent("add_embedding.linear_1.weight", 1)
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": width // described["time_ids"],
            "projection_class_embeddings_input_dim": width,
        }
    if "time_embedding.cond_proj.weight" in part:
        config["time_cond_proj_dim"] = part.extent("time_embedding.cond_proj.weight", 1)
    return config


def _heads(widths: list[int], described: Described) -> int | list[int]:
    """The numbers of attention heads of each level, which diffusers calls attention_head_dim: as many
    everywhere, or heads of one width. Narrow test models have as many in proportion.
    """
    if "heads" in described:
        return math.gcd(described["heads"], *widths)
    width = math.gcd(described["head_width"], *widths)
    return [extent // width for extent in widths]


def _vae(part: _Part, described: Described, image_size: int) -> dict[str, Any]:
    widths = part.widths("encoder.down_blocks.#.resnets.0.conv1.weight")
    return _of_diffusers(described["class"][1]) | {
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "in_channels": part.extent("encoder.conv_in.weight", 1),
        "latent_channels": part.extent("decoder.conv_in.weight", 1),
        "layers_per_block": part.count("encoder.down_blocks.0.resnets.#"),
        "norm_num_groups": math.gcd(32, *widths),
        "out_channels": part.extent("decoder.conv_out.weight", 0),
        "sample_size": image_size,
        "scaling_factor": described["scaling_factor"],
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_post_quant_conv": "post_quant_conv.weight" in part,
        "use_quant_conv": "quant_conv.weight" in part,
    }


def _text_encoder(part: _Part, described: Described, _: int) -> dict[str, Any]:
    width = part.extent("text_model.embeddings.token_embedding.weight", 1)
    return {
        "architectures": [described["class"][1]],
        "bos_token_id": 0,
        # Not that of the tokenizer, but what transformers takes for it in all published folders.
        "eos_token_id": 2,
        "hidden_act": described["hidden_act"],
        "hidden_size": width,
        "intermediate_size": part.extent("text_model.encoder.layers.0.mlp.fc1.weight", 0),
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": part.extent("text_model.embeddings.position_embedding.weight", 0),
        "model_type": "clip_text_model",
        "num_attention_heads": width // math.gcd(_TEXT_HEAD_WIDTH, width),
        "num_hidden_layers": part.count("text_model.encoder.layers.#"),
        "pad_token_id": 1,
        "projection_dim": part.extent("text_projection.weight", 0)
        if "text_projection.weight" in part
        else width,
        "vocab_size": part.extent("text_model.embeddings.token_embedding.weight", 0),
    }


def _as_described(part: _Part, described: Described, _: int) -> dict[str, Any]:
    """No more than the class and the `settings` that the family gives."""
    settings: dict[str, Any] = described.get("settings", {})
    return _of_diffusers(described["class"][1]) | settings


_MAKERS: Mapping[str, Callable[[_Part, Described, int], dict[str, Any]]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "as_described": _as_described,
}
