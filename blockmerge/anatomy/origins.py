"""Which rows of which tensors a tensor is made of, from one naming to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction

ALL = ((0, 1),)
"""The stretches of a tensor that is taken whole."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a tensor's first axis: `start` to `stop` of `of` equal ones; by default all.

    >>> Rows("attn.in_proj_weight", 1, 2, 3)  # k, the second third of q|k|v
    Rows(name='attn.in_proj_weight', start=1, stop=2, of=3)
    """

    name: str
    start: int = 0
    stop: int = 1
    of: int = 1


@dataclass(frozen=True, slots=True)
class Origin:
    """How a tensor is made from those of a source: `rows` joined along the first axis, in order.

    >>> swapped = Origin((Rows("t", 1, 2, 2), Rows("t", 0, 1, 2)))

    `transposed` says that rows and columns change places; `axes` how many axes it gets (the source may have
    fewer or more of length 1), or None for as many as it has.
    """

    rows: tuple[Rows, ...]
    transposed: bool = False
    axes: int | None = None

    def of(self, names: Mapping[str, str]) -> Origin:
        """The same of tensors that have other names."""
        return replace(self, rows=tuple(replace(one, name=names[one.name]) for one in self.rows))


@dataclass(frozen=True, slots=True)
class Place:
    """A diffusers tensor that holds rows of an original one: `stretches` (start, stop) of `of` equal rows, in
    its own order.
    """

    name: str
    stretches: tuple[tuple[int, int], ...] = ALL
    of: int = 1


@dataclass(frozen=True, slots=True)
class Relation:
    """Where diffusers keeps an original tensor's values: nowhere, in one tensor, or its rows in several."""

    places: tuple[Place, ...] = ()
    transposed: bool = False
    squeezed: bool = False

    @classmethod
    def parts(cls, *names: str) -> Relation:
        """The tensor's rows in equal parts, in order; in a single one all of them."""
        return cls(tuple(Place(name, ((n, n + 1),), len(names)) for n, name in enumerate(names)))

    @property
    def diffusers(self) -> tuple[str, ...]:
        """The names of the diffusers tensors."""
        return tuple(place.name for place in self.places)

    def origins_in_diffusers(self, original: str) -> dict[str, Origin]:
        """Return {diffusers name: how it is made of the tensor `original`}."""
        axes = 2 if self.squeezed else None
        return {
            place.name: Origin(
                tuple(Rows(original, start, stop, place.of) for start, stop in place.stretches),
                self.transposed,
                axes,
            )
            for place in self.places
        }

    def origin_in_ldm(self) -> Origin:
        """How the original tensor is made of the diffusers ones: their stretches, in the original's order."""
        found: list[tuple[Fraction, Rows]] = []
        for place in self.places:
            rows = sum(stop - start for start, stop in place.stretches)
            at = 0
            for start, stop in place.stretches:
                whole = stop - start == rows
                taken = Rows(place.name) if whole else Rows(place.name, at, at + stop - start, rows)
                found.append((Fraction(start, place.of), taken))
                at += stop - start
        found.sort(key=lambda one: one[0])
        return Origin(tuple(rows for _, rows in found), self.transposed, 4 if self.squeezed else None)


NO_PLACE = Relation()
