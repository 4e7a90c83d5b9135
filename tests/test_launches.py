"""The path that merges take on a GPU, without one: tensors on torch's `meta` device have no values, so
whatever asks for one (and so would wait for a GPU) is an error, and what is launched can be counted. Copies
to the device are not seen to wait.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import blockmerge
from blockmerge.anatomy import layout
from blockmerge.methods import METHODS
from tests.small_models import small_model

FREE = (
    "view",
    "detach",
    "empty",
    "slice",
    "split",
    "select.int",
    "unbind",
    "permute",
    "narrow",
    "expand",
    "alias",
    "t.default",
)
"""What makes a tensor without computing one."""


class Launches(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        if not name.startswith(FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class OnDevice(torch.Tensor):
    """A tensor without values that passes for one with them."""

    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl


def u_net(shapes):
    names = (name for name in shapes if name.startswith("model.diffusion_model."))
    tensors = {name: torch.empty(shapes[name], dtype=torch.float16, device="meta") for name in names}
    return {name: tensor.as_subclass(OnDevice) for name, tensor in tensors.items()}


def launches(model, method):
    beta = {"weights_beta": 0.25} if "beta" in method.weights else {}
    with Launches() as seen:
        merged = blockmerge.merge_state_dicts(
            *[dict(model) for _ in range(method.models or 3)], method=method.name, weights=0.5, **beta
        )
    assert {name: (tensor.shape, tensor.device.type) for name, tensor in merged.items()} == {
        name: (tensor.shape, "meta") for name, tensor in model.items()
    }
    return seen.names


@pytest.mark.parametrize("name", METHODS)
def test_nothing_waits(name):
    assert launches(u_net({name: tensor.shape for name, tensor in small_model("sd1").items()}), METHODS[name])


@pytest.mark.parametrize(
    "name", [method.name for method in METHODS.values() if method.locality == "element" and not method.random]
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_large_launches(family, name):
    """No function is launched half as many times as a U-Net has tensors."""
    model = u_net(layout(family))
    assert max(Counter(launches(model, METHODS[name])).values()) < len(model) / 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda a: a.sum().item(),
        lambda a: a[a > 0],
        lambda a: a.cpu(),
        lambda a: bool(a.isfinite().all()),
        torch.nonzero,
    ],
)
def test_what_waits_is_seen(wait):
    @blockmerge.merge_method()
    def waiting(a, b, *, alpha):
        """Waits."""
        wait(a)
        return a

    model = u_net({name: tensor.shape for name, tensor in small_model("sd1").items()})
    with pytest.raises((RuntimeError, NotImplementedError, blockmerge.RecipeError), match=r"(?i)meta"):
        blockmerge.merge_state_dicts(model, dict(model), method=waiting, weights=0.5)
