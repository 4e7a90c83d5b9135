"""Thousands of mutated headers: always our error or a correct merge; never a crash, a hang or a large
allocation.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import signal
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as load_bytes

import blockmerge
from tests.effort import many
from tests.oracle import step_at

CASES = many(10_000)
PREFIX = "model.diffusion_model."
SHAPES = {
    PREFIX + "input_blocks.0.0.weight": ("F16", [4, 4, 3, 3]),
    PREFIX + "input_blocks.1.1.proj_in.weight": ("F16", [4, 4, 1, 1]),
    PREFIX + "input_blocks.11.0.in_layers.0.weight": ("F16", [5]),
    PREFIX + "middle_block.0.in_layers.0.bias": ("F16", []),
    PREFIX + "out.2.bias": ("F16", [0]),
    "cond_stage_model.transformer.text_model.embeddings.position_ids": ("I64", [1, 7]),
    "cond_stage_model.transformer.text_model.final_layer_norm.bias": ("F32", [6]),
    "first_stage_model.decoder.conv_in.bias": ("BF16", [3]),
}
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "I64": 8}
VALUES = [0, 1, -1, 2, 3, 7, 255, 256, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 0.5, 1e300, True, None, "1", [], {}, [1], "F16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "XX", "", "\u0000", "é"]  # fmt: skip


def valid_header(rng):
    names = list(SHAPES)
    rng.shuffle(names)
    names.sort(key=lambda name: -SIZES[SHAPES[name][0]] if rng.random() < 0.5 else 0)
    header, offset = {"__metadata__": {"format": "pt", "note": "x"}}, 0
    for name in names:
        dtype, shape = SHAPES[name]
        size = SIZES[dtype]
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return header, offset


def mutate_tree(rng, header):
    """Change a few places of the JSON, keeping it JSON."""
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        name = rng.choice(list(header))
        entry = header[name]
        match rng.randrange(7):
            case 0:
                header[
                    rng.choice(
                        [name + "x", name[: len(name) // 2], "model_ema." + name, name.replace("1", "9")]
                    )
                ] = header.pop(name)
            case 1:
                del header[name]
            case 2:
                header[name] = copy.deepcopy(rng.choice(VALUES))
            case _ if isinstance(entry, dict) and entry:
                key = rng.choice(list(entry))
                value = entry[key]
                if isinstance(value, list) and value and rng.random() < 0.7:
                    place = rng.randrange(len(value))
                    value = list(value)
                    old = value[place]
                    near = [old + 1, old - 1, old * 2] if type(old) is int else []
                    value[place] = rng.choice([*VALUES, *near])
                    rng.random() < 0.2 and value.append(1)
                    entry[key] = value
                elif rng.random() < 0.1:
                    del entry[key]
                else:
                    entry[key] = copy.deepcopy(rng.choice(VALUES))
    return header


def mutate_bytes(rng, data):
    data = bytearray(data)
    for _ in range(rng.choice([0, 0, 0, 1, 1, 2, 8])):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] = rng.randrange(256)
            case 1:
                del data[place : place + rng.randrange(1, 40)]
            case 2:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
            case 3:
                data[place : place + 1] = rng.choice(b'{}[]",:0123456789\\').to_bytes(1, "little")
        if not data:
            return b""
    return bytes(data)


def mutated(rng):
    header, size = valid_header(rng)
    text = json.dumps(mutate_tree(rng, header)).encode()
    text = text if rng.random() < 0.5 else mutate_bytes(rng, text)
    text += b" " * rng.choice([0, 0, 1, 3, 4096])
    length = (
        len(text)
        if rng.random() < 0.93
        else rng.choice([0, len(text) - 1, len(text) + 1, 10**12, 2**64 - 1, rng.getrandbits(64)])
    )
    values = torch.randn(size // 2 + 1, generator=torch.Generator().manual_seed(rng.getrandbits(32))).half()
    data = values.view(torch.uint8).numpy().tobytes()[:size]
    if rng.random() < 0.05:
        data = data[: rng.randrange(size + 1)] if rng.random() < 0.5 else data + b"\0" * rng.randrange(1, 9)
    return struct.pack("<Q", max(0, length)) + text + data


def assert_correct(out, a, b):
    """A merge at 0.5 that succeeded, held against the inputs as safetensors itself reads them."""
    for name in [name for name in a if name.startswith((PREFIX, "cond_stage"))]:
        if not (a[name].is_floating_point() and name in b and b[name].is_floating_point()):
            continue
        merged = out[name if name in out else PREFIX + name]
        if a[name].shape != b[name].shape:
            assert "input_blocks.0.0.weight" in name
            continue
        exact = (a[name].double() + b[name].double()) / 2
        if merged.numel() and merged.dtype in (torch.float16, torch.bfloat16, torch.float32):
            largest = torch.maximum(a[name].double().abs(), b[name].double().abs())
            assert ((merged.double() - exact).abs() <= step_at(largest, merged.dtype)).all(), name


@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(4))
def test_mutated_headers(part):
    rng = random.Random(part)
    merged = refused = 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        good = Path(folder) / "good.safetensors"
        bad = Path(folder) / "bad.safetensors"
        output = Path(folder) / "out.safetensors"
        header, size = valid_header(random.Random(0))
        text = json.dumps(header).encode()
        values = (torch.arange(size // 2) % 50 - 25).half().div(100).view(torch.uint8).numpy().tobytes()
        good.write_bytes(struct.pack("<Q", len(text)) + text + values)
        blockmerge.merge(good, good, weights=0.5, output=output)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for _ in range(CASES // 4):
            data = mutated(rng)
            bad.write_bytes(data)
            output.unlink(missing_ok=True)
            models = (bad, good) if rng.random() < 0.5 else (good, bad)
            signal.alarm(20)
            try:
                blockmerge.merge(*models, weights=0.5, output=output, threads=1)
            except blockmerge.BlockmergeError as error:
                refused += 1
                assert str(error).isprintable()
                assert len(str(error)) < 1500
            else:
                merged += 1
                sides = [load_bytes(model.read_bytes()) for model in models]
                assert_correct(load_bytes(output.read_bytes()), *sides)
            finally:
                signal.alarm(0)
            assert bad.read_bytes() == data
            assert {path.name for path in Path(folder).iterdir()} <= {
                "good.safetensors",
                "bad.safetensors",
                "out.safetensors",
            }
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    assert merged > CASES // 100
    assert refused > CASES // 10
    assert grown < 200_000, f"{grown} kB"
