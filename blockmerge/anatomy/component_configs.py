"""The config of one component of a diffusers folder, from its tensors' shapes and what its family says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from blockmerge.anatomy.structure import built_of
from blockmerge.errors import UnknownFamilyError, shown

Shapes = Mapping[str, tuple[int, ...]]
Described = Mapping[str, Any]
"""What a family says of one component in its `configs`."""

_TEXT_HEAD_WIDTH = 64
_SAMPLES = 8  # pixels a latent
_DIFFUSERS = "0.30.0"  # whose configs these are; some pipelines ask for it


def of_diffusers(name: str) -> dict[str, Any]:
    """How a config of one of diffusers' classes begins."""
    return {"_class_name": name, "_diffusers_version": _DIFFUSERS}


def fitting(table: Mapping[str, Any], words: Collection[str]) -> Iterator[Any]:
    """Yield the values of a table under whose keys are words that a model has, all of them.

    >>> list(fitting({"base": 1, "i2v": 2, "i2v large": 3}, {"base", "i2v"}))
    [1, 2]
    """
    return (value for key, value in table.items() if set(key.split()) <= set(words))


class Part:
    """One component: its shapes, and the words for what kind of a model it is of."""

    def __init__(self, component: str, shapes: Shapes, words: Collection[str] = ()) -> None:
        self.component = component
        self.words = words
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
            raise self.fault(f"{shown(name)} {found}")
        return shape[axis]

    def axes(self, name: str) -> int:
        """The number of a tensor's axes."""
        self.extent(name, 0)
        return len(self._shapes[name])

    def numbers(self, template: str) -> list[int]:
        """The numbers that stand for the ``#`` in a name's start."""
        pattern = re.compile(re.escape(template).replace(r"\#", r"(\d{1,6})") + r"(?:\.|\Z)")
        return sorted({int(match[1]) for name in self._shapes if (match := pattern.match(name))})

    def count(self, template: str) -> int:
        """How many numbers there are for the ``#`` in a name's start."""
        return len(self.numbers(template))

    def widths(self, template: str) -> list[int]:
        """The first extents of the tensors with the numbers from 0 up for ``#``."""
        start = template[: template.index("#") + 1]
        return [self.extent(template.replace("#", str(level)), 0) for level in range(self.count(start))]

    def fault(self, why: str) -> UnknownFamilyError:
        """The error that it is not built as such a component is."""
        return UnknownFamilyError(f"holds no whole {self.component}: {why}")


def component_config(part: Part, described: Described, image_size: int) -> dict[str, Any]:
    """Return a component's config. Raises UnknownFamilyError where it lacks a tensor that tells it."""
    return _MAKERS[described["maker"]](part, described, image_size)


def _unet(part: Part, described: Described, image_size: int) -> dict[str, Any]:
    widths = part.widths("down_blocks.#.resnets.0.conv1.weight")
    built = built_of(part.names)
    where = [f"down_blocks.{n}" for n, kind in enumerate(built["down_block_types"]) if "CrossAttn" in kind]
    first = f"{where[0] if where else 'mid_block'}.attentions.0"
    config = of_diffusers(described["class"][1]) | {
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


def _vae(part: Part, described: Described, image_size: int) -> dict[str, Any]:
    widths = part.widths("encoder.down_blocks.#.resnets.0.conv1.weight")
    shift = {"shift_factor": described["shift_factor"]} if "shift_factor" in described else {}
    return of_diffusers(described["class"][1]) | {
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
        **shift,
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "use_post_quant_conv": "post_quant_conv.weight" in part,
        "use_quant_conv": "quant_conv.weight" in part,
    }


def _text_encoder(part: Part, described: Described, _: int) -> dict[str, Any]:
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


def _as_described(part: Part, described: Described, _: int) -> dict[str, Any]:
    """The class, what the family's `shapes` say that its shapes tell, and the family's `settings`; then the
    same of what it says of models `when` they are of some kind.
    """
    library, name = described["class"]
    is_of_diffusers = library == "diffusers"
    config: dict[str, Any] = of_diffusers(name) if is_of_diffusers else {"architectures": [name]}
    shapes: dict[str, str] = {}
    settings: dict[str, Any] = {}
    for one in (described, *fitting(described.get("when", {}), part.words)):
        shapes |= one.get("shapes", {})
        settings |= one.get("settings", {}) | dict.fromkeys(one.get("null", ()))
    told: dict[str, Any] = {}
    for key, said in shapes.items():
        told[key] = _told(said, part, told)
        if not is_of_diffusers and said.endswith(".#"):  # transformers' layers are all alike
            _check_layers(part, said)
    return config | dict(sorted((told | settings).items()))


def _check_layers(part: Part, template: str) -> None:
    """Raise UnknownFamilyError where a layer lacks what others have; the first may have more."""
    layers: dict[int, set[str]] = {number: set() for number in range(part.count(template))}
    pattern = re.compile(re.escape(template).replace(r"\#", r"(\d{1,6})") + r"\.(.+)")
    for name in part.names:
        if match := pattern.match(name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    alike = set[str]().union(*(names for number, names in layers.items() if number))
    for number, names in sorted(layers.items()):
        if lacking := sorted(alike - names):
            layer = template.replace("#", str(number))
            raise part.fault(f"{shown(f'{layer}.{lacking[0]}')} is missing")


def _told(said: str, part: Part, before: Mapping[str, int]) -> Any:
    """The value of what a family says in its `shapes`, as `families/README.md` describes it; `before` are
    the values of the keys above.
    """
    kind, _, rest = said.partition(" ")
    if kind == "has":
        return rest in part
    if kind == "which":
        return part.numbers(rest)
    if rest.startswith("of "):
        proportions = [int(number) for number in kind.split(":")]
        return _in_proportion(proportions, _number(rest.removeprefix("of "), part, before))
    first, *others = said.split()
    value = _number(first, part, before)
    for sign, operand in zip(others[::2], others[1::2], strict=True):
        number = _number(operand, part, before)
        if sign == "/" and (number == 0 or value % number):
            raise part.fault(f"{said} is {value} / {number}, and should be a whole number")
        value = _SIGNS[sign](value, number)
    return value


_SIGNS: Mapping[str, Callable[[int, int], int]] = {
    "/": lambda a, b: a // b,
    "-": lambda a, b: a - b,
    "gcd": math.gcd,
}


def _number(said: str, part: Part, before: Mapping[str, int]) -> int:
    if said.isdecimal():
        return int(said)
    if said in before:
        return before[said]
    if said.startswith("root:"):
        return math.isqrt(_number(said.removeprefix("root:"), part, before))
    if said.endswith("]"):
        name, _, axis = said[:-1].rpartition("[")
        return part.extent(name, int(axis))
    return part.count(said)


def _in_proportion(proportions: list[int], width: int) -> list[int]:
    """Even numbers that add up to a width, in given proportions as nearly as can be.

    >>> _in_proportion([16, 56, 56], 128), _in_proportion([16, 56, 56], 16)
    ([16, 56, 56], [2, 8, 6])
    """
    total, halves = sum(proportions), width // 2
    found = [halves * one // total for one in proportions]
    rests = [halves * one % total for one in proportions]
    for place in sorted(range(len(found)), key=lambda n: -rests[n])[: halves - sum(found)]:
        found[place] += 1
    return [2 * one for one in found]


_MAKERS: Mapping[str, Callable[[Part, Described, int], dict[str, Any]]] = {
    "unet": _unet,
    "vae": _vae,
    "text_encoder": _text_encoder,
    "as_described": _as_described,
}
