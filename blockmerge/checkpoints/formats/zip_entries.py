"""The entries of a zip archive, found without unpacking anything.

Stricter than Python's `zipfile`, and quick with a thousand entries: nothing may overlap, nothing may be named
twice, both descriptions of an entry must agree, and the directory must be of a size that a model can have.
The format is PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (directory), 4.3.14 to 4.3.16 (its
end).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from blockmerge.errors import counted, shown

_MOST_ENTRIES = 100_000  # a model has one for each of its few thousand storages
_LARGEST_DIRECTORY = 16 << 20
_LONGEST_COMMENT = (1 << 16) - 1
_END, _END64, _LOCATOR, _ENTRY, _LOCAL = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
_FULL = 0xFFFFFFFF  # what stands where a number needs more than 32 bits
_STORED = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: where its header begins, its size in the archive, how it is stored, the CRC-32 of its bytes,
    and where the next thing begins.
    """

    name: str
    header: int
    size: int
    stored: bool
    crc: int
    limit: int

    def locate(self, file: BinaryIO) -> int:
        """Return where the entry's bytes begin.

        Raises ValueError when it is compressed, or its header says something else.
        """
        if not self.stored:
            raise ValueError(
                f"its {shown(self.name)} is compressed, which torch never does: "
                "unpack the archive and zip it stored"
            )
        file.seek(self.header)
        raw_name = self.name.encode("utf-8", "surrogateescape")
        data = file.read(30 + len(raw_name))
        if len(data) < 30 or data[:4] != _LOCAL or data[30:] != raw_name:
            raise ValueError(
                f"the header of its {shown(self.name)} is not where the archive's directory says"
            )
        name, extra = struct.unpack_from("<HH", data, 26)
        start: int = self.header + 30 + name + extra
        if name != len(raw_name) or start + self.size > self.limit:
            raise ValueError(
                f"its {shown(self.name)} reaches into what comes after it: the archive's sizes lie"
            )
        return start


def read_entries(file: BinaryIO, size: int) -> dict[str, Entry]:
    """Return the entries of an archive of `size` bytes by their names.

    Raises ValueError when it is damaged, or its directory is one that no model has.
    """
    count, start, length = _find_directory(file, size)
    if count > _MOST_ENTRIES or length > _LARGEST_DIRECTORY:
        raise ValueError(f"the archive claims {count:,} entries, far more than any model has")
    file.seek(start)
    found = _parse_directory(file.read(length), count)
    found.sort(key=lambda entry: entry[1])
    limits = [entry[1] for entry in found[1:]] + [start]
    entries: dict[str, Entry] = {}
    for (name, header, held, stored, crc), limit in zip(found, limits, strict=True):
        if name in entries:
            raise ValueError(f"the archive holds {shown(name)} twice")
        if ".." in name.replace("\\", "/").split("/") or name.startswith(("/", "\\")):
            raise ValueError(f"the archive's entry {shown(name)} leads out of the archive")
        if header + 30 + len(name) + held > limit:
            raise ValueError(
                f"the archive's entry {shown(name)} reaches into what comes after it: its sizes lie"
            )
        entries[name] = Entry(name, header, held, stored, crc, limit)
    return entries


def _find_directory(file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Return (number of entries, offset, length) of the directory."""
    tail_start = max(0, size - 22 - _LONGEST_COMMENT)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise ValueError("the archive's end is missing, so it is cut short: download it again")
    disk, first_disk, _, count, length, start, comment = struct.unpack_from("<4H2LH", tail, at + 4)
    end = tail_start + at
    if end + 22 + comment != size:
        raise ValueError("the archive's end is not at the end of the file")
    if end >= 20:
        file.seek(end - 20)
        locator = file.read(20)
        if locator[:4] == _LOCATOR:
            end = struct.unpack_from("<Q", locator, 8)[0]
            record = b""
            if end <= size - 56:
                file.seek(end)
                record = file.read(56)
            if record[:4] != _END64:
                raise ValueError("the archive's end is damaged")
            disk, first_disk, _, count, length, start = struct.unpack_from("<2L4Q", record, 16)
    if disk or first_disk:
        raise ValueError("it is one part of an archive in parts")
    if start + length > end:
        raise ValueError(
            "the archive's directory reaches beyond the file, so it is cut short: download it again"
        )
    return count, start, length


def _parse_directory(data: bytes, count: int) -> list[tuple[str, int, int, bool, int]]:
    """Return (name, offset of the header, size, whether it is stored, CRC-32) of each entry."""
    found: list[tuple[str, int, int, bool, int]] = []
    position = 0
    while position < len(data) and len(found) < _MOST_ENTRIES:
        if data[position : position + 4] != _ENTRY or len(data) - position < 46:
            raise ValueError("the archive's directory is damaged")
        flags, method, crc, packed, size, name_length, extra_length, comment = struct.unpack_from(
            "<HH4xLLLHHH", data, position + 8
        )
        header = struct.unpack_from("<L", data, position + 42)[0]
        name_end = position + 46 + name_length
        stop = name_end + extra_length + comment
        if stop > len(data):
            raise ValueError("the archive's directory is damaged")
        name = data[position + 46 : name_end].decode("utf-8", "surrogateescape")
        if _FULL in (size, packed, header):
            size, packed, header = _wide(data[name_end : name_end + extra_length], size, packed, header)
        stored = method == _STORED and not flags & 1  # bit 0: encrypted
        if stored and size != packed:
            raise ValueError(
                f"the archive's entry {shown(name)} has two sizes: {packed} and {counted(size, 'byte')}"
            )
        found.append((name, header, packed, stored, crc))
        position = stop
    if len(found) != count:
        raise ValueError(f"the archive claims {count:,} entries and holds {len(found):,}")
    return found


def _wide(extra: bytes, *fields: int) -> list[int]:
    """Return `fields` with those that did not fit into 32 bits taken from the entry's extra data (4.5.3)."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            values = extra[position + 4 : position + 4 + length]
            wide = []
            for field in fields:
                if field == _FULL:
                    if len(values) < 8:
                        break
                    field, values = int.from_bytes(values[:8], "little"), values[8:]
                wide.append(field)
            else:
                return wide
        position += 4 + length
    raise ValueError("the archive's directory lacks the size of an entry of more than 4 GB")
