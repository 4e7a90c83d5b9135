"""How many of very many alike cases the tests take: a fixed share, or every one with BLOCKMERGE_EVERY_CASE=1.

`make test` takes the share, so that it ends in minutes; `make test-all` takes them all.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

Case = TypeVar("Case")

EVERY_CASE = bool(os.environ.get("BLOCKMERGE_EVERY_CASE"))


def many(count: int) -> int:
    """How often to try something by chance: `count` times, or a third of them."""
    return count if EVERY_CASE else -(-count // 3)


def some(cases: Iterable[Case], of: int, chosen_by: str = "") -> list[Case]:
    """One of `of` cases, in their order. Another text chooses others, the same ones in every run."""
    cases = list(cases)
    if EVERY_CASE:
        return cases
    kept = set(random.Random(chosen_by).sample(range(len(cases)), -(-len(cases) // of)))
    return [case for place, case in enumerate(cases) if place in kept]


def in_turn(first: Iterable[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with each value of the first axis once, and the values of the others beside them in turn; the
    whole product with every case.
    """
    if EVERY_CASE:
        return list(itertools.product(first, *others))
    return list(zip(first, *map(itertools.cycle, others), strict=False))
