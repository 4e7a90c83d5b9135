"""Weights left to chance, so that they can be had again: each follows from a seed and the block's name
alone.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from hashlib import blake2b

from blockmerge.errors import WeightsError, shown

_FORM = "write random, random(0.2,0.8), or random(0.2,0.8,2) for two digits"
_MOST_DIGITS = 12
_LIMITS = f"the lower limit comes first, then the upper, then 0 to {_MOST_DIGITS} digits"

_LETTERS = {"R": "random", "U": "random(-0.5,1.5)", "X": "random"}
"""SuperMerger's (README, "Let the Dice roll"). The limits of its X are set elsewhere; they are 0 and 1 until
they are.
"""


@dataclass(frozen=True)
class RandomWeight:
    """A weight drawn evenly from `low` to `high` and rounded to so many digits after the point.

    >>> RandomWeight(0.2, 0.8).draw(seed=1, block="IN04")
    0.644

    Raises WeightsError when the limits are not two numbers in order, or the digits not a whole number from 0
    to 12.
    """

    low: float = 0.0
    high: float = 1.0
    digits: int = 3

    def __post_init__(self) -> None:
        in_order = math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high
        if not (in_order and self.digits in range(_MOST_DIGITS + 1)):
            given = f"random({self.low:g},{self.high:g},{self.digits})"
            raise WeightsError(f"{given}: {_LIMITS}")

    def draw(self, seed: int | str, block: str) -> float:
        """Return the weight of a block. Rounding does not lead out of the limits.

        Order, other blocks and the machine play no part: it is the first 64 bits of BLAKE2b("SEED BLOCK").
        """
        bits = int.from_bytes(blake2b(f"{seed} {block}".encode(), digest_size=8).digest(), "big")
        weight = round(self.low + (self.high - self.low) * (bits / 2**64), self.digits)
        return min(max(weight, self.low), self.high)


def random_weight(text: str) -> RandomWeight | None:
    """Read ``random``, ``random(LOW,HIGH)``, ``random(LOW,HIGH,DIGITS)``, R, U or X; None for what is none of
    them.

    Raises WeightsError for what begins so and cannot be read.
    """
    text = _LETTERS.get(text, text)
    if not text.casefold().startswith("random"):
        return None
    match = re.fullmatch(
        r"random(?:\(([^,()]+),([^,()]+)(?:,\s*(\d{1,2})\s*)?\))?", text, re.IGNORECASE | re.ASCII
    )
    if match is None:
        raise WeightsError(f"cannot read '{shown(text)}': {_FORM}")
    if match[1] is None:
        return RandomWeight()
    try:
        low, high = float(match[1]), float(match[2])
        return RandomWeight(low, high) if match[3] is None else RandomWeight(low, high, int(match[3]))
    except ValueError:
        raise WeightsError(f"cannot read '{shown(text)}': {_FORM}") from None
    except WeightsError:  # say it as it was written
        raise WeightsError(f"{shown(text)}: {_LIMITS}") from None


def is_random(weights: object) -> bool:
    """Whether weights that can be read, in whatever form, leave any to chance."""
    return re.search(r"random|\b[RUX]\b", str(weights), re.IGNORECASE) is not None
