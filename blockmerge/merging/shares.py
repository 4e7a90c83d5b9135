"""How large what is added to the weights of a model is: ‖ΔW‖/‖W‖ of each block."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blockmerge.anatomy import Family
from blockmerge.expressions import Squares

if TYPE_CHECKING:
    import torch


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
        numbers = iter(
            _numbers([one for step in measured for one in (step.weight, step.total, *step.each.values())])
        )
        with self._lock:
            sums = self._blocks[self._family.block_of(ldm)]
            for step in measured:
                weight, total = next(numbers), next(numbers)
                sums.weight += math.nan if step.is_torn else weight
                # What one step after the other adds may cancel out: the sum of all is not known.
                sums.total = None if step.is_later or sums.total is None else sums.total + total
                for source in step.each:
                    sums.each[source] += next(numbers)

    def of(self, source: int | None) -> dict[str, float | None]:
        """{block: ‖ΔW‖/‖W‖} of what a source adds, or of all, in the family's order.

        None where that is not known: for weights that are 0 or not finite, of all where one source is added
        to the weights that another has changed, and where sources change different input channels.
        """
        return {
            block: _share(sums.total if source is None else sums.each[source], sums.weight)
            for block in self._family.blocks
            if (sums := self._blocks.get(block)) and (source is None or source in sums.each)
        }


def _numbers(sums: Sequence[torch.Tensor | None]) -> list[float]:
    """The numbers in all of them, of a GPU in one transfer; 0 for None."""
    import torch

    there = [one.double() for one in sums if one is not None]
    numbers = iter(torch.stack(there).tolist() if there else [])
    return [0.0 if one is None else next(numbers) for one in sums]


def _share(change: float | None, weight: float) -> float | None:
    if change is None or not math.isfinite(change) or not weight > 0:
        return None
    # Products that cancel out leave their rounding; digits that hardly depend on how it was cut.
    return float(f"{math.sqrt(max(0.0, change) / weight):.5g}")
