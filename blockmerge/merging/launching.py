"""What a live merge launches: neighbours in flat memory that have one program are computed as one.

Loads torch: imported late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby

import torch

from blockmerge.checkpoints import made
from blockmerge.expressions import Expression, Gathered, Part, Programs, Stored, methods_of, simplify
from blockmerge.merging.flat_unet import Block, FlatModel, FlatUNet, Slot
from blockmerge.merging.in_memory import gathered, tasks_of
from blockmerge.merging.planning.combining import Combination, widened, widest_input

Content = FlatModel | tuple[float | None, float | None]
"""What a block holds: a model as it is, or all of them merged at weights alpha and beta."""

_COPIED_ELEMENTS = 1 << 22  # that a user's own function, which gets wide copies, is given at once


class Launcher:
    """Merges models that lie in flat memory into a buffer `out` that is laid out alike."""

    def __init__(
        self, unet: FlatUNet, models: Sequence[FlatModel], out: torch.Tensor, combination: Combination
    ) -> None:
        self.models, self.out = models, out
        self._unet = unet
        self._plain: dict[str, bool] = {}
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
            for task in tasks_of(
                self._merged(slot, content), out, self._programs, _COPIED_ELEMENTS, slot.ldm
            ):
                task.run(self._figures)
            if out is not target:
                target.copy_(out)

    def _merged(self, slot: Slot, content: Content) -> Expression:
        """What a parameter is to be."""
        made_of = {slot.ldm: self._in_ldm(slot.ldm, content)}
        return simplify(made(slot.origin, made_of, "the module"))

    def _in_ldm(self, ldm: str, content: Content) -> Expression:
        """What the tensor of an LDM name is to be."""
        tensors = self._of_models(ldm)
        widest = widest_input(ldm, [one.shape for one in tensors], self._unet.family)
        if isinstance(content, FlatModel):
            own = content.in_ldm(self._unet.tensors[ldm])
            if widest is None:
                return own
            shared = min(one.shape[1] for one in tensors)
            return widened([own], tensors[widest], shared, own.dtype, lambda given: given[0])
        combination = self._combination
        if combination.method.locality == "model":
            combination = replace(combination, gathered=self._looked_at)
        return combination.combine(ldm, tensors, content, tensors[0].dtype, widest=widest).expression

    def _of_models(self, ldm: str) -> list[Expression]:
        return [model.in_ldm(self._unet.tensors[ldm]) for model in self.models]

    @cached_property
    def _looked_at(self) -> Gathered:
        """All that is merged, for a method that looks at all tensors first: gathered when it is first asked
        for.
        """
        wanted = Gathered(self._combination.method, tuple(map(self._shared, self._unet.tensors)))
        self._figures[wanted] = gathered(wanted)
        return wanted

    def _shared(self, ldm: str) -> tuple[Expression, ...]:
        """A tensor of each model: of a first convolution, the input channels that all have."""
        tensors = self._of_models(ldm)
        if len({one.shape for one in tensors}) == 1:
            return tuple(tensors)
        shared = min(one.shape[1] for one in tensors)
        return tuple(Part(one, 0, shared, axis=1).simplified() for one in tensors)

    def _is_plain(self, slot: Slot) -> bool:
        """Whether all models have a parameter whole, and as it stands in the module."""
        if slot.name not in self._plain:
            own = [simplify(made(slot.origin, {slot.ldm: one}, "")) for one in self._of_models(slot.ldm)]
            pairs = zip(own, self.models, strict=True)
            alike = all(one == Stored.of(model, slot.name) for one, model in pairs)
            self._plain[slot.name] = alike and {one.shape for one in own} == {slot.shape}
        return self._plain[slot.name]


def _source(tensor: Expression) -> object:
    return tensor.source if isinstance(tensor, Stored) else None
