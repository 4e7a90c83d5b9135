"""What adapters add that depends on the weight itself: W(1) − W, W(1) being the weight at strength 1.

Each needs the whole weight, or is rare enough to take it whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockmerge.expressions.expression import Expression, Shape

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class WeightChange(Expression):
    """A change of `weight`, in float32 or float64, made of it and of `factors`."""

    weight: Expression
    factors: tuple[Expression, ...]
    dtype: str

    locality = "tensor"

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The weight, then the factors."""
        return self.weight, *self.factors

    def with_inputs(self, inputs: tuple[Expression, ...]) -> WeightChange:
        """The same of another weight, or of other factors."""
        return replace(self, weight=inputs[0], factors=inputs[1:])

    @property
    def shape(self) -> Shape:
        """That of the weight."""
        return self.weight.shape


@dataclass(frozen=True)
class Decomposed(WeightChange):
    """m·V/‖V‖ − W, V = W + a low-rank change: DoRA (arXiv 2402.09353). `factors` are that change, and m.

    m has a number for each row of the weight, [rows, 1, …], or for each input, [1, inputs, …]; norms are over
    all else, the kernel of a convolution among it.
    """

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Scale the rows, or the inputs, of the changed weight."""
        weight, change, magnitude = (one.to(out.dtype) for one in inputs)
        changed = weight + change.view(weight.shape)
        by_input = self.factors[1].shape[0] == 1 and weight.shape[0] != 1
        axes = [axis for axis in range(weight.dim()) if axis != int(by_input)]
        shape = [1] * weight.dim()
        shape[int(by_input)] = -1
        norms = changed.square().sum(axes, keepdim=True).sqrt_()
        # Where there is nothing to scale, nothing comes of it.
        scales = magnitude.reshape(shape) / norms.clamp(min=_LEAST[out.itemsize])
        out.copy_(changed.mul_(scales).sub_(weight))


_LEAST = {4: 1e-30, 8: 1e-280}
"""The norm below which a row counts as one of zeros, by the bytes of a number."""


@dataclass(frozen=True)
class Generalised(WeightChange):
    """scale·(W·a1·a2 + b1·b2): GLoRA (arXiv 2306.07967).

    `factors` are a1 [inputs, rank], a2 [rank, inputs], b1 [rows, rank] and b2 [rank, …]. On a convolution,
    a1·a2 acts on the channels.
    """

    scale: float = 1.0

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Multiply, and add up."""
        import torch

        weight, a1, a2, b1, b2 = (one.to(out.dtype) for one in inputs)
        of_weight = torch.tensordot(weight, a1.flatten(1) @ a2.flatten(1), dims=([1], [0]))
        of_weight = of_weight.movedim(-1, 1)
        added = (b1.flatten(1) @ b2.flatten(1)).view(weight.shape)
        out.copy_((of_weight + added).mul_(self.scale))


@dataclass(frozen=True)
class Rescaled(WeightChange):
    """W∘w, w having a number for each row, or `on_input` for each input: IA3 (arXiv 2205.05638)."""

    on_input: bool = False

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Multiply."""
        weight, scales = (one.to(out.dtype) for one in inputs)
        shape = [1] * weight.dim()
        shape[int(self.on_input)] = -1
        out.copy_(weight * scales.reshape(shape))


@dataclass(frozen=True)
class Rotated(WeightChange):
    """Rows turned by orthogonal matrices, minus themselves: OFT (arXiv 2306.07280), BOFT (arXiv 2311.06243).

    `factors` are the blocks, and a factor for each row if there is one. The blocks B are [n, b, b], each of
    which turns b rows by Rᵀ, or [stages, n, b, b], which turn rows that lie further apart with each stage, by
    R. R = (I + Q)(I − Q)⁻¹ with Q = B − Bᵀ, which is scaled down to the norm `limit` where it is larger, all
    blocks together; or B itself, where that `is_rotation`.
    """

    limit: float | None = None
    is_rotation: bool = False

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Turn the rows."""
        import torch

        weight, blocks, *scales = (one.to(out.dtype) for one in inputs)
        rotations = blocks if self.is_rotation else _rotations(blocks, self.limit)
        rows = weight.reshape(len(weight), -1)
        size = blocks.shape[-1]
        if blocks.dim() == 3:
            turned = torch.bmm(rotations.transpose(1, 2), rows.view(-1, size, rows.shape[1]))
        else:
            turned = rows
            for stage, rotation in enumerate(rotations):
                apart = 2**stage * size // 2
                near = turned.reshape(-1, 2, apart, rows.shape[1]).transpose(1, 2)
                near = torch.bmm(rotation, near.reshape(-1, size, rows.shape[1]))
                turned = near.reshape(-1, apart, 2, rows.shape[1]).transpose(1, 2)
        turned = turned.reshape(rows.shape)
        for one in scales:
            turned = turned * one.reshape(-1, 1)
        out.copy_((turned - rows).view(weight.shape))


def _rotations(blocks: torch.Tensor, limit: float | None) -> torch.Tensor:
    import torch

    skew = blocks - blocks.transpose(-1, -2)
    if limit is not None:
        norm = skew.norm()
        skew = skew * (limit / norm.clamp(min=max(limit, _LEAST[4])))
    unit = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    # R(I − Q) = I + Q
    rotations: torch.Tensor = torch.linalg.solve(unit - skew, unit + skew, left=False)
    return rotations
