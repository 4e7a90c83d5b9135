"""What a live merge launches: neighbours in flat memory that have one program are computed as one.

Loads torch: imported late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import groupby

import torch
from torch.utils._pytree import tree_leaves

from blockmerge.checkpoints import made
from blockmerge.expressions import Expression, Gathered, Part, Programs, Stored, methods_of, simplify
from blockmerge.merging.devices import current_streams
from blockmerge.merging.flat_unet import Block, Buffers, FlatModel, FlatUNet, Slot
from blockmerge.merging.in_memory import Task, gather, tasks_of
from blockmerge.merging.planning.combining import Combination, Weights

Content = FlatModel | Weights
"""What a block holds: a model as it is, or all of them merged at weights alpha and beta."""

_COPIED_ELEMENTS = 1 << 22  # that a user's own function, which gets wide copies, is given at once


class Launcher:
    """Merges models that lie in flat memory into buffers `out` that are laid out alike."""

    def __init__(
        self, unet: FlatUNet, models: Sequence[FlatModel], out: Buffers, combination: Combination
    ) -> None:
        self.models, self.out = models, out
        self._unet = unet
        self._combination = combination
        self._programs = Programs()
        self._figures: dict[Gathered, object] = {}
        self._known_tasks: dict[str, Sequence[Task]] = {}

    @property
    def device(self) -> torch.device:
        """Where all of it lies."""
        return self.out[0].device

    def content(self, weights: Weights) -> Content:
        """What blocks of these weights hold."""
        model = self._combination.copied(weights)
        return weights if model is None else self.models[model]

    def note_stream(self) -> None:
        """Keep all that was queued on the current stream in memory until it is done, whoever lets go of it
        sooner: the memory was made on the stream of that time, and would be given out there again.
        """
        held = [*self.out, *(buffer for model in self.models for buffer in model.buffers)]
        held += tree_leaves(list(self._figures.values()))
        for stream in current_streams([self.device]):
            for one in held:
                if isinstance(one, torch.Tensor) and one.device == self.device:
                    one.record_stream(stream)

    def fill(self, blocks: Sequence[Block], content: Content) -> None:
        """Let neighbouring blocks hold this."""
        slots = [slot for block in blocks for slot in block.slots]
        for (is_whole, _), group in groupby(slots, lambda slot: (slot.name in self._whole, slot.buffer)):
            stretch = list(group)
            if is_whole and (isinstance(content, FlatModel) or self._method_joins):
                self._fill_stretch(stretch, content)
            else:
                self._fill_each(stretch, content)

    def _fill_stretch(self, slots: Sequence[Slot], content: Content) -> None:
        """Fill neighbours in a buffer as one: models that have them whole, where each element stands for
        itself, are treated alike, and so the program of the first is that of all.
        """
        tensor = self._merged(slots[0], content)
        program, operands = self._programs.of(tensor)
        number = slots[0].buffer
        out = self.out[number]
        flats = [
            one.source.buffers[number]
            for one in operands
            if isinstance(one, Stored) and isinstance(one.source, FlatModel)
        ]
        begin, end = slots[0].offset, slots[-1].end
        step = _COPIED_ELEMENTS if any(method.own for method in methods_of(tensor)) else end - begin
        for start in range(begin, end, max(1, step)):
            part = slice(start, min(start + step, end))
            program.run([flat[part] for flat in flats], out[part])

    def _fill_each(self, slots: Sequence[Slot], content: Content) -> None:
        """Fill parameters one by one, each in its shape."""
        for slot in slots:
            target = slot.of(self.out)
            if target.is_contiguous():
                tasks = self._tasks(slot, target, content)
            else:
                out = torch.empty_like(target, memory_format=torch.contiguous_format)
                tasks = self._new_tasks(slot, out, content)
            for task in tasks:
                task.run(self._figures)
            if not target.is_contiguous():
                target.copy_(out)

    def _tasks(self, slot: Slot, out: torch.Tensor, content: Content) -> Sequence[Task]:
        """What there is to do; other weights change nothing of it but these, unless whole rows are taken."""
        if isinstance(content, FlatModel) or self._combination.method.rows is not None:
            return self._new_tasks(slot, out, content)
        if slot.name not in self._known_tasks:
            self._known_tasks[slot.name] = self._new_tasks(slot, out, content)
        return [replace(task, program=task.program.at(*content)) for task in self._known_tasks[slot.name]]

    def _new_tasks(self, slot: Slot, out: torch.Tensor, content: Content) -> Sequence[Task]:
        tensor = self._merged(slot, content)
        most = _COPIED_ELEMENTS if any(method.own for method in methods_of(tensor)) else max(1, out.numel())
        return list(tasks_of(tensor, out, self._programs, most, slot.ldm))

    @property
    def _method_joins(self) -> bool:
        method = self._combination.method
        return method.locality == "element" and not method.random

    def _merged(self, slot: Slot, content: Content) -> Expression:
        """What a parameter is to be."""
        tensors = self._tensors[slot.ldm]
        if isinstance(content, FlatModel):
            merged = self._combination.copy(slot.ldm, tensors, self.models.index(content), tensors[0].dtype)
        else:
            merged = self._to_merge.combine(slot.ldm, tensors, content, tensors[0].dtype)
        return simplify(made(slot.origin, {slot.ldm: merged.expression}, "the module"))

    @cached_property
    def _tensors(self) -> dict[str, tuple[Expression, ...]]:
        """LDM name → the tensor of each model."""
        return {
            ldm: tuple(model.in_ldm(tensor) for model in self.models)
            for ldm, tensor in self._unet.tensors.items()
        }

    @cached_property
    def _whole(self) -> frozenset[str]:
        """The parameters that all models have whole, and as they stand in the module."""

        def is_whole(slot: Slot) -> bool:
            if len(slot.origin.rows) > 1:  # as swapped halves are, whose program is not that of the others
                return False
            own = [simplify(made(slot.origin, {slot.ldm: one}, "")) for one in self._tensors[slot.ldm]]
            stand = zip(own, self.models, strict=True)
            return all(one == Stored.of(model, slot.name) and one.shape == slot.shape for one, model in stand)

        return frozenset(slot.name for slot in self._unet.slots if is_whole(slot))

    @cached_property
    def _to_merge(self) -> Combination:
        """The combination, with what a method gathers of all tensors before it merges the first."""
        method = self._combination.method
        if method.locality != "model":
            return self._combination
        wanted = Gathered(method, tuple(map(self._shared, self._tensors.values())))
        self._figures[wanted] = gather(wanted)
        return replace(self._combination, figures=wanted)

    def _shared(self, tensors: Sequence[Expression]) -> tuple[Expression, ...]:
        """A tensor of each model: of a first convolution, the input channels that all have."""
        if len({one.shape for one in tensors}) == 1:
            return tuple(tensors)
        shared = self._unet.family.shared_channels
        return tuple(Part(one, 0, shared, axis=1).simplified() for one in tensors)
