"""Changes that look at the weight: those that LyCORIS' own modules make at strength 1, and linear in strength."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule

from blockmerge.checkpoints import StateDict
from blockmerge.expressions import (
    Changed,
    Decomposed,
    Generalised,
    LowRank,
    Rescaled,
    Rotated,
    Stored,
)
from blockmerge.merging.in_memory import tensor_of

LAYERS = {"linear": lambda: torch.nn.Linear(8, 16), "convolution": lambda: torch.nn.Conv2d(8, 16, 3)}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]()


def random(module):
    for parameter in module.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return {name: tensor.detach() for name, tensor in module.state_dict().items()}


def assert_makes(make, layer, tensors, wanted):
    """The expression that `make` gives for the weight and named tensors is the change `wanted`."""
    source = StateDict({"weight": layer.weight.detach(), **tensors}, "module")
    change = make(Stored.of(source, "weight"), lambda name: Stored.of(source, name))
    assert torch.allclose(tensor_of(change), wanted.detach().double(), rtol=1e-5, atol=1e-6)
    for strength in (0, -1, 0.5, 2):
        whole = tensor_of(Changed(Stored.of(source, "weight"), (change,), (strength,), "F64"))
        assert torch.allclose(whole, layer.weight.detach().double() + strength * tensor_of(change))


@pytest.mark.parametrize("limit", [0, 0.01])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
def test_oft_and_boft(layer, kind, rescaled, limit):
    module = kind("x", layer, 1.0, 4, limit, constraint=limit, rescaled=rescaled)
    tensors = random(module)
    module.alpha.fill_(limit)

    def make(weight, named):
        factors = (named("oft_blocks"), *([named("rescale")] if rescaled else []))
        return Rotated(weight, factors, "F64", limit * 16 or None)

    assert_makes(make, layer, tensors, module.get_diff_weight(1)[0])


def test_old_oft_holds_the_rotations_themselves(layer):
    turned, _ = torch.linalg.qr(torch.randn(4, 4, 4))
    weight = layer.weight.detach()
    wanted = torch.einsum("knm,kn...->km...", turned, weight.view(4, 4, *weight.shape[1:]))
    wanted = wanted.reshape(weight.shape) - weight

    def make(weight, named):
        return Rotated(weight, (named("oft_diag"),), "F64", None, is_rotation=True)

    assert_makes(make, layer, {"oft_diag": turned}, wanted)


def test_glora(layer):
    module = GLoRAModule("x", layer, 1.0, 4, 2)
    tensors = random(module)

    def make(weight, named):
        return Generalised(
            weight, tuple(named(f"{one}.weight") for one in ("a1", "a2", "b1", "b2")), "F64", 0.5
        )

    assert_makes(make, layer, tensors, module.make_weight())


@pytest.mark.parametrize("on_input", [False, True])
def test_ia3(layer, on_input):
    module = IA3Module("x", layer, 1.0, train_on_input=on_input)
    tensors = random(module)

    def make(weight, named):
        return Rescaled(weight, (named("weight_"),), "F64", on_input)

    assert_makes(make, layer, {"weight_": tensors["weight"]}, module.get_diff_weight(1)[0])


@pytest.mark.parametrize("on_output", [False, True])
def test_dora(layer, on_output):
    module = LoConModule("x", layer, 1.0, 4, 2, weight_decompose=True, wd_on_out=on_output)
    tensors = random(module)
    module.dora_scale.data = torch.rand_like(module.dora_scale) + 0.5
    tensors = {name: tensor.detach() for name, tensor in module.state_dict().items()}

    def make(weight, named):
        change = LowRank(
            weight.shape,
            "F64",
            ups=(named("lora_up.weight"),),
            downs=(named("lora_down.weight"),),
            scales=(0.5,),
        )
        return Decomposed(weight, (change, named("dora_scale")), "F64")

    assert_makes(make, layer, tensors, module.get_merged_weight(1)[0] - layer.weight)
