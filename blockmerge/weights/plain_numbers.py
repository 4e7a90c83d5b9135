"""Numbers as people write them."""

from __future__ import annotations

import math


def finite_number(text: str) -> float | None:
    """Return the number that a text is, or None for any other text, infinity and NaN among them."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and "_" not in text and text.isascii() else None
