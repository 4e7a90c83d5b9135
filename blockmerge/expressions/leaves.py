"""What is there already: bytes of a source, and bytes that are known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from blockmerge.dtypes import size_of
from blockmerge.expressions.expression import Expression, Shape

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """What stored tensors are read from: a checkpoint, with a name for messages and a place for each
    tensor.
    """

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def tensors(self) -> Mapping[str, Any]:
        """Name → where the tensor lies, and as what."""


class Leaf(Expression):
    """A tensor that is made from no others, and so is never computed."""

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """There are none."""
        return ()

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Expression:
        """There are none to change."""
        assert not inputs
        return self

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """A leaf is read, not computed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Stored(Leaf):
    """A tensor of a source, or entries of it that lie one behind the other: `elements` from element `begin`
    on.

    The shape need not be the source's own: as many elements in the same order are the same bytes.
    """

    source: Source
    name: str
    dtype: str
    shape: Shape
    begin: int = 0

    @classmethod
    def of(cls, source: Source, name: str) -> Stored:
        """The whole tensor of that name."""
        info = source.tensors[name]
        return cls(source, name, info.dtype, info.shape)

    @property
    def offset(self) -> int:
        """Where its first byte lies in the source."""
        offset: int = self.source.tensors[self.name].offset
        return offset + self.begin * size_of(self.dtype)

    def part(self, start: int, stop: int) -> Expression:
        """Entries of the first axis of what lies in a row are bytes in a row, too."""
        width = math.prod(self.shape[1:])
        return replace(self, shape=(stop - start, *self.shape[1:]), begin=self.begin + start * width)

    def continues(self, other: Stored) -> bool:
        """Whether it is the next stretch of the same tensor."""
        mine, before = (self.source, self.name, self.dtype), (other.source, other.name, other.dtype)
        return mine == before and self.begin == other.begin + other.elements

    def __str__(self) -> str:
        whole = self.elements == math.prod(self.source.tensors[self.name].shape)
        part = "" if whole else f"[{self.begin}:{self.begin + self.elements}]"
        return f"{self.source.name}[{self.name}]{part}"


@dataclass(frozen=True)
class Known(Leaf):
    """A tensor whose bytes are known."""

    data: bytes
    dtype: str
    shape: Shape

    def __str__(self) -> str:
        return f"known({self.dtype}, {list(self.shape)}, {self.data[:16].hex()}{'…' * (len(self.data) > 16)})"
