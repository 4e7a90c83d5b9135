"""Which tensors of a merge the candidates can explain, by block and by component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from blockmerge.anatomy import COMPONENTS, Family, component_of
from blockmerge.checkpoints import Model
from blockmerge.comparing.arrays import Array
from blockmerge.comparing.sources import weights_of
from blockmerge.dtypes import Precision, precision_of
from blockmerge.expressions import Expression, dequantised_in


@dataclass(frozen=True)
class ComparedTensors:
    """The tensors of a merge that all candidates with such a component have, in the merge's shape.

    `holders[name]` are the candidates that have a tensor, by their places. `skipped` are the names of the
    merge's other tensors. `coarseness[tensor, candidate]` is the square of the candidate's dtype's step in
    steps of the merge's, at least 1.
    """

    names: tuple[str, ...]
    holders: dict[str, tuple[int, ...]]
    skipped: tuple[str, ...]
    coarseness: Array

    @classmethod
    def of(cls, merge: Model, candidates: Sequence[Model]) -> ComparedTensors:
        """Look at names, shapes and dtypes."""
        of_merge, of_candidates = weights_of(merge), [weights_of(model) for model in candidates]
        components = [set(map(component_of, tensors)) for tensors in of_candidates]
        holders: dict[str, tuple[int, ...]] = {}
        skipped = []
        for name, tensor in of_merge.items():
            able = [n for n, found in enumerate(components) if component_of(name) in found]
            alike = [
                n for n in able if name in of_candidates[n] and of_candidates[n][name].shape == tensor.shape
            ]
            if alike and alike == able:
                holders[name] = tuple(alike)
            else:
                skipped.append(name)
        coarseness = np.ones((len(holders), len(candidates)))
        for place, (name, held_by) in enumerate(holders.items()):
            bits = stored_precision(of_merge[name]).mantissa
            for n in held_by:
                fewer = bits - stored_precision(of_candidates[n][name]).mantissa
                coarseness[place, n] = max(1.0, 4.0**fewer)
        return cls(tuple(holders), holders, tuple(skipped), coarseness)

    def select(self, places: Sequence[int]) -> ComparedTensors:
        """Some of the tensors, by their places."""
        names = tuple(self.names[place] for place in places)
        holders = {name: self.holders[name] for name in names}
        return ComparedTensors(names, holders, self.skipped, self.coarseness[list(places)])

    def by_block(self, family: Family) -> dict[str, list[int]]:
        """The places of tensors by block; BASE is all outside the U-Net but the VAE, as in merges."""
        groups: dict[str, list[int]] = {block: [] for block in family.blocks}
        for place, name in enumerate(self.names):
            if component_of(name) != "vae":
                groups[family.block_of(name)].append(place)
        return groups

    def by_component(self) -> dict[str, list[int]]:
        """The places of tensors by component, without the U-Net, which has blocks."""
        groups: dict[str, list[int]] = {component: [] for component in COMPONENTS if component != "unet"}
        for place, name in enumerate(self.names):
            if component_of(name) != "unet":
                groups[component_of(name)].append(place)
        return groups

    def one_by_one(self) -> dict[str, list[int]]:
        """The place of every tensor, as a group of its own."""
        return {name: [place] for place, name in enumerate(self.names)}


def stored_precision(tensor: Expression) -> Precision:
    """How precisely a tensor is stored.

    Of codes with a scale, a bit less than the codes: a scale is no power of two, so that the steps of the
    products are up to twice as large. They have no smallest step that would be the same in all rows.
    """
    for scaled in dequantised_in(tensor):
        return Precision(precision_of(scaled.codes.dtype).mantissa - 1, precision_of("F32").least_exponent)
    return precision_of(tensor.dtype)
