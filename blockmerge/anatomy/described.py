"""The parts of a family's description: a class for each table of `family.toml` that says more than words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Adjusted:
    """What `adjust` does to a tensor: times 1 + `factor` × the number of that name; or, where there are
    `tones`, plus 0.02 × (the contrast, and the amounts of brightness and three colours times their rows).
    """

    number: str = ""
    factor: float = 0.0
    tones: tuple[tuple[float, float, float], ...] = ()


@dataclass(frozen=True)
class Arms:
    """How blocks are drawn: the left ones downwards, `middle` below, the right ones upwards."""

    left: tuple[str, ...]
    middle: tuple[str, ...]
    right: tuple[str, ...]


@dataclass(frozen=True)
class Signs:
    """How a U-Net of one naming is known, by names without prefix.

    `first` is the tensor that a file must have to be looked at, with some name that begins with `beside`. Its
    extent along axis 1 tells the variant, where it has `first_axes` axes. `highest` is the highest of the
    numbers after the word `numbered`, as 8 in ``input_blocks.8.``, where that tells the family; `told` says
    in words what there is instead. Every name in `has` is there and none in `lacks`, where a final dot means
    all that begin so, and a slash before it a name of another folder; `axes` are {name: number of axes}.
    """

    first: str
    first_axes: int
    numbered: str = ""
    highest: int = -1
    told: str = ""
    beside: str = ""
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    axes: Mapping[str, int] = field(default_factory=dict)

    def are_looked_at(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether the names are of this kind at all."""
        return self.first in shapes and _holds(shapes, self.beside)

    def fit(self, shapes: Mapping[str, Shape], *, cut: bool = False) -> bool:
        """Whether this is the family's U-Net, or with `cut` may be one that lacks its highest blocks; widths
        are not looked at.
        """
        highest = self.highest_in(shapes) if self.numbered else self.highest
        return (
            self.names_fit(shapes)
            and all(name in shapes and len(shapes[name]) == axes for name, axes in self.axes.items())
            and (0 <= highest < self.highest if cut else highest == self.highest)
        )

    def names_fit(self, names: Collection[str], prefix: str = "") -> bool:
        """Whether all that must be there is, under names with a prefix, and nothing that must not."""

        # A name after a slash stands elsewhere, in a folder of its own, which dicts have with a dot.
        def spellings(name: str) -> tuple[str, ...]:
            return (name[1:], name[1:].replace("/", ".", 1)) if name.startswith("/") else (prefix + name,)

        return all(any(one in names for one in spellings(name)) for name in self.has) and not any(
            _holds(names, one) for name in self.lacks for one in spellings(name)
        )

    def highest_in(self, names: Iterable[str]) -> int:
        """The highest number that there is, −1 without one."""
        pattern = re.compile(re.escape(self.numbered) + r"\.(\d+)\.")
        found = (pattern.match(name) for name in names)
        # Six digits at most: a hostile name must not make a number of a megabyte.
        return max((int(match[1][:6]) for match in found if match), default=-1)

    def found_instead(self, names: Iterable[str]) -> str:
        """What a U-Net of no known family has, in words."""
        highest = self.highest_in(names)
        return self.told.format(highest=highest, count=highest + 1)


def _holds(names: Collection[str], wanted: str) -> bool:
    if wanted.endswith("."):
        return any(name.startswith(wanted) for name in names)
    return not wanted or wanted in names


@dataclass(frozen=True)
class Version:
    """One of several models of a family that cannot be merged with each other: its name and title, and by
    which names without prefix it is told: {naming: those that it has, and those that it lacks}.
    """

    name: str
    title: str
    has: Mapping[str, tuple[str, ...]]
    lacks: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, name: str, data: Mapping[str, Any]) -> Version:
        """From the table of that name."""
        has, lacks = (
            {key: tuple(names) for key, names in data.get(one, {}).items()} for one in ("has", "lacks")
        )
        return cls(name, data["title"], has, lacks)


@dataclass(frozen=True)
class Unmarked:
    """What a variant predicts when no marker says so, and what the user is told then.

    `architectures` are {part of the metadata's modelspec.architecture: prediction}, asked first.
    """

    prediction: str
    note: str
    architectures: Mapping[str, str]


@dataclass(frozen=True)
class Derivative:
    """A model that was made from one of the family by adding tensors, or cutting layers out.

    `adds` are patterns of U-Net names that it has beside the layout's, `beside` of names outside the U-Net,
    and `cut` of all that it lacks, without prefix. `unfit_for_folders` says why no configs of a diffusers
    folder can be made for it, where that is so.
    """

    name: str
    title: str
    adds: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    unfit_for_folders: str = ""

    def has(self, name: str) -> bool:
        """Whether a tensor is one that the family's own models lack."""
        return matches((*self.adds, *self.beside), name)


@dataclass(frozen=True)
class Attention:
    """The layers that the attention similarity looks at, {block: how the names of q, k and v begin}, and what
    to say of it.
    """

    layers: Mapping[str, str]
    note: str | None = None


@dataclass(frozen=True)
class Beginning:
    """The block of names that begin with a text in which ``#`` stands for numbers: its word, and its number =
    first of `numbers` + the others × those in the name.
    """

    text: str
    word: str
    numbers: tuple[int, ...]

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(re.escape(self.text).replace(r"\#", r"(\d+)"))

    def block_of(self, name: str) -> str | None:
        """The block of a name, None where it does not begin so."""
        match = self._pattern.match(name)
        if match is None:
            return None
        if not self.numbers:
            return self.word
        first, *each = self.numbers
        counted = sum(times * int(digits[:6]) for times, digits in zip(each, match.groups(), strict=True))
        return f"{self.word}{first + counted:02}"


def matches(patterns: Iterable[str], name: str) -> bool:
    """Whether a name is one of those that patterns with ``*`` stand for."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def beginnings(data: Mapping[str, Sequence[Any]]) -> dict[str, tuple[Beginning, ...]]:
    """Return {first word of a name: beginnings with it}."""
    found: dict[str, list[Beginning]] = {}
    for text, (word, *numbers) in data.items():
        found.setdefault(text.partition(".")[0], []).append(Beginning(text, word, tuple(numbers)))
    return {root: tuple(beginnings) for root, beginnings in found.items()}


def frozen(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same with lists as tuples."""
    return {key: _tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def _tuple(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_tuple(value) if isinstance(value, list) else value for value in values)
