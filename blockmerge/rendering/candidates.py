"""What `explain` found of every candidate, in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockmerge.anatomy import OUTSIDE

if TYPE_CHECKING:
    from blockmerge.explaining import Explanation


@dataclass(frozen=True)
class Candidate:
    """A candidate and what it is to the merge.

    `shares` are how much of it the blocks took, without BASE and those where it cannot be told; `difference`
    is how far it is from the merge, None where that was not measured.
    """

    name: str
    finding: str
    shares: tuple[float, ...] = ()
    difference: float | None = None
    is_left_out: bool = False

    @property
    def mean(self) -> float | None:
        """The mean share."""
        return sum(self.shares) / len(self.shares) if self.shares else None


def candidates_of(found: Explanation) -> Iterator[Candidate]:
    """All that were named: those with a part in the merge, the others that were looked at, and the rest."""
    part = list(found.parents) or list(dict.fromkeys((found.base, *_others(found))))
    looked_at = sorted(found.candidates, key=lambda name: found.differences.get(name, float("inf")))
    for name in (*part, *(name for name in looked_at if name not in part)):
        yield Candidate(
            name,
            _finding(found, name, part),
            tuple(_shares(found, name)) if name in part else (),
            found.differences.get(name),
        )
    for name, what in found.added.items():
        yield Candidate(name, what)
    for name in found.screened:
        yield Candidate(name, "not looked at further: others are more like the merge, or explain more of it")
    for name, why in found.left_out.items():
        yield Candidate(name, f"left out: {why}", is_left_out=True)


def _others(found: Explanation) -> list[str]:
    """The parents, or the nearest candidates, but the base."""
    origins = (*found.blocks.values(), *found.components.values())
    return list(dict.fromkeys(name for origin in origins for name in origin.weights))


def _finding(found: Explanation, name: str, part: list[str]) -> str:
    if not found.parents:
        return {0: "the nearest", 1: "with the nearest, the best two"}.get(
            part.index(name) if name in part else 2, "explains no more than these"
        )
    if name not in part:
        return "not needed"
    if found.method == "copy":
        return "the one it is"
    return "parent, the base" if name == found.base else "parent"


def _shares(found: Explanation, name: str) -> Iterator[float]:
    for block, origin in found.blocks.items():
        weights = [weight for weight in origin.weights.values() if weight is not None]
        if block != OUTSIDE and weights and len(weights) == len(origin.weights):
            yield 1.0 - sum(weights) if name == found.base else origin.weights.get(name) or 0.0
