"""The families that are known, each a folder of data here; a new folder is a new family."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, TypeVar

from blockmerge.anatomy.family import Family

F = TypeVar("F", bound=Callable[..., Any])

_ANY, _ANY_FOLDER = "any", "_any"
_emptied: list[Callable[[], None]] = []


class Families(Mapping[str, Family]):
    """{name: family}, each read from its folder when it is first asked for.

    What stands for all that is not known is there when it is asked for, and is none of them.
    """

    def __init__(self, home: Traversable) -> None:
        found = sorted(one.name for one in home.iterdir() if one.joinpath("family.toml").is_file())
        self._families: dict[str, Family | Traversable] = {
            name: home.joinpath(name) for name in found if name != _ANY_FOLDER
        }
        self._any: Family | Traversable = home.joinpath(_ANY_FOLDER)

    def __getitem__(self, name: str) -> Family:
        if name == _ANY:
            if not isinstance(self._any, Family):
                self._any = Family.read(self._any)
            return self._any
        found = self._families[name]
        if not isinstance(found, Family):
            found = self._families[name] = Family.read(found)
        return found

    def __contains__(self, name: object) -> bool:
        return name in self._families

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._families))

    def __len__(self) -> int:
        return len(self._families)

    def register(self, family: Family) -> None:
        """Add a family, or put it in the place of the one with its name."""
        self._families[family.name] = family
        self._forget()

    def unregister(self, name: str) -> None:
        """Take a family out."""
        del self._families[name]
        self._forget()

    def _forget(self) -> None:
        for empty in _emptied:
            empty()


FAMILIES = Families(files(__name__))
DEFAULT_FAMILY = "sd1"
"""Which family is meant where none is given."""


def remembered(size: int | None) -> Callable[[F], F]:
    """`lru_cache` for what depends on which families there are: emptied when one is added or taken out."""

    def wrap(function: F) -> F:
        cached = lru_cache(size)(function)
        _emptied.append(cached.cache_clear)
        return cached  # type: ignore[return-value]

    return wrap


def register(family: Family) -> None:
    """Add a family to FAMILIES."""
    FAMILIES.register(family)


def unregister(name: str) -> None:
    """Take a family out of FAMILIES."""
    FAMILIES.unregister(name)
