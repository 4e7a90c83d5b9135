"""How parents explain a merge, group by group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from blockmerge.anatomy import component_of
from blockmerge.comparing.arrays import Array
from blockmerge.explaining.groups import GroupSums, MergeSums
from blockmerge.explaining.linear_fit import Fit
from blockmerge.explaining.parents import Parents


@dataclass(frozen=True)
class GroupFit:
    """How parents explain a block, component or tensor.

    `candidates` are the places of those parents among the candidates that have its tensors, the base first
    where it has them; `coefficients` are how much of each it takes. `members` are its tensors' places in
    `ComparedTensors.names`.
    """

    candidates: tuple[int, ...]
    coefficients: Array
    uncertainty: float
    residual: float | None
    determined: bool
    explained: bool
    elements: float
    members: tuple[int, ...]


@dataclass(frozen=True)
class MergeFit:
    """How the same parents explain all blocks, components and tensors of a merge."""

    parents: Parents
    blocks: Mapping[str, GroupFit]
    components: Mapping[str, GroupFit]
    tensors: Mapping[str, GroupFit]
    preset: str | None = None

    @property
    def unet(self) -> dict[str, GroupFit]:
        """The U-Net's groups that have weights of their own: blocks, or tensors."""
        if self.parents.by_tensor:
            return {name: group for name, group in self.tensors.items() if component_of(name) == "unet"}
        return {name: group for name, group in self.blocks.items() if name != "BASE"}

    @property
    def outside(self) -> dict[str, GroupFit]:
        """What is outside the U-Net: BASE and the VAE."""
        base = {name: group for name, group in self.blocks.items() if name == "BASE"}
        return base | {name: group for name, group in self.components.items() if name == "vae"}

    def with_coefficients(self, coefficients: Mapping[str, Array], preset: str | None) -> MergeFit:
        """The same with other coefficients for some groups."""

        def changed(groups: Mapping[str, GroupFit]) -> dict[str, GroupFit]:
            return {
                name: replace(group, coefficients=coefficients.get(name, group.coefficients))
                for name, group in groups.items()
            }

        return replace(
            self,
            blocks=changed(self.blocks),
            components=changed(self.components),
            tensors=changed(self.tensors),
            preset=preset,
        )


def fit_parents(sums: MergeSums, parents: Parents) -> MergeFit:
    """Fit the parents to every group."""
    blocks, components, tensors = (
        _fit_groups(groups, parents) for groups in (sums.blocks, sums.components, sums.tensors)
    )
    return MergeFit(parents, blocks, components, tensors)


def _fit_groups(groups: GroupSums, parents: Parents) -> dict[str, GroupFit]:
    """Fit every group with those parents that have it, groups of the same parents at once."""
    with_the_same: dict[tuple[int, ...], list[int]] = {}
    for place, have in enumerate(groups.have):
        with_the_same.setdefault(tuple(n for n in parents.candidates if have[n]), []).append(place)
    fits: dict[str, GroupFit] = {}
    for candidates, places in with_the_same.items():
        if not candidates:
            continue
        some = groups.select(places)
        found = some.fit(candidates)
        for place, name in enumerate(some.names):
            group = _group_fit(some, found, place)
            # Where some parents have nothing to say and the others do not explain it, nothing is known.
            known = group.determined and (group.explained or candidates == parents.candidates)
            fits[name] = replace(group, determined=known)
    return {name: fits[name] for name in groups.names if name in fits}


def _group_fit(groups: GroupSums, found: Fit, place: int) -> GroupFit:
    return GroupFit(
        candidates=found.candidates,
        coefficients=found.coefficients[place],
        uncertainty=float(found.uncertainty[place].max()),
        residual=_residual(groups, found, place),
        determined=bool(found.determined[place]),
        explained=bool(found.explained(groups.elements)[place]),
        elements=float(groups.elements[place]),
        members=groups.members[place],
    )


def _residual(groups: GroupSums, found: Fit, place: int) -> float | None:
    """What a fit leaves of a group, in units of the largest difference of a candidate from the base."""
    products, base = groups.plain_products[place], found.candidates[0]
    able = np.flatnonzero(groups.have[place])
    if len(able) < 2:
        return None
    differences = [products[n, n] - 2 * products[n, base] + products[base, base] for n in able]
    largest = float(np.sqrt(max(0.0, *differences)))
    coefficients = found.coefficients[place]
    left = coefficients @ products[np.ix_(found.candidates, found.candidates)] @ coefficients
    return float(np.sqrt(max(0.0, left))) / largest if largest else None
