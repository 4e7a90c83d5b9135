"""Writing a LoRA whose modules are only known one after the other: in order, by many workers, atomically.

A module's rank, and whether there is anything to write of it, may be known only when it has been computed. So
the header's place is as large as it can get, modules follow in the order of their names, whoever has
computed them, and the header is written last.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar

from blockmerge.checkpoints import AtomicFile, Readers, TensorInfo, encode_header
from blockmerge.dtypes import size_of
from blockmerge.errors import OutputError, reason, shown
from blockmerge.lora_making.tasks import Made, Parts, Shape
from blockmerge.streaming import PAGE, Progress, TorchThreads, for_each, processors, thread_count

_MOST_WORKERS = 8
_LARGEST_OFFSET = 10**15
_POLL = 0.05  # seconds
_OLD_HASH = (0x100000, 0x10000)  # where the web UI's old hash begins, and how many bytes it looks at
_SPARE = 1024  # bytes that what is said of ranks may take

Task = TypeVar("Task")

HASHES = ("sshs_model_hash", "sshs_legacy_hash")
"""The keys of a file's own hashes, of 64 and 8 digits."""


class LoraFile:
    """A LoRA under way: `put` its modules in any order, then `finish` it. Use as a context manager; without
    `finish` nothing remains of it.

    `most` are {module: {part: shape}} in the order in which they will stand, at their largest; `size` is what
    they take at least, to be reserved. All tensors are of the one `dtype`, but those of other `dtypes`, by
    their names. Raises OutputError.
    """

    def __init__(
        self,
        target: Path,
        most: Mapping[str, Mapping[str, Shape]],
        metadata: Mapping[str, str],
        dtype: str,
        *,
        dtypes: Mapping[str, str] | None = None,
        size: int = 0,
        overwrite: bool = False,
    ) -> None:
        self.dtype = dtype
        self.dtypes = dtypes or {}
        self.tensors: dict[str, TensorInfo] = {}
        self.modules = 0
        self._metadata = dict(metadata)
        largest = {
            f"{module}.{part}": TensorInfo(self.dtypes.get(f"{module}.{part}", dtype), shape, _LARGEST_OFFSET)
            for module, parts in most.items()
            for part, shape in parts.items()
        }
        hashes = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "0" * 8}
        room = len(encode_header(largest, {**metadata, **hashes}, 8)) + _SPARE
        self._room = -(-room // PAGE) * PAGE
        self._names = list(most)
        self._file = AtomicFile(target, self._room + size, overwrite=overwrite)
        self._handle: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._length = 0
        self._waiting: dict[int, Parts] = {}
        self._next = 0
        self._ready = threading.Condition()
        self._has_failed = False

    def __enter__(self) -> LoraFile:
        self._file.__enter__()
        with self._failing():
            self._handle = self._file.path.open("r+b", buffering=0)
            self._handle.seek(self._room)
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            self._handle.close()
        self._file.__exit__()

    @property
    def swept(self) -> tuple[str, ...]:
        """Which leftovers of killed processes were found in the folder."""
        return self._file.swept

    def put(self, number: int, parts: Parts, ahead: int) -> None:
        """Hand over a module by its place in the order, or nothing of it.

        Waits while as many as `ahead` are there that must stand behind one which is not.
        """
        with self._ready:
            while number - self._next > ahead and not self._has_failed:
                self._ready.wait(_POLL)
            self._waiting[number] = parts
            while self._next in self._waiting:
                self._append(self._names[self._next], self._waiting.pop(self._next))
                self._next += 1
            self._ready.notify_all()

    def give_up(self) -> None:
        """Wake those who wait for what will not come."""
        with self._ready:
            self._has_failed = True
            self._ready.notify_all()

    def finish(self, said: Mapping[str, str]) -> int:
        """Write the header, with what is `said` beside the metadata, and give the file its name. Returns its
        size.
        """
        assert self._handle is not None
        metadata = {**self._metadata, **said}
        with self._failing():
            hashes = self._hash.hexdigest(), self._old_hash(self._handle, metadata)
            header = encode_header(
                self.tensors, {**metadata, **dict(zip(HASHES, hashes, strict=True))}, self._room
            )
            assert len(header) == self._room, "the header has outgrown its place"
            self._handle.seek(0)
            _write(self._handle, header)
            self._handle.close()
        self._file.size = self._room + self._length
        self._file.commit()
        return self._file.size

    def _append(self, module: str, parts: Parts) -> None:
        assert self._handle is not None
        self.modules += bool(parts)
        for part, (shape, data) in sorted(parts.items()):
            name = f"{module}.{part}"
            self.tensors[name] = TensorInfo(self.dtypes.get(name, self.dtype), shape, self._length)
            self._hash.update(data)
            self._length += len(data)
            with self._failing():
                _write(self._handle, data)

    def _old_hash(self, file: BinaryIO, metadata: Mapping[str, str]) -> str:
        """The web UI's old hash of the file as it would be with its training metadata alone.

        (sd-scripts, library/train_util.py, precalculate_safetensors_hashes)
        """
        trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
        header = encode_header(self.tensors, trained, 8)
        begin, count = _OLD_HASH
        data = header[begin : begin + count]
        file.seek(self._room + max(0, begin - len(header)))
        data += file.read(count - len(data))
        return hashlib.sha256(data).hexdigest()[:8]

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot write {shown(self._file.target)}: {reason(error)}") from error


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of it: a full disk may take a part without a word."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def compute_all(
    tasks: Sequence[Task],
    work: Callable[[Task, Readers], Made],
    file: LoraFile,
    *,
    in_file: int,
    nbytes: Callable[[Task], int],
    threads: int | None,
    progress: Progress | None,
) -> list[Made]:
    """Do all tasks on several threads; the first `in_file` are the file's modules in its order.

    Returns what became of each, without the tensors of those that have been written.
    """
    count = min(processors(), _MOST_WORKERS) if threads is None else thread_count(threads)
    found: list[Made] = [Made({}, 0, 0.0, 0.0)] * len(tasks)
    torch_threads = TorchThreads()

    @contextmanager
    def worker() -> Iterator[Callable[[tuple[int, Task]], int]]:
        torch_threads.single_here()
        try:
            with Readers() as readers:

                def do(numbered: tuple[int, Task]) -> int:
                    number, task = numbered
                    made = work(task, readers)
                    if number < in_file:
                        file.put(number, made.parts, 2 * count)
                    found[number] = replace(made, parts={})
                    return nbytes(task)

                yield do
        except BaseException:
            file.give_up()
            raise

    try:
        for_each(enumerate(tasks), worker, min(count, len(tasks)), sum(map(nbytes, tasks)), progress)
    finally:
        torch_threads.restore()
    return found


def sizes_of(most: Mapping[str, Mapping[str, Shape]], dtype: str) -> int:
    """How many bytes tensors of these shapes take."""
    infos = (TensorInfo(dtype, shape, 0) for parts in most.values() for shape in parts.values())
    return sum(one.elements for one in infos) * size_of(dtype)
