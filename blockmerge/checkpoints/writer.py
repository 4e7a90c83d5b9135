"""The atomic writer: a new file appears under its name complete and safe on the disk, or not at all.

The data goes into a temp file beside the target, with its space reserved before any work is done; when it is complete
it is flushed to the disk and renamed. A process that is killed leaves its temp file behind, but unlocked: the next
writer in that folder finds it and removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from blockmerge.errors import OutputError, reason, shown

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_TEMP_PREFIX, _TEMP_SUFFIX = ".blockmerge-", ".tmp"
_TEMP_NAME = re.compile(r"\.blockmerge-\d+-[0-9a-f]{8}\.tmp")
_YOUNG = 600  # seconds


def check_output(path: str | os.PathLike[str], inputs: Iterable[Path] = (), *, overwrite: bool = False) -> Path:
    """Return where the output will really lie (a symlink at `path` stays one; its target is written).

    Raises OutputError when it exists and `overwrite` is false, when it is one of the `inputs` (also through a symlink or
    a hard link), when it is no regular file, or its folder is missing.
    """
    try:
        target = Path(os.path.realpath(path))
        folder_exists, status = target.parent.is_dir(), _stat(target)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise OutputError(f"cannot write {shown(path)}: {why}") from error
    if status is not None:
        if stat.S_ISDIR(status.st_mode):
            raise OutputError(f"{shown(path)} is a folder: give the output a file name")
        if not stat.S_ISREG(status.st_mode):
            raise OutputError(f"{shown(path)} is not a regular file")
        for model in inputs:
            if os.path.exists(model) and os.path.samefile(model, target):
                raise OutputError(f"the output {shown(path)} is the input {shown(model)}: give another name")
        if not overwrite:
            raise OutputError(f"{shown(path)} exists: give another name, or --overwrite")
    if not folder_exists:
        raise OutputError(f"cannot write {shown(path)}: the folder {shown(target.parent)} does not exist")
    return target


def check_space(target: Path, size: int) -> None:
    """Raise OutputError when `size` bytes are not free where `target` is to lie, OSError when that cannot be told."""
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise OutputError(f"not enough space for {shown(target)}: it needs {_mega(size)}, {_mega(free)} are free")


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


class AtomicFile:
    """A file under way. Use as a context manager; without `commit()` nothing remains of it.

    `path` is the temp file, to be opened by as many writers as it takes, with `size` bytes reserved. `target` comes
    from `check_output`. `swept` tells which leftovers of killed processes were found in the folder.

    Raises OutputError when the folder cannot be written or has not enough space.
    """

    def __init__(self, target: Path, size: int, *, overwrite: bool = False) -> None:
        self.target = target
        self.size = size
        self.swept: tuple[str, ...] = ()
        self._overwrite = overwrite
        self._file: int | None = None
        self.path = target

    def __enter__(self) -> Self:
        try:
            self.swept = tuple(_sweep(self.target.parent))
            check_space(self.target, self.size)
            self._create()
            assert self._file is not None
            _reserve(self._file, self.size)
        except OSError as error:
            self.discard()
            raise self._failed(error) from error
        except BaseException:
            self.discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def path_of(self, name: str) -> Path:
        """Where the data goes; the name tells nothing here, there is one file (`AtomicFolder` has several)."""
        return self.path

    def commit(self) -> None:
        """Cut the file to its size, flush it to the disk and give it its name.

        Raises OutputError when that fails, and when a file of that name has appeared meanwhile.
        """
        assert self._file is not None
        try:
            os.ftruncate(self._file, self.size)
            _flush(self._file)
            if os.name == "nt":  # Windows renames no open file
                os.close(self._file)
                self._file = None
            self._rename()
            _sync_folder(self.target.parent)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temp file, if there still is one."""
        if self._file is not None:
            if os.name != "nt":
                # Removed before it is unlocked, so that no other writer can find it as a leftover.
                self._remove()
            os.close(self._file)
            self._file = None
        self._remove()

    def _remove(self) -> None:
        if self.path != self.target:
            # An error here must not hide the one that led here, and after a rename there is nothing left to lose.
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _create(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        for _ in range(100):
            name = f"{_TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{_TEMP_SUFFIX}"
            self.path = self.target.with_name(name)
            self._file = os.open(self.path, flags, 0o666)
            if _lock(self._file) and self.path.exists():
                return
            # Between creating and locking it, another writer took it for a leftover and removed it.
            os.close(self._file)
            self._file = None
            self.path.unlink(missing_ok=True)
        raise OSError(errno.EAGAIN, "temp files vanish as soon as they are made")

    def _rename(self) -> None:
        if self._overwrite:
            os.replace(self.path, self.target)
        elif os.name == "nt":
            os.rename(self.path, self.target)  # refuses to replace there
        else:
            try:
                os.link(self.path, self.target)  # refuses to replace, which rename does not
            except FileExistsError:
                raise
            except OSError:  # file systems without hard links
                if self.target.exists():
                    raise FileExistsError(errno.EEXIST, "it has appeared meanwhile") from None
                os.rename(self.path, self.target)

    def _failed(self, error: OSError) -> OutputError:
        if isinstance(error, FileExistsError):
            return OutputError(f"{shown(self.target)} has appeared meanwhile: give another name, or --overwrite")
        return OutputError(f"cannot write {shown(self.target)}: {reason(error)}")


def _lock(file: int) -> bool:
    """Lock a file for as long as it is open, or say that somebody else has. Where files cannot be locked: True."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _sweep(folder: Path) -> Iterable[str]:
    """Remove what killed writers left in `folder`, and say what was found."""
    for path in sorted(folder.glob(f"{_TEMP_PREFIX}*{_TEMP_SUFFIX}")):
        if not _TEMP_NAME.fullmatch(path.name):
            continue
        try:
            size = path.stat().st_size
            if _remove_if_abandoned(path):
                yield f"removed {shown(path.name)} ({_mega(size)}), left by an interrupted run"
        except OSError:
            continue  # somebody else's, or already gone


def _remove_if_abandoned(path: Path) -> bool:
    """Remove a temp file that no living writer holds, and say whether it was one."""
    if fcntl is None:
        # Windows removes no open file, but a writer closes its file just before it renames it: leave young ones alone.
        if time.time() - path.stat().st_mtime < _YOUNG:
            return False
        path.unlink()
        return True
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Still locked: a writer that has just created it finds that it is gone, and makes another.
        path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _reserve(file: int, size: int) -> None:
    """Reserve `size` bytes where the file system can. Raises OSError when they are not to be had.

    `os.posix_fallocate` is not used: on file systems that cannot reserve it writes every block instead.
    """
    if sys.platform != "linux" or size == 0:
        return
    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if fallocate(file, 0, 0, size) != 0:
        code = ctypes.get_errno()
        if code not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise OSError(code, os.strerror(code))


def _flush(file: int) -> None:
    """Flush a file to the disk itself."""
    if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):  # on macOS, fsync stops at the drive's own cache
        with contextlib.suppress(OSError):
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def _sync_folder(folder: Path) -> None:
    # Makes the new name itself survive a power cut. Not every system lets a folder be opened; the data is safe already.
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(file)
    except OSError:
        pass
    finally:
        os.close(file)


def _mega(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
