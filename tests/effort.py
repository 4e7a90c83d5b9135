"""How many of very many alike cases the tests take: a fixed share, or every one with BLOCKMERGE_EVERY_CASE=1.

`make test` takes the share, so that it ends in minutes; `make test-all` takes them all.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Case = TypeVar("Case")

EVERY_CASE = bool(os.environ.get("BLOCKMERGE_EVERY_CASE"))


def many(count: int) -> int:
    """How often to try something by chance: `count` times, or a third of them."""
    return count if EVERY_CASE else -(-count // 3)


def some(
    cases: Iterable[Case],
    of: int,
    chosen_by: str = "",
    values: Callable[[Case], Iterable[Hashable]] | None = None,
) -> list[Case]:
    """One of `of` cases, in their order, and as many more as it takes for every value to be in one of them.

    `values` gives what is in a case; without it, these are the elements of a tuple, each at its place.
    Another text chooses other cases, the same ones in every run.
    """
    cases = list(cases)
    if EVERY_CASE:
        return cases
    values_of = values or _elements
    shuffled = random.Random(chosen_by).sample(range(len(cases)), len(cases))
    wanted, seen, kept = -(-len(cases) // of), set(), set()
    # First such as bring most that is new: a greedy cover.
    while new := {place: set(values_of(cases[place])) - seen for place in shuffled if place not in kept}:
        best = max(new, key=lambda place: len(new[place]))
        if len(kept) >= wanted and not new[best]:
            break
        kept.add(best)
        seen |= new[best]
    return [case for place, case in enumerate(cases) if place in kept]


def _elements(case: Any) -> Iterator[Hashable]:
    elements = case if isinstance(case, tuple) else ()
    yield from (pair for pair in enumerate(elements) if isinstance(pair[1], Hashable))


def in_turn(first: Iterable[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with each value of the first axis once, and the values of the others beside them in turn; the
    whole product with every case.
    """
    if EVERY_CASE:
        return list(itertools.product(first, *others))
    return list(zip(first, *map(itertools.cycle, others), strict=False))
