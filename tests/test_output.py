"""The output: complete or not there at all, on every system; nothing else is touched."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest
from safetensors.torch import load_file

import blockmerge
from blockmerge import OutputError
from blockmerge.checkpoints import AtomicFile, check_output
from blockmerge.checkpoints.writing import disk
from blockmerge.cli.main import run
from blockmerge.streaming import PAGE, OutputStream, aligned_buffer
from tests import oracle
from tests.conftest import unchanged
from tests.refusals import assert_refused, snapshot


def test_a_merge_on_every_system(pairs, system):
    a, b = pairs()
    output = system / "out.safetensors"
    with unchanged(a, b):
        blockmerge.merge(a, b, preset="high_res", output=output)
    assert [path.name for path in system.iterdir() if path.is_file()] == ["out.safetensors"]
    weights = dict(zip(oracle.SD, oracle.numbers(oracle.HIGH_RES), strict=True))
    oracle.assert_merged(load_file(output), load_file(a), load_file(b), weights, "sd1")


def test_an_existing_output_is_kept_unless_asked(pairs, system, capsys):
    a, b = pairs()
    output = system / "out.safetensors"
    output.write_text("precious")
    assert_refused(
        capsys,
        system,
        a,
        b,
        "-w",
        "0.5",
        "-o",
        "out.safetensors",
        says=["out.safetensors exists", "--overwrite"],
    )
    assert run([str(a), str(b), "-w", "0.5", "-q", "-o", str(output), "--overwrite"]) == 0
    assert len(load_file(output)) == 1131


def test_the_output_is_never_an_input(pairs, system, capsys):
    for name, path in zip(("a", "b"), pairs(), strict=True):
        (system / f"{name}.safetensors").write_bytes(path.read_bytes())
    (system / "soft.safetensors").symlink_to("a.safetensors")
    subprocess.run(["ln", system / "b.safetensors", system / "hard.safetensors"], check=True)
    for name in ("a", "b", "soft", "hard", "../" + system.name + "/a"):
        assert_refused(
            capsys,
            system,
            "a.safetensors",
            "b.safetensors",
            "-w",
            "0.5",
            "-o",
            f"{name}.safetensors",
            "--overwrite",
            says="is the input",
        )
    assert_refused(
        capsys,
        system,
        "soft.safetensors",
        "b.safetensors",
        "-w",
        "0.5",
        "-o",
        "a.safetensors",
        "--overwrite",
        says="is the input",
    )
    vae = ["--vae", "hard.safetensors"]
    assert_refused(
        capsys,
        system,
        "a.safetensors",
        "a.safetensors",
        "-w",
        "0.5",
        *vae,
        "-o",
        "b.safetensors",
        "--overwrite",
        says="is the input",
    )


def test_places_where_nothing_can_be_written(pairs, tmp_path, capsys):
    a, b = pairs()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for output, says in {
        "missing/out.safetensors": ["the folder", "missing does not exist"],
        "folder.safetensors": "is a folder",
        "pipe.safetensors": "not a regular file",
        "file/out.safetensors": "does not exist",
        "out.ckpt": "the output is a .safetensors file",
        "out": "the output is a .safetensors file",
        "": "the output's name is empty",
        ".": ". is a folder",
        "newdir/": "newdir/ is a folder",
        "x" * 300 + ".safetensors": "name too long",
        "nul\0.safetensors": "null",
    }.items():
        assert_refused(capsys, tmp_path, a, b, "-w", "0.5", "-o", output, says=says)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (None, r"no output is named: give a path \(-o\)"),
        (b"out.safetensors", "the output is a path; bytes given"),
        (3, "the output is a path; int given"),
    ],
)
def test_an_output_that_is_no_path(pairs, output, says):
    with pytest.raises(OutputError, match=says):
        blockmerge.merge(*pairs(), weights=0.5, output=output)


def test_a_folder_that_may_not_be_written(pairs, tmp_path, capsys, monkeypatch):
    """Root may write everywhere, so the operating system's refusal is made by hand."""
    real = os.open

    def refuse(path, flags, *rest, **options):
        if ".blockmerge-" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert_refused(capsys, tmp_path, *pairs(), "-w", "0.5", says="permission denied")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(pairs, tmp_path, capsys):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_refused(
        capsys, tmp_path, *pairs(), "-w", "0.5", "-o", "locked/out.safetensors", says="permission denied"
    )


def test_a_full_disk_is_an_error_before_any_work(pairs, tmp_path, capsys, monkeypatch):
    import shutil

    real = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1_000_000))
    line = assert_refused(
        capsys, tmp_path, *pairs(), "-w", "0.5", says=["not enough space", "1.0 MB are free"]
    )
    assert "2.2 MB" in line


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
def test_a_really_full_disk(pairs, small_tmpfs, capsys, monkeypatch, blind):
    """`blind`: even when free space and reservation say nothing, writing does, and nothing remains."""
    if blind:
        import shutil

        real = shutil.disk_usage
        monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=1 << 40))
        monkeypatch.setattr(disk, "reserve", lambda *_: None)
    assert_refused(
        capsys, small_tmpfs, *pairs(), "-w", "0.5", says="no space left" if blind else "not enough space"
    )


@pytest.mark.parametrize("reserved", [True, False])
def test_a_file_size_limit(pairs, system, capsys, monkeypatch, reserved):
    if not reserved:
        monkeypatch.setattr(disk, "reserve", lambda *_: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        assert_refused(capsys, system, *pairs(), "-w", "0.5", says="file too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_error_leaves_nothing(pairs, system, capsys, monkeypatch):
    real = os.write

    def fail(file, data):
        if len(data) >= 4096:
            raise OSError(5, "Input/output error")
        return real(file, data)

    monkeypatch.setattr(os, "write", fail)
    assert_refused(capsys, system, *pairs(), "-w", "0.5", says="cannot write")


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_file_mode_follows_the_umask(pairs, system, umask):
    old = os.umask(umask)
    try:
        blockmerge.merge(*pairs(), weights=0, output=system / "out.safetensors")
    finally:
        os.umask(old)
    assert stat.S_IMODE((system / "out.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_symlink_at_the_target_stays_one(pairs, system):
    (system / "real").mkdir()
    (system / "link.safetensors").symlink_to("real/model.safetensors")
    blockmerge.merge(*pairs(), weights=0, output=system / "link.safetensors")
    assert (system / "link.safetensors").is_symlink()
    first = (system / "real/model.safetensors").read_bytes()
    blockmerge.merge(*pairs(), weights=1, output=system / "link.safetensors", overwrite=True)
    assert (system / "link.safetensors").is_symlink()
    assert (system / "real/model.safetensors").read_bytes() != first
    assert [path.name for path in (system / "real").iterdir()] == ["model.safetensors"]


def test_a_file_that_appears_meanwhile_is_kept(pairs, system):
    output = system / "out.safetensors"

    def appear(done, total):
        if not output.exists():
            output.write_text("somebody else's")

    with pytest.raises(OutputError, match="appeared meanwhile"):
        blockmerge.merge(*pairs(), weights=0.5, output=output, progress=appear)
    assert output.read_text() == "somebody else's"
    assert [path.name for path in system.iterdir() if path.is_file()] == ["out.safetensors"]


def test_an_exception_in_the_callback_leaves_nothing(pairs, system):
    def burst(done, total):
        raise KeyboardInterrupt

    before = snapshot(system)
    with pytest.raises(KeyboardInterrupt):
        blockmerge.merge(*pairs(), weights=0.5, output=system / "out.safetensors", progress=burst)
    assert snapshot(system) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blockmerge")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing(big_pair, tmp_path, number):
    """The whole command, interrupted while it writes."""
    arguments = [
        sys.executable,
        "-m",
        "blockmerge",
        *map(str, big_pair),
        "-w",
        "0.5",
        "-o",
        str(tmp_path / "out.safetensors"),
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob(".blockmerge-*")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "Interrupted: no unfinished file is left")
    assert list(tmp_path.iterdir()) == []


def test_progress_is_told_from_the_callers_thread(pairs, tmp_path):
    seen = []
    result = blockmerge.merge(
        *pairs(),
        weights=0.5,
        output=tmp_path / "o.safetensors",
        progress=lambda *step: seen.append((threading.get_ident(), *step)),
    )
    assert {ident for ident, _, _ in seen} == {threading.get_ident()}
    assert seen[-1][1:] == (result.bytes, result.bytes)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_leftovers_are_swept_only_when_abandoned(system):
    dead = system / ".blockmerge-1-abcdef01.tmp"
    dead.write_bytes(b"x" * 1000)
    other = system / ".blockmerge-notes.txt"
    other.write_text("mine")
    with AtomicFile(check_output(system / "one"), 10) as first:
        assert first.swept == ("removed .blockmerge-1-abcdef01.tmp (1.0 kB), left by an interrupted run",)
        with AtomicFile(check_output(system / "two"), 10) as second:
            assert second.swept == ()
            assert first.path.exists()
            second.commit()
        first.commit()
    assert {path.name for path in system.iterdir() if path.is_file()} == {
        "one",
        "two",
        ".blockmerge-notes.txt",
    }
    assert (system / "two").stat().st_size == 10


def test_direct_writes_that_are_refused_fall_back(tmp_path, monkeypatch):
    """Some file systems let a file be opened for direct writes and then refuse them."""
    if not hasattr(os, "O_DIRECT"):
        pytest.skip("no direct writes here")
    path = tmp_path / "file"
    path.write_bytes(b"")
    stream = OutputStream(path)
    real = os.write
    with stream.writer() as piece_writer:
        was_direct = stream.direct

        def refuse(file, data):
            if stream.direct:
                raise OSError(22, "Invalid argument")
            return real(file, data)

        monkeypatch.setattr(os, "write", refuse)
        buffer = aligned_buffer(8192)
        buffer[:] = b"ab" * 4096
        piece_writer.write(4096, buffer)
    assert was_direct
    assert path.read_bytes() == bytes(4096) + b"ab" * 4096


def test_short_writes_are_continued(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"")
    real = os.write
    monkeypatch.setattr(
        os, "write", lambda file, data: real(file, data[: max(4096, len(data) // 3 // 4096 * 4096)])
    )
    data = os.urandom(40 * 4096)
    buffer = aligned_buffer(len(data))
    buffer[:] = data
    with OutputStream(path).writer() as piece_writer:
        piece_writer.write(0, buffer)
    assert path.read_bytes() == data


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 8192), (100, 8192), (4096, 9000), (5000, 20000), (5000, 6000), (5000, 9000)]
)
def test_only_whole_pages_are_written_directly(tmp_path, monkeypatch, start, stop):
    path = tmp_path / "file"
    path.write_bytes(bytes(20480))
    real, direct, buffered = os.write, [], []

    def noted(file, data):
        is_direct = fcntl.fcntl(file, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0)
        count = real(file, data)
        (direct if is_direct else buffered).append(count)
        return count

    monkeypatch.setattr(os, "write", noted)
    data = os.urandom(stop - start)
    memory = aligned_buffer(24576)[start % PAGE :][: len(data)]
    memory[:] = data
    stream = OutputStream(path)
    with stream.writer() as piece_writer:
        piece_writer.write(start, memory)
    assert path.read_bytes() == bytes(start) + data + bytes(20480 - stop)
    if stream.direct:
        assert sum(direct) == max(0, stop // PAGE - -(-start // PAGE)) * PAGE
        assert sum(buffered) == len(data) - sum(direct)


def test_the_data_is_flushed_before_it_gets_its_name(pairs, tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "link", "replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *given, name=name, real=real: (steps.append(name), real(*given))[1]
        )
    blockmerge.merge(*pairs(), weights=0, output=tmp_path / "out.safetensors")
    assert steps[:2] == ["fsync", "link"]


def test_an_abandoned_file_is_removed_while_it_is_locked(tmp_path, monkeypatch):
    """Between unlocking and removing, a new writer could lock it and then lose it."""
    import fcntl
    from pathlib import Path

    stale = tmp_path / ".blockmerge-1-abcdef01.tmp"
    stale.write_bytes(b"x")
    seen = []
    real = Path.unlink

    def unlink(path, **options):
        if path == stale:
            with path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    seen.append("locked")
        real(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    with AtomicFile(check_output(tmp_path / "one"), 10):
        assert seen == ["locked"]


def test_a_cleanup_that_fails_does_not_hide_the_error(pairs, tmp_path, monkeypatch):
    from pathlib import Path

    a, b = (load_file(path) for path in pairs())
    a["model.diffusion_model.input_blocks.4.1.proj_in.weight"][0] = float("nan")

    def refuse(path, **_):
        raise PermissionError(13, "in use")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(blockmerge.NonFiniteError):
        blockmerge.merge(a, b, weights=0.5, output=tmp_path / "out.safetensors")
