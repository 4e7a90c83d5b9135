"""`Size`: how large the factors of a new LoRA may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral, Real

from blockmerge.errors import RecipeError, shown

_NOTHING = 1e-14
"""Shares of the energy that are rounding."""


@dataclass(frozen=True)
class Size:
    """A rank for all modules, or the share of each one's energy that is to stay: its squared Frobenius norm.

    >>> Size(energy=0.9).least_rank([9.0, 1.0], 10.0), Size(rank=1).least_rank([9.0, 1.0], 10.0)
    (1, 1)

    Neither means that nothing is to be lost. Raises RecipeError for a rank that is no whole number from 1 up,
    a share that is not above 0 and at most 1, and for both.
    """

    rank: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        check_rank(self.rank, "rank (--rank)")
        energy = self.energy
        is_share = isinstance(energy, Real) and not isinstance(energy, bool) and 0 < float(energy) <= 1
        if energy is not None and not is_share:
            raise RecipeError(
                "energy (--energy) is the share that is to stay, above 0 and at most 1, as in 0.99; "
                f"{shown(repr(energy))} given"
            )
        if self.rank is not None and energy is not None:
            raise RecipeError("a rank and a share of the energy are given: leave one of them out")

    @property
    def is_exact(self) -> bool:
        """Whether nothing is to be lost."""
        return self.rank is None and self.energy is None

    def check_given(self) -> None:
        """Raise RecipeError when there is neither."""
        if self.is_exact:
            raise RecipeError("how large? give a rank (--rank 32), or the share to keep (--energy 0.95)")

    def most(self, rank: int) -> int:
        """The rank that what is of that rank has at most."""
        return rank if self.rank is None else min(rank, self.rank)

    def least_rank(self, energies: Sequence[float], total: float) -> int | None:
        """Return the least rank that is large enough, for the largest squared singular values in order, and
        their sum with those that are not there; None where more are needed.
        """
        if self.rank is not None:
            return self.rank if self.rank <= len(energies) else None
        allowed = max(1 - (1 if self.energy is None else self.energy), _NOTHING) * total
        sums = accumulate(energies)
        return next((rank for rank, kept in enumerate(sums, 1) if total - kept <= allowed), None)

    def missing(self, energies: Sequence[float], total: float) -> int:
        """At least how many more ranks are needed than there are energies, the last being the least."""
        wanted = (1 if self.energy is None else self.energy) * total - math.fsum(energies)
        least = energies[-1]
        return 0 if wanted <= 0 else math.ceil(min(wanted / least, 1e9)) if least > 0 else 0


def check_rank(rank: object, what: str) -> None:
    """Raise RecipeError for what is no rank; None is left to the caller."""
    is_count = isinstance(rank, Integral) and not isinstance(rank, bool) and int(rank) >= 1
    if rank is not None and not is_count:
        raise RecipeError(f"{what} is a whole number from 1 up; {shown(repr(rank))} given")
