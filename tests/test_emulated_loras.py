"""LoRAs on a GPU, where there is none: the CPU's bits and shares, in files and in memory."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import blockmerge
from tests.emulated_gpu import EmulatedGpu
from tests.lora_oracle import KINDS, written
from tests.test_bake import EVERYWHERE, SDXL, lora_for, model_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sdxl():
    return model_of("sdxl", SDXL.values())


def loras_of(kind, model):
    """One of that kind everywhere, and before it a plain one, with which it meets."""
    places = [SDXL[name] for name in EVERYWHERE]
    loras = [lora_for(places[:3], model, seed=9), lora_for(places, model, kind)]
    return [(written(lora), strength) for lora, strength in zip(loras, (0.5, -1), strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_files(sdxl, tmp_path, kind):
    """Three workers, late copies; no memory is kept."""
    loras = loras_of(kind, sdxl)
    save_file(sdxl, tmp_path / "a.safetensors")

    def baked(device):
        output = tmp_path / f"{device}.safetensors"
        return blockmerge.bake(tmp_path / "a.safetensors", loras, output=output, device=device, threads=3)

    wanted = baked("cpu")
    with EmulatedGpu() as gpu:
        found = baked("cuda")
        assert gpu.launches
        assert gpu.emptied == [(0, 0)]
    assert found.output.read_bytes() == wanted.output.read_bytes()
    shares, others = (
        {(number, block): share for number, change in enumerate([one.change, *(lora["change"] for lora in one.loras)])
         for block, share in change.items() if share is not None}
        for one in (found, wanted)
    )  # fmt: skip
    assert shares == pytest.approx(others, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts(sdxl, kind):
    """Nothing is waited for but the LoRAs on their way there."""
    other = model_of("sdxl", SDXL.values(), seed=1)
    loras = loras_of(kind, sdxl)
    wanted = blockmerge.merge_state_dicts(sdxl, other, weights=0.25, loras=loras)
    with EmulatedGpu() as gpu:
        there = [{name: one.cuda() for name, one in model.items()} for model in (sdxl, other)]
        gpu.waits.clear()
        merged = blockmerge.merge_state_dicts(*there, weights=0.25, loras=loras)
        assert {str(tensor.device) for tensor in merged.values()} == {"cuda:0"}
        assert set(gpu.waits) <= {"a copy to the device"}, set(gpu.waits)
    for name, tensor in merged.items():
        assert torch.equal(tensor, wanted[name]), name
