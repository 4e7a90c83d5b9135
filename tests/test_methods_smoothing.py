"""`smooth_add_difference` is scipy.ndimage's median and Gaussian filter."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from scipy import ndimage

from blockmerge.methods import METHODS, smoothing

SHAPES = [(1,), (2,), (9,), (300,), (5, 3), (100, 70), (1, 1), (1, 40), (40, 1), (64, 48, 3, 3), (7, 2, 2, 2), (50, 3, 1, 5),
          (6, 5, 4), (33, 20, 1, 1), (5, 9, 2, 3)]  # fmt: skip


def smoothed(delta):
    return ndimage.gaussian_filter(
        ndimage.median_filter(delta, size=3, mode="reflect"), 1.0, mode="reflect", truncate=4.0
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("small", [False, True], ids=["one slab", "many slabs"])
def test_it_is_scipys(shape, dtype, small, monkeypatch):
    if small:
        monkeypatch.setattr(smoothing, "_SLAB", 1)
        monkeypatch.setattr(smoothing, "_LEAST_ROWS", 3)
        monkeypatch.setattr(smoothing, "_BLOCK", 40)
        shape = (min(shape[0], 20), *shape[1:])
    generator = torch.Generator().manual_seed(len(shape))
    a, b, c = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    out = torch.empty(shape, dtype=torch.float32)
    METHODS["smooth_add_difference"].function(a, b, c, alpha=0.7, out=out)
    delta = b.double().numpy() - c.double().numpy()
    wanted = a.double().numpy() + 0.7 * smoothed(delta)
    assert np.abs(out.double().numpy() - wanted).max() <= 1e-6 * np.abs(delta).max()


@pytest.mark.parametrize("shape", [(320, 320, 3, 3), (320, 1280), (320, 4, 3, 3)], ids=str)
def test_whole_layers_of_a_fine_tune(shape):
    # Of real sizes and magnitudes, in float32, as for models in half precision.
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(shape, generator=generator).mul_(0.02).half()
    b = torch.randn(shape, generator=generator).mul_(0.001).add_(c).half()
    found = torch.empty(shape)
    for rows, values in smoothing.smoothed_slabs(b, c, torch.float32):
        found[rows] = values
    delta = b.double().numpy() - c.double().numpy()
    assert np.abs(found.numpy() - smoothed(delta)).max() <= 1e-6 * np.abs(delta).max()


@pytest.mark.parametrize("length", [1, 3, 9, 27])
def test_the_networks_merge(length):
    # By the 0-1 principle, three sorted lists of zeros and ones are all that there is to try.
    everything, order = smoothing._merging_network(length, False)
    pruned, (middle,) = smoothing._merging_network(length, True)
    assert sum(wanted == "both" for _, _, wanted in pruned) < len(everything)
    ones = [(x, y, z) for x in range(length + 1) for y in range(length + 1) for z in range(length + 1)]
    for counts in random.Random(0).sample(ones, min(len(ones), 1000)):
        values = [place >= length - count for count in counts for place in range(length)]
        for exchanges, outputs in ((everything, order), (pruned, [middle])):
            wires = list(values)
            for low, high, wanted in exchanges:
                one, other = wires[low], wires[high]
                wires[low] = (one and other) if wanted != "high" else None
                wires[high] = (one or other) if wanted != "low" else None
            right = sorted(values)
            assert [wires[output] for output in outputs] == (
                right if exchanges is everything else [right[len(right) // 2]]
            )


def test_torchs_medians_are_numpys():
    # What runs on a GPU, on the CPU.
    values = torch.randn(5, 5, 9, 11, generator=torch.Generator().manual_seed(0))
    found = smoothing._median_of_block(values, torch.minimum, torch.maximum)
    assert torch.equal(
        found, torch.from_numpy(smoothing._median_of_block(values.numpy(), np.minimum, np.maximum))
    )
    wanted = ndimage.median_filter(values.numpy(), size=3)[1:-1, 1:-1, 1:-1, 1:-1]
    assert torch.equal(found, torch.from_numpy(wanted))
