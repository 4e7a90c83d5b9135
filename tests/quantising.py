"""Scaled fp8 as the tools write it, made with torch alone, and what it stands for."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = {E4M3: "float8_e4m3fn", E5M2: "float8_e5m2"}
SPELLINGS = ("scaled_fp8", "comfy_quant", "metadata", "bare")
"""Old and new names; the new ones with what they say in tensors, in the metadata, or not at all."""


def codes_of(weight, dtype=E4M3, *, by_row=False):
    """8-bit floats, and the scale that makes them the weight again: one, or one for each row."""
    limit = torch.finfo(dtype).max
    wide = weight.float()
    largest = wide.flatten(1).abs().amax(1) if by_row else wide.abs().max()
    scale = (largest / limit).clamp(min=2.0**-60)
    return (wide / _along(scale, wide)).clamp(-limit, limit).to(dtype), scale


def meant(codes, scale):
    """What codes and scale stand for, in float32."""
    return codes.float() * _along(scale.float(), codes)


def _along(scale, weight):
    return scale.view(-1, *[1] * (weight.dim() - 1)) if scale.numel() > 1 else scale


def is_quantised(name, tensor):
    """Whether tools quantise such a tensor: matrices and convolutions outside the VAE."""
    vae = name.startswith(("first_stage_model.", "vae"))
    return name.endswith(".weight") and tensor.dim() > 1 and not vae


def quantised(model, spelling="scaled_fp8", dtype=E4M3, *, by_row=False, of=is_quantised):
    """Return (a model in scaled fp8, its metadata, the same model with what that stands for in float32)."""
    found, plain, layers = {}, {}, {}
    old = spelling == "scaled_fp8"
    for name, tensor in model.items():
        if not of(name, tensor):
            found[name] = plain[name] = tensor
            continue
        layer = name.removesuffix("weight")
        codes, scale = codes_of(tensor, dtype, by_row=by_row)
        found[name], plain[name] = codes, meant(codes, scale)
        found[f"{layer}scale_weight" if old else f"{layer}weight_scale"] = scale
        found[f"{layer}scale_input" if old else f"{layer}input_scale"] = torch.tensor(1.0)
        layers[layer.removesuffix(".")] = {"format": FORMATS[dtype]}
        if spelling == "comfy_quant":
            text = json.dumps(layers[layer.removesuffix(".")]).encode()
            found[f"{layer}comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()
    if old:
        found["scaled_fp8"] = torch.zeros(2 if by_row else 0, dtype=dtype)
    said = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    return found, said if spelling == "metadata" else {}, plain


def saved(folder, name, tensors, metadata=None):
    """Write a file of that name, and return its path."""
    tensors = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / f"{name}.safetensors", metadata=metadata)
    return folder / f"{name}.safetensors"
