"""What a file holds, by the names of its tensors: parts of modules, embeddings, and what is neither."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from blockmerge.adapters.parts import EMBEDDINGS, NOT_TELLING, part_of
from blockmerge.anatomy import TITLES, canonical_name, has_signs_of_a_unet, lone_component
from blockmerge.checkpoints import Checkpoint, other_kind_of
from blockmerge.errors import CheckpointError, counted, listing, shown
from blockmerge.expressions import Stored

_READ = "LoRA, LoCon, LoHa, LoKr, full, norm, DoRA, GLoRA, IA3, OFT and BOFT are read"
_NO_MORE = re.compile(r"[,:](?![^(]*\))")  # not within brackets


@dataclass(frozen=True)
class Found:
    """{module: {part: tensor}}; embeddings that travel along; tensors that are nothing of an adapter's; and
    those that are there a second time under another name.
    """

    modules: Mapping[str, Mapping[str, Stored]]
    embeddings: tuple[str, ...]
    strange: tuple[str, ...]
    twice: tuple[str, ...]

    @classmethod
    def in_file(cls, checkpoint: Checkpoint) -> Found:
        """Look at the names in a file."""
        modules: dict[str, dict[str, Stored]] = defaultdict(dict)
        embeddings: list[str] = []
        strange: list[str] = []
        twice: list[str] = []
        for name in checkpoint.tensors:
            if name.startswith(EMBEDDINGS):
                embeddings.append(name)
            elif (said := part_of(name)) is None:
                strange.append(name)
            elif said[1] in modules[said[0]]:
                twice.append(name)
            else:
                modules[said[0]][said[1]] = Stored.of(checkpoint, name)
        for module in [one for one, parts in modules.items() if parts.keys() <= NOT_TELLING]:
            strange += [one.name for one in modules.pop(module).values()]
        return cls(dict(modules), tuple(embeddings), tuple(strange), tuple(twice))

    def check(self, checkpoint: Checkpoint, name: str) -> None:
        """Raise CheckpointError for a file that is no adapter, or holds what is nothing of one.

        Messages call it `name`.
        """
        if not self.modules:
            raise CheckpointError(f"{shown(name)} {_instead(checkpoint, self)}")
        if self.strange:
            raise CheckpointError(
                f"{shown(name)} {_what_else(checkpoint)}holds {counted(len(self.strange), 'tensor')} that no "
                f"LoRA has ({listing(self.strange)}): {_READ}"
            )
        if self.twice:
            raise CheckpointError(
                f"{shown(name)} holds {counted(len(self.twice), 'tensor')} of modules a second time, under "
                f"other names ({listing(self.twice)}): nothing says which counts; save it again with one of "
                "each"
            )


def _instead(checkpoint: Checkpoint, found: Found) -> str:
    """What a file is that has no module."""
    if _is_model(checkpoint):
        return "is a model (a checkpoint), not a LoRA"
    if (kind := _other_kind(checkpoint)) is not None:
        return f"{kind}, which is not read: {_READ}" if _is_lora(kind) else f"{kind}, not a LoRA"
    alone = lone_component(checkpoint.tensors)
    if alone is not None:
        return f"is a {TITLES[alone[0]]} alone, not a LoRA"
    held = listing((*found.strange, *found.embeddings)) or "no tensor at all"
    return f"is not a LoRA: it holds none of their tensors (it has {held})"


def _what_else(checkpoint: Checkpoint) -> str:
    """What a file is that has modules and more: ``"is a Control-LoRA and "``; nothing where it is a LoRA."""
    kind = "is a model (a checkpoint)" if _is_model(checkpoint) else _other_kind(checkpoint)
    return "" if kind is None or _is_lora(kind) else f"{kind} and "


def _other_kind(checkpoint: Checkpoint) -> str | None:
    """What messages call a file that is no model, without what they say then."""
    kind = other_kind_of(checkpoint)
    return None if kind is None or not kind.startswith("is ") else _NO_MORE.split(kind)[0]


def _is_lora(kind: str) -> bool:
    return kind.startswith("is a LoRA")


def _is_model(checkpoint: Checkpoint) -> bool:
    return has_signs_of_a_unet({canonical_name(one): info.shape for one, info in checkpoint.tensors.items()})
