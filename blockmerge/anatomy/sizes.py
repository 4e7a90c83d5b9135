"""Families whose files say how many blocks there are: numbered lists of blocks, counted by names, and tables
whose lines stand for every member of a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

NUMBER = "#"
"""Stands for a member's number, in templates of names and in those of blocks."""


@dataclass(frozen=True)
class NumberedList:
    """A list of like modules, as `double_blocks.0` to `double_blocks.18`.

    `paths` are {naming: what stands before the numbers}. `block` is the block of a member: ``"D#"`` is D00,
    D01, …, and ``"NOISE"`` one for all. `usual` is how many there are in the published models.
    """

    block: str
    usual: int
    paths: Mapping[str, str]

    @property
    def has_blocks(self) -> bool:
        """Whether every member is a block of its own."""
        return NUMBER in self.block

    def count_in(self, names: Iterable[str], naming: str) -> int:
        """How many members a model of that naming has, by names without prefix. Of those that are one block
        together none may be missing at the end, since nothing else would tell.
        """
        pattern = re.compile(re.escape(self.paths[naming]) + r"\.(\d{1,4})\.")
        found = 1 + max((int(match[1]) for name in names if (match := pattern.match(name))), default=-1)
        return found if self.has_blocks else max(found, self.usual)

    def blocks(self, count: int) -> tuple[str, ...]:
        """The blocks of so many members: two digits, and three only from 100 on."""
        if not self.has_blocks:
            return (self.block,)
        return tuple(self.block.replace(NUMBER, f"{number:02}") for number in range(count))


def expanded(
    lines: Iterable[str],
    lists: Mapping[str, tuple[NumberedList, int]],
    columns: int,
    block: int | None = None,
) -> Iterator[list[str]]:
    """Yield the columns of a table's lines, a line for each member where the first column's name is a
    template; `lists` are {path: the list, and how many it has}.

    A line may have one column more: for which numbers it stands, written as Python slices are. `block` is the
    column that holds the block.
    """
    for line in lines:
        fields = line.split("\t")
        path = fields[0].partition(f".{NUMBER}.")[0]
        if NUMBER not in fields[0]:
            yield fields[:columns]
            continue
        one, count = next(found for own, found in lists.items() if path.endswith(own))
        blocks = one.blocks(count) * (1 if one.has_blocks else count)
        for number in range(count)[_slice(fields[columns:])]:
            made = [field.replace(NUMBER, str(number), 1) for field in fields[:columns]]
            if block is not None:
                made[block] = blocks[number]
            yield made


def lines_for_each(
    table: Sequence[str], lists: Mapping[str, tuple[NumberedList, int]], columns: int
) -> list[str]:
    """Return a table with a line for each member that a line is for, before those that are for all."""
    some = [line for line in table if line.split("\t")[columns:]]
    each = ["\t".join(fields) for fields in expanded(some, lists, columns)]
    return [*each, *(line for line in table if line not in some)]


def sizes_of(lists: Sequence[NumberedList], counts: Sequence[int]) -> dict[str, tuple[NumberedList, int]]:
    """Return {path in original names: the list, and how many it has}, the longest path first, since one may
    end as another does (`llm_adapter.blocks`, `blocks`).
    """
    found = sorted(zip(lists, counts, strict=True), key=lambda pair: -len(pair[0].paths["ldm"]))
    return {one.paths["ldm"]: (one, count) for one, count in found}


def blocks_of(order: Iterable[str], lists: Sequence[NumberedList], counts: Sequence[int]) -> Iterator[str]:
    """Yield the blocks of a model, in the order in which a family has them."""
    sizes = {one.block: one.blocks(count) for one, count in zip(lists, counts, strict=True)}
    for word in order:
        yield from sizes.get(word, (word,))


def beginnings_of(lists: Iterable[NumberedList], naming: str) -> dict[str, list[str | int]]:
    """Return {how the names of members begin: the word of their block, and how their numbers count}."""
    return {
        f"{one.paths[naming]}.{NUMBER}.": [one.block.replace(NUMBER, ""), *((0, 1) * one.has_blocks)]
        for one in lists
    }


def _slice(said: Sequence[str]) -> slice:
    if not said:
        return slice(None)
    start, stop = said[0].split(":")
    return slice(int(start) if start else None, int(stop) if stop else None)
