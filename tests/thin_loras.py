"""LoRAs with the names that real trainers write, for models with narrow layers, and what new ones change."""

from __future__ import annotations

from math import prod

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from blockmerge.demo import demo_layout
from tests.adapter_names import modules

PROGRAMS = {"sd1": "sd15-kohya-locon", "sd2": "sd21-kohya", "sdxl": "sdxl-kohya-locon"}


def own_shapes(family, program=None):
    """{name of a module: (its block, its own weight's shape in a narrow model)}, as a trainer has them."""
    thin = demo_layout(family)
    found = {}
    for name, named in modules(family, program or PROGRAMS[family]).items():
        first, *rest = thin[named.ldm]
        found[name] = named.block, (first // 3 if named.rows else first, *rest)
    return found


def make_lora(
    path, family, *, rank=4, alpha=None, dtype=torch.float16, seed=0, only=None, scale=1.0, metadata=None
):
    """Write a LoRA. Returns its path; `only` says which modules it has, by their names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (_, (rows, *inner)) in own_shapes(family).items():
        if only is not None and not only(name):
            continue
        own = min(rank, rows, prod(inner))
        up = torch.randn(rows, own, *[1] * (len(inner) - 1), generator=generator)
        down = torch.randn(own, *inner, generator=generator)
        tensors[f"{name}.lora_up.weight"] = (up * 0.1 * scale).to(dtype)
        tensors[f"{name}.lora_down.weight"] = (down * prod(inner) ** -0.5).to(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(float(alpha)).to(dtype)
    save_file(tensors, path, metadata)
    return path


def parts_in(path):
    """{name of a module: {part: tensor}} of a file."""
    found = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118 (a file is no dict)
            module, _, part = name.partition(".")
            found.setdefault(module, {})[part] = file.get_tensor(name)
    return found


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def ranks_of(path):
    return {name: len(parts["lora_down.weight"]) for name, parts in parts_in(path).items()}


def change(parts):
    """What a plain module changes, as a matrix in float64."""
    up, down = (parts[f"lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
    factor = parts["alpha"].item() / len(down) if "alpha" in parts else 1.0
    return factor * up @ down


def changes(path):
    return {name: change(parts) for name, parts in parts_in(path).items()}


def assert_near(found, wanted, allowed):
    """Hold matrices against each other, each within a part of its Frobenius norm."""
    assert found.keys() == wanted.keys()
    for name, matrix in wanted.items():
        error, size = (found[name] - matrix).norm(), matrix.norm()
        assert error <= allowed * size, (name, float(error / size))
