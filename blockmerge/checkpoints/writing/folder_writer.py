"""The atomic writer of folders: as of files, a new folder appears under its name complete and safe on the
disk, or not at all.

A folder of that name that is to be replaced stands there until the new one is complete. Then the two change
names at once, where the system can do that; elsewhere the old one is moved aside for the moment that the new
one takes to get its name. It is removed when the new one stands, and put back when it does not, if need be by
the next writer in that place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Self

from blockmerge.checkpoints.formats.folder import foreign_files, is_diffusers_folder
from blockmerge.checkpoints.hub import shown_path
from blockmerge.checkpoints.writing import disk
from blockmerge.errors import CheckpointError, OutputError, listing, reason, shown


def check_output_folder(
    path: str | os.PathLike[str], inputs: Iterable[Path] = (), *, overwrite: bool = False
) -> Path:
    """Return where the output folder will really lie (a symlink at `path` stays one; its target is written).

    `inputs` are all files and folders that are read: of a folder with symlinked files, both. Raises
    OutputError when it exists and `overwrite` is false, when it would take other things than a model with it,
    when it is, holds or lies in one of the `inputs`, when it is no folder, or the folder it is to lie in is
    missing.
    """
    try:
        target = Path(os.path.realpath(path))
        for model in inputs:
            if _holds(target, model) or _holds(model, target):
                raise OutputError(
                    f"the output {shown(path)} is, "
                    f"holds or lies in the input {shown_path(model)}: give another name"
                )
        parent_exists, status = target.parent.is_dir(), disk.status(target)
        if status is not None:
            if not stat.S_ISDIR(status.st_mode):
                raise OutputError(f"{shown(path)} is a file: give the output folder another name")
            if not overwrite:
                raise OutputError(f"{shown(path)} exists: give another name, or overwrite (--overwrite)")
            _check_replaceable(target)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise OutputError(f"cannot write {shown(path)}: {why}") from error
    if not parent_exists:
        raise OutputError(f"cannot write {shown(path)}: the folder {shown(target.parent)} does not exist")
    return target


def _holds(folder: Path, path: Path) -> bool:
    """Say whether `path` is `folder` or lies in it, by whatever names."""
    place = Path(os.path.realpath(path))
    return os.path.exists(folder) and any(
        os.path.exists(at) and os.path.samefile(folder, at) for at in (place, *place.parents)
    )


def _check_replaceable(folder: Path) -> None:
    """Raise OutputError when something that is no model would be lost with a folder."""
    try:
        is_model, foreign = is_diffusers_folder(folder), foreign_files(folder)
    except CheckpointError as error:
        raise OutputError(f"{shown(folder)} is not replaced: {error}") from error
    if not is_model and os.listdir(folder):
        raise OutputError(
            f"{shown(folder)} holds no diffusers model but {listing(os.listdir(folder))}: give another name"
        )
    if foreign:
        raise OutputError(
            f"{shown(folder)} holds what is not part of a model: "
            f"{listing(foreign)}: move that elsewhere, or give another name"
        )


class AtomicFolder:
    """A folder under way. Use as a context manager; without `commit()` nothing remains of it.

    `files` maps the relative paths (with ``/``) of the files it is to hold to their sizes in bytes, which are
    reserved, or to their whole contents, which are written at once. `path_of` tells where a file lies
    meanwhile, to be opened by as many writers as it takes. `target` comes from `check_output_folder`. `swept`
    tells which leftovers of killed processes were found beside it.

    Raises OutputError when the folder cannot be written, has not enough space, or is to hold a file outside
    itself.
    """

    def __init__(self, target: Path, files: Mapping[str, int | bytes], *, overwrite: bool = False) -> None:
        self.target = target
        self.files = files
        self.swept: tuple[str, ...] = ()
        self._overwrite = overwrite
        self._lock: Path | None = None
        self._locked: int | None = None
        self._open: dict[str, int] = {}

    def __enter__(self) -> Self:
        try:
            self.swept = tuple(disk.sweep(self.target.parent))
            if not self._overwrite and os.path.lexists(self.target):  # just put back
                raise FileExistsError
            disk.check_space(self.target, sum(map(_size, self.files.values())))
            self._locked = disk.create_locked(self.target.parent, disk.LOCK, self._locked_by)
            os.write(self._locked, os.fsencode(self.target.name))
            self._at(disk.TEMP).mkdir()
            for name, content in self.files.items():
                self._create(name, content)
        except OSError as error:
            self.discard()
            raise self._failed(error) from error
        except BaseException:
            self.discard()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def _locked_by(self, lock: Path) -> None:
        self._lock = lock

    def path_of(self, name: str) -> Path:
        """Return the path at which one of `files` is to be written."""
        return self._at(disk.TEMP) / name

    def commit(self) -> None:
        """Cut the files to their sizes, flush them to the disk and give the folder its name.

        Raises OutputError when that fails, when something of that name has appeared meanwhile, and when a
        folder that is to be replaced has got other things in it than a model.
        """
        temp = self._at(disk.TEMP)
        try:
            for name, file in self._open.items():
                os.ftruncate(file, _size(self.files[name]))
                disk.flush(file)
            self._close()  # Windows renames no folder with open files
            for folder, _, _ in os.walk(temp, topdown=False):
                disk.sync_folder(Path(folder))
            self._rename(temp)
            disk.sync_folder(self.target.parent)
        except OSError as error:
            raise self._failed(error) from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove what is not under the final name, and put back what was moved aside for nothing."""
        self._close()
        if self._lock is None:
            return
        aside = self._at(disk.ASIDE)
        # An error here must not hide the one that led here; what then remains, the next writer finds.
        with contextlib.suppress(OSError):
            if aside.exists() and not os.path.lexists(self.target):
                os.rename(aside, self.target)
        shutil.rmtree(self._at(disk.TEMP), ignore_errors=True)
        lock, file = self._lock, self._locked
        self._lock = self._locked = None
        if file is None:
            with contextlib.suppress(OSError):
                lock.unlink(missing_ok=True)
        elif aside.exists():
            os.close(file)  # the lock stays, with the name of what was moved aside
        else:
            disk.unlock_and_remove(lock, file)

    def _at(self, suffix: str) -> Path:
        assert self._lock is not None
        return self._lock.with_suffix(suffix)

    def _create(self, name: str, content: int | bytes) -> None:
        inside = PurePosixPath(name)
        # Component names come from files that may be hostile.
        if (
            not inside.name
            or inside.is_absolute()
            or ".." in inside.parts
            or any(mark in name for mark in "\\:\0")
        ):
            raise OutputError(
                f"cannot write {shown(self.target)}: '{shown(name)}' is not a name for a file in a folder"
            )
        path = self.path_of(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        file = self._open[name] = os.open(path, flags, 0o666)
        disk.reserve(file, _size(content))
        if isinstance(content, bytes):
            with open(file, "wb", closefd=False) as stream:
                stream.write(content)

    def _close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _rename(self, temp: Path) -> None:
        if not self._overwrite or not os.path.lexists(self.target):
            os.rename(temp, self.target)  # refuses to replace all but an empty folder
            return
        _check_replaceable(self.target)  # much may have happened since it was asked for
        if not disk.exchange(temp, self.target):
            aside = self._at(disk.ASIDE)
            assert self._locked is not None
            disk.flush(self._locked)  # says whose folder that is, after a power cut too
            os.rename(self.target, aside)
            os.rename(temp, self.target)
            os.rename(aside, temp)  # from here on it may be removed

    def _failed(self, error: OSError) -> OutputError:
        if isinstance(error, FileExistsError) or error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
            return OutputError(
                f"{shown(self.target)} has appeared meanwhile: give another name, or overwrite (--overwrite)"
            )
        return OutputError(f"cannot write {shown(self.target)}: {reason(error)}")


def _size(content: int | bytes) -> int:
    return content if isinstance(content, int) else len(content)
