"""How large what is added to the weights of a model is: ‖ΔW‖/‖W‖ of each block."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from blockmerge.anatomy import Family
from blockmerge.expressions import Squares


@dataclass
class _Sums:
    """Σx² of some weights: theirs, of all that is added, of what each source adds."""

    weight: float = 0.0
    total: float | None = 0.0
    each: dict[int, float] = field(default_factory=lambda: defaultdict(float))


class Shares:
    """Adds up what workers measure, from any thread.

    Of a block, ‖W‖ is that of the weights that anything is added to.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._blocks: dict[str, _Sums] = defaultdict(_Sums)
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def is_new(self, tensor: str) -> bool:
        """Whether this is asked of a tensor for the first time."""
        with self._lock:
            is_new = tensor not in self._seen
            self._seen.add(tensor)
        return is_new

    def add(self, ldm: str, measured: Sequence[Squares]) -> None:
        """Add what was measured of a stretch of a tensor."""
        steps = [
            (
                float(one.weight or 0.0),
                float(one.total or 0.0),
                {source: float(square) for source, square in one.each.items()},
                one.is_later,
            )
            for one in measured
        ]
        with self._lock:
            sums = self._blocks[self._family.block_of(ldm)]
            for weight, total, each, is_later in steps:
                sums.weight += weight
                # What one step after the other adds may cancel out: the sum of all is not known.
                sums.total = None if is_later or sums.total is None else sums.total + total
                for source, square in each.items():
                    sums.each[source] += square

    def of(self, source: int | None) -> dict[str, float | None]:
        """{block: ‖ΔW‖/‖W‖} of what a source adds, or of all, in the family's order.

        None where that is not known: for weights that are 0, and of all where one source looks at the weights
        that another has changed.
        """
        return {
            block: _share(sums.total if source is None else sums.each[source], sums.weight)
            for block in self._family.blocks
            if (sums := self._blocks.get(block)) and (source is None or source in sums.each)
        }


def _share(change: float | None, weight: float) -> float | None:
    if change is None or not weight > 0:
        return None
    share = math.sqrt(max(0.0, change) / weight)  # products that cancel out leave their rounding
    return float(f"{share:.6g}") if math.isfinite(share) else None  # digits that do not depend on threads
