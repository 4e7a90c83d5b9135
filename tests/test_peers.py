"""Agreement with sd-mecha 1.1.8, where its definition is ours: `make peers` installs it in a place of its
own.

Pairings, all on float32 tensors and to float32 rounding (sd-mecha computes in float32, we in float64):

=================  ===================================
============================================================= ours               sd-mecha
parameters =================  ===================================
============================================================= weighted_sum       weighted_sum(a, b, alpha)
alpha = α add_difference     add_difference(a, b, c, alpha)       alpha = α, clamp_to_ab off slerp
slerp(a, b, alpha)                   alpha = α; tensors that are neither parallel nor 0 tensor_sum
tensor_sum(a, b, width, offset)      width = α, offset = β; bounds that are whole numbers of rows
=================  ===================================
=============================================================
"""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch

from blockmerge.methods import METHODS

sd_mecha = pytest.importorskip("sd_mecha", reason="sd-mecha is not installed: make peers")

SHAPES = [(20,), (20, 30), (40, 5, 3, 3)]


def test_it_is_the_version_that_the_pairings_are_of():
    assert version("sd-mecha") == "1.1.8"


@pytest.fixture(params=SHAPES, ids=str)
def models(request):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(request.param, generator=generator) for _ in range(3)]


def theirs(name, models, **parameters):
    nodes = [sd_mecha.value_to_node({"x": model.clone()}) for model in models]
    return sd_mecha.merge(
        getattr(sd_mecha, name)(*nodes, **parameters),
        merge_dtype=torch.float32,
        output_dtype=torch.float32,
        threads=0,
    )["x"]


def ours(name, models, **weights):
    flat = METHODS[name].locality == "element"
    out = torch.empty_like(models[0])
    METHODS[name].function(
        *(model.view(-1) if flat else model for model in models), out=out.view(-1) if flat else out, **weights
    )
    return out


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0, 1.5])
@pytest.mark.parametrize(("name", "count"), [("weighted_sum", 2), ("add_difference", 3), ("slerp", 2)])
def test_the_same_weight(models, name, count, alpha):
    found = theirs(name, models[:count], alpha=alpha)
    assert torch.allclose(ours(name, models[:count], alpha=alpha), found, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.0), (0.25, 0.5), (0.5, 0.75), (1.0, 0.0), (0.0, 0.0)])
def test_tensor_sum(models, alpha, beta):
    assert torch.equal(
        ours("tensor_sum", models[:2], alpha=alpha, beta=beta),
        theirs("tensor_sum", models[:2], width=alpha, offset=beta),
    )
