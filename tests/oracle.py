"""What a merge should be, worked out in float64 from the definitions, without any of blockmerge's code."""

from __future__ import annotations

import torch

SD = ["BASE", *(f"IN{n:02}" for n in range(12)), "M00", *(f"OUT{n:02}" for n in range(12))]
SDXL = ["BASE", *(f"IN{n:02}" for n in range(9)), "M00", *(f"OUT{n:02}" for n in range(9))]

HIGH_RES = "0,0,1,1,0.67,0.67,0.33,0.33,0,0,0,0,0,0,0,0,0,0,0,0.33,0.33,0.67,0.67,1,1,0"
LOW_RES = "0,0,0,0,0,0,0,0.33,0.33,0.67,0.67,1,1,1,1,1,0.67,0.67,0.33,0.33,0,0,0,0,0,0"
SDXL_HIGH_RES = "0,0,1,1,0.67,0.67,0.33,0.33,0,0,0,0,0,0.33,0.33,0.67,0.67,1,1,0"
SDXL_LOW_RES = "0,0,0,0,0,0,0,0.33,0.33,0.67,1,0.67,0.33,0.33,0,0,0,0,0,0"


def numbers(text):
    return [float(word) for word in text.split(",")]


def block(name, family):
    """The table of the merge-block-weighted tool, by plain string surgery."""
    if not name.startswith("model.diffusion_model."):
        return "BASE"
    parts = name.split(".")[2:]
    if parts[0] == "input_blocks":
        return "IN" + parts[1].zfill(2)
    if parts[0] == "output_blocks":
        return "OUT" + parts[1].zfill(2)
    if parts[0] == "out":
        return "OUT08" if family == "sdxl" else "OUT11"
    return "M00" if parts[0] == "middle_block" else "IN00"


def weight_of(name, family, weights, *, vae="auto"):
    """The weight of a tensor under the default policies; weights by block."""
    if name.endswith("position_ids"):
        return 0.0
    if name.startswith("first_stage_model.") and vae == "auto":
        return 0.0 if weights["BASE"] <= 0.5 else 1.0
    return weights[block(name, family)]


def step_at(size, dtype):
    """One step (unit in the last place) of `dtype` at magnitude `size`, in float64."""
    bits, lowest = {
        torch.float16: (10, -14),
        torch.bfloat16: (7, -126),
        torch.float32: (23, -126),
        torch.float64: (52, -1022),
    }[dtype]
    exponent = torch.frexp(size.double())[1].double() - 1
    return 2.0 ** (torch.clamp(exponent, min=lowest) - bits)


def assert_merged(out, a, b, weights, family, *, vae="auto"):
    """Hold a merged state dict against A and B: exact where a weight is 0 or 1, else within one step."""
    assert out.keys() == a.keys()
    for name, result in out.items():
        assert result.dtype == a[name].dtype
        assert result.shape == a[name].shape
        weight = weight_of(name, family, weights, vae=vae)
        if weight == 0 or (weight == 1 and b[name].dtype == a[name].dtype):
            source = a if weight == 0 else b
            assert torch.equal(bits(result), bits(source[name])), name
            continue
        first, second = a[name].double(), b[name].double()
        exact = (1 - weight) * first + weight * second
        error = (result.double() - exact).abs() / step_at(
            torch.maximum(first.abs(), second.abs()), result.dtype
        )
        assert error.max() <= 1, (name, error.max())


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)
