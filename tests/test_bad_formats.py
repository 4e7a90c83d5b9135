"""Bad input and bad luck with torch files and folders, as far as `test_attacks` and `test_folders` do not
have it: whole runs.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import blockmerge
from blockmerge import CheckpointError, OutputError
from blockmerge.cli.main import run
from blockmerge.demo import make_state_dicts
from blockmerge.merging import execute
from tests.forms import FORMS, as_dtype, write
from tests.refusals import assert_refused, snapshot


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{form: path} of the same model."""
    home = tmp_path_factory.mktemp("models")
    state = as_dtype(make_state_dicts("sd1")[0], torch.float16)
    return {form: write(state, home / form, form) for form in FORMS}


def copy(path, folder):
    return Path((shutil.copytree if path.is_dir() else shutil.copy)(path, folder / path.name))


def largest_file(path):
    return max((file for file in path.rglob("*.safetensors")), key=os.path.getsize) if path.is_dir() else path


OUTPUTS = (["o.safetensors", "--to", "ldm"], ["o", "--to", "diffusers"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_short(models, tmp_path, capsys, form, kept):
    path = copy(models[form], tmp_path)
    cut = largest_file(path)
    os.truncate(cut, int(kept * cut.stat().st_size))
    good = models["safetensors"]
    for output in OUTPUTS:
        assert_refused(capsys, tmp_path, "convert", path.name, *output, says=cut.name)
    assert_refused(capsys, tmp_path, path.name, good, "-w", "0.5", "-o", *OUTPUTS[0], says=cut.name)
    assert_refused(capsys, tmp_path, good, path.name, "-w", "0", "-o", *OUTPUTS[1], says=cut.name)
    assert_refused(capsys, tmp_path, "check", path.name, "--fix", "o.safetensors", says=cut.name)


@pytest.mark.parametrize("damage", ["cut", "lost", "lying"])
def test_a_damaged_index(models, tmp_path, capsys, damage):
    path = copy(models["sharded"], tmp_path)
    index = path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    text = index.read_text()
    if damage == "lost":
        index.unlink()
    else:
        index.write_text(
            text[: len(text) // 2] if damage == "cut" else text.replace('"conv_in.bias"', '"conv_in.bios"')
        )
    says = "without their index" if damage == "lost" else index.name
    for output in OUTPUTS:
        assert_refused(capsys, tmp_path, "convert", path.name, *output, says=says)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("when", ["cut", "touched", "gone"])
def test_a_file_that_changes_while_it_is_read(models, tmp_path, capsys, monkeypatch, form, when):
    path = copy(models[form], tmp_path)
    file = largest_file(path)
    real = execute.for_each
    change = {
        "cut": lambda: os.truncate(file, 1000),
        "touched": lambda: os.utime(file, ns=(1, 1)),
        "gone": file.unlink,
    }[when]

    def change_first(*arguments, **options):
        if file.exists():
            change()
        return real(*arguments, **options)

    monkeypatch.setattr(execute, "for_each", change_first)
    assert run(["convert", str(path), str(tmp_path / "out"), "--to", "diffusers"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert file.name in err
    assert {"cut": "cut short", "touched": "was changed", "gone": "no such file"}[when] in err
    assert list(tmp_path.iterdir()) == ([path] if path.exists() else [])


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_folder_that_cannot_be_written_to_the_end(models, tmp_path, monkeypatch, existing, error):
    output = tmp_path / "out"
    if existing:
        shutil.copytree(models["sharded"], output)
    before = snapshot(tmp_path)
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) > 2:
            raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(execute, "PIECE_BYTES", 64 << 10)
        patch.setattr(execute.OutputStream, "writer", _failing(execute.OutputStream.writer, fail))
        with pytest.raises(
            OutputError, match=f"out: {os.strerror(error)[1:]}|out: {os.strerror(error).lower()}"
        ):
            blockmerge.convert(models["zip"], output, naming="diffusers", overwrite=True)
    assert len(calls) > 2
    assert snapshot(tmp_path) == before


def _failing(real, fail):
    def writer(stream):
        made = real(stream)
        write = made.write
        made.write = lambda *arguments: (fail(), write(*arguments))
        return made

    return writer


def test_no_room_for_a_folder_is_said_before_any_work(models, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    model = copy(models["folder"], tmp_path)
    for output in OUTPUTS:
        assert_refused(capsys, tmp_path, "convert", model.name, *output, says="not enough space")


def test_a_place_that_may_not_be_written(models, tmp_path, capsys, monkeypatch):
    """The tests may run as root, who may write everywhere: the refusal is made by hand."""
    model, real = copy(models["legacy"], tmp_path), os.open

    def refuse(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    for output in OUTPUTS:
        assert_refused(capsys, tmp_path, "convert", model.name, *output, says="cannot write")


KILLED = """
import os, signal, sys, blockmerge
def kill(done, total):
    if done >= float(sys.argv[3]) * total:
        os.kill(os.getpid(), signal.SIGKILL)
blockmerge.convert(*sys.argv[1:3], naming="diffusers", overwrite=True, threads=1, progress=kill)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("share", [0.01, 0.6, 1.0])
def test_killed_midway_there_is_no_half_written_folder(models, tmp_path, share, existing):
    output = tmp_path / "out"
    if existing:
        shutil.copytree(models["sharded"], output)
    before = snapshot(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KILLED, models["legacy"], output, str(share)]
    assert subprocess.run(command, check=False, env=environment).returncode == -signal.SIGKILL
    left = {path: found for path, found in snapshot(tmp_path).items() if path not in before}
    assert left
    assert all(Path(path).relative_to(tmp_path).parts[0].startswith(".blockmerge-") for path in left)
    assert before.items() <= snapshot(tmp_path).items()
    result = blockmerge.convert(models["zip"], output, naming="diffusers", overwrite=True)
    assert any(note.startswith("removed .blockmerge-") for note in result.notes)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
@pytest.mark.parametrize("size", [1_000, 900_000])
def test_hashes_are_hashlibs(tmp_path, form, size):
    """Files under and over the 1 MiB at which AutoV1 begins to read."""
    path = write({"x": torch.randn(size, generator=torch.Generator().manual_seed(0))}, tmp_path / "m", form)
    data = path.read_bytes()
    assert (len(data) > 1 << 20) == (size == 900_000)
    found = blockmerge.inspect(path, hashes=True).hashes
    sha = hashlib.sha256(data).hexdigest()
    assert (found.sha256, found.autov2) == (sha, sha[:10])
    assert found.autov1 == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert (found.autov1 == "e3b0c442") == (size == 1_000)
    header = 8 + int.from_bytes(data[:8], "little")
    assert found.autov3 == (hashlib.sha256(data[header:]).hexdigest()[:12] if form == "safetensors" else None)


def test_the_hash_of_what_follows_a_header_needs_a_header(tmp_path):
    """A zip whose ninth byte is a "{", which made 8 bytes of it the length of a header."""
    path = write({"x": torch.ones(3)}, tmp_path / "m", "zip")
    data = bytearray(path.read_bytes())
    data[8] = ord("{")  # the method of compression, of which only the directory at the end is looked at
    path.write_bytes(data)
    assert blockmerge.open_checkpoint(path).tensors.keys() == {"x"}
    found = blockmerge.inspect(path, hashes=True).hashes
    assert (found.sha256, found.autov3) == (hashlib.sha256(data).hexdigest(), None)


def test_a_folder_with_one_file_has_its_hashes(models):
    weights = models["folder"] / "unet" / "diffusion_pytorch_model.safetensors"
    assert (
        blockmerge.inspect(weights.parent, hashes=True).hashes
        == blockmerge.inspect(weights, hashes=True).hashes
    )


def test_a_folder_has_no_hashes(models, tmp_path, capsys):
    path = copy(models["folder"], tmp_path)
    assert_refused(
        capsys, tmp_path, "inspect", path.name, "--hash", says="folder is not one file: it has no hashes"
    )
    with pytest.raises(CheckpointError, match="not one file"):
        blockmerge.inspect(path, hashes=True)
    assert run(["inspect", str(path / "unet"), "--hash"]) == 0  # a component's folder holds one file
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    assert blockmerge.inspect(path).hashes is None
