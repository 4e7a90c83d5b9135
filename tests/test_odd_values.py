"""Values that no model should hold: whatever they are, users see lines of blockmerge's own, and no warnings of
the libraries below.
"""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.cli.main import run
from tests.small_models import small_model

POSITIONS = "cond_stage_model.transformer.text_model.embeddings.position_ids"
SIGNALLING = {
    torch.float16: (torch.int16, 0x7D01),
    torch.bfloat16: (torch.int16, 0x7FA1),
    torch.float32: (torch.int32, 0x7FA00001),
    torch.float64: (torch.int64, 0x7FF4_0000_0000_0001),
    torch.float8_e5m2: (torch.int8, 0x7D),
    torch.float8_e4m3fn: (torch.int8, 0x7F),  # it has no signalling one
}
COMMANDS = (
    "odd.safetensors b.safetensors -w 0.5 -o clipped.safetensors --allow-nonfinite --clip --adjust 1,1,1,1",
    "b.safetensors odd.safetensors -w 0.5 -m cosine_a -o cosine.safetensors --allow-nonfinite",
    "b.safetensors odd.safetensors -w 0.5 -o refused.safetensors",
    "check odd.safetensors",
    "convert odd.safetensors small.safetensors --dtype fp8_e4m3fn --allow-nonfinite",
    "similarity b.safetensors odd.safetensors",
    "similarity odd.safetensors a.safetensors b.safetensors --method weights --matrix",
    "explain odd.safetensors a.safetensors b.safetensors",
    "explain merge.safetensors a.safetensors odd.safetensors --tensors --json",
)
OF_IDS = (
    "inspect odd.safetensors",
    "check odd.safetensors --fix fixed.safetensors --overwrite",
    "convert odd.safetensors ids.safetensors --overwrite",
    "odd.safetensors b.safetensors -w 0.5 -o merged.safetensors --overwrite",
)


def number(dtype, bits=None):
    integer, signalling = SIGNALLING[dtype]
    bits = signalling if bits is None else bits
    return torch.tensor([bits], dtype=torch.int64).to(integer).view(dtype)[0]


@pytest.fixture(scope="module")
def odd_pair(pairs):
    return [load_file(path) for path in pairs()]


def in_folder(here, a, b, odd):
    mean = blockmerge.merge_state_dicts(a, b, weights=0.5)
    for name, model in {"a": a, "b": b, "odd": odd, "merge": mean}.items():
        save_file(model, here / f"{name}.safetensors")


def assert_quiet(capfd, commands=COMMANDS):
    for command in commands:
        code = run(command.split())
        out, err = capfd.readouterr()
        assert code in (0, 1), (command, err)
        for word in ("Traceback", "Warning", ".py"):
            assert word not in out + err, (command, out, err)
        assert err.count("\n") <= 3, (command, err)


def test_a_signalling_nan_in_position_ids(here, capfd):
    a, b = (small_model(seed=seed, for_a_folder=True) for seed in range(2))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        ids = a[POSITIONS].to(dtype)
        ids.view(-1)[5] = number(dtype)
        for name, model in {"b": b, "odd": {**a, POSITIONS: ids}}.items():
            save_file(model, f"{name}.safetensors")
        assert_quiet(capfd, OF_IDS)
        assert torch.equal(load_file("merged.safetensors")[POSITIONS], a[POSITIONS])


@pytest.mark.parametrize("values", ["finite", "all"])
def test_such_weights(odd_pair, here, capfd, values):
    """In tensors of every dtype: its largest and smallest numbers, −0, and with all also infinity and NaN."""
    a, b = odd_pair
    odd = dict(a)
    names = [name for name in a if "output_blocks.4.1" in name and a[name].dim() == 2]
    for name, dtype in zip(names, SIGNALLING, strict=False):
        info = torch.finfo(dtype)
        numbers = [info.max, info.min, info.smallest_normal, -info.smallest_normal, 0.0, -0.0]
        numbers += [torch.inf, -torch.inf] if values == "all" else []
        tensor = torch.tensor(numbers, dtype=torch.float64).to(dtype).repeat(a[name].numel())
        odd[name] = tensor[: a[name].numel()].view(a[name].shape).clone()
        if values == "all":
            odd[name].view(-1)[-1] = number(dtype)
    in_folder(here, a, b, odd)
    assert_quiet(capfd)
