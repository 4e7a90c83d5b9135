"""What a module changes at strength 1, seen for itself: without the model that it is made for."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from blockmerge.adapters.factors import down_of, loha_factors, lokr_factor, reshaped
from blockmerge.adapters.module import Module
from blockmerge.expressions import Change, Expression, Hadamard, Kronecker, LowRank


def own_change(module: Module, dtype: str = "F64") -> Expression | None:
    """Return what a module adds to its own weight at strength 1, as a matrix [rows, columns].

    >>> own_change(module).shape  # doctest: +SKIP
    (1280, 2048)

    It is computed in `dtype`; only that of a full or norm module is as it is stored. Plain LoRA and LoCon
    give a `LowRank` of one product. None where nothing is added to a weight, only to a bias.

    Raises ValueError for a module that looks at the weight.
    """
    if module.looks_at_weights:
        raise ValueError(f"{module.name} looks at the weight")
    parts = module.parts
    stored = parts.get("diff", parts.get("w_norm"))
    if stored is not None:
        return reshaped(stored, (stored.shape[0], prod(stored.shape[1:])))
    if not module.changes_weight:
        return None
    change: Change
    if module.kind == "loha":
        change = Hadamard((), dtype, factors=loha_factors(module, dtype), scale=module.factor)
    elif module.kind == "lokr":
        factors = (lokr_factor(module, "lokr_w1", dtype), lokr_factor(module, "lokr_w2", dtype))
        change = Kronecker((), dtype, factors=factors, scale=module.factor)
    else:
        down = down_of(module, dtype)
        change = LowRank((), dtype, ups=(parts["up"],), downs=(down,), scales=(module.factor,))
    return replace(change, shape=(change.rows, change.width))


def own_bias(module: Module) -> tuple[tuple[float, Expression], ...]:
    """Return what a module adds to its bias at strength 1: (factor, vector) of each, which are added up."""
    return tuple((factor, reshaped(tensor, (tensor.elements,))) for _, factor, tensor in module.of_bias)
