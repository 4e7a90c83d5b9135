"""An output folder: complete or not there at all, on every system; what it replaces is never lost.

Over 500 lines: the ways in which a swap can be interrupted share their helpers.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockmerge import OutputError
from blockmerge.checkpoints import AtomicFile, AtomicFolder, check_output, check_output_folder
from blockmerge.checkpoints.writing import disk
from tests.effort import many
from tests.refusals import snapshot

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
CONTENT = {"model_index.json": b"{}", "unet/config.json": b'{"new": 1}', WEIGHTS: b"new" * 70_000}
LEFT = ".blockmerge-1-abcdef01"


def write(folder, content):
    for name, data in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def fill(target, content=CONTENT, overwrite=False):
    """Write a folder as merging does: small files at once, large ones through handles of its own."""
    files = {name: len(data) if name.endswith(".safetensors") else data for name, data in content.items()}
    with AtomicFolder(target, files, overwrite=overwrite) as folder:
        for name, size in files.items():
            if isinstance(size, int):
                with folder.path_of(name).open("r+b") as file:
                    file.write(content[name] + bytes(4096))  # as direct writes do, to whole pages
        folder.commit()
    return folder


def found(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


@pytest.fixture
def old(system):
    """A model in the way."""
    return write(
        system / "out",
        {"model_index.json": b"{}", "vae/config.json": b"old", "vae/diffusion_pytorch_model.bin": b"old"},
    )


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchanging(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(disk, "exchange", lambda *_: False)
    return request.param


def test_a_new_folder(system):
    target = check_output_folder(system / "out")
    folder = fill(target)
    assert folder.swept == ()
    assert found(target) == CONTENT
    assert [path.name for path in system.iterdir()] == ["out"]


_NAME = st.text("abXY._ é", min_size=1, max_size=8).filter(lambda name: name not in (".", ".."))


@given(st.dictionaries(st.tuples(_NAME, st.just("f")).map("/".join), st.binary(max_size=5000), max_size=6))
def test_any_files(tmp_path_factory, files):
    target = tmp_path_factory.mktemp("home") / "out"
    with AtomicFolder(target, files) as folder:
        folder.commit()
    assert found(target) == files
    assert len(list(target.parent.iterdir())) == 1


def test_without_commit_nothing_remains(system, old):
    before = snapshot(system)
    for name, overwrite in (("new", False), ("out", True)):
        with AtomicFolder(
            system / name, {"unet/a": 1000, "config.json": b"{}"}, overwrite=overwrite
        ) as folder:
            assert folder.path_of("unet/a").stat().st_size in (0, 1000)
            assert folder.path_of("config.json").read_bytes() == b"{}"
        assert snapshot(system) == before
        with pytest.raises(KeyboardInterrupt), AtomicFolder(system / name, {"a": 10}, overwrite=overwrite):
            raise KeyboardInterrupt
        assert snapshot(system) == before


def test_replacing(system, old, exchanging):
    fill(check_output_folder(old, overwrite=True), overwrite=True)
    assert found(old) == CONTENT
    assert [path.name for path in system.iterdir()] == ["out"]


def test_replacing_an_empty_folder(system, exchanging):
    (system / "out").mkdir()
    fill(check_output_folder(system / "out", overwrite=True), overwrite=True)
    assert found(system / "out") == CONTENT


def test_this_system_exchanges(tmp_path):
    """So that the tests of it do not pass for want of it."""
    one, other = write(tmp_path / "one", {"a": b"1"}), write(tmp_path / "other", {"b": b"2"})
    if not disk.exchange(one, other):
        pytest.skip("not here")
    assert (found(one), found(other)) == ({"b": b"2"}, {"a": b"1"})
    with pytest.raises(FileNotFoundError):
        disk.exchange(one, tmp_path / "missing")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_modes_follow_the_umask(system, umask):
    before = os.umask(umask)
    try:
        fill(system / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (system / "out", system / "out/unet")} == {
        0o777 & ~umask
    }
    assert {stat.S_IMODE((system / "out" / name).stat().st_mode) for name in CONTENT} == {0o666 & ~umask}


def test_a_symlink_at_the_target_stays_one(system):
    (system / "link").symlink_to("real")
    fill(check_output_folder(system / "link"))
    fill(check_output_folder(system / "link", overwrite=True), {"model_index.json": b"{}"}, overwrite=True)
    assert (system / "link").is_symlink()
    assert found(system / "real") == {"model_index.json": b"{}"}


REFUSED = {
    "missing/out": "the folder .*missing does not exist",
    "file": "is a file",
    "file/out": "does not exist",
    "pipe": "is a file",
    "in": "is, holds or lies in the input",
    "in/out": "is, holds or lies in the input",
    "in/unet": "is, holds or lies in the input",
    "link-to-in/deeper": "is, holds or lies in the input",
    "above": "is, holds or lies in the input .*above/in",
    "above/in/unet": "is, holds or lies in the input",
    "single.safetensors/out": "is, holds or lies in the input",
    "cat": "holds no diffusers model but cat.png",
    "mixed": "holds what is not part of a model: README.md, notes, unet/deep and 2 more",
    "broken": "broken is not replaced: .*model_index.json is not valid JSON",
    "x" * 300: "name too long",
    "nul\0": "null",
}


@pytest.fixture
def places(tmp_path):
    model = {"model_index.json": b"{}", "unet/config.json": b"{}"}
    write(tmp_path / "in", model)
    write(tmp_path / "above", {"model_index.json": b"{}"})
    write(tmp_path / "above" / "in", model)
    (tmp_path / "link-to-in").symlink_to("in")
    (tmp_path / "file").write_text("x")
    (tmp_path / "single.safetensors").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    write(tmp_path / "cat", {"cat.png": b"x"})
    write(
        tmp_path / "mixed",
        model
        | {
            "README.md": b"x",
            "notes/a.txt": b"x",
            "unet/mine.safetensors": b"x",
            "unet/deep/config.json": b"x",
            "unet/me.txt": b"x",
        },
    )
    write(tmp_path / "broken", {"model_index.json": b"{nope"})
    return tmp_path


@pytest.mark.parametrize("output", REFUSED)
def test_places_that_are_refused(places, output):
    before = snapshot_without_pipes(places)
    inputs = [places / "in", places / "above" / "in", places / "single.safetensors", places / "gone"]
    with pytest.raises(OutputError, match=REFUSED[output]) as caught:
        check_output_folder(places / output, inputs, overwrite=True)
    assert "\n" not in str(caught.value)
    assert snapshot_without_pipes(places) == before


def snapshot_without_pipes(folder):
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_an_existing_folder_is_kept_unless_asked(places):
    with pytest.raises(OutputError, match=r"in exists: give another name, or overwrite \(--overwrite\)"):
        check_output_folder(places / "in")
    write(places / "in", {".DS_Store": b"x", "unet/Thumbs.db": b"x"})
    assert (
        check_output_folder(places / "in", [places / "above", places / "file"], overwrite=True)
        == places / "in"
    )


def test_an_input_whose_files_are_links_into_the_output(places):
    """As the hub's cache has them: the folder given is elsewhere than its bytes."""
    (places / "snapshot").mkdir()
    (places / "snapshot" / "config.json").symlink_to("../in/unet/config.json")
    with pytest.raises(OutputError, match=r"the input .*snapshot"):
        check_output_folder(places / "in", [places / "snapshot" / "config.json"], overwrite=True)


@pytest.mark.parametrize("name", ["../a", "/etc/a", "a/../../b", "", ".", "a\\..\\b", "c:a", "nul\0"])
def test_files_outside_the_folder_are_refused(system, name):
    with (
        pytest.raises(OutputError, match="is not a name for a file in a folder"),
        AtomicFolder(system / "out", {"a": b"", name: b"x"}),
    ):
        pass
    assert list(system.iterdir()) == []


def test_what_appears_meanwhile_is_kept(system):
    for name, make in {
        "folder": lambda path: write(path, {"a": b"x"}),
        "file": lambda path: path.write_text("x"),
    }.items():
        with AtomicFolder(system / name, {"a": 10}) as folder:
            make(system / name)
            with pytest.raises(OutputError, match="has appeared meanwhile"):
                folder.commit()
    assert sorted(path.relative_to(system).as_posix() for path in system.rglob("*")) == [
        "file",
        "folder",
        "folder/a",
    ]


def test_what_gets_other_files_meanwhile_is_not_replaced(system, old):
    with AtomicFolder(old, {"a": 10}, overwrite=True) as folder:
        (old / "notes.txt").write_text("mine")
        before = found(old)
        with pytest.raises(OutputError, match=r"not part of a model: notes\.txt"):
            folder.commit()
    assert found(old) == before
    assert [path.name for path in system.iterdir()] == ["out"]


@pytest.mark.parametrize("broken", [1, 2])
def test_a_rename_that_fails_puts_the_old_folder_back(system, old, monkeypatch, broken):
    monkeypatch.setattr(disk, "exchange", lambda *_: False)
    before = snapshot(system)
    real, count = os.rename, 0

    def fail(*names):
        nonlocal count
        count += 1
        if count == broken:
            raise OSError(errno.EIO, "Input/output error")
        real(*names)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OutputError, match="input/output error"):
        fill(old, overwrite=True)
    assert snapshot(system) == before


def test_an_exchange_that_fails_leaves_the_old_folder(system, old, monkeypatch):
    def fail(*_):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(disk, "exchange", fail)
    before = snapshot(system)
    with pytest.raises(OutputError, match="resource busy"):
        fill(old, overwrite=True)
    assert snapshot(system) == before


def test_when_nothing_can_be_put_back_the_next_writer_does_it(system, old, monkeypatch):
    monkeypatch.setattr(disk, "exchange", lambda *_: False)
    before = snapshot(old)
    real = os.rename

    def fail(source, target):
        if target == old:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", fail)
        with pytest.raises(OutputError, match="input/output error"):
            fill(old, overwrite=True)
    assert not old.exists()
    with AtomicFile(check_output(system / "other"), 10) as file:
        assert file.swept == ("put out back, which an interrupted run had moved aside",)
    assert snapshot(old) == before
    assert [path.name for path in system.iterdir()] == ["out"]


def test_flushed_before_it_gets_its_name(tmp_path, old, monkeypatch):
    steps = []
    for module, name in ((os, "fsync"), (os, "rename"), (disk, "exchange"), (shutil, "rmtree")):
        real = getattr(module, name)
        monkeypatch.setattr(
            module,
            name,
            lambda *given, name=name, real=real, **more: (steps.append(name), real(*given, **more))[1],
        )
    fill(old, overwrite=True)
    named = min(steps.index(name) for name in ("rename", "exchange") if name in steps)
    assert steps[:named].count("fsync") >= len(CONTENT)
    assert steps.index("rmtree") > named


# A full disk


def test_a_full_disk_is_an_error_before_any_work(system, old, monkeypatch):
    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1_000_000))
    before = snapshot(system)
    with pytest.raises(OutputError, match=r"not enough space for .*out: it needs 1\.2 MB, 1\.0 MB are free"):
        fill(old, {"a.safetensors": bytes(600_000), "b.safetensors": bytes(600_000)}, overwrite=True)
    assert snapshot(system) == before


@pytest.fixture
def small_tmpfs(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("blind", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_really_full_disk(small_tmpfs, monkeypatch, blind, at_once):
    if blind:
        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1 << 40))
    before = write(small_tmpfs / "out", {"model_index.json": b"{}"})
    state = snapshot(before)
    with (
        pytest.raises(OutputError, match="no space left" if blind else "not enough space"),
        AtomicFolder(
            before, {"a": bytes(1_000_000) if at_once else 1_000_000, "b": 1_000_000}, overwrite=True
        ),
    ):
        pass
    assert snapshot(before) == state
    assert [path.name for path in small_tmpfs.iterdir()] == ["out"]


# What killed writers leave


def leave(folder, *, lock=None, temp=False, aside=False):
    if lock is not None:
        (folder / f"{LEFT}.lock").write_bytes(lock)
    if temp:
        write(folder / f"{LEFT}.tmp", {"unet/a": b"x" * 100_000})
    if aside:
        write(folder / f"{LEFT}.old", {"unet/a": b"precious"})


def swept(folder):
    with AtomicFile(check_output(folder / "other"), 10) as file:
        return file.swept


REMOVED = f"removed {LEFT}.tmp (100.0 kB), left by an interrupted run"
PUT_BACK = "put out back, which an interrupted run had moved aside"
TOLD = f"{LEFT}.old is a folder that an interrupted run moved aside: rename it, or remove it"


@pytest.mark.parametrize("lock", [None, b"", b"out", b"../out", b"..", b".", b"a/b", b"nul\0", b"x" * 9999])
@pytest.mark.parametrize("taken", [False, True])
def test_leftovers(system, lock, taken):
    leave(system, lock=lock, temp=True, aside=True)
    if taken:
        write(system / "out", {"model_index.json": b"{}"})
    back = lock == b"out" and not taken
    assert swept(system) == (REMOVED, PUT_BACK if back else TOLD)
    precious = system / "out" if back else system / f"{LEFT}.old"
    assert found(precious) == {"unet/a": b"precious"}
    assert {path.name for path in system.iterdir()} == {precious.name} | ({"out"} if taken else set())
    assert swept(system) == (() if back else (TOLD,))


def test_a_lock_alone_goes_without_a_word(system):
    leave(system, lock=b"out")
    assert swept(system) == ()
    assert list(system.iterdir()) == []


def test_a_lock_that_is_a_pipe_or_a_link_is_left_alone(tmp_path):
    os.mkfifo(tmp_path / f"{LEFT}.lock")
    (tmp_path / ".blockmerge-1-abcdef02.tmp").symlink_to(tmp_path)
    assert swept(tmp_path) == ()
    assert len(list(tmp_path.iterdir())) == 2


def test_living_writers_are_left_alone(system, old):
    with (
        AtomicFolder(old, {"unet/a": 10}, overwrite=True) as first,
        AtomicFolder(system / "two", {"b": b"x"}) as second,
    ):
        assert first.swept == second.swept == ()
        assert first.path_of("unet/a").exists()
        with AtomicFile(check_output(system / "file"), 10) as third:
            assert third.swept == ()
            assert first.path_of("unet/a").exists()
            with AtomicFolder(system / "four", {}) as fourth:
                assert fourth.swept == ()
                assert third.path.exists()
        second.commit()
        first.commit()
    assert sorted(path.name for path in system.iterdir()) == ["out", "two"]


def test_without_locks_the_young_are_left_alone(system, monkeypatch):
    """As on Windows."""
    monkeypatch.setattr(disk, "fcntl", None)
    leave(system, lock=b"out", temp=True, aside=True)
    assert swept(system) == ()
    long_ago = time.time() - 3600
    os.utime(system / f"{LEFT}.lock", (long_ago, long_ago))
    assert swept(system) == (REMOVED, PUT_BACK)


def test_the_former_folder_put_back_is_not_overwritten_unasked(system):
    leave(system, lock=b"out", aside=True)
    with pytest.raises(OutputError, match="out has appeared meanwhile"):
        fill(check_output_folder(system / "out"))
    assert found(system / "out") == {"unet/a": b"precious"}


# kill -9


@contextlib.contextmanager
def child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(0)
    yield pid
    os.waitpid(pid, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("step", ["before", "between", "after"])
def test_killed_between_the_renames(system, old, monkeypatch, step):
    monkeypatch.setattr(disk, "exchange", lambda *_: False)
    before, real = found(old), os.rename
    which = {"before": 1, "between": 2, "after": 3}[step]

    def die_at():
        count = 0

        def rename(*names):
            nonlocal count
            count += 1
            if count == which:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*names)

        os.rename = rename
        fill(old, overwrite=True)

    with child(die_at):
        pass
    assert old.exists() == (step != "between")
    said = swept(system)
    temp = [line for line in said if line.startswith("removed .blockmerge-")]
    others = [line for line in said if line not in temp]
    if step == "after":
        assert found(old) == CONTENT
        assert len(others) == 1
        assert "is a folder that an interrupted run moved aside" in others[0]
        assert found(system / others[0].split()[0]) == before
    else:
        assert found(old) == before
        assert len(temp) == 1
        assert others == ([PUT_BACK] if step == "between" else [])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("system", "exchanging"),
    [("native", True), ("native", False), ("tmpfs", True), ("bare", False)],  # what is bare cannot exchange
    indirect=True,
)
def test_killed_at_random_moments(system, exchanging):
    """No folder, the old one or the new one under the name, whole; never neither where there was one; all is
    swept.
    """
    target = system / "out"
    contents = [
        {f"unet/{n}.json": bytes([k]) * 50_000 for n in range(10)}
        | {"model_index.json": b"{}", WEIGHTS: bytes([k]) * 2_000_000}
        for k in (1, 2)
    ]
    fill(target, contents[0])
    started = time.perf_counter()
    with child(lambda: fill(target, contents[0], overwrite=True)):
        pass
    whole = time.perf_counter() - started
    random.seed(0)
    seen = {"rounds": 0, "killed midway": 0, "finished": 0}
    now = 0
    # On a machine that is now fast and now slow, kills come too late or too early: how long it takes is found
    # out on the way.
    while seen["rounds"] < many(30) or (seen["killed midway"] < 5 and seen["rounds"] < 400):
        seen["rounds"] += 1
        with child(lambda now=now: fill(target, contents[1 - now], overwrite=True)) as pid:
            time.sleep(random.random() * whole)
            os.kill(pid, signal.SIGKILL)
        midway = bool(list(system.glob(".blockmerge-*")))
        seen["killed midway"] += midway
        said = swept(system)
        state = found(target)
        assert state in contents, said
        if state == contents[1 - now]:
            now = 1 - now
            seen["finished"] += 1
            whole *= 0.8
        elif not midway:
            whole *= 1.25
        left = list(system.glob(".blockmerge-*"))
        if left:  # killed when the new one stood and the old one was not yet up for removal: both are whole
            assert [path.suffix for path in left] == [".old"]
            assert any(left[0].name in line for line in said)
            assert found(left[0]) == contents[1 - now]
            shutil.rmtree(left[0])
        assert [path.name for path in system.iterdir()] == ["out"]
    assert seen["killed midway"] >= 5, json.dumps(seen)
