"""Thin transformers as diffusers builds them, and their weights under original names, by this file's own
reading of the tables in `renaming_tables/`, which were made by running diffusers' converters on addresses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import torch

TABLES = Path(__file__).parent / "renaming_tables"


@dataclass(frozen=True)
class Thin:
    """A model: its family and version, diffusers' class with its arguments, and what one pass takes."""

    family: str
    table: str
    kind: str
    config: dict
    inputs: object
    variant: str
    pipeline: str
    drops: dict = field(default_factory=dict)
    """Original names that diffusers has no place for, and their shapes."""

    def build(self, seed=0):
        """The model, with random values everywhere."""
        import diffusers

        torch.manual_seed(seed)
        model = getattr(diffusers, self.kind)(**self.config).eval()
        for name, tensor in model.state_dict().items():
            spread = 0.3 if tensor.dim() == 1 else tensor.shape[-1] ** -0.5
            tensor.normal_(1.0 if name.endswith("weight") and tensor.dim() == 1 else 0.0, spread)
        return model

    def original(self, model):
        """Its weights under original names."""
        found = to_original(model.state_dict(), read_table(self.table))
        generator = torch.Generator().manual_seed(9)
        return found | {name: torch.randn(s, generator=generator) for name, s in self.drops.items()}


def read_table(name):
    """[(original name, diffusers name, [(start, stop) of its rows], rows of all)]; for all rows no numbers."""
    lines = []
    for line in (TABLES / f"{name}.tsv").read_text().splitlines()[1:]:
        original, other, rows, _ = line.split("\t")
        said, _, of = rows.partition(" of ")
        stretches = [tuple(map(int, one.split(":"))) for one in said.split()] if of else []
        lines.append((original, other, stretches, int(of or 0)))
    return lines


def to_original(state, table):
    """Put the tensors of diffusers names where the table says that they are among the original ones."""
    pieces = {}
    left = set(state)
    for original, other, stretches, of in table:
        pattern = re.compile(re.escape(other).replace(r"\#", r"(\d+)"))
        numbers = [
            (match[1] if "#" in other else "", name) for name in state if (match := pattern.fullmatch(name))
        ]
        # A second line for the same two names is for the last block alone.
        if (original, other) in pieces.get("seen", set()):
            numbers = [max(numbers, key=lambda pair: int(pair[0]))]
        pieces.setdefault("seen", set()).add((original, other))
        for number, name in numbers:
            left.discard(name)
            pieces.setdefault(original.replace("#", number), {})[name] = (stretches, of)
    assert not left, sorted(left)[:5]
    del pieces["seen"]
    return {
        original: _assembled([(state[n], *how) for n, how in held.items()])
        for original, held in pieces.items()
    }


def _assembled(parts):
    if not parts[0][1]:
        ((tensor, _, _),) = parts
        return tensor.clone()
    (scale,) = {Fraction(len(tensor), sum(stop - start for start, stop in rows)) for tensor, rows, _ in parts}
    whole = torch.full((int(parts[0][2] * scale), *parts[0][0].shape[1:]), float("nan")).to(parts[0][0].dtype)
    for tensor, rows, _ in parts:
        for start, stop in rows:
            start, stop = int(start * scale), int(stop * scale)
            whole[start:stop], tensor = tensor[: stop - start], tensor[stop - start :]
    assert not whole.isnan().any()
    return whole


def _random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _flux(guidance=False):
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    inputs = {
        "hidden_states": _random(1, 16, 64),
        "encoder_hidden_states": _random(1, 5, 64),
        "timestep": torch.tensor([0.7]),
        "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }
    return inputs | ({"guidance": torch.tensor([3.5])} if guidance else {})


_FLUX = {
    "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 3,
    "joint_attention_dim": 64, "axes_dims_rope": (2, 8, 6),
}  # fmt: skip
_SD3 = {
    "attention_head_dim": 16, "num_attention_heads": 3, "joint_attention_dim": 64, "caption_projection_dim": 48,
    "pooled_projection_dim": 64,
}  # fmt: skip


def _sd3():
    return {
        "hidden_states": _random(1, 16, 8, 8),
        "encoder_hidden_states": _random(1, 5, 64),
        "pooled_projections": _random(1, 64),
        "timestep": torch.tensor([700.0]),
    }


def _flux_model(variant, pipeline="FluxPipeline", guidance=False, **config):
    inputs = _flux(guidance) | {"pooled_projections": _random(1, 32)}
    inputs["hidden_states"] = _random(1, 16, config.get("in_channels", 64))
    return Thin(
        "flux1", "flux1_dev", "FluxTransformer2DModel",
        _FLUX | {"pooled_projection_dim": 32, "guidance_embeds": guidance, **config}, inputs, variant, pipeline,
    )  # fmt: skip


def _sd3_model(variant, table, **config):
    return Thin(
        "sd3", table, "SD3Transformer2DModel", _SD3 | config, _sd3(), variant, "StableDiffusion3Pipeline"
    )


def _cosmos(family, variant, channels, pipeline):
    config = {
        "in_channels": channels, "num_attention_heads": 3, "attention_head_dim": 16, "num_layers": 2,
        "text_embed_dim": 32, "adaln_lora_dim": 16, "extra_pos_embed_type": None,
        "rope_scale": (1.0, 4.0, 4.0) if channels == 16 else (1.0, 3.0, 3.0),
    }  # fmt: skip
    inputs = {
        "hidden_states": _random(1, channels, 1, 8, 8),
        "timestep": torch.tensor([0.7]),
        "encoder_hidden_states": _random(1, 5, 32),
        "padding_mask": torch.zeros(1, 1, 8, 8),
    }
    return Thin(family, "cosmos_predict2_2b", "CosmosTransformer3DModel", config, inputs, variant, pipeline)


THIN = {
    "schnell": _flux_model("schnell"),
    "dev": _flux_model("dev", guidance=True),
    "fill": _flux_model("fill dev", "FluxFillPipeline", guidance=True, in_channels=384, out_channels=64),
    "control": _flux_model("control dev", "FluxControlPipeline", guidance=True, in_channels=128, out_channels=64),
    "chroma": Thin(
        "chroma", "chroma", "ChromaTransformer2DModel",
        _FLUX | {"approximator_hidden_dim": 80}, _flux(), "base", "ChromaPipeline",
    ),
    "sd3": _sd3_model("medium", "sd3_medium", num_layers=3, pos_embed_max_size=8),
    "sd3.5-medium": _sd3_model(
        "3.5-medium", "sd35_medium", num_layers=14, pos_embed_max_size=12, qk_norm="rms_norm",
        dual_attention_layers=tuple(range(13)),
    ),
    "sd3.5-large": _sd3_model(
        "3.5-large", "sd35_large", num_layers=3, pos_embed_max_size=8, qk_norm="rms_norm"
    ),
    "z_image": Thin(
        "z_image", "z_image", "ZImageTransformer2DModel",
        {"dim": 48, "n_layers": 2, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 40, "axes_dims": [4, 6, 6],
         "axes_lens": [1536, 512, 512]},
        {"x": [_random(16, 1, 8, 8)], "t": torch.tensor([0.7]), "cap_feats": [_random(5, 40)]},
        "base", "ZImagePipeline", {"norm_final.weight": (48,)},
    ),
    "lumina2": Thin(
        "lumina2", "lumina2", "Lumina2Transformer2DModel",
        {"hidden_size": 48, "num_layers": 2, "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 64,
         "axes_dim_rope": (6, 6, 4), "cap_feat_dim": 48},
        {"hidden_states": _random(1, 16, 8, 8), "timestep": torch.tensor([0.7]),
         "encoder_hidden_states": _random(1, 5, 48), "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)},
        "base", "Lumina2Pipeline", {"norm_final.weight": (48,)},
    ),
    "cosmos": _cosmos("cosmos_predict2", "base", 16, "Cosmos2TextToImagePipeline"),
    "cosmos i2v": _cosmos("cosmos_predict2", "i2v", 17, "Cosmos2VideoToWorldPipeline"),
}  # fmt: skip
