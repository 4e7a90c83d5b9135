"""Adapters of one or a few modules, for a model with narrow layers of unlike sides."""

from __future__ import annotations

import pytest
import torch

from blockmerge import CheckpointError
from blockmerge.adapters import Adapter
from blockmerge.checkpoints import StateDict

LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
PLAIN = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
POINT = "lora_unet_mid_block_attentions_0_proj_in"
NORM = "lora_unet_mid_block_resnets_0_norm1"
FIRST = "lora_unet_conv_in"
SHAPES = {  # of a model with narrow layers of unlike sides
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_out.0.weight": (8, 6),
    "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight": (8, 6),
    "model.diffusion_model.middle_block.0.in_layers.2.weight": (8, 6, 3, 3),
    "model.diffusion_model.middle_block.1.proj_in.weight": (8, 6, 1, 1),
    "model.diffusion_model.middle_block.0.in_layers.0.weight": (8,),
    "model.diffusion_model.input_blocks.0.0.weight": (8, 9, 3, 3),
}


def tensors_of(module, parts, dtype=torch.float32):
    return {f"{module}.{part}": torch.ones(shape, dtype=dtype) for part, shape in parts.items()}


def lora_of(module, rank=2, shape=(8, 6), alpha=None, dtype=torch.float32):
    parts = {"lora_down.weight": (rank, *shape[1:]), "lora_up.weight": (shape[0], rank)}
    found = tensors_of(module, parts, dtype)
    return found if alpha is None else {**found, f"{module}.alpha": torch.tensor(alpha)}


def opened(tensors, metadata=None, **how):
    source = StateDict(tensors, "x")
    source.metadata = metadata or {}
    return Adapter.of(source, **how)


def narrow(tensors, metadata=None, family="sd1", shapes=SHAPES):
    """The adapter for the narrow model."""
    return opened(tensors, metadata, family=family, shapes=shapes)


def refused(tensors, error=CheckpointError, metadata=None, **how):
    """What is said of tensors that are no adapter for the narrow model: one line that begins with the name."""
    with pytest.raises(error) as caught:
        opened(tensors, metadata, **({"family": "sd1", "shapes": SHAPES} | how))
    assert type(caught.value) is error
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("x")
    return said
