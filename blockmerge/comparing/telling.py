"""Every block, component and tensor of a merge, told by the same parents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from blockmerge.comparing.arrays import Array
from blockmerge.comparing.linear_fit import Fit, explained
from blockmerge.comparing.parents import Parents
from blockmerge.comparing.units import Units


@dataclass(frozen=True)
class Sight:
    """The sums over blocks, over components (the U-Net aside), and tensor by tensor."""

    blocks: Units
    components: Units
    tensors: Units


@dataclass(frozen=True)
class ToldUnit:
    """A block, component or tensor told by some parents (numbers of candidates, the base first where it has it)."""

    subset: tuple[int, ...]
    coefficients: Array
    uncertainty: float
    residual: float | None
    determined: bool
    explained: bool
    elements: float
    members: tuple[int, ...]


@dataclass(frozen=True)
class Told:
    """All units, told by the same parents."""

    parents: Parents
    blocks: dict[str, ToldUnit]
    components: dict[str, ToldUnit]
    tensors: dict[str, ToldUnit]
    preset: str | None = None


def tell(sight: Sight, parents: Parents) -> Told:
    """Fit the parents to everything."""
    blocks, components, tensors = (_tell_units(part, parents) for part in (sight.blocks, sight.components, sight.tensors))
    return Told(parents, blocks, components, tensors)


def _tell_units(units: Units, parents: Parents) -> dict[str, ToldUnit]:
    told: dict[str, ToldUnit] = {}
    for pattern in {tuple(row) for row in units.have[:, parents.subset].tolist()}:
        subset = tuple(n for n, has in zip(parents.subset, pattern, strict=True) if has)
        wanted = [u for u, row in enumerate(units.have[:, parents.subset].tolist()) if tuple(row) == pattern]
        if not subset:
            continue
        some = units.select(wanted)
        found = some.fit(subset)
        told.update({name: _unit(some, found, u) for u, name in enumerate(some.names)})
    return {name: told[name] for name in units.names if name in told}


def _unit(units: Units, found: Fit, u: int) -> ToldUnit:
    plain, base = units.plain[u], found.subset[0]
    apart = [plain[n, n] - 2 * plain[n, base] + plain[base, base] for n in range(len(plain)) if units.have[u, n]]
    largest = float(np.sqrt(max(0.0, *apart))) if len(apart) > 1 else 0.0
    own = plain[np.ix_(found.subset, found.subset)]
    left = float(np.sqrt(max(0.0, found.coefficients[u] @ own @ found.coefficients[u])))
    uncertainty = float(found.uncertainty[u].max())
    return ToldUnit(
        subset=found.subset,
        coefficients=found.coefficients[u],
        uncertainty=uncertainty,
        residual=left / largest if largest else None,
        determined=bool(found.determined[u]),
        explained=bool(explained(found.error, units.elements)[u]),
        elements=float(units.elements[u]),
        members=units.members[u],
    )
