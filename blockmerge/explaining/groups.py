"""The sums of the first pass over groups of tensors: blocks, components, and tensors one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from blockmerge.anatomy import Family, component_of
from blockmerge.comparing.arrays import Array, Flags
from blockmerge.explaining.compared import ComparedTensors
from blockmerge.explaining.linear_fit import Fit, fit

if TYPE_CHECKING:
    from blockmerge.explaining.gram import GramMatrices


@dataclass(frozen=True)
class GroupSums:
    """Sums of GramMatrices over groups of tensors; an array's first axis is the group.

    `members` are the places of a group's tensors in `ComparedTensors.names`. `coarseness[group, candidate]`
    is the mean over the group's values, and `have[group, candidate]` says who has all of its tensors.
    """

    names: tuple[str, ...]
    members: tuple[tuple[int, ...], ...]
    products: Array
    plain_products: Array
    elements: Array
    differing: Array
    coarseness: Array
    have: Flags

    @classmethod
    def of(cls, groups: dict[str, list[int]], compared: ComparedTensors, gram: GramMatrices) -> GroupSums:
        """Add up the tensors of each group; groups without tensors are left out."""
        groups = {name: members for name, members in groups.items() if members}

        def add_up(table: Array) -> Array:
            sums = [table[members].sum(axis=0) for members in groups.values()]
            return np.array(sums).reshape(-1, *table.shape[1:])

        elements = add_up(gram.elements)
        held: Flags = np.zeros(compared.coarseness.shape, dtype=np.bool_)
        for place, name in enumerate(compared.names):
            held[place, list(compared.holders[name])] = True
        return cls(
            names=tuple(groups),
            members=tuple(map(tuple, groups.values())),
            products=add_up(gram.products),
            plain_products=add_up(gram.plain_products),
            elements=elements,
            differing=add_up(gram.differing),
            coarseness=add_up(compared.coarseness * gram.elements[:, None]) / elements[:, None].clip(min=1),
            have=np.array([held[members].all(axis=0) for members in groups.values()], dtype=np.bool_).reshape(
                -1, held.shape[1]
            ),
        )

    def select(self, wanted: Sequence[int]) -> GroupSums:
        """Some of the groups, by their places."""
        chosen = list(wanted)
        return GroupSums(
            tuple(self.names[place] for place in chosen),
            tuple(self.members[place] for place in chosen),
            self.products[chosen],
            self.plain_products[chosen],
            self.elements[chosen],
            self.differing[chosen],
            self.coarseness[chosen],
            self.have[chosen],
        )

    def named(self, is_wanted: Callable[[str], bool]) -> GroupSums:
        """The groups whose names are wanted."""
        return self.select([place for place, name in enumerate(self.names) if is_wanted(name)])

    @property
    def complete_candidates(self) -> tuple[int, ...]:
        """The candidates that have all tensors of all groups."""
        return tuple(np.flatnonzero(self.have.all(axis=0)).tolist())

    def are_made_of(self, candidates: tuple[int, ...]) -> bool:
        """Whether those of some candidates that have all the groups explain them."""
        able = tuple(n for n in candidates if self.have[:, n].all())
        return bool(able) and bool(self.fit(able).explained(self.elements).all())

    def fit(self, candidates: tuple[int, ...]) -> Fit:
        """Fit some of the candidates to every group."""
        return fit(self.products, self.differing, self.coarseness, candidates)


@dataclass(frozen=True)
class MergeSums:
    """The sums over a merge's blocks, over its components but the U-Net, and tensor by tensor."""

    blocks: GroupSums
    components: GroupSums
    tensors: GroupSums

    @classmethod
    def of(cls, compared: ComparedTensors, gram: GramMatrices, family: Family) -> MergeSums:
        """Add up what the first pass found."""
        return cls(
            GroupSums.of(compared.by_block(family), compared, gram),
            GroupSums.of(compared.by_component(), compared, gram),
            GroupSums.of(compared.one_by_one(), compared, gram),
        )

    @property
    def unet_blocks(self) -> GroupSums:
        """The blocks without BASE."""
        return self.blocks.named(lambda block: block != "BASE")

    @property
    def unet_tensors(self) -> GroupSums:
        """The U-Net's tensors one by one."""
        return self.tensors.named(lambda name: component_of(name) == "unet")

    def unexplained(self, candidates: tuple[int, ...]) -> int:
        """How many components outside the U-Net are not made of some candidates, not even tensor by
        tensor.
        """
        return sum(
            not self._component(name).are_made_of(candidates)
            and not self.tensors.select(members).are_made_of(candidates)
            for name, members in zip(self.components.names, self.components.members, strict=True)
        )

    def is_copy(self, component: str, candidate: int) -> bool:
        """Whether a component of the merge is that of a candidate, but for rounding."""
        found = self._component(component)
        return bool(found.names) and found.are_made_of((candidate,))

    def _component(self, wanted: str) -> GroupSums:
        return self.components.named(lambda name: name == wanted)
