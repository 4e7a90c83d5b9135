"""Write a merge method of one's own, and merge with it.

    python examples/own_method.py
    cd examples && blockmerge a.safetensors b.safetensors --weights 0.5 --method own_method:nearer

A method is a function of one tensor of each model. It may be given any stretch of a tensor, as float32 or
float64, and returns the result, which blockmerge rounds and writes. Its keywords are the weights, and numbers
with a default.
"""

from __future__ import annotations

import torch

import blockmerge
from blockmerge.demo import write_pair


@blockmerge.merge_method(formula="A + α·(B − A) where |B − A| ≤ limit, else A")
def nearer(a: torch.Tensor, b: torch.Tensor, *, alpha: float, limit: float = 0.02) -> torch.Tensor:
    """A weighted sum that leaves alone whatever B has changed a lot."""
    difference = b - a
    return torch.where(difference.abs() <= limit, a + alpha * difference, a)


if __name__ == "__main__":
    from pathlib import Path

    from safetensors.torch import load_file

    folder = Path("blockmerge-example")
    folder.mkdir(exist_ok=True)
    paths = folder / "a.safetensors", folder / "b.safetensors"
    write_pair(*paths, "sd1", overwrite=True)
    a, b = map(load_file, paths)

    merged = blockmerge.merge_state_dicts(a, b, weights=0.5, method=nearer)
    plain = blockmerge.merge_state_dicts(a, b, weights=0.5)
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    far = (b[name].float() - a[name].float()).abs() > 0.02
    print(
        f"left alone: {bool((merged[name][far] == a[name][far]).all())}, {far.float().mean():.0%} of {name}"
    )
    print(f"as a weighted sum elsewhere: {bool(merged[name][~far].equal(plain[name][~far]))}")
