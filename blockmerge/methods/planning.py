"""What a plan needs of the methods before any weight is read: which results are copies, of what, and keys for
chance. Methods choose their `copies` and `rows` from what is here.

No torch. A *source* is the number of a model: 0 is A, 1 is B, 2 is C. Weights are read as the decimal numbers
that they are written as: 0.29 of 100 rows are 29, although the double nearest to 0.29 is a little less.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from math import ceil, floor

Rows = tuple[tuple[int, int, int], ...]
"""Stretches (start, stop, source) of an axis, in order and without gaps."""


def key_of(seed: int, name: str) -> int:
    """Return 64 random bits for a tensor: the first of SHA-256 of the seed, as a decimal, a line feed and the
    name.
    """
    return int.from_bytes(
        hashlib.sha256(f"{int(seed)}\n{name}".encode("utf-8", "surrogatepass")).digest()[:8], "little"
    )


def share(fraction: float, count: int) -> int:
    """Return ⌈fraction · count⌉, the fraction being the decimal number that it is written as."""
    return ceil(Fraction(str(fraction)) * count)


# -- the weights at which a result is an input ---------------------------------------------------------------


def never(alpha: float, beta: float = 0.0) -> int | None:
    """No result is sure to be an input's bytes."""
    return None


def always_a(alpha: float | None = None, beta: float | None = None) -> int:
    """The result is A, whatever the weights, and without any."""
    return 0


def a_at_zero(alpha: float, beta: float = 0.0) -> int | None:
    """α = 0 is A."""
    return 0 if alpha == 0 else None


def a_at_zero_and_one(alpha: float, beta: float = 0.0) -> int | None:
    """α = 0 and α = 1 are A."""
    return 0 if alpha in (0, 1) else None


def a_to_b(alpha: float, beta: float = 0.0) -> int | None:
    """α = 0 is A, α = 1 is B."""
    return {0.0: 0, 1.0: 1}.get(alpha)


def a_to_b_limited(alpha: float, beta: float = 0.0) -> int | None:
    """A up to α = 0, B from α = 1 on."""
    return 0 if alpha <= 0 else 1 if alpha >= 1 else None


def triple(alpha: float, beta: float = 0.0) -> int | None:
    """α = β = 0 is A, (1, 0) is B, (0, 1) is C."""
    return {(0.0, 0.0): 0, (1.0, 0.0): 1, (0.0, 1.0): 2}.get((alpha, beta))


def twice(alpha: float, beta: float = 0.0) -> int | None:
    """β = 1 is C, β = 0 is a weighted sum of A and B."""
    return 2 if beta == 1 else a_to_b(alpha) if beta == 0 else None


# -- rows of A and B -----------------------------------------------------------------------------------------


def swapped_rows(shape: tuple[int, ...], alpha: float, beta: float = 0.0) -> Rows:
    """Return which entries of the first axis are whose in a `tensor_sum`.

    α of the rows are B's, from β of the way on, and round the end; α and β are limited to [0, 1]. A tensor
    without axes is one row, which is B's if α > ½.
    """
    if not shape:
        return ((0, 1, int(alpha > 0.5)),)
    rows = shape[0]
    width, start = (Fraction(str(min(1, max(0, weight)))) for weight in (alpha, beta))
    if start + width <= 1:
        first, last, inside = floor(rows * start), floor(rows * (start + width)), 1
    else:
        first, last, inside = floor(rows * (start + width - 1)), floor(rows * start), 0
    borders = ((0, first, 1 - inside), (first, last, inside), (last, rows, 1 - inside))
    return tuple(part for part in borders if part[0] < part[1])


def swapped_columns(shape: tuple[int, ...], alpha: float, beta: float = 0.0) -> Rows:
    """Return which entries of the second axis, or of the only one, are whose in a `tensor_sum_columns`."""
    return swapped_rows(shape[1:2] or shape, alpha, beta)
