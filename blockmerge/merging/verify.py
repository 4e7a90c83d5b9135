"""`verify`: a merged file held against what its own recipe makes, which is computed anew, not written."""

from __future__ import annotations

import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blockmerge.checkpoints import Checkpoint, CheckpointLike, Reader, TensorInfo, open_checkpoint
from blockmerge.dtypes import FLOAT_DTYPES, size_of
from blockmerge.errors import listing
from blockmerge.merging.again import Finder, Recorded, Searched
from blockmerge.merging.execute import compute
from blockmerge.merging.planning.runs import PlannedFile
from blockmerge.streaming import Progress, aligned_buffer
from blockmerge.types import PathLike

_MOST_DIFFERENT = 10
"""Tensors that differ before nobody needs to know more."""


@dataclass(frozen=True)
class Verification:
    """Whether a file is what its recipe makes: the same tensors with the same bits.

    - `name`: the file's name. `same`: whether everything is the same.
    - `different`: {tensor: the largest difference, in steps of its dtype}. Of more than ten tensors, some are
      listed.
    - `missing`: tensors that the recipe makes and the file lacks.
    - `added`: tensors that only the file has, or has in another dtype or shape.
    - `recipe`: what was recorded.
    - `sources`: the files that it was made from, opened.
    """

    name: str
    same: bool
    different: Mapping[str, int]
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    recipe: Mapping[str, Any] = field(default_factory=dict, repr=False)
    sources: tuple[Checkpoint, ...] = field(default=(), repr=False)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of `sources`."""
        return tuple(dict.fromkeys(one.name for one in self.sources))

    @property
    def said(self) -> str:
        """What differs, in a few words."""
        count = len(self.different)
        many = f"more than {_MOST_DIFFERENT}" if count > _MOST_DIFFERENT else str(count)
        parts = {
            f"{many} of its tensors {'differs' if count == 1 else 'differ'}": count,
            f"{listing(self.missing)} missing": len(self.missing),
            f"{listing(self.added)} not by its recipe": len(self.added),
        }
        return ", ".join(part for part, is_there in parts.items() if is_there)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data, ready for JSON. The keys are those of `docs/json.md`."""
        return {
            "same": self.same,
            "different": dict(self.different),
            "missing": list(self.missing),
            "added": list(self.added),
            "models": list(self.models),
        }


def verify(
    file: CheckpointLike,
    models: Sequence[PathLike] = (),
    *,
    device: str = "cpu",
    threads: int | None = None,
    methods: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Make a merged file again in memory, from the recipe in its metadata, and compare the two.

    >>> found = blockmerge.verify("merged.safetensors", models=["~/models"])  # doctest: +SKIP
    >>> found.same, found.different  # doctest: +SKIP
    (True, {})

    The arguments are those of `again`. Bits depend on the kind of processor and on torch's version, so
    another machine may differ by one step of the dtype.

    Raises `RecipeError` where the file has no recipe or a model is not found. Raises `CheckpointError` where
    a file cannot be read, and what `merge` raises.
    """
    recorded, source = Recorded.of(file), open_checkpoint(file)
    searched = Searched.beside_file(recorded, models)
    return verified(
        source, recorded, searched, device=device, threads=threads, methods=methods, progress=progress
    )


def verified(
    source: Checkpoint,
    recorded: Recorded,
    finder: Finder,
    *,
    device: str = "cpu",
    threads: int | None = None,
    methods: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Return what `verify` does, of a file whose recipe is read, with the files that `finder` finds."""
    recipe = recorded.recipe(finder, methods=methods)
    path = source.path
    assert path is not None, "what has no path has no recipe"
    planned, pace, device = recipe.computed(path, device=device, threads=threads, metadata=recorded.metadata)
    compared = [_Compared(one, source) for one in planned.files]
    by_file = {one.file.path: one for one in compared}
    with suppress(_EnoughError):
        compute(planned, lambda one: by_file[one.path], pace, device, progress, shown_as=path)
    different = {name: steps for one in compared for name, steps in one.different.items()}
    made = {name for one in compared for name in one.file.tensors}
    lacking = [name for name in made if name not in source.tensors]
    other = [name for one in compared for name in one.other]
    added = [*other, *(name for name in source.tensors if name not in made)]
    missing = [*lacking, *_differing_files(path, planned.small_files)]
    return Verification(
        source.name,
        not (different or missing or added),
        dict(sorted(different.items())),
        tuple(sorted(missing)),
        tuple(sorted(added)),
        recorded.run,
        planned.decided.checkpoints,
    )


def _differing_files(folder: Path, files: Mapping[str, bytes]) -> list[str]:
    """Small files of a folder that are missing or differ."""

    def is_there(name: str, data: bytes) -> bool:
        try:
            status = (folder / name).stat()
            is_so = stat.S_ISREG(status.st_mode) and status.st_size == len(data)
            return is_so and (folder / name).read_bytes() == data
        except OSError:
            return False

    return [name for name, data in files.items() if not is_there(name, data)]


class _EnoughError(Exception):
    """So much differs that nobody needs to know more."""


class _Compared:
    """A planned file, whose bytes are held against those of tensors that are there, instead of written."""

    def __init__(self, file: PlannedFile, source: Checkpoint) -> None:
        self.file, self._source = file, source
        self.different: dict[str, int] = {}
        there = source.tensors
        self.other = [
            name
            for name, one in file.tensors.items()
            if name in there and (there[name].dtype, there[name].shape) != (one.dtype, one.shape)
        ]
        self._lock = threading.Lock()

    @contextmanager
    def writer(self) -> Iterator[_Comparing]:
        """Compare with a reader of its own."""
        with self._source.reader() as reader:
            yield _Comparing(self, reader)

    def compare(self, reader: Reader, memory: memoryview, offset: int, piece: memoryview) -> None:
        """Hold a piece of the planned file against the tensors that are there, which are read into memory."""
        for name, planned in self.file.tensors_between(offset, offset + len(piece)):
            if name not in self._source.tensors or name in self.other:
                continue
            start = max(offset, planned.offset)
            stop = min(offset + len(piece), planned.offset + planned.nbytes)
            there = memory[: stop - start]
            reader.read_into(self._source.tensors[name].offset + start - planned.offset, there)
            made = piece[start - offset : stop - offset]
            if not _are_equal(made, there):
                self._note(name, _steps(made, there, planned))

    def _note(self, name: str, steps: int) -> None:
        with self._lock:
            self.different[name] = max(steps, self.different.get(name, 0))
            if len(self.different) > _MOST_DIFFERENT:
                raise _EnoughError


class _Comparing:
    """One worker's reader, and memory to read into."""

    def __init__(self, compared: _Compared, reader: Reader) -> None:
        self._compared, self._reader = compared, reader
        self._memory = memoryview(b"")

    def write(self, offset: int, piece: memoryview) -> None:
        """Compare a piece."""
        if len(self._memory) < len(piece):
            self._memory = aligned_buffer(len(piece))
        self._compared.compare(self._reader, self._memory, offset, piece)


def _are_equal(one: memoryview, other: memoryview) -> bool:
    import numpy as np

    words = len(one) // 8 * 8  # Python itself compares byte by byte
    first, second = (np.frombuffer(data[:words], np.int64) for data in (one, other))
    return one[words:] == other[words:] and bool((first == second).all())


def _steps(made: memoryview, there: memoryview, tensor: TensorInfo) -> int:
    """By how many steps of their dtype values differ at most: of floats, how many lie between them."""
    import numpy as np

    size = size_of(tensor.dtype)
    if size not in (1, 2, 4, 8):
        return 1
    sign = "u" if tensor.dtype.startswith(("U", "BOOL")) else "i"
    wide = object if size == 8 else "i8"
    one, other = (np.frombuffer(data, f"{sign}{size}").astype(wide) for data in (made, there))
    if tensor.dtype in FLOAT_DTYPES:
        least = -(1 << (8 * size - 1))
        one, other = (np.where(values < 0, least - values, values) for values in (one, other))
    return max(1, int(abs(one - other).max()))  # 0 and −0 differ, too
