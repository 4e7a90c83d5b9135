"""`Lora`: an adapter as a user asks for it: a file, how strongly, and how much of that in each block."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union

from blockmerge.adapters.adapter import Adapter
from blockmerge.adapters.block_texts import LoraBlocks, read_blocks
from blockmerge.adapters.targets import Shape
from blockmerge.anatomy import Family
from blockmerge.checkpoints import Checkpoint, CheckpointLike, in_cache, open_source
from blockmerge.errors import CheckpointError, RecipeError, WeightsError, shown
from blockmerge.weights import BlockWeights
from blockmerge.weights.block_lists import family_named
from blockmerge.weights.plain_numbers import finite_number

_FORM = "FILE[:STRENGTH[:BLOCKS]], as in style.safetensors:0.8 or style.safetensors:0.5:OUTALL"


@dataclass(frozen=True)
class Lora:
    """A LoRA, or one of its relatives, with its strength and block weights.

    >>> Lora("style.safetensors", 0.8)
    Lora(file='style.safetensors', strength=0.8, blocks=None, name=None)
    >>> Lora.parse("detail.safetensors:-0.5:BASE=0,IN04-OUT05=1").strength
    -0.5

    - `file`: a path, an opened checkpoint or a state dict.
    - `strength`: a finite number, negative too.
    - `blocks`: weights that multiply the strength: a text such as ``"OUT03-OUT05=0.5"``, a number, a list, or
      the name of a LoRA preset such as ``"OUTALL"``. A list has a number for each block that LoRAs of the
      family have (17 or 12), or for all. Blocks that a text leaves out are 0; without `blocks` all are 1.
    - `name`: what messages and results call it. The default is the file's name.

    Raises `RecipeError` for a strength that is not a finite number, or a name that is not a text.
    """

    file: CheckpointLike
    strength: float = 1.0
    blocks: LoraBlocks | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        strength = self.strength
        number = None if isinstance(strength, (bool, str)) else finite_number(str(strength))
        if number is None:
            raise RecipeError(f"the strength of a LoRA is a finite number; {shown(repr(strength))} given")
        object.__setattr__(self, "strength", number + 0.0)
        if self.name is not None and (not isinstance(self.name, str) or not self.name):
            raise RecipeError(f"the name of a LoRA is a text; {shown(repr(self.name))} given")

    @classmethod
    def parse(cls, text: str, *, windows: bool = os.name == "nt") -> Lora:
        """Read ``FILE[:STRENGTH[:BLOCKS]]``. An empty strength is 1.

        FILE is the longest beginning that is an existing file. Without one, it ends at the first colon after
        the last folder. `windows` says whether a drive's colon is part of FILE.

        Raises `RecipeError` for an empty FILE, or a STRENGTH that is not a number.
        """
        file, rest = _split(text, windows)
        if not file:
            raise RecipeError(f"no file in '{shown(text)}': a LoRA is given as {_FORM}")
        strength, _, blocks = rest.partition(":")
        number = finite_number(strength.strip()) if strength.strip() else 1.0
        if number is None:
            missing = "" if os.path.isfile(file) else f" (and there is no file {shown(file)})"
            raise RecipeError(
                f"'{shown(strength)}' in '{shown(text)}' is not a strength{missing}: "
                f"a LoRA is given as {_FORM}"
            )
        return cls(file, number, blocks.strip() or None)

    @classmethod
    def of(cls, lora: LoraLike) -> Lora:
        """Return what is taken for a LoRA as one: a text as `parse` reads it, a path, (file, strength) or
        (file, strength, blocks), an opened checkpoint, a state dict, or a Lora.

        Raises RecipeError for anything else, and as `parse` does.
        """
        if isinstance(lora, Lora):
            return lora
        if isinstance(lora, str):
            return cls.parse(lora)
        if isinstance(lora, (os.PathLike, Checkpoint, Mapping)):
            return cls(lora)
        if isinstance(lora, (tuple, list)) and 1 <= len(lora) <= 4:
            file, *others = lora
            if isinstance(file, (str, os.PathLike, Checkpoint, Mapping)):
                return cls(file, *others)
        raise RecipeError(
            f"a {type(lora).__name__} is not a LoRA: give a path, (path, strength), "
            "(path, strength, blocks), or a Lora"
        )

    @property
    def label(self) -> str:
        """What results call it: its name, or the file's without its ending."""
        if self.name is not None:
            return self.name
        if isinstance(self.file, (str, os.PathLike)):
            return Path(self.file).stem
        return Path(self.file.name).stem if isinstance(self.file, Checkpoint) else "state dict"

    @property
    def _told(self) -> str:
        """What messages call it that come before it is opened: as its label, but with the file's ending."""
        is_path = self.name is None and isinstance(self.file, (str, os.PathLike))
        return Path(self.file).name if is_path else self.label  # type: ignore[arg-type]

    def as_it_is(self, done: str) -> Lora:
        """Return it, to be ``"converted"``, say, as it is.

        Raises RecipeError for a strength or blocks, which would have no effect then.
        """
        if self.strength != 1 or self.blocks is not None:
            raise RecipeError(
                f"{shown(self._told)} is {done} as it is: give the file without strength and blocks, or make "
                "a LoRA that has them in it first (blockmerge lora merge)"
            )
        return self

    def open(self, family: Family | None = None, shapes: Mapping[str, Shape] | None = None) -> Adapter:
        """Open the file, and look at its names and shapes. `family` and `shapes` are those of `Adapter.of`.

        Raises CheckpointError, IncompatibleModelsError and UnknownFamilyError as `Adapter.of` does.
        """
        file = self.file
        # Of Hugging Face's cache, a folder stands for the file in it.
        if isinstance(file, (str, os.PathLike)) and os.path.isdir(file) and not in_cache(file):
            raise CheckpointError(f"{shown(file)} is a folder, not a LoRA: give the file in it")
        source = open_source(self.file, self.label)
        return Adapter.of(source, family, self.name, shapes=shapes)

    def weights(self, family: Family | str, seed: int = 0) -> BlockWeights:
        """Return the weight of every block of a family, which multiplies the strength.

        Raises `WeightsError` for blocks, numbers and presets that the family does not have.
        """
        family = family_named(family)
        try:
            return read_blocks(self.blocks, family, seed)
        except WeightsError as error:
            raise type(error)(f"the blocks of {shown(self._told)}: {error}") from error


LoraLike = Union[str, "os.PathLike[str]", Checkpoint, Mapping[str, Any], Sequence[Any], Lora]
"""What stands for a LoRA: a path, ``(path, strength)``, ``(path, strength, blocks)`` or a `Lora`.

A text is read as ``FILE[:STRENGTH[:BLOCKS]]``. Opened checkpoints and state dicts are taken, too.
"""


def _split(text: str, windows: bool) -> tuple[str, str]:
    """A file, and what is said of it."""
    colons = [place for place, char in enumerate(text) if char == ":"]
    for end in (len(text), *reversed(colons)):
        if end and os.path.isfile(text[:end]):
            return text[:end], text[end + 1 :]
    begin = max(text.rfind("/"), text.rfind("\\") if windows else -1) + 1
    if windows and begin == 0 and text[1:2] == ":" and text[:1].isalpha():
        begin = 2
    file, _, rest = text[begin:].partition(":")
    return text[:begin] + file, rest
