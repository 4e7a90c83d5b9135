"""One model in every form that people have it in, written with torch, safetensors and huggingface_hub
alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from tests.oracle import bits
from tests.other_names import in_diffusers

UNET = "model.diffusion_model."
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}
FORMS = ("safetensors", "zip", "legacy", "folder", "sharded")


def write(model, path, form, family="sd1"):
    """Write a model of LDM naming in one of the FORMS; returns the path, to which folders add no ending."""
    path = Path(path)
    if form == "safetensors":
        path = path.with_name(path.name + ".safetensors")
        save_file(model, path, {"format": "pt"})
    elif form in ("zip", "legacy"):
        path = path.with_name(path.name + ".ckpt")
        torch.save({"state_dict": model}, path, _use_new_zipfile_serialization=form == "zip")
    else:
        write_folder(in_diffusers(model, family), path, sharded=form == "sharded")
    return path


def write_folder(tensors, path, *, sharded=False, binary=False):
    """Write {component/name: tensor} as a diffusers folder."""
    components = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition("/")
        components.setdefault(component, {})[rest] = tensor
    path.mkdir()
    (path / "model_index.json").write_text(
        json.dumps({component: ["diffusers", "X"] for component in components})
    )
    for component, state in components.items():
        folder = path / component
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        stem = STEMS.get(component, "model")
        if sharded:
            size = sum(tensor.nbytes for tensor in state.values()) // 3
            save_torch_state_dict(
                state, folder, filename_pattern=stem + "{suffix}.safetensors", max_shard_size=size
            )
            assert (folder / f"{stem}.safetensors.index.json").exists()
        elif binary:
            torch.save(state, folder / f"{stem if component in STEMS else 'pytorch_model'}.bin")
        else:
            save_file(state, folder / f"{stem}.safetensors", {"format": "pt"})
    return path


def read(path):
    """What was written, a file or a folder, as one dict; shards as their index says."""
    path = Path(path)
    if path.is_file():
        return load_file(path)
    found = {}
    for file in sorted(path.glob("*/*.safetensors")):
        found.update({f"{file.parent.name}/{name}": tensor for name, tensor in load_file(file).items()})
    for index in path.glob("*/*.index.json"):
        promised = json.loads(index.read_text())["weight_map"]
        shards = {shard: load_file(index.parent / shard) for shard in set(promised.values())}
        assert all(name in shards[shard] for name, shard in promised.items())
    return found


def ema_of(model):
    """EMA copies under their names, half as large as the U-Net's tensors, and what stands beside them."""
    copies = {
        f"model_ema.diffusion_model{n.removeprefix(UNET).replace('.', '')}": t / 2
        for n, t in model.items()
        if is_unet(n)
    }
    return {
        **copies,
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }


def is_unet(name):
    return name.startswith(UNET)


def as_dtype(model, dtype):
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in model.items()
    }


def assert_same(one, other):
    """Hold that two dicts of tensors are the same, bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor.shape, tensor.dtype) == (other[name].shape, other[name].dtype), name
        assert torch.equal(bits(tensor), bits(other[name])), name
