"""safetensors files: a strict reader of headers, positioned reads, and the header of a new file.

The format: 8 bytes little-endian header length N, N bytes of JSON (it may be padded with spaces), then the
data. Each entry has `dtype`, `shape` and `data_offsets` [begin, end) from the data's start; `__metadata__`
maps strings to strings. Everything is checked before a byte of data is touched, against the file's true size.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

from blockmerge.checkpoints.checkpoint import TensorInfo
from blockmerge.checkpoints.formats.file import FileCheckpoint
from blockmerge.checkpoints.formats.trailing_zeros import said_of_zeros, zeros_from
from blockmerge.dtypes import itemsize
from blockmerge.errors import CheckpointError, counted, listing, reason, shown

_MOST_FAULTS = 100  # counted; a hostile header can hold millions
_MOST_AXES = 64
_FEWEST_ZEROS = 32 << 10  # bytes at the end of a file that is said to be broken off
_SHARE_OF_ZEROS = 8  # and at least this part of all
LARGEST_HEADER = 100_000_000  # bytes; the reference reader's limit


class SafetensorsFile(FileCheckpoint):
    """An opened safetensors file: its header has been read and checked, its data has not.

    Raises CheckpointError, in one line with the file's name, when it is missing, no regular file, or not
    valid.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        with self._opened("safetensors") as (file, size):
            self.tensors, self.metadata, self.data_start = _read_header(file, size)

    def broken_off(self) -> str | None:
        """Say that the file ends in zeros that begin inside a tensor, or before the first.

        Tensors may well be all zeros, at the end of a file too; but then a tensor begins where the zeros do.
        """
        size = self._identity[0]
        try:
            with self.path.open("rb") as file:
                begin = zeros_from(file, self.data_start, size)
        except OSError as error:
            raise CheckpointError(f"cannot read {shown(self.path)}: {reason(error)}") from error
        is_long = size - begin >= max(_FEWEST_ZEROS, (size - self.data_start) // _SHARE_OF_ZEROS)
        return said_of_zeros(self.name, begin, size) if is_long and self._is_inside(begin) else None

    def _is_inside(self, begin: int) -> bool:
        """Whether zeros from `begin` on are the end of a tensor that holds more, or the whole of all."""
        if begin == self.data_start:
            return True
        before = (one for one in self.tensors.values() if one.offset < begin and one.nbytes)
        holder = max(before, key=lambda one: one.offset)
        # The last of its elements may be a 0, and another end in zero bytes, as small integers do.
        return holder.offset + holder.nbytes - begin >= 2 * (itemsize(holder.dtype) or 0)


def encode_header(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str], alignment: int) -> bytes:
    """Return the first bytes of a file: length and JSON, padded with spaces so that the data starts at
    `alignment`.

    The offsets in `tensors` count from the data's start.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for name, info in tensors.items():
        entries[name] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [info.offset, info.offset + info.nbytes],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text


def _read_header(file: Any, size: int) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """Return tensors in the order of their data, metadata, and where the data starts. Raises ValueError."""
    if size < 8:
        raise ValueError("it is empty" if size == 0 else f"it has only {counted(size, 'byte')}")
    length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:  # letters read as a length
        raise ValueError(
            "it does not begin with a safetensors header (a text, a .ckpt, or a broken download?)"
        )
    if length > size - 8:
        raise ValueError(f"its header would be {length} bytes long, but the file has {size} (cut short?)")
    raw = file.read(length)
    if len(raw) != length:
        raise ValueError("its header is cut short")
    header = _parse_json(raw)
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # also null, which the reference reader takes
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ does not map strings to strings")
    for value in metadata.values():
        value.encode("utf-8")  # as for names: half a surrogate pair cannot be written again
    data_start = 8 + length
    return _checked_entries(header, size - data_start, data_start), metadata, data_start


def _parse_json(raw: bytes) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError("its header is not UTF-8") from None
    try:
        header = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"its header is not JSON ({error.msg} at character {error.pos})") from None
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):  # Python's own limit, with advice that is none to a user
            raise ValueError("its header holds a number of thousands of digits") from None
        raise
    assert isinstance(header, dict)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(
            f"its header holds a name twice: {listing(name for name, count in counts.items() if count > 1)}"
        )
    for name in table:
        # JSON can spell half of a surrogate pair, which cannot be written as UTF-8 again.
        if not name.isascii():
            name.encode("utf-8")
    return table


def _refuse(constant: str) -> None:
    raise ValueError(f"its header holds {constant}, which is not JSON")


def _checked_entries(header: dict[str, Any], data_size: int, data_start: int) -> dict[str, TensorInfo]:
    faults: list[str] = []
    spans: list[tuple[int, int, str, TensorInfo]] = []
    for name, entry in header.items():
        try:
            begin, end, info = _checked_entry(entry, data_start)
        except ValueError as fault:
            faults.append(f"{shown(name)} {fault}")
            if len(faults) == _MOST_FAULTS:
                break
        else:
            spans.append((begin, end, name, info))
    if not faults:
        faults = _gaps(spans, data_size)
    if faults:
        many = len(faults) >= _MOST_FAULTS
        # Not shortened here: their parts are, so that no verb is lost.
        first = "; ".join(f"tensor {fault}" for fault in faults[:2])
        raise ValueError(first + (_more(len(faults) - 2, many) if faults[2:] else ""))
    spans.sort(key=lambda span: span[:2])
    return {name: info for _, _, name, info in spans}


def _checked_entry(entry: Any, data_start: int) -> tuple[int, int, TensorInfo]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("has an entry without exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    size = itemsize(dtype) if isinstance(dtype, str) else None
    if size is None:
        raise ValueError(f"has the unknown dtype {_brief(dtype, 40)}")
    if not _counts(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"has the shape {_brief(shape)}; shapes are lists of whole numbers from 0 up")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"has the data_offsets {_brief(offsets)}; "
            "these are two whole numbers, the second not below the first"
        )
    begin, end = offsets
    # Multiplied step by step and given up early: a hostile shape must not make a number of a million digits.
    needed = 0 if 0 in shape else size
    for extent in shape if needed else ():
        needed *= extent
        if needed > end - begin:
            break
    if needed != end - begin:
        raise ValueError(
            f"has {counted(end - begin, 'byte')} of data, "
            f"which shape {shown(shape, 60)} in {dtype} does not take"
        )
    return begin, end, TensorInfo(dtype, tuple(shape), data_start + begin)


def _more(count: int, many: bool) -> str:
    return f" and {'at least ' if many else ''}{count} more"


def _brief(value: object, limit: int = 60) -> str:
    # A hostile value may be of megabytes: what is not shown is not spelled either.
    return shown(
        json.dumps(
            value[:20]
            if isinstance(value, (list, str))
            else value
            if not isinstance(value, dict)
            else "an object"
        ),
        limit,
    )


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _gaps(spans: list[tuple[int, int, str, TensorInfo]], data_size: int) -> list[str]:
    position = 0
    faults = []
    for begin, end, name, _ in sorted(spans, key=lambda span: span[:2]):
        if begin != position:
            what = "overlaps the one before it" if begin < position else "leaves a gap before it"
            faults.append(f"{shown(name)} {what} (it begins at {begin}, expected {position})")
            if len(faults) == _MOST_FAULTS:
                return faults
        position = max(position, end)
    if not faults and position != data_size:
        raise ValueError(
            f"its data is cut short: {data_size} bytes of {position}; download it again"
            if position > data_size
            else f"it goes on for {counted(data_size - position, 'byte')} after the last tensor"
        )
    return faults
