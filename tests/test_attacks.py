"""Hostile torch files: none runs anything, each ends in one line, soon and in little memory."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockmerge import BlockmergeError, open_checkpoint
from tests import attacks
from tests.refusals import assert_refused

LAYOUTS = {"zip": attacks.zipped, "stream": attacks.streamed}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", attacks.PICKLES)
@pytest.mark.timeout(20)
def test_a_hostile_pickle_is_refused(tmp_path, capsys, monkeypatch, name, layout):
    make, says = attacks.PICKLES[name]
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "x.ckpt").write_bytes(LAYOUTS[layout](make(tmp_path / "canary")))
    line = assert_refused(
        capsys, tmp_path, "inspect", "x.ckpt", says=["x.ckpt is not a valid torch file: ", *says]
    )
    assert len(line) < 600
    assert not (tmp_path / "canary").exists()
    assert "attacks_canary" not in sys.modules


@pytest.mark.parametrize("name", attacks.FILES)
@pytest.mark.timeout(20)
def test_a_hostile_file_is_refused(tmp_path, capsys, name):
    make, says = attacks.FILES[name]
    (tmp_path / "x.ckpt").write_bytes(make())
    line = assert_refused(
        capsys, tmp_path, "inspect", "x.ckpt", says=["x.ckpt is not a valid torch file: ", *says]
    )
    assert len(line) < 600


@pytest.mark.parametrize("name", attacks.RUNNING)
def test_the_attacks_are_real(tmp_path, monkeypatch, name):
    """Python's own unpickler runs them."""
    monkeypatch.syspath_prepend(tmp_path)
    try:
        pickle.loads(attacks.RUNNING[name](tmp_path / "canary"))
    finally:
        sys.modules.pop("attacks_canary", None)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_an_attack_the_files_open(tmp_path, layout):
    (tmp_path / "x.ckpt").write_bytes(LAYOUTS[layout]())
    assert open_checkpoint(tmp_path / "x.ckpt").read("a") == attacks.DATA
    assert torch.equal(torch.load(tmp_path / "x.ckpt")["a"], torch.tensor([1.0, 2, 3, 4]))


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_attacks_cost_little_memory(tmp_path):
    """All of them one after the other, in 600 MB of address space, of which Python itself has a part."""
    for name, (make, _) in attacks.PICKLES.items():
        (tmp_path / f"{name}.ckpt").write_bytes(attacks.zipped(make(tmp_path / "canary")))
    for name, (make, _) in attacks.FILES.items():
        (tmp_path / f"{name}.ckpt").write_bytes(make())
    code = (
        "import resource, sys, blockmerge\n"
        "resource.setrlimit(resource.RLIMIT_AS, (600 << 20, 600 << 20))\n"
        "for path in sys.argv[1:]:\n"
        "    try: blockmerge.inspect(path)\n"
        "    except blockmerge.CheckpointError: continue\n"
        "    raise SystemExit(path)\n"
    )
    paths = [str(path) for path in sorted(tmp_path.glob("*.ckpt"))]
    assert len(paths) == len(attacks.PICKLES) + len(attacks.FILES)
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)
    assert not (tmp_path / "canary").exists()


def saved_files():
    import io

    tensors = {
        "a": torch.randn(3, 4).half(),
        "b": torch.randn(5, 6).T,
        "c": torch.nn.Parameter(torch.ones(3)),
    }
    for options in ({}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}):
        buffer = io.BytesIO()
        torch.save({"state_dict": tensors, "step": 3}, buffer, **options)
        yield buffer.getvalue()


SAVED = list(saved_files())


def outcome(path):
    """Open a file and read all that is in it: a BlockmergeError, or what was read."""
    try:
        checkpoint = open_checkpoint(path)
        return {name: checkpoint.read(name) for name in checkpoint.tensors}
    except BlockmergeError as error:
        assert str(error).isprintable()
        assert len(str(error)) < 1500
        return error


@pytest.mark.parametrize("number", range(len(SAVED)))
def test_every_truncation_is_refused(tmp_path, number):
    data = SAVED[number]
    path = tmp_path / "x.ckpt"
    for size in [*range(0, len(data) - 100, 11), *range(len(data) - 100, len(data))]:
        path.write_bytes(data[:size])
        assert isinstance(outcome(path), BlockmergeError), size
    path.write_bytes(data)
    assert outcome(path).keys() == {"a", "b", "c"}


@given(st.sampled_from(SAVED), st.data())
def test_changed_bytes_are_refused_or_read(tmp_path, data, draw):
    changed = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        changed[at] = draw.draw(st.integers(0, 255) | st.sampled_from(list(b"(.)NRtu}]ecqQ\x80\x95")))
    path = tmp_path / "x.ckpt"
    path.write_bytes(changed)
    outcome(path)


OPCODES = [*b"(.012NJKM]}tadeusqrhjRbQlIFGXUTCBc)", *range(0x80, 0x98)]


@given(st.lists(st.sampled_from(OPCODES) | st.integers(0, 255), max_size=60), st.sampled_from(list(LAYOUTS)))
def test_random_pickles_are_refused_or_read(tmp_path, codes, layout):
    path = tmp_path / "x.ckpt"
    path.write_bytes(LAYOUTS[layout](b"\x80\x02" + bytes(codes) + b"."))
    outcome(path)
