"""How `explain` groups tensors, into blocks and components, and what some parents tell of each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from blockmerge.anatomy import COMPONENTS, block_of, component_of
from blockmerge.checkpoints import Model
from blockmerge.comparing.arrays import Array, Flags
from blockmerge.comparing.sources import weights_of
from blockmerge.explaining.linear_fit import MANTISSA, Fit, fit

if TYPE_CHECKING:
    from blockmerge.explaining.gram import Gram
    from blockmerge.explaining.parents import Parents


@dataclass(frozen=True)
class Compared:
    """The tensors of a merge that candidates can explain.

    `holders[name]` are the numbers of the models that have the tensor in the merge's shape, the merge (0)
    first; a tensor is looked at when every candidate that has its component at all is among them. `skipped`
    are the others. `coarseness[tensor, candidate]` is the square of the candidate's dtype's step in steps of
    the merge's, at least 1.
    """

    names: tuple[str, ...]
    holders: dict[str, tuple[int, ...]]
    skipped: tuple[str, ...]
    coarseness: Array

    @classmethod
    def of(cls, merge: Model, candidates: Sequence[Model]) -> Compared:
        """Look at names and shapes."""
        tensors = [weights_of(model) for model in (merge, *candidates)]
        components = [{component_of(name) for name in found} for found in tensors]
        holders, skipped = {}, []
        for name, info in tensors[0].items():
            able = [n for n in range(1, len(tensors)) if component_of(name) in components[n]]
            having = [n for n in able if name in tensors[n] and tensors[n][name].shape == info.shape]
            if having and having == able:
                holders[name] = (0, *having)
            else:
                skipped.append(name)
        coarseness = np.ones((len(holders), len(candidates)))
        for row, (name, held) in enumerate(holders.items()):
            own, _ = MANTISSA[tensors[0][name].dtype]
            for n in held[1:]:
                coarseness[row, n - 1] = max(1.0, 4.0 ** (own - MANTISSA[tensors[n][name].dtype][0]))
        return cls(tuple(holders), holders, tuple(skipped), coarseness)


@dataclass(frozen=True)
class Units:
    """The sums of `Gram` over groups of tensors, and which candidates `have` each group: `have[U, k]`."""

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    products: Array
    plain: Array
    elements: Array
    apart: Array
    coarseness: Array
    have: Flags

    @classmethod
    def of(cls, groups: dict[str, list[int]], compared: Compared, gram: Gram) -> Units:
        """Add up the tensors of each group; groups without tensors are left out."""
        groups = {name: members for name, members in groups.items() if members}
        candidates = gram.products.shape[1]
        have = np.array(
            [
                [
                    all(n in compared.holders[compared.names[t]] for t in members)
                    for n in range(1, candidates + 1)
                ]
                for members in groups.values()
            ],
            dtype=np.bool_,
        ).reshape(len(groups), candidates)

        def add_up(table: Array) -> Array:
            return np.array([table[members].sum(axis=0) for members in groups.values()]).reshape(
                -1, *table.shape[1:]
            )

        return cls(
            tuple(groups),
            tuple(tuple(members) for members in groups.values()),
            add_up(gram.products),
            add_up(gram.plain),
            add_up(gram.elements),
            add_up(gram.apart),
            add_up(compared.coarseness * gram.elements[:, None]) / add_up(gram.elements)[:, None].clip(min=1),
            have,
        )

    def select(self, wanted: Sequence[int]) -> Units:
        """Some of the units."""
        chosen = list(wanted)
        return Units(
            tuple(self.names[u] for u in chosen),
            tuple(self.members[u] for u in chosen),
            self.products[chosen],
            self.plain[chosen],
            self.elements[chosen],
            self.apart[chosen],
            self.coarseness[chosen],
            self.have[chosen],
        )

    def fit(self, subset: tuple[int, ...]) -> Fit:
        """Fit a subset of the candidates to every unit."""
        return fit(self.products, self.apart, self.coarseness, subset)


def group_by_block(compared: Compared, family: str, blocks: Sequence[str]) -> dict[str, list[int]]:
    """Tensor numbers by block. BASE is what merges treat as BASE: all outside the U-Net but the VAE."""
    groups: dict[str, list[int]] = {block: [] for block in blocks}
    for number, name in enumerate(compared.names):
        if component_of(name) != "vae":
            groups[block_of(name, family)].append(number)
    return groups


def group_by_component(compared: Compared) -> dict[str, list[int]]:
    """Tensor numbers by component, the U-Net aside, whose blocks are told one by one."""
    groups: dict[str, list[int]] = {component: [] for component in COMPONENTS if component != "unet"}
    for number, name in enumerate(compared.names):
        if component_of(name) != "unet":
            groups[component_of(name)].append(number)
    return groups


@dataclass(frozen=True)
class Sight:
    """The sums over blocks, over components (the U-Net aside), and tensor by tensor."""

    blocks: Units
    components: Units
    tensors: Units

    def is_copy(self, component: str, candidate: int) -> bool:
        """Whether a component of the merge is that of a candidate, but for rounding."""
        if component not in self.components.names:
            return False
        place = self.components.names.index(component)
        found = self.components.select([place])
        return bool(found.have[0, candidate] and found.fit((candidate,)).explained(found.elements)[0])


@dataclass(frozen=True)
class ToldUnit:
    """A block, component or tensor told by some parents (numbers of candidates, the base first where it has
    it).
    """

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
    blocks, components, tensors = (
        _tell_units(part, parents) for part in (sight.blocks, sight.components, sight.tensors)
    )
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
        for u, name in enumerate(some.names):
            unit = _unit(some, found, u)
            # Where some parents have nothing to say and the others do not explain it, nothing is known.
            known = unit.determined and (unit.explained or len(subset) == len(parents.subset))
            told[name] = replace(unit, determined=known)
    return {name: told[name] for name in units.names if name in told}


def _unit(units: Units, found: Fit, u: int) -> ToldUnit:
    plain, base = units.plain[u], found.subset[0]
    apart = [
        plain[n, n] - 2 * plain[n, base] + plain[base, base] for n in range(len(plain)) if units.have[u, n]
    ]
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
        explained=bool(found.explained(units.elements)[u]),
        elements=float(units.elements[u]),
        members=units.members[u],
    )
