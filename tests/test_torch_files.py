"""Files of torch.save: every layout opens without torch, and is worth as much as the safetensors file of the
same tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import CheckpointError, open_checkpoint
from blockmerge.checkpoints import TorchFile
from blockmerge.cli.main import run
from blockmerge.demo import demo_layout
from tests.effort import some
from tests.refusals import assert_refused
from tests.small_models import small_model

SAVED = {
    "zip, protocol 2": {},
    "zip, protocol 4": {"pickle_protocol": 4},
    "legacy, protocol 2": {"_use_new_zipfile_serialization": False},
    "legacy, protocol 4": {"_use_new_zipfile_serialization": False, "pickle_protocol": 4},
}


def with_leftovers(tensors):
    """As trainers write it, with classes that are not installed here."""
    sys.modules["pytorch_lightning"] = types.ModuleType("pytorch_lightning")
    module = types.ModuleType("pytorch_lightning.callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    instance = module.ModelCheckpoint()
    instance.best = {"score": 0.5, "path": "x.ckpt"}
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3)
    optimizer.step()
    return {
        "epoch": 3,
        "global_step": np.int64(1234),
        "pytorch-lightning_version": "1.4.2",
        "callbacks": {module.ModelCheckpoint: {"best": None}, "instance": instance},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [np.random.RandomState(0), np.arange(3), b"bytes", {1, 2}, frozenset("a"), 1 << 700],
        "hyper_parameters": argparse.Namespace(
            device=torch.device("cpu"), dtype=torch.float16, size=torch.Size([1, 2])
        ),
        "state_dict": {**tensors, "global_step": 4, "note": "text", "nothing": None, "score": np.float32(3)},
    }


def test_the_largest_files_of_training_open(tmp_path):
    """SDXL with EMA copies and Adam's state of the U-Net: the pickle has a bound, which no real one may
    reach.
    """
    state = dict.fromkeys(demo_layout("sdxl"))
    unet = [name for name in state if name.startswith("model.diffusion_model.")]
    state |= dict.fromkeys(f"model_ema.{name.replace('.', '')}" for name in unet)
    saved = {"state_dict": {name: torch.zeros(1) for name in state}}
    adam = {"step": torch.zeros(()), "exp_avg": torch.zeros(1), "exp_avg_sq": torch.zeros(1)}
    saved["optimizer_states"] = [
        {number: {key: value.clone() for key, value in adam.items()} for number in range(len(unet))}
    ]
    for zipped in (True, False):
        torch.save(saved, tmp_path / "x.ckpt", _use_new_zipfile_serialization=zipped)
        assert open_checkpoint(tmp_path / "x.ckpt").tensors.keys() == state.keys()


def shared(tensors):
    """Every other tensor lies in one storage of its dtype, the rest beside them; the last two are the
    same.
    """
    result, flat = dict(tensors), {}
    for name in list(tensors)[::2]:
        flat.setdefault(tensors[name].dtype, []).append(name)
    for names in flat.values():
        storage = torch.cat([tensors[name].flatten() for name in names])
        parts = storage.split([tensors[name].numel() for name in names])
        result.update({name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)})
    return result


def twisted(tensors):
    """No tensor that can help it lies in a row."""

    def twist(tensor):
        if tensor.dim() == 4:
            return tensor.to(memory_format=torch.channels_last)
        if tensor.dim() == 2:
            return tensor.T.contiguous().T
        return torch.stack([tensor, tensor], -1)[..., 0]

    return {name: twist(tensor) for name, tensor in tensors.items()}


def parameters(tensors):
    result = {name: torch.nn.Parameter(t) if t.is_floating_point() else t for name, t in tensors.items()}
    next(iter(result.values())).tag = "an attribute of its own"
    return result


DRESSED = {
    "bare": OrderedDict,
    "of a module": lambda tensors: _module_state(tensors),
    "with leftovers": with_leftovers,
    "nested twice": lambda tensors: {"state_dict": {"state_dict": tensors, "step": 1.5}},
    "shared": shared,
    "twisted": twisted,
    "parameters": parameters,
}


def _module_state(tensors):
    state = OrderedDict(tensors)
    state._metadata = OrderedDict({"": {"version": 1}})
    return state


def save(path, tensors, dressed="bare", saved="zip, protocol 2"):
    torch.save(DRESSED[dressed](tensors), path, **SAVED[saved])
    for name in [name for name in sys.modules if name.startswith("pytorch_lightning")]:
        del sys.modules[name]
    return path


def bits(tensor):
    return (
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if tensor.numel()
        else b""
    )


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize("dressed", DRESSED)
def test_every_layout_has_the_tensors_that_were_saved(tmp_path, dressed, saved):
    torch.manual_seed(0)
    tensors = {
        "conv.weight": torch.randn(6, 5, 3, 3).half(), "linear.weight": torch.randn(7, 3), "bias": torch.randn(9).bfloat16(),
        "position_ids": torch.arange(77)[None], "scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "double": torch.randn(2).double(),
        "mask": torch.tensor([True, False]), "bytes": torch.arange(5, dtype=torch.uint8), "int": torch.arange(-3, 3, dtype=torch.int32),
        "short": torch.arange(3, dtype=torch.int16), "char": torch.arange(3, dtype=torch.int8), "complex": torch.randn(3, dtype=torch.complex64),
    }  # fmt: skip
    if "zip" in saved and dressed not in ("parameters",):  # the legacy layout cannot hold them
        tensors |= {
            "fp8": torch.randn(8).to(torch.float8_e4m3fn),
            "fp8 wide": torch.randn(8).to(torch.float8_e5m2),
            "u16": torch.tensor([1, 65535], dtype=torch.uint16),
        }
    path = save(tmp_path / "x.ckpt", tensors, dressed, saved)
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, TorchFile)
    assert (checkpoint.name, checkpoint.path, checkpoint.files, checkpoint.metadata) == (
        "x.ckpt",
        path,
        (path,),
        {},
    )
    assert checkpoint.tensors.keys() == tensors.keys()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    plain = open_checkpoint(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].dtype == plain.tensors[name].dtype
        assert checkpoint.tensors[name].shape == tuple(tensor.shape)
        assert checkpoint.read(name) == plain.read(name) == bits(tensor), name
    checkpoint.check_unchanged()


def test_views_expanded_and_tied_tensors(tmp_path):
    base = torch.randn(40)
    tensors = {
        "slice": base[3:11], "step": base[::3], "expanded": base[:5, None].expand(5, 7), "everywhere": base[7].expand(3, 3),
        "tied": base, "tied too": base, "overlapping": base.unfold(0, 8, 2), "empty": base[:0], "scalar": base[39],
    }  # fmt: skip
    torch.save(tensors, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    for name, tensor in checkpoint.tensors.items():
        assert tensor.shape == tuple(tensors[name].shape)
        assert checkpoint.read(name) == bits(tensors[name]), name


KINDS = {
    "safetensors": None,
    "zip": "zip, protocol 2",
    "legacy": "legacy, protocol 2",
}


@pytest.fixture(scope="module")
def dressed_pair(tmp_path_factory):
    """A function that gives a small model (0: A, 1: B) as a file of a kind and dressing, each made once."""
    folder = tmp_path_factory.mktemp("dressed")

    def model(side, kind, dressed="bare"):
        path = folder / f"{side} {kind} {dressed}.{'safetensors' if kind == 'safetensors' else 'ckpt'}"
        if not path.exists():
            tensors = small_model("sd1", (torch.float16, torch.float32)[side], side, for_a_folder=True)
            if KINDS[kind] is None:
                save_file(tensors, path)
            else:
                save(path, tensors, dressed, KINDS[kind])
        return path

    return model


CHOICES = {"weights": 0.3, "changes": "IN00-IN05=1,OUT03=0", "vae": "b", "threads": 2}
PAIRS = [(a, b, "bare") for a in KINDS for b in KINDS if {a, b} != {"safetensors"}]
PAIRS += [
    (a, b, dressed)
    for dressed in DRESSED
    for a, b in [("zip", "legacy"), ("legacy", "zip")]
    if dressed != "bare"
]


@pytest.fixture(scope="module")
def plainly_merged(dressed_pair, tmp_path_factory):
    output = tmp_path_factory.mktemp("plain") / "plain.safetensors"
    blockmerge.merge(dressed_pair(0, "safetensors"), dressed_pair(1, "safetensors"), output=output, **CHOICES)
    return load_file(output)


@pytest.mark.parametrize(("a", "b", "dressed"), some(PAIRS, of=2))
def test_every_pair_merges_as_the_plain_pair(dressed_pair, plainly_merged, tmp_path, a, b, dressed):
    blockmerge.merge(
        dressed_pair(0, a, dressed),
        dressed_pair(1, b, dressed),
        output=tmp_path / "out.safetensors",
        **CHOICES,
    )
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == plainly_merged.keys()
    for name, tensor in plainly_merged.items():
        assert out[name].dtype == tensor.dtype
        assert out[name].shape == tensor.shape
        assert bits(out[name]) == bits(tensor), name


def test_all_commands_take_them(dressed_pair, tmp_path, capsys, monkeypatch):
    import hashlib

    folder = tmp_path / "models"
    folder.mkdir()
    a = shutil.copy(dressed_pair(0, "zip", "twisted"), folder / "a.ckpt")
    b = shutil.copy(dressed_pair(1, "legacy", "with leftovers"), folder / "b.pt")
    plain = [str(dressed_pair(side, "safetensors")) for side in (0, 1)]
    monkeypatch.chdir(tmp_path)

    def said(*arguments):
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out

    found = json.loads(said("inspect", a, "--hash", "--json"))
    assert found["family"] == "sd1"
    sha = hashlib.sha256(a.read_bytes()).hexdigest()
    assert found["hashes"] == {
        "autov1": hashlib.sha256(a.read_bytes()[0x100000:0x110000]).hexdigest()[:8],
        "autov2": sha[:10],
        "autov3": None,
        "sha256": sha,
    }
    assert "autov3  –\n" in said("inspect", a, "--hash")
    expected = blockmerge.inspect(plain[0])
    assert blockmerge.inspect(a).components == expected.components
    assert blockmerge.inspect(a).blocks == expected.blocks

    for method in ("attention", "weights"):
        rows = json.loads(said("similarity", a, folder, "--method", method, "--json"))["references"]
        plain_rows = json.loads(said("similarity", plain[0], *plain, "--method", method, "--json"))[
            "references"
        ]
        assert [row["name"] for row in rows] == ["a.ckpt", "b.pt"]
        assert [row["similarity"] for row in rows] == pytest.approx(
            [row["similarity"] for row in plain_rows], abs=1e-9
        )
        assert all(row["error"] is None for row in rows)

    said(a, b, "--weights", "0.25", "-o", tmp_path / "merged.safetensors", "-q")
    # Without its recipe, which would tell the files apart.
    save_file(load_file(tmp_path / "merged.safetensors"), tmp_path / "merged.safetensors")
    (tmp_path / "plain").mkdir()
    same_names = [
        shutil.copy(path, tmp_path / "plain" / name)
        for path, name in zip(plain, ("a.ckpt", "b.pt"), strict=True)
    ]
    origins = [
        json.loads(said("explain", "merged.safetensors", *parents, "--json"))
        for parents in ((a, b), same_names)
    ]
    assert origins[0]["blocks"] == origins[1]["blocks"]
    shutil.copy(b, folder / "c.safetensors")
    line = assert_refused(
        capsys,
        folder,
        "c.safetensors",
        "a.ckpt",
        "-w",
        "1",
        "-o",
        "c.safetensors",
        "--overwrite",
        says="input",
    )
    assert "c.safetensors" in line


def test_opening_needs_neither_torch_nor_numpy(dressed_pair):
    code = (
        "import sys, blockmerge\n"
        "for path in sys.argv[1:]: blockmerge.inspect(path, hashes=True)\n"
        "assert not {'torch', 'numpy', 'pickle'} & sys.modules.keys(), sys.modules.keys()\n"
    )
    paths = [str(dressed_pair(0, kind, "twisted")) for kind in ("zip", "legacy")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)


def test_content_decides_not_the_name(dressed_pair, tmp_path):
    from blockmerge.checkpoints import SafetensorsFile

    shutil.copy(dressed_pair(0, "safetensors"), tmp_path / "really.ckpt")
    assert isinstance(open_checkpoint(tmp_path / "really.ckpt"), SafetensorsFile)
    for kind in ("zip", "legacy"):
        shutil.copy(dressed_pair(0, kind), tmp_path / "really.safetensors")
        assert isinstance(open_checkpoint(tmp_path / "really.safetensors"), TorchFile)
    # A header of 640 bytes begins with the bytes of a pickle of protocol 2.
    text = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(0x280)
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"x")
    assert open_checkpoint(tmp_path / "x.safetensors").read("a") == b"x"


NOT_MODELS = {
    "HTML": (b"<!DOCTYPE html><html>rate limited</html>", "is an HTML page"),
    "a git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n",
        "git lfs pull",
    ),
    "text": (b"Dear user, this is no model. " * 40, 'is a text, not a model, and says "Dear user'),
    "bytes": (b"\1\2\3\4" * 40, "neither like a zip archive nor like a pickle"),
    "empty": (b"", "is empty"),
    "two bytes": (b"\x80\x02", "cut short"),
    "tar": (b"\0" * 257 + b"ustar\x0000" + b"\0" * 600, "tar archive"),
    "an empty zip": (b"PK\5\6" + bytes(18), "is an empty zip archive, not a model"),
}


@pytest.mark.parametrize("case", NOT_MODELS)
def test_what_is_no_torch_file_is_named(tmp_path, capsys, case):
    data, says = NOT_MODELS[case]
    (tmp_path / "x.ckpt").write_bytes(data)
    assert_refused(capsys, tmp_path, "inspect", "x.ckpt", says=["x.ckpt", says])


WRONG = {
    "a whole model": (lambda: torch.nn.Linear(2, 2), ["torch.nn.modules.linear.Linear", "state_dict()"]),
    "a tensor": (lambda: torch.ones(2), ["a tensor", "state_dict()"]),
    "a list": (lambda: [torch.ones(2)], ["a list"]),
    "no state dict": (lambda: {"model": {"a": torch.ones(2)}, "step": 3}, ["it holds no state dict, but: model, a dict"]),
    "a list in the state dict": (lambda: {"a": torch.ones(2), "b": [torch.ones(2)]}, ["its state dict holds something other than tensors: b, a list"]),
    "an object in the state dict": (
        lambda: {"state_dict": {"a": torch.ones(2), "b": argparse.Namespace(c=1)}},
        ["b, an argparse.Namespace"],
    ),
    "a sparse tensor": (lambda: {"a": torch.eye(3).to_sparse()}, ["a, a torch._utils._rebuild_sparse_tensor"]),
    "a quantized tensor": (
        lambda: {"a": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)},
        ["a, a torch._utils._rebuild_qtensor"],
    ),
    "complex128": (lambda: {"a": torch.ones(3, dtype=torch.complex128)}, ["tensor a has the dtype complex128"]),
    "a conjugate view": (lambda: {"a": torch.ones(3, dtype=torch.complex64).conj()}, ["tensor a is a conjugate"]),
    "a meta tensor": (lambda: {"a": torch.empty(3, device="meta")}, ["a, a torch._utils._rebuild_meta_tensor_no_storage"]),
    "a number as name": (lambda: {3: torch.ones(2)}, ["names a tensor by an int"]),
    "a pair as name": (lambda: {("a", 1): torch.ones(2)}, ["names a tensor by a key that is not text"]),
    "expanded without end": (lambda: {"a": torch.ones(1).expand(1 << 50)}, ["tensor a would be expanded"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("new", [True, False])
def test_what_cannot_be_merged_is_named(tmp_path, capsys, case, new):
    make, says = WRONG[case]
    torch.save(make(), tmp_path / "x.ckpt", _use_new_zipfile_serialization=new)
    assert_refused(capsys, tmp_path, "inspect", "x.ckpt", says=["x.ckpt is not a valid torch file", *says])


def test_a_file_that_changes_is_refused(tmp_path):
    import os

    torch.save({"a": torch.ones(4, 4).T}, tmp_path / "x.ckpt")
    checkpoint = open_checkpoint(tmp_path / "x.ckpt")
    os.utime(tmp_path / "x.ckpt", ns=(1, 1))
    with pytest.raises(CheckpointError, match=r"x\.ckpt was changed while it was being read"):
        checkpoint.check_unchanged()


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
def test_storages_beyond_4_gb(tmp_path):
    """Offsets that need 64 bits, in a file that takes next to no space."""
    import zipfile

    from tests import attacks

    path = tmp_path / "x.ckpt"
    with path.open("wb") as file:
        file.write(b"PK\3\4")
        file.seek(5 << 30)
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("x/data.pkl", attacks.GOOD)
            archive.writestr("x/data/0", attacks.DATA)
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["a"].offset > 5 << 30
    assert checkpoint.read("a") == attacks.DATA


def test_a_legacy_file_that_is_cut_short_says_by_how_much(tmp_path):
    path = tmp_path / "m.pt"
    torch.save({"a": torch.ones(100), "b": torch.ones(50)}, path, _use_new_zipfile_serialization=False)
    whole = path.stat().st_size
    for left in (whole - 1, whole - 205, whole - 300):  # in b's numbers, in b's size, in a's numbers
        os.truncate(path, left)
        with pytest.raises(CheckpointError, match=f": its data is cut short: {left} bytes of {whole}$"):
            open_checkpoint(path)
