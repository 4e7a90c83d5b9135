"""Fixtures: thin checkpoints with real names, made once, and the three systems that reading and writing must
work on.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from blockmerge.demo import write_pair
from tests.big import write_big

settings.register_profile(
    "default",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("default")

# As in what a script starts with &: children would ignore it too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FAMILIES = ("sd1", "sd2", "sdxl")


def pytest_collection_modifyitems(items):
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    """Folders that are not there yet; `mktemp` would look through all former ones for each of thousands of
    tests.
    """
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def own_config_folder(homes, monkeypatch):
    """No test sees the presets of whoever runs it."""
    home = next(homes)
    home.mkdir()
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("APPDATA", str(home / "config"))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture(scope="module")
def one_thread():
    """torch's threads: thin tensors gain nothing from more, and lose much where other tests run beside."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A new folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """A function that gives paths of a thin pair (a, b) for a family and two dtypes; each is made once."""
    folder = tmp_path_factory.mktemp("pairs")

    def pair(family="sd1", dtypes=("F16", "F16"), difference=0.05, seed=0):
        home = folder / f"{family}-{'-'.join(dtypes)}-{difference}-{seed}"
        if not home.exists():
            made = folder / "being-made"
            made.mkdir(exist_ok=True)
            names = made / "a.safetensors", made / "b.safetensors"
            write_pair(*names, family, dtypes=dtypes, difference=difference, seed=seed, overwrite=True)
            made.rename(home)
        return home / "a.safetensors", home / "b.safetensors"

    return pair


TAKEN_AWAY = (
    "pread",
    "pwrite",
    "preadv",
    "pwritev",
    "copy_file_range",
    "posix_fallocate",
    "posix_fadvise",
    "O_DIRECT",
    "O_DIRECTORY",
)


def _no_hard_links(*_, **__):
    raise OSError(errno.EPERM, "Operation not permitted")


@pytest.fixture(params=["native", "bare", "tmpfs"])
def system(request, monkeypatch, tmp_path):
    """A folder to write in: on this system as it is, with all that Windows lacks taken away, and on a
    tmpfs.
    """
    if request.param == "bare":
        for name in TAKEN_AWAY:
            monkeypatch.delattr(os, name, raising=False)
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "link", _no_hard_links)
        # fallocate and sync_file_range are only to be had through ctypes
        monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: (_ for _ in ()).throw(OSError("no C library")))
        yield tmp_path
    elif request.param == "tmpfs":
        if not os.path.isdir("/dev/shm") or not os.access("/dev/shm", os.W_OK):
            pytest.skip("no tmpfs here")
        folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="blockmerge-test-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        yield tmp_path


@contextlib.contextmanager
def unchanged(*paths):
    """Hold that files have the same bytes, and their folders the same entries, before and after."""
    files = [Path(path) for path in paths]
    before = [path.read_bytes() for path in files]
    yield
    assert [path.read_bytes() for path in files] == before


@pytest.fixture(scope="session")
def big_pair(tmp_path_factory):
    """Paths of two models of 96 MB, of which one tensor makes up nearly all."""
    folder = tmp_path_factory.mktemp("big")
    for name, value in (("a", b"\x00\x3c"), ("b", b"\x00\x40")):  # 1.0 and 2.0
        write_big(folder / f"{name}.safetensors", value, megabytes=96)
    return folder / "a.safetensors", folder / "b.safetensors"
