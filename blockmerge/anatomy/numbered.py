"""The blocks of a model that nobody has described: numbered lists of like modules, found by names alone."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<=\.)(\d{1,4})(?=\.)")
_GLUED = re.compile(r"(?<=\.)[^.\d][^.]*?(\d{1,4})(?=\.)")
"""A number between dots; and one glued to a word (``blocks.block0.``), for models that have no other."""

_LETTERS = {"double": "D", "single": "S"}
"""What the lists of transformers for texts and images are called everywhere."""

_Members = Mapping[int, frozenset[str]]
"""{number: what stands after it in names}."""


@dataclass(frozen=True)
class FoundList:
    """A numbered list of blocks: what stands before its numbers, how many there are, and what its blocks are
    called, with ``#`` for the number.
    """

    start: str
    count: int
    block: str

    @property
    def path(self) -> str:
        """What it is called, without the dot before the numbers."""
        return self.start.removesuffix(".")


def numbered_lists(names: Collection[str]) -> tuple[FoundList, ...]:
    """Return the lists of blocks among a model's names, in the order in which they appear; none where nothing
    looks like one.

    >>> numbered_lists(["embed.weight", *(f"layers.{n}.{part}.weight" for n in (0, 1) for part in "qkv")])
    (FoundList(start='layers.', count=2, block='L#'),)

    A list has the numbers from 0 up, at least two. At least half of its members hold several modules, and at
    least half are like another: they share half of their names. Of a list within a list the outer one
    counts, unless each of its members is nothing but a list.
    """
    found, glued = _chosen(names, _NUMBER), _chosen(names, _GLUED)
    if all(any(re.match(rf"{re.escape(outer)}\d+\.", start) for outer in glued) for start in found):
        found = glued
    return tuple(_named(found))


def _chosen(names: Iterable[str], number: re.Pattern[str]) -> dict[str, _Members]:
    """{what stands before the numbers: members} of the lists of blocks."""
    members: dict[str, dict[int, set[str]]] = {}
    for name in names:
        # With a dot before it, so that a number may also stand first.
        for match in number.finditer(dotted := f".{name}"):
            start, rest = dotted[1 : match.start(1)], dotted[match.end() + 1 :]
            members.setdefault(start, {}).setdefault(int(match[1]), set()).add(rest)
    found = {start: {n: frozenset(rest) for n, rest in held.items()} for start, held in members.items()}
    lists = {start: held for start, held in found.items() if start and _are_blocks(held)}
    return {start: held for start, held in lists.items() if _is_chosen(start, lists)}


def _are_blocks(members: _Members) -> bool:
    if len(members) < 2 or max(members) != len(members) - 1:
        return False
    several = sum(len({rest.rpartition(".")[0] for rest in held}) > 1 for held in members.values())
    kinds = list(members.values())
    distinct = set(kinds)
    alike = sum(
        kinds.count(held) > 1 or any(2 * len(held & other) >= len(held) for other in distinct - {held})
        for held in distinct
        for _ in range(kinds.count(held))
    )
    return 2 * several >= len(members) and 2 * alike >= len(members)


def _is_chosen(start: str, lists: Mapping[str, _Members]) -> bool:
    """Whether its members are the blocks, and not those of a list around it or within it."""
    outer = (other for other in lists if re.match(rf"{re.escape(other)}\d+\.", start))
    return not _is_list_of_lists(start, lists) and all(_is_list_of_lists(other, lists) for other in outer)


def _is_list_of_lists(start: str, lists: Mapping[str, _Members]) -> bool:
    return all(f"{start}{number}." in lists for number in lists[start]) and all(
        rest.partition(".")[0].isdigit() for held in lists[start].values() for rest in held
    )


def _named(lists: Mapping[str, _Members]) -> Iterator[FoundList]:
    letters = {start: next((to for word, to in _LETTERS.items() if word in start), "") for start in lists}
    if len(lists) == 1:
        letters = {start: letter or "L" for start, letter in letters.items()}
    for start, held in lists.items():
        letter = letters[start]
        is_only = bool(letter) and list(letters.values()).count(letter) == 1
        block = f"{letter}#" if is_only else f"{start.removesuffix('.')}.#"
        yield FoundList(start, len(held), block)
