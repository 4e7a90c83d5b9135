"""Weights that change evenly from one number to another: gradients as they are written, and lists that are
carried over to fewer or more blocks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from blockmerge.errors import WeightsError, shown
from blockmerge.weights.plain_numbers import finite_number

Weights = Sequence[float | None]


def is_gradient(text: str) -> bool:
    """Whether a text is meant as a gradient: ``"0..1"``."""
    return ".." in re.sub(r"\(.*?\)", "", text)  # random(0.2..) is something else


def gradient(text: str, count: int, form: str) -> list[float]:
    """Return the weights of so many blocks that a gradient stands for, from its first number to its second.

    >>> gradient("0..1", 5, "IN00-IN05=0..1")
    [0.0, 0.25, 0.5, 0.75, 1.0]

    One block gets the first. Raises WeightsError for anything but two numbers; `form` shows how one is
    written.
    """
    ends = text.split("..")
    if "..." in text:  # "0...1" is no more a gradient to .1 than one to 1
        raise WeightsError(f"cannot read '{shown(text)}': a gradient has two dots, as in {form}")
    if len(ends) == 2 and not all(ends):
        raise WeightsError(f"'{shown(text)}' is half a gradient: write both ends, as in {form}")
    if len(ends) != 2:
        raise WeightsError(f"cannot read '{shown(text)}': a gradient has two ends, as in {form}")
    for end in ends:
        if finite_number(end) is None:
            raise WeightsError(
                f"'{shown(end)}' in '{shown(text)}' is not a number: a gradient goes from one number to "
                f"another, as in {form}"
            )
    first, last = map(float, ends)
    return [_between(first, last, place, count - 1) for place in range(count)]


def spread(weights: Weights, count: int) -> list[float | None]:
    """Return weights carried over to so many blocks by depth.

    >>> spread([0, 1, 0], 5)
    [0, 0.5, 1, 0.5, 0]

    Weight i of n stands at the depth i/(n − 1), and block j of m takes what lies at j/(m − 1), linearly
    between the two weights beside it; None where one of these is None. A single block lies in the middle.
    """
    steps = len(weights) - 1
    if count == 1:
        return [_at(weights, steps, 2)]
    return [_at(weights, place * steps, count - 1) for place in range(count)]


def _at(weights: Weights, numerator: int, denominator: int) -> float | None:
    place, rest = divmod(numerator, denominator)
    first = weights[place]
    last = weights[place + 1] if rest else first
    return None if first is None or last is None else _between(first, last, rest, denominator)


def _between(first: float, last: float, step: int, steps: int) -> float:
    """What lies so many of `steps` on the way from one number to another: exactly these at the ends."""
    if step == 0:
        return first
    return last if step == steps else first + (last - first) * (step / steps)
