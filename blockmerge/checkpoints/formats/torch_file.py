"""Files of `torch.save`, zip archives and the streams before them, opened without torch and without running
anything.

A zip (torch 1.6 and later) holds `<folder>/data.pkl`, a pickle that names storages, and
`<folder>/data/<key>`, the bytes of each, stored as they are. The legacy stream is a row of pickles (magic
number, protocol, system, the object, the keys of its storages), then for each key 8 bytes with its number of
elements and its bytes. Storages are found by their offset and read as late as the data of a safetensors file.
The formats are those of torch/serialization.py.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from blockmerge.anatomy import other_kind
from blockmerge.checkpoints.assembled import Assembled, Assembly, Piece
from blockmerge.checkpoints.checkpoint import Checksummed, TensorInfo
from blockmerge.checkpoints.formats.file import FileCheckpoint
from blockmerge.checkpoints.formats.pickles import (
    LARGEST_PICKLE,
    Dtype,
    Storage,
    StoredTensor,
    Unbuilt,
    pickles_in,
)
from blockmerge.checkpoints.formats.trailing_zeros import said_of_zeros, zeros_from
from blockmerge.checkpoints.formats.zip_entries import Entry, read_entries
from blockmerge.dtypes import itemsize
from blockmerge.errors import CheckpointError, listing, shown

TORCH_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_MOST_AXES = 64
_MOST_NESTED = 3
_MOST_LOOKED_AT = 100_000  # things within things, where there is no state dict
_LONGEST_KEY = 1000
_FEWEST_ZEROS = 4096  # at the end of a file that is damaged because it is broken off
_OTHER_SIZES = {"complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
_ROOM = 1 << 20  # bytes by which an expanded tensor may exceed its file


def begins_torch_file(head: bytes) -> bool:
    """Whether a file that begins so (9 bytes or more) is a zip archive or a pickle.

    A safetensors file has a "{" at byte 8.
    """
    return head.startswith(b"PK\3\4") or (head[:1] == b"\x80" and head[8:9] != b"{")


class TorchFile(Assembled):
    """An opened file of `torch.save`: what it describes has been read and checked, its data has not.

    It has no metadata.

    Its tensors are those of the state dict: the dict itself, or what it holds under "state_dict". Numbers and
    texts in it are skipped, and so is what lies beside it. What is known to be no model, as a textual
    inversion or an upscaler, may keep its tensors deeper: their names have dots then. Raises CheckpointError,
    in one line with the file's name, when it is missing, damaged, holds no state dict or tensors that
    safetensors files cannot hold, and when its pickle names anything but tensors, dicts and what training
    scripts are known to leave beside them.
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        storages = _Storages(path)
        super().__init__(storages, storages.state_dict)
        self.path = storages.path
        self._checksummed = storages.parts

    def checksummed(self) -> tuple[Checksummed, ...]:
        """All entries of a zip archive that are stored as they are; none of the stream before it."""
        return self._checksummed


class _Storages(FileCheckpoint):
    """The storages of a file as tensors of bytes, and `state_dict`: where in them its tensors lie.

    `parts` are the entries of a zip archive.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.parts: tuple[Checksummed, ...] = ()
        with self._opened("torch") as (file, size):
            try:
                self._read(file, size)
            except ValueError as error:
                begin = zeros_from(file, 0, size)
                if size - begin >= _FEWEST_ZEROS:
                    raise CheckpointError(said_of_zeros(str(self.path), begin, size)) from error
                raise

    def _read(self, file: BinaryIO, size: int) -> None:
        head = file.read(512)
        file.seek(0)
        entries: dict[str, Entry] = {}
        if head.startswith(b"PK\3\4"):
            content, storages, entries = _read_zip(file, size)
        elif head.startswith(b"\x80"):
            content, storages = _read_legacy(file, size)
        else:
            raise ValueError(_what_else(head, size))
        self.tensors = storages
        tensors = _state_dict(content)
        found = [_locate(name, tensor, storages, size) for name, tensor in tensors.items()]
        found.sort(key=lambda item: item[0])
        self.state_dict: Mapping[str, TensorInfo | Assembly] = {name: place for _, name, place in found}
        self.parts = tuple(self._parts(file, entries, tensors))

    def _parts(
        self, file: BinaryIO, entries: Mapping[str, Entry], tensors: Mapping[str, StoredTensor]
    ) -> Iterator[Checksummed]:
        held: dict[str, list[str]] = {}
        for name, tensor in tensors.items():
            held.setdefault(tensor.storage.key, []).append(name)
        for key, entry in entries.items():
            if entry.crc == 0:  # torch can be told to write none
                continue
            with suppress(ValueError):  # an entry that no tensor lies in need not be one that can be read
                offset = self.tensors[key].offset if key in self.tensors else entry.locate(file)
                names = tuple(held.get(key, ()))
                yield Checksummed(self.path, entry.name, offset, entry.size, entry.crc, names)


def _what_else(head: bytes, size: int) -> str:
    if not size:
        return "it is empty"
    if head[257:262] == b"ustar":
        return "it is a tar archive, as torch wrote before 0.1.10: save it anew with torch"
    return "it begins neither like a zip archive nor like a pickle"


def _read_zip(file: BinaryIO, size: int) -> tuple[object, dict[str, TensorInfo], dict[str, Entry]]:
    """Return what was saved, the storages by their keys, and all entries, those of storages by their keys."""
    entries = read_entries(file, size)
    pickles = [name for name in entries if name.rpartition("/")[2] == "data.pkl" and name.count("/") < 2]
    if len(pickles) != 1:
        holds = f"it holds {listing(entries)}" if entries else "it is empty"
        raise ValueError(
            f"it is a zip archive without one data.pkl, as torch writes it ({holds}): "
            "unpack it if a model is in it"
        )
    folder = pickles[0].removesuffix("data.pkl")
    if folder + "constants.pkl" in entries:
        raise ValueError("it is a TorchScript program, not a state dict")
    order = entries.get(folder + "byteorder")
    if order:
        file.seek(order.locate(file))
        if file.read(min(order.size, 16)) != b"little":
            raise ValueError("it was written on a big-endian machine: save it anew on another")
    pickle = entries[pickles[0]]
    start = pickle.locate(file)
    if pickle.size > LARGEST_PICKLE:
        raise ValueError(f"its pickle has {pickle.size:,} bytes, far more than any model needs")
    file.seek(start)
    named: dict[str, Storage] = {}
    content = next(pickles_in(io.BytesIO(file.read(pickle.size)), pickle.size, named))
    storages = {}
    for key, storage in named.items():
        entry = entries.get(f"{folder}data/{key}")
        if entry is None:
            raise ValueError(f"it lacks the storage {shown(key)} that its pickle names")
        if entry.size < storage.elements * _size_of(storage.dtype):
            raise ValueError(f"its storage {shown(key)} has {entry.size} bytes, fewer than its pickle says")
        storages[key] = TensorInfo("U8", (entry.size,), entry.locate(file))
    return content, storages, {name.removeprefix(f"{folder}data/"): one for name, one in entries.items()}


def _read_legacy(file: BinaryIO, size: int) -> tuple[object, dict[str, TensorInfo]]:
    named: dict[str, Storage] = {}
    pickles = pickles_in(file, size, named)
    if next(pickles) != _MAGIC:
        raise ValueError("it is a pickle, but none that torch.save writes")
    if next(pickles) != _PROTOCOL:
        raise ValueError("it is of another protocol than torch's 1001")
    system = next(pickles)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine: save it anew on another")
    content, keys = next(pickles), next(pickles)
    position = file.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in named for key in keys):
        raise ValueError("the list of its storages is damaged")
    whole = position + sum(8 + named[key].elements * _size_of(named[key].dtype) for key in keys)
    storages = {}
    for key in keys:
        file.seek(position)
        length = int.from_bytes(file.read(8), "little") * _size_of(named[key].dtype)
        position += 8
        if length > size - position and size < whole:
            raise ValueError(f"its data is cut short: {size} bytes of {whole}")
        if length > size - position or key in storages:
            raise ValueError(f"its storage {shown(key)} claims too much")
        if length < named[key].elements * _size_of(named[key].dtype):
            raise ValueError(f"its storage {shown(key)} has {length} bytes, fewer than its pickle says")
        storages[key] = TensorInfo("U8", (length,), position)
        position += length
    if missing := named.keys() - storages.keys():
        raise ValueError(f"it lacks the storage {shown(min(missing))} that its pickle names")
    if position != size:
        raise ValueError("it goes on after its last storage")
    return content, storages


def _size_of(dtype: str) -> int:
    return itemsize(dtype) or _OTHER_SIZES[dtype]


def _state_dict(content: object) -> dict[str, StoredTensor]:
    """The tensors of the state dict in what was saved, or all tensors in what is known to be no model.

    Raises ValueError naming what else is in it.
    """
    try:
        return _plain_state_dict(content)
    except ValueError:
        within = islice(_within(content, "", _MOST_NESTED), _MOST_LOOKED_AT)
        nested = {name: found for name, found in within if isinstance(found, StoredTensor)}
        shapes = {name: tensor.shape if _counts(tensor.shape) else () for name, tensor in nested.items()}
        if not nested or other_kind(shapes) is None:
            raise
        return nested


def _within(value: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    """Yield everything in dicts, lists and tuples, by the keys that lead to it, with dots between them."""
    items: Iterable[tuple[object, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for key, one in items:
        # Half a surrogate pair cannot be written again.
        text = str(key).encode("utf-8", "replace").decode() if isinstance(key, (str, int)) else ""
        yield path + text, one
        if depth and len(text) <= _LONGEST_KEY:
            yield from _within(one, f"{path}{text}.", depth - 1)


def _plain_state_dict(content: object) -> dict[str, StoredTensor]:
    for _ in range(_MOST_NESTED):
        if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
            break
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise ValueError(f"it holds {_kind(content)}, not a state dict: save the model's state_dict()")
    tensors: dict[str, StoredTensor] = {}
    others: list[str] = []
    for name, value in content.items():
        if isinstance(value, StoredTensor):
            if not isinstance(name, str):
                raise ValueError(f"its state dict names a tensor by {_kind(name)}, not by a text")
            name.encode("utf-8")  # half a surrogate pair cannot be written again
            tensors[name] = value
        elif value is not None and not isinstance(value, (str, bytes, int, float)):
            others.append(f"{shown(name) if isinstance(name, str) else _kind(name)}, {_kind(value)}")
    if others:
        what = (
            "its state dict holds something other than tensors" if tensors else "it holds no state dict, but"
        )
        raise ValueError(f"{what}: {listing(others, 2, 400)}")
    return tensors


def _kind(value: object) -> str:
    match value:
        case StoredTensor():
            kind = "tensor"
        case Unbuilt(what=what):
            kind = shown(what)
        case _:
            kind = "text" if isinstance(value, str) else type(value).__name__.lstrip("_").lower()
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def _locate(
    name: str, tensor: StoredTensor, storages: Mapping[str, TensorInfo], file_size: int
) -> tuple[int, str, TensorInfo | Assembly]:
    """Return (where its first byte lies, name, place) of a tensor.

    Raises ValueError, with its name, when that makes no sense.
    """
    label = f"its tensor {shown(name)}"
    storage, offset, shape, strides = tensor.storage, tensor.offset, tensor.shape, tensor.strides
    if not isinstance(storage, Storage):
        raise ValueError(f"{label} lies in {_kind(storage)}, not in a storage")
    dtype = tensor.dtype.name if isinstance(tensor.dtype, Dtype) else storage.dtype
    size = itemsize(dtype)
    if size is None or not (tensor.dtype is None or isinstance(tensor.dtype, Dtype)):
        unknown = dtype if size is None else _kind(tensor.dtype)
        raise ValueError(f"{label} has the dtype {unknown}, which cannot be merged or copied")
    if tensor.metadata:
        raise ValueError(f"{label} is a conjugate or negative view: save it resolved")
    if not (
        _counts(shape)
        and _counts(strides)
        and len(shape) == len(strides) <= _MOST_AXES
        and _counts((offset,))
    ):
        raise ValueError(f"{label} has a shape, strides or an offset that no tensor has")
    held = storages[storage.key]
    begin = held.offset
    if 0 not in shape:
        reach = 1 + sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        if (offset + reach) * size > held.nbytes:
            raise ValueError(f"{label} reaches beyond its storage, which has {held.nbytes} bytes")
        begin += offset * size
    info, piece = TensorInfo(dtype, shape, begin), Piece(begin, shape, strides)
    if info.nbytes > file_size + _ROOM:
        raise ValueError(f"{label} would be expanded to more than the whole file")
    return begin, name, info if piece.is_contiguous else Assembly(dtype, shape, (piece,))


def _counts(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
