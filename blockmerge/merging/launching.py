"""What a live merge launches: neighbours in flat memory that have one program are computed as one. Loads
torch: imported late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby

import torch

from blockmerge.expressions import Expression, Gathered, Part, Programs, Stored, methods_of, simplify
from blockmerge.merging.flat_unet import Block, FlatModel, FlatUNet, Slot
from blockmerge.merging.in_memory import gathered, tasks_of
from blockmerge.merging.planning.combining import SHARED_CHANNELS, Combination, widened, widest_input

Content = FlatModel | tuple[float | None, float | None]
"""What a block holds: a model as it is, or all of them merged at weights alpha and beta."""

_COPIED_ELEMENTS = 1 << 22  # that a user's own function, which gets wide copies, is given at once


class Launcher:
    """Merges models that lie in flat memory into a buffer `out` that is laid out alike."""

    def __init__(
        self, unet: FlatUNet, models: Sequence[FlatModel], out: torch.Tensor, combination: Combination
    ) -> None:
        self.models, self.out = models, out
        self._slots = list(unet.slots)
        self._programs = Programs()
        self._figures: dict[Gathered, object] = {}
        self._combination = combination

    def content(self, weights: tuple[float | None, float | None]) -> Content:
        """What blocks of these weights hold."""
        source = self._combination.copied(*weights)
        return weights if source is None else self.models[source]

    def fill(self, blocks: Sequence[Block], content: Content) -> None:
        """Let neighbouring blocks hold this."""
        slots = [slot for block in blocks for slot in block.slots]
        for is_plain, group in groupby(slots, self._is_plain):
            stretch = list(group)
            if is_plain:
                self._merge_plain(stretch, content)
            else:
                self._merge_each(stretch, content)

    def _merge_plain(self, slots: Sequence[Slot], content: Content) -> None:
        """Merge tensors that all models have whole: as one, where each element stands for itself."""
        tensor = self._merged(slots[0], content)
        program, operands = self._programs.of(tensor)
        is_copy = isinstance(content, FlatModel)
        if not (program.joins and (is_copy or self._combination.method.locality == "element")):
            self._merge_each(slots, content)
            return
        flats = [model.flat for one in operands for model in self.models if _source(one) is model]
        begin, end = slots[0].offset, slots[-1].end
        step = _COPIED_ELEMENTS if any(method.own for method in methods_of(tensor)) else end - begin
        for start in range(begin, end, max(1, step)):
            part = slice(start, min(start + step, end))
            program.run([flat[part] for flat in flats], self.out[part])

    def _merge_each(self, slots: Sequence[Slot], content: Content) -> None:
        """Merge parameters one by one, each in its shape."""
        for slot in slots:
            target = slot.of(self.out)
            out = target
            if not target.is_contiguous():
                out = torch.empty_like(target, memory_format=torch.contiguous_format)
            for task in tasks_of(self._merged(slot, content), out, self._programs, _COPIED_ELEMENTS):
                task.run(self._figures)
            if out is not target:
                target.copy_(out)

    def _merged(self, slot: Slot, content: Content) -> Expression:
        """What a parameter is to be."""
        tensors = [Stored.of(model, slot.ldm) for model in self.models]
        widest = widest_input(slot.ldm, [one.shape for one in tensors])
        if isinstance(content, FlatModel):
            own = Stored.of(content, slot.ldm)
            return simplify(
                own if widest is None else widened([own], tensors[widest], own.dtype, lambda one: one[0])
            )
        combination = self._combination
        if combination.method.locality == "model":
            combination = replace(combination, gathered=self._looked_at)
        return simplify(
            combination.combine(slot.ldm, tensors, content, tensors[0].dtype, widest=widest).expression
        )

    @cached_property
    def _looked_at(self) -> Gathered:
        """All that is merged, for a method that looks at all tensors first: gathered when it is first asked
        for.
        """
        wanted = Gathered(self._combination.method, tuple(map(self._shared, self._slots)))
        self._figures[wanted] = gathered(wanted)
        return wanted

    def _shared(self, slot: Slot) -> tuple[Expression, ...]:
        """A parameter of each model: of a first convolution, the input channels that all have."""
        tensors = tuple(Stored.of(model, slot.ldm) for model in self.models)
        if self._is_plain(slot):
            return tensors
        return tuple(Part(one, 0, SHARED_CHANNELS, axis=1).simplified() for one in tensors)

    def _is_plain(self, slot: Slot) -> bool:
        return all(model.tensors[slot.ldm].shape == slot.shape for model in self.models)


def _source(tensor: Expression) -> object:
    return tensor.source if isinstance(tensor, Stored) else None
