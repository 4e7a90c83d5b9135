"""What is to be made of each module of a new LoRA, told from headers. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from blockmerge.expressions import Expression
from blockmerge.lora_making.size import Size

Shape = tuple[int, ...]
Parts = Mapping[str, tuple[Shape, bytes | memoryview]]
"""{what stands after the module's name: shape and bytes of the tensor}"""


@dataclass(frozen=True)
class Layer:
    """A weight, by the name that its module gets: [rows, inputs], or [rows, inputs, …] of a convolution."""

    name: str
    block: str
    shape: Shape

    @property
    def has_kernel(self) -> bool:
        """Whether it is a convolution of more than one place."""
        return prod(self.shape[2:]) > 1

    @property
    def full_rank(self) -> int:
        """The highest rank that its change can have."""
        return min(self.shape[0], prod(self.shape[1:]))

    def factor_shapes(self, rank: int) -> dict[str, Shape]:
        """{part: shape} of the factors of a rank, as trainers write them."""
        rows, *inner = self.shape
        return {
            "alpha": (),
            "lora_down.weight": (rank, *inner),
            "lora_up.weight": (rows, rank, *[1] * len(inner[1:])),
        }


@dataclass(frozen=True)
class Term:
    """What one LoRA adds to a weight: `scale` times up·down, or times a `matrix`; `label` is whose it is."""

    label: str
    scale: float
    up: Expression | None = None
    down: Expression | None = None
    matrix: Expression | None = None

    @property
    def rank(self) -> int | None:
        """The rank of a product; None of a matrix."""
        return None if self.up is None else self.up.shape[1]

    @property
    def rows(self) -> int:
        """The rows of what it adds."""
        return self.inputs[0].shape[0]

    @property
    def columns(self) -> int:
        """The columns of what it adds."""
        return prod(self.inputs[-1].shape[1:])

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """What is read for it."""
        return tuple(one for one in (self.up, self.down, self.matrix) if one is not None)


@dataclass(frozen=True)
class Sum:
    """A module of a merged LoRA: the `terms` of its weight, and of vectors {part: terms}, as biases are.

    `is_plain` says that all its terms are LoRAs as they stand, which are joined at no loss.
    """

    layer: Layer
    terms: tuple[Term, ...]
    vectors: Mapping[str, tuple[Term, ...]]
    is_plain: bool

    @property
    def ranks(self) -> int | None:
        """The sum of its terms' ranks; None where one is no product."""
        ranks = [term.rank for term in self.terms]
        return None if None in ranks else sum(rank for rank in ranks if rank is not None)

    @property
    def most(self) -> int:
        """The rank that it has at most."""
        if self.ranks is None:
            return self.layer.full_rank
        return self.ranks if self.is_plain else min(self.ranks, self.layer.full_rank)

    def most_parts(self, size: Size) -> dict[str, Shape]:
        """{part: shape} of its tensors at their largest."""
        vectors = dict.fromkeys(self.vectors, self.layer.shape[:1])
        return {**(self.layer.factor_shapes(size.most(self.most)) if self.terms else {}), **vectors}

    @property
    def nbytes(self) -> int:
        """How much is read for it."""
        terms = (*self.terms, *(term for terms in self.vectors.values() for term in terms))
        return sum(one.nbytes for term in terms for one in term.inputs)


@dataclass(frozen=True)
class Difference:
    """A tensor of two models, by its LDM name. `layer` is None where no LoRA can hold what differs in it, and
    `block` where that counts nowhere. `kind` is what notes call its like.
    """

    ldm: str
    tuned: Expression
    base: Expression
    block: str | None
    kind: str
    layer: Layer | None = None

    @property
    def nbytes(self) -> int:
        """How much is read for it."""
        return self.tuned.nbytes + self.base.nbytes


@dataclass(frozen=True)
class Made:
    """A module as it is to be written; of the energy `total` that was to be in it, `kept` is. `rank` is 0 and
    `parts` are empty where there is nothing to write. `rounding` is about how large a part of ‖ΔW‖ is lost by
    rounding its factors.
    """

    parts: Parts
    rank: int
    total: float
    kept: float
    rounding: float = 0.0
