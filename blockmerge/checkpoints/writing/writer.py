"""The atomic writer: a new file appears under its name complete and safe on the disk, or not at all.

The data goes into a temp file beside the target, with its space reserved before any work is done; when it is
complete it is flushed to the disk and renamed. A process that is killed leaves its temp file behind, but
unlocked: the next writer in that folder finds it and removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from blockmerge.checkpoints.hub import shown_path
from blockmerge.checkpoints.writing import disk
from blockmerge.errors import OutputError, reason, shown


def check_output(
    path: str | os.PathLike[str], inputs: Iterable[Path] = (), *, overwrite: bool = False
) -> Path:
    """Return where the output will really lie (a symlink at `path` stays one; its target is written).

    Raises OutputError when it exists and `overwrite` is false, when it is one of the `inputs` (also through a
    symlink or a hard link), when it is no regular file, or its folder is missing.
    """
    try:
        target = Path(os.path.realpath(path))
        folder_exists, status = target.parent.is_dir(), disk.status(target)
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
                raise OutputError(
                    f"the output {shown(path)} is the input {shown_path(model)}: give another name"
                )
        if not overwrite:
            raise OutputError(f"{shown(path)} exists: give another name, or overwrite (--overwrite)")
    if not folder_exists:
        raise OutputError(f"cannot write {shown(path)}: the folder {shown(target.parent)} does not exist")
    return target


class AtomicFile:
    """A file under way. Use as a context manager; without `commit()` nothing remains of it.

    `path` is the temp file, to be opened by as many writers as it takes, with `size` bytes reserved. `target`
    comes from `check_output`. `swept` tells which leftovers of killed processes were found in the folder.

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
            self.swept = tuple(disk.sweep(self.target.parent))
            disk.check_space(self.target, self.size)
            self._file = disk.create_locked(self.target.parent, disk.TEMP, self._lies_at)
            disk.reserve(self._file, self.size)
        except OSError as error:
            self.discard()
            raise self._failed(error) from error
        except BaseException:
            self.discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def _lies_at(self, path: Path) -> None:
        self.path = path

    def path_of(self, name: str) -> Path:
        """Where the data goes; the name tells nothing here, there is one file (`AtomicFolder` has
        several).
        """
        return self.path

    def commit(self) -> None:
        """Cut the file to its size, flush it to the disk and give it its name.

        Raises OutputError when that fails, and when a file of that name has appeared meanwhile.
        """
        assert self._file is not None
        try:
            os.ftruncate(self._file, self.size)
            disk.flush(self._file)
            if os.name == "nt":  # Windows renames no open file
                os.close(self._file)
                self._file = None
            self._rename()
            disk.sync_folder(self.target.parent)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temp file, if there still is one."""
        if self._file is not None:
            disk.unlock_and_remove(self.path, self._file)
            self._file = None
        elif self.path != self.target:
            # An error here must not hide the one that led here, and after a rename there is nothing left to
            # lose.
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

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
            return OutputError(
                f"{shown(self.target)} has appeared meanwhile: give another name, or overwrite (--overwrite)"
            )
        return OutputError(f"cannot write {shown(self.target)}: {reason(error)}")
