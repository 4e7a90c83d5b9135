"""The factors that modules are made of, as expressions: those of a product where there is one.

LoRA and LoCon are products up·down, [rows, rank]·[rank, columns], and so are relatives of theirs whose
factors are small enough (arXiv 2108.06098 for LoHa, 2309.14859 for LoKr).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from math import prod

from blockmerge.adapters.module import Module
from blockmerge.expressions import Contracted, Expression, Known, Kronecker, Reshaped, Transposed, simplify

Factors = tuple[Expression, Expression]
"""up [rows, rank] and down [rank, columns], or with the axes of a convolution."""


def product_of(module: Module, wide: str) -> Factors | None:
    """Return the factors, whose product times `module.factor` is the change that a module makes; None where
    there are none, or where the weight is looked at.

    A LoHa of rank r is one of rank r², a LoKr of ranks s and r one of rank s·r. What has to be computed is of
    the dtype `wide`.
    """
    match module.kind:
        case "lora" | "locon":
            return module.parts["up"], down_of(module, wide)
        case "loha":
            return _product_of_loha(module, wide)
        case "lokr" if "lokr_w2" not in module.parts:
            return _product_of_lokr(module, wide)
    return None


def matrix_of(module: Module, wide: str) -> Expression:
    """Return the change that a module makes, at `module.factor` 1, of kinds that are not products and do not
    look at the weight: LoKr of whole factors, full, norm.
    """
    if module.kind == "lokr":
        first, second = lokr_factor(module, "lokr_w1", wide), lokr_factor(module, "lokr_w2", wide)
        shape = (first.shape[0] * second.shape[0], first.shape[1] * prod(second.shape[1:]))
        return Kronecker(shape, wide, factors=(first, second))
    return module.parts["diff" if "diff" in module.parts else "w_norm"]


def down_of(module: Module, wide: str) -> Expression:
    """The second factor of a product, [rank, …]; that of a convolution with a core in the middle is made of
    both.
    """
    down = module.parts["down"]
    if "mid" not in module.parts:
        return down
    mid = module.parts["mid"]
    rank, _, *kernel = mid.shape
    shape = (rank, down.shape[1], *kernel)
    return Contracted("nm...,mi->ni...", (mid, reshaped(down, down.shape[:2])), shape, wide)


def loha_factors(module: Module, wide: str) -> tuple[Expression, ...]:
    """w1_a [rows, rank], w1_b [rank, …], w2_a and w2_b of a LoHa, with the cores that convolutions have."""
    parts = module.parts
    factors: list[Expression] = []
    for number in (1, 2):
        first, second = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        if (core := parts.get(f"hada_t{number}")) is None:
            factors += [first, second]
        else:  # Σ t[i, j, …]·a[i, rows]·b[j, columns]
            rank, _, *kernel = core.shape
            shape = (rank, second.shape[1], *kernel)
            factors += [Transposed(first), Contracted("ij...,jn->in...", (core, second), shape, wide)]
    return tuple(factors)


def lokr_factor(module: Module, which: str, wide: str) -> Expression:
    """``"lokr_w1"`` or ``"lokr_w2"`` of a LoKr, whole, whatever it is made of."""
    parts = module.parts
    if which in parts:
        return parts[which]
    a, b = parts[f"{which}_a"], parts[f"{which}_b"]
    if which == "lokr_w2" and "lokr_t2" in parts:
        core = parts["lokr_t2"]
        shape = (a.shape[1], b.shape[1], *core.shape[2:])
        return Contracted("ij...,ip,jq->pq...", (core, a, b), shape, wide)
    return Contracted("ij,j...->i...", (a, b), (a.shape[0], *b.shape[1:]), wide)


def _product_of_loha(module: Module, wide: str) -> Factors:
    """All products of a column of w1_a with one of w2_a, and of a row of w1_b with one of w2_b."""
    first_a, first_b, second_a, second_b = loha_factors(module, wide)
    rank = first_a.shape[1] * second_a.shape[1]
    return (
        Contracted("oi,oj->oij", (first_a, second_a), (first_a.shape[0], rank), wide),
        Contracted("i...,j...->ij...", (first_b, second_b), (rank, *first_b.shape[1:]), wide),
    )


def _product_of_lokr(module: Module, wide: str) -> Factors:
    """(p·q)⊗(a·b) = (p⊗a)·(q⊗b)."""
    parts = module.parts
    p, q = _split(module, wide)
    a: Expression = parts["lokr_w2_a"]
    b: Expression = parts["lokr_w2_b"]
    if "lokr_t2" in parts:
        core = parts["lokr_t2"]
        shape = (a.shape[0], b.shape[1], *core.shape[2:])
        a, b = Transposed(a), Contracted("ij...,jq->iq...", (core, b), shape, wide)
    rank = p.shape[1] * a.shape[1]
    return (
        Contracted("xp,yr->xypr", (p, a), (p.shape[0] * a.shape[0], rank), wide),
        Contracted("px,ry...->prxy...", (q, b), (rank, q.shape[1] * b.shape[1], *b.shape[2:]), wide),
    )


def _split(module: Module, wide: str) -> Factors:
    """A LoKr's first factor as a product of the least rank that is sure."""
    parts = module.parts
    if "lokr_w1" not in parts:
        a, b = parts["lokr_w1_a"], parts["lokr_w1_b"]
        if a.shape[1] <= min(a.shape[0], b.shape[1]):
            return a, b
    whole = lokr_factor(module, "lokr_w1", wide)
    rows, columns = whole.shape
    return (_identity(rows), whole) if rows <= columns else (whole, _identity(columns))


def _identity(size: int) -> Expression:
    data = bytearray(4 * size * size)
    for place in range(size):
        struct.pack_into("<f", data, 4 * place * (size + 1), 1.0)
    return Known(bytes(data), "F32", (size, size))


def reshaped(tensor: Expression, shape: Sequence[int]) -> Expression:
    """A tensor in another shape of as many elements; the same where it has that."""
    return simplify(Reshaped(tensor, tuple(shape)))
