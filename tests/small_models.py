"""Models of a few real tensors of every kind, for tests of what does not depend on how many there are."""

from __future__ import annotations

import re
from functools import cache

import torch
from safetensors.torch import save_file

from blockmerge.anatomy import is_position_ids
from blockmerge.demo import demo_layout
from tests.other_names import in_diffusers

_KEPT = re.compile(
    r"model\.diffusion_model\.(time_embed\.0|label_emb\.0\.0|input_blocks\.[01]\.|middle_block\.1\.(norm|proj_in)|out\.).*"
    r"|model\.diffusion_model\.(input_blocks\.\d+\.0\.in_layers|output_blocks\.[345]\.0\.out_layers)\..*"
    r"|(cond_stage_model|conditioner)\..*(resblocks\.0\.|encoder\.layers\.0\.|text_projection|logit_scale|final).*"
    r"|first_stage_model\.encoder\.(mid\.attn_1|conv_in)\..*"
)


@cache
def _shapes(family, for_a_folder):
    # No config makes a part of a model.
    return {
        name: shape for name, shape in demo_layout(family).items() if for_a_folder or _KEPT.fullmatch(name)
    }


def small_model(family="sd1", dtype=torch.float16, seed=0, *, for_a_folder=False):
    """A model in LDM names with few, thin tensors: what tells the family, convolutions, matrices, joined and
    transposed ones.

    With all tensors, where it is to become a folder.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = _shapes(family, for_a_folder)

    def made(name, shape):
        if is_position_ids(name):
            return torch.arange(shape[-1]).expand(shape).contiguous()
        return torch.randn(shape, generator=generator).to(dtype)

    return {name: made(name, shape) for name, shape in shapes.items()}


def write_folder(folder, model, family):
    """Write a model in LDM names as a diffusers folder, without configs. Returns the folder."""
    found = in_diffusers(model, family)
    for component in {name.partition("/")[0] for name in found}:
        (folder / component).mkdir(parents=True)
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        tensors = {
            name.partition("/")[2]: tensor
            for name, tensor in found.items()
            if name.startswith(f"{component}/")
        }
        save_file(tensors, folder / component / f"{stem}.safetensors")
    return folder
