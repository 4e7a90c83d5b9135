"""A download that was broken off: the right size, a right header, and zeros where the rest should be."""

from __future__ import annotations

import json
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import CheckpointError
from blockmerge.checkpoints.formats.trailing_zeros import zeros_from
from blockmerge.cli.main import run
from tests.commands import ok
from tests.forms import write
from tests.refusals import assert_refused

SAYS = ["bad", "is broken off: it holds nothing but zeros after", "download it again"]


def zeroed(source, target, share):
    """Write a copy of a file with zeros after a share of it."""
    data = source.read_bytes()
    kept = int(share * len(data))
    target.write_bytes(data[:kept] + bytes(len(data) - kept))
    return target


def begin_of_data(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def refusals(bad, a, b):
    yield bad, a, "-w", "0.5", "-o", "o.safetensors"
    yield a, bad, "-w", "0", "-o", "o.safetensors"
    yield a, bad, "-w", "0.5", "-o", "o.safetensors", "--overwrite"
    yield "convert", bad, "o.safetensors"
    yield "convert", bad, "o", "--to", "diffusers"
    yield "convert", a, "o.safetensors", "--vae", bad
    yield "check", bad, "--fix", "o.safetensors"
    yield "similarity", bad, a
    yield "explain", bad, a, b
    yield "explain", a, bad


@pytest.mark.parametrize(("family", "share"), [("sd1", 0.15), ("sdxl", 0.5), ("sd1", 0.85)])
def test_every_command_says_so_before_anything_is_written(pairs, tmp_path, capsys, family, share):
    a, b = pairs(family)
    bad = zeroed(b, tmp_path / "bad.safetensors", share)
    for arguments in refusals(bad, a, b):
        assert_refused(capsys, tmp_path, *arguments, says=SAYS)
    out = ok(capsys, "inspect", bad)
    assert "broken off" in out
    found = json.loads(ok(capsys, "inspect", bad, "--json"))
    assert found["family"] == family
    assert found["broken_off"].startswith("bad.safetensors is broken off")
    assert json.loads(ok(capsys, "inspect", b, "--json"))["broken_off"] is None
    assert run(["check", str(bad), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert problems[0]["code"] == "broken_off"
    assert problems[0]["severity"] == "error"
    assert "zero_weights" not in {problem["code"] for problem in problems}
    assert run(["similarity", str(a), str(bad), str(b), "--method", "weights", "--json"]) == 1
    good, failed = json.loads(capsys.readouterr().out)["references"]
    assert good["error"] is None
    assert "bad.safetensors is broken off" in failed["error"]
    ok(capsys, a, bad, "-w", "0.5", "-o", tmp_path / "o.safetensors", "--dry-run")  # which reads no weights
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_nothing_but_the_header(pairs, tmp_path, capsys):
    source = pairs()[0]
    bad = zeroed(source, tmp_path / "bad.safetensors", begin_of_data(source) / source.stat().st_size)
    assert_refused(capsys, tmp_path, "convert", bad, "o.safetensors", says=SAYS)
    assert json.loads(ok(capsys, "inspect", bad, "--json"))["family"] == "sd1"


def test_less_than_the_header(pairs, tmp_path, capsys):
    bad = zeroed(pairs()[0], tmp_path / "bad.safetensors", 0.001)
    assert_refused(capsys, tmp_path, "inspect", bad, says=["bad.safetensors", "not JSON"])


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.95])
def test_a_torch_file(pairs, tmp_path, capsys, form, share):
    good = write(load_file(pairs()[0]), tmp_path / "good", form)
    bad = zeroed(good, tmp_path / "bad.ckpt", share)
    good.unlink()
    for command in (["inspect", bad], ["check", bad], ["convert", bad, "o.safetensors"]):
        assert_refused(capsys, tmp_path, *command, says=SAYS)


@pytest.mark.parametrize("form", ["folder", "sharded"])
def test_a_file_of_a_folder(pairs, tmp_path, capsys, form):
    bad = write(load_file(pairs()[0]), tmp_path / "bad", form)
    file = max(bad.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    zeroed(file, file, 0.5)
    assert_refused(capsys, tmp_path, "convert", bad, "o.safetensors", says=[file.name, *SAYS])
    assert f"bad/unet/{file.name}" in json.loads(ok(capsys, "inspect", bad, "--json"))["broken_off"]


def test_python_says_the_same(pairs, tmp_path):
    a, b = pairs()
    bad = zeroed(b, tmp_path / "bad.safetensors", 0.5)
    calls = (
        lambda: blockmerge.merge(a, bad, weights=0.5, output=tmp_path / "o.safetensors"),
        lambda: blockmerge.Merge(a, b, weights=0.5, vae=bad).run(tmp_path / "o.safetensors"),
        lambda: blockmerge.similarity(bad, [a]),
        lambda: blockmerge.explain(bad, [a, b]),
        lambda: blockmerge.LiveMerge(torch.nn.Linear(1, 1), a, bad),
    )
    for call in calls:
        with pytest.raises(CheckpointError, match=r"bad\.safetensors is broken off"):
            call()
    assert blockmerge.open_checkpoint(bad).broken_off()
    assert blockmerge.similarity_matrix([a, b, bad], method="weights").errors["bad.safetensors"]


def halves(model):
    """The names of a model, in the order in which the reference writer stores them, in two halves."""
    names = sorted(model, key=lambda name: (-model[name].element_size(), name))
    return names[: len(names) // 2], names[len(names) // 2 :]


def test_tensors_that_are_zeros_are_no_fault_of_a_download(pairs, tmp_path, capsys):
    """However many there are at the end of a file: the zeros begin where a tensor does."""
    model = load_file(pairs()[0])
    legit = {
        "the last half": {**model, **{name: model[name] * 0 for name in halves(model)[1]}},
        "the first half": {**model, **{name: model[name] * 0 for name in halves(model)[0]}},
        "the last": {**model, halves(model)[1][-1]: model[halves(model)[1][-1]] * 0},
        "all but one": {
            name: tensor if name == halves(model)[0][5] else tensor * 0 for name, tensor in model.items()
        },
    }
    for what, tensors in legit.items():
        path = tmp_path / "legit.safetensors"
        save_file(tensors, path)
        assert blockmerge.inspect(path).broken_off is None, what
        assert blockmerge.convert(path, tmp_path / "o.safetensors", overwrite=True).tensors, what


def test_small_files_are_not_asked(tmp_path):
    save_file({"a": torch.cat([torch.ones(10), torch.zeros(4000)])}, tmp_path / "small.safetensors")
    assert blockmerge.open_checkpoint(tmp_path / "small.safetensors").broken_off() is None


@pytest.mark.parametrize("zeros", [0, 1, 4095, 4096, 5000, 100_000, 999_999, 1_000_000])
@pytest.mark.parametrize("holes", [[], [(100_000, 300_000)], [(0, 200_000), (500_000, 900_000)]])
def test_where_zeros_begin(tmp_path, zeros, holes):
    """Zeros inside are none at the end; those of less than a page are not looked for."""
    size = 1_000_000
    data = bytearray(b"\7" * size)
    for start, stop in holes:
        data[start:stop] = bytes(stop - start)
    data[size - zeros :] = bytes(zeros)
    (tmp_path / "x").write_bytes(b"head" + data)
    with (tmp_path / "x").open("rb") as file:
        found = zeros_from(file, 4, size + 4)
    last_page = size % 4096 or 4096
    assert found == (4 + len(data.rstrip(b"\0")) if zeros >= last_page else size + 4)


def test_a_whole_file_costs_one_page(tmp_path):
    """And a broken one some dozens, however large it is."""
    reads = []

    class Counting:
        def seek(self, place):
            self.place = place

        def read(self, count):
            reads.append(count)
            return b"\1" * count if self.place < limit else bytes(count)

    size, limit = 1 << 36, 1 << 36
    assert zeros_from(Counting(), 0, size) == size
    assert reads == [4096]
    limit = 1 << 35
    assert zeros_from(Counting(), 0, size) == limit
    assert len(reads) < 60


def test_checksums_of_an_archive(pairs, tmp_path, capsys):
    """One flipped bit of a zip .ckpt: torch loads it without a word, and so did check."""
    good = write(load_file(pairs()[0]), tmp_path / "good", "zip")
    assert "wrong_checksum" not in {problem.code for problem in blockmerge.check(good).problems}
    with zipfile.ZipFile(good) as archive:
        entry = max(archive.infolist(), key=lambda one: one.file_size * ("/data/" in one.filename))
    data = bytearray(good.read_bytes())
    name, tensor = next(
        (name, info)
        for name, info in blockmerge.open_checkpoint(good).tensors.items()
        if info.nbytes == entry.file_size
    )
    data[tensor.offset + tensor.nbytes // 2] ^= 1
    bad = tmp_path / "bad.ckpt"
    bad.write_bytes(data)
    with zipfile.ZipFile(bad) as archive:
        assert archive.testzip() == entry.filename
    problem = next(one for one in blockmerge.check(bad).problems if one.code == "wrong_checksum")
    assert problem.severity == "error"
    assert not problem.fixable
    assert entry.filename in problem.message
    assert name in problem.tensors
    assert run(["check", str(bad)]) == 1
    assert "wrong_checksum" in capsys.readouterr().out
    folder = tmp_path / "model" / "unet"
    folder.mkdir(parents=True)
    shutil.copy(bad, folder / "diffusion_pytorch_model.bin")
    found = next(one for one in blockmerge.check(tmp_path / "model").problems if one.code == "wrong_checksum")
    assert f"unet/{name}" in found.tensors


def test_an_archive_without_checksums_has_no_wrong_ones(tmp_path):
    from torch.serialization import get_crc32_options, set_crc32_options

    before = get_crc32_options()
    try:
        set_crc32_options(False)
        torch.save({"a": torch.randn(5000)}, tmp_path / "x.ckpt")
    finally:
        set_crc32_options(before)
    assert "wrong_checksum" not in {one.code for one in blockmerge.check(tmp_path / "x.ckpt").problems}
