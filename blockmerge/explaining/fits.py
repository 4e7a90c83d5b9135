"""How parents explain a merge, group by group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

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
    """How the same parents explain all blocks, components and tensors of a merge.

    `divided` are the names of blocks and components that no single weight explains: BASE is told by its
    components then, and all others tensor by tensor.
    """

    parents: Parents
    blocks: Mapping[str, GroupFit]
    components: Mapping[str, GroupFit]
    tensors: Mapping[str, GroupFit]
    preset: str | None = None
    divided: frozenset[str] = frozenset()

    @property
    def told(self) -> dict[str, GroupFit]:
        """All groups that have weights of their own."""
        return {**self.unet, **self.outside}

    @property
    def unexplained(self) -> list[str]:
        """The names of those that their weights do not explain."""
        return [name for name, group in self.told.items() if not group.explained]

    @property
    def unet(self) -> dict[str, GroupFit]:
        """Those of the U-Net: blocks, or the tensors of those that are divided."""
        return self._told(name for name in self.blocks if name != "BASE")

    @property
    def outside(self) -> dict[str, GroupFit]:
        """Those outside the U-Net: BASE and the VAE, or what they are divided into."""
        return self._told(name for name in ("BASE", "vae") if name in self._all)

    def _told(self, names: Iterable[str]) -> dict[str, GroupFit]:
        told: dict[str, GroupFit] = {}
        for name in names:
            told |= self._told(self.parts_of(name)) if name in self.divided else {name: self._all[name]}
        return told

    def parts_of(self, name: str) -> list[str]:
        """What a block or component is divided into: the components in it, where it is not a single one, and
        tensors.
        """
        inside = set(self._all[name].members)
        parts = [one for one, group in self.components.items() if inside.issuperset(group.members)]
        if len(parts) < 2:
            parts = []
        inside -= {place for part in parts for place in self.components[part].members}
        return parts + [one for one, group in self.tensors.items() if inside.issuperset(group.members)]

    def divide(self, names: Iterable[str]) -> MergeFit:
        """Divide those of some blocks and components that can be: into components, or into tensors that are
        all explained one by one.
        """
        able = {self._all[name].members for name in names if self._can_be_divided(name)}
        groups = (*self.blocks.items(), *self.components.items())
        return replace(self, divided=self.divided | {name for name, one in groups if one.members in able})

    def _can_be_divided(self, name: str) -> bool:
        parts, members = self.parts_of(name), self._all[name].members
        if self.components.keys() & parts:
            return True
        return len(parts) == len(members) > 1 and all(self.tensors[part].explained for part in parts)

    @cached_property
    def _all(self) -> dict[str, GroupFit]:
        return {**self.tensors, **self.components, **self.blocks}

    def with_coefficients(self, coefficients: Mapping[str, Array]) -> MergeFit:
        """The same with other coefficients for some groups, whatever else their tensors are called
        together.
        """
        of_members = {self._all[name].members: found for name, found in coefficients.items()}

        def changed(groups: Mapping[str, GroupFit]) -> dict[str, GroupFit]:
            return {
                name: replace(group, coefficients=of_members.get(group.members, group.coefficients))
                for name, group in groups.items()
            }

        return replace(
            self,
            blocks=changed(self.blocks),
            components=changed(self.components),
            tensors=changed(self.tensors),
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
