"""What the writers of files and of folders ask of the disk: locked temp files, space, flushing, and sweeping
up.

A writer holds a lock on a temp file for as long as it lives. What a killed one leaves is unlocked: the next
writer in that folder finds it and removes it. A file under way is its own lock; a folder under way, `X.tmp`,
has the file `X.lock` beside it (inside, it would have to go just before the folder gets its name, and leave
it unguarded), which holds the name that the folder is to get. `X.old` is the folder of that name, moved aside
for a moment to be replaced: it is never removed, but put back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blockmerge.errors import OutputError, bytes_text, shown

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be removed anyway
    fcntl = None  # type: ignore[assignment]

_PREFIX = ".blockmerge-"
TEMP, LOCK, ASIDE = ".tmp", ".lock", ".old"
_NAME = re.compile(rf"{re.escape(_PREFIX)}\d+-[0-9a-f]{{8}}\.(tmp|lock|old)")
_YOUNG = 600  # seconds
_LONGEST_NAME = 4096  # bytes


def check_space(target: Path, size: int) -> None:
    """Raise OutputError when `size` bytes are not free where `target` is to lie, OSError when that cannot be
    told.
    """
    free = shutil.disk_usage(target.parent).free
    if free < size:
        needed, there = bytes_text(size), bytes_text(free)
        if needed == there:  # to the digits that are shown
            needed, there = f"{size:,} B", f"{free:,} B"
        raise OutputError(f"not enough space for {shown(target)}: it needs {needed}, {there} are free")


def status(path: Path) -> os.stat_result | None:
    """Return what the system knows of a path, None where there is nothing. Raises OSError and ValueError."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def create_locked(folder: Path, suffix: str, announce: Callable[[Path], None]) -> int:
    """Create a file with a new temp name in `folder`, locked for as long as it is open. Raises OSError.

    The name is announced before there is a file, which can so be removed whenever this is interrupted.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    for _ in range(100):
        path = folder / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}{suffix}"
        announce(path)
        file = os.open(path, flags, 0o666)
        try:
            if _lock(file) and path.exists():
                return file
        except BaseException:
            unlock_and_remove(path, file)
            raise
        # Between creating and locking it, another writer took it for a leftover and removed it, or will: the
        # next one has another name.
        unlock_and_remove(path, file)
    raise OSError(errno.EAGAIN, "temp files vanish as soon as they are made")


def unlock_and_remove(path: Path, file: int) -> None:
    """Remove a file made by `create_locked`, if it is still there, and close it.

    An error is no reason to stop.
    """
    if os.name == "nt":  # Windows removes no open file
        os.close(file)
    # Elsewhere removed before it is unlocked, so that no other writer can find it as a leftover.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    if os.name != "nt":
        os.close(file)


def sweep(folder: Path) -> Iterator[str]:
    """Remove what killed writers left in `folder`, put back what they moved aside, and say what was done."""
    found = {path.stem for path in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(path.name)}
    for stem in sorted(found):
        with contextlib.suppress(OSError):  # somebody else's, or already gone
            yield from _sweep_writer(folder / stem)


def _sweep_writer(stem: Path) -> Iterator[str]:
    temp, lock, aside = (stem.with_suffix(suffix) for suffix in (TEMP, LOCK, ASIDE))
    # Without a lock its folders are dead: a writer makes its lock first and removes it last.
    target = _take_lock(lock) if lock.is_file() else ""
    if target is None:
        return
    if temp.is_dir() and not temp.is_symlink():
        size = sum(file.lstat().st_size for file in temp.rglob("*") if not file.is_dir())
        shutil.rmtree(temp)
        yield f"removed {shown(temp.name)} ({bytes_text(size)}), left by an interrupted run"
    elif temp.is_file():
        size = temp.stat().st_size
        if _remove_if_abandoned(temp):
            yield f"removed {shown(temp.name)} ({bytes_text(size)}), left by an interrupted run"
    if aside.is_dir():
        if _put_back(aside, target):
            yield f"put {shown(target)} back, which an interrupted run had moved aside"
        else:
            yield (
                f"{shown(aside.name)} is a folder that an interrupted run moved aside: "
                "rename it, or remove it"
            )


def _put_back(aside: Path, target: str) -> bool:
    if not target or os.path.lexists(aside.with_name(target)):
        return False
    with contextlib.suppress(OSError):
        aside.rename(aside.with_name(target))
        return True
    return False


def _take_lock(path: Path) -> str | None:
    """Remove the lock of a dead writer and return the name it holds; None when its writer lives."""
    with path.open("rb") as file:
        target = os.fsdecode(file.read(_LONGEST_NAME))
    if not _remove_if_abandoned(path):
        return None
    # Whoever wrote it, nothing is moved out of this folder.
    return target if target == Path(target).name and target not in (".", "..") and "\0" not in target else ""


def _lock(file: int) -> bool:
    """Lock a file for as long as it is open, or say that somebody else has.

    Where files cannot be locked: True.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _remove_if_abandoned(path: Path) -> bool:
    """Remove a temp file that no living writer holds, and say whether it was one."""
    if fcntl is None:
        # Windows removes no open file, but a writer closes its file just before it renames it: leave young
        # ones alone.
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


def reserve(file: int, size: int) -> None:
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


def flush(file: int) -> None:
    """Flush a file to the disk itself."""
    if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):  # on macOS, fsync stops at the drive's own cache
        with contextlib.suppress(OSError):
            fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            return
    os.fsync(file)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system lets a folder be opened."""
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


def exchange(one: Path, other: Path) -> bool:
    """Let two folders of one file system change names at once, or say that the system cannot.

    Raises OSError.
    """
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    at_cwd, rename_exchange = -100, 2
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code))
