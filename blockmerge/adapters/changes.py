"""What modules do to a model's tensors: each kind's formula, as an expression.

Every kind is W' = W + s·(W(1) − W), W(1) being the weight at strength 1. The formulas are LoRA's (arXiv
2106.09685) and LyCORIS' (arXiv 2309.14859).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from blockmerge.adapters.adapter import Adapter
from blockmerge.adapters.factors import down_of, loha_factors, lokr_factor, reshaped
from blockmerge.adapters.module import Module
from blockmerge.adapters.targets import Whereabouts
from blockmerge.anatomy import Family
from blockmerge.checkpoints import made
from blockmerge.dtypes import size_of
from blockmerge.expressions import (
    Cast,
    Changed,
    Decomposed,
    Expression,
    Generalised,
    Hadamard,
    Joined,
    Kronecker,
    LowRank,
    Part,
    Rescaled,
    Rotated,
    Stepped,
    WeightChange,
    simplify,
)
from blockmerge.weights import BlockWeights


class ScaledModule(NamedTuple):
    """A module, how much of its change is added, and the number of the adapter that it is of."""

    scale: float
    module: Module
    source: int


class Addend(NamedTuple):
    """What is added to a weight, with its factor, and the numbers of the adapters that it is of."""

    scale: float
    change: Expression
    sources: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Applied:
    """An adapter with its strength, and the factor of that for each block."""

    adapter: Adapter
    strength: float
    weights: BlockWeights

    def scaled(self) -> Iterable[tuple[float, Module]]:
        """Its modules that meet a tensor and change something, and how much of their change is added."""
        for module in self.adapter.modules:
            if module.target is not None:
                scale = self.strength * (self.weights[module.target.block] or 0.0)
                if scale != 0:
                    yield scale, module


class Changes:
    """What adapters do to a model's tensors, by their LDM names, in the order in which they are given."""

    def __init__(self, applied: Sequence[Applied], family: Family) -> None:
        self._family = family
        self._weights: dict[str, dict[str | None, list[ScaledModule]]] = defaultdict(
            lambda: defaultdict(list)
        )
        self._biases: dict[str, dict[str | None, list[ScaledModule]]] = defaultdict(lambda: defaultdict(list))
        for one in (
            ScaledModule(*scaled, source) for source, a in enumerate(applied) for scaled in a.scaled()
        ):
            target = one.module.target
            assert target is not None, one
            if one.module.changes_weight:
                self._weights[target.ldm][target.place].append(one)
            if target.bias is not None and any(True for _ in one.module.of_bias):
                place: Whereabouts = target.bias
                self._biases[place.ldm][place.place].append(one)

    def __bool__(self) -> bool:
        return bool(self._weights or self._biases)

    def __contains__(self, ldm: object) -> bool:
        return ldm in self._weights or ldm in self._biases

    def of(self, ldm: str, tensor: Expression, dtype: str) -> Expression:
        """The tensor with all that is done to it, rounded once to `dtype`."""
        if ldm in self._biases:
            return self._changed(ldm, tensor, self._biases[ldm], dtype, is_bias=True)
        return self._changed(ldm, tensor, self._weights[ldm], dtype, is_bias=False)

    def _changed(
        self,
        ldm: str,
        tensor: Expression,
        modules: Mapping[str | None, Sequence[ScaledModule]],
        dtype: str,
        *,
        is_bias: bool,
    ) -> Expression:
        parts = {place: found for place, found in modules.items() if place is not None}
        wide = "F64" if size_of(dtype) >= size_of("F32") else "F32"
        if None in modules:
            tensor = _with(tensor, modules[None], wide if parts else dtype, wide, is_bias=is_bias)
        if not parts:
            return tensor
        # A module's own weight is a part of the tensor, or stands another way in it.
        relation = self._family.relation_of(ldm)
        own: dict[str, Expression] = {}
        for place, origin in relation.origins_in_diffusers(ldm).items():
            one = simplify(made(origin, {ldm: tensor}, ldm))
            own[place] = _with(one, parts.get(place, ()), dtype, wide, is_bias=is_bias)
        return simplify(made(relation.origin_in_ldm(), own, ldm))


def _with(
    tensor: Expression, modules: Sequence[ScaledModule], dtype: str, wide: str, *, is_bias: bool
) -> Expression:
    """A module's own weight with all changes; those that look at it, at what the ones before have left."""
    if not modules:
        return Cast(tensor, dtype)
    together = [
        list(group) for _, group in groupby(modules, lambda one: _alike(one.module, tensor, is_bias=is_bias))
    ]
    for number, group in enumerate(together):
        is_last = number == len(together) - 1
        tensor = _step(tensor, group, dtype if is_last else wide, wide, is_bias=is_bias)
    return tensor


def _alike(module: Module, tensor: Expression, *, is_bias: bool) -> tuple[int, int | None]:
    """What is the same of modules whose changes are added at once; one that looks at the weight is alone."""
    is_alone = module.looks_at_weights and not is_bias
    return module.inputs_of(tensor.shape), id(module) if is_alone else None


def _step(
    tensor: Expression, modules: Sequence[ScaledModule], dtype: str, wide: str, *, is_bias: bool
) -> Expression:
    inputs = modules[0].module.inputs_of(tensor.shape)
    if len(tensor.shape) > 1 and inputs < tensor.shape[1]:
        # A first convolution that takes more channels than the module's: the others stay.
        changed = _step(Part(tensor, 0, inputs, axis=1), modules, dtype, wide, is_bias=is_bias)
        rest = Cast(Part(tensor, inputs, tensor.shape[1], axis=1), dtype)
        return Joined((changed, rest), axis=1)
    if not is_bias and (look := _OF_WEIGHT.get(modules[0].module.kind)):
        [one] = modules
        return Stepped(look(one.module, tensor, wide), one.scale, dtype, one.source)
    addends = _of_bias(modules, tensor) if is_bias else _of_weight(modules, tensor, wide)
    scales, changes, sources = zip(*addends, strict=True)
    return Changed(tensor, changes, scales, dtype, sources)


def _of_bias(modules: Sequence[ScaledModule], tensor: Expression) -> list[Addend]:
    return [
        Addend(scale * factor, reshaped(added, tensor.shape), (source,))
        for scale, module, source in modules
        for _, factor, added in module.of_bias
    ]


def _of_weight(modules: Sequence[ScaledModule], tensor: Expression, wide: str) -> list[Addend]:
    """Products of two factors are joined, and come first."""
    products = [one for one in modules if one.module.is_product]
    others = [one for one in modules if not one.module.is_product]
    return [
        *(
            Addend(1.0, _product(some, tensor, wide), tuple(one.source for one in some))
            for some in _by_rank(products)
        ),
        *(
            Addend(*_LYCORIS[module.kind](scale, module, tensor, wide), (source,))
            for scale, module, source in others
        ),
    ]


_MOST_RANK = 512  # of one product


def _by_rank(modules: Sequence[ScaledModule]) -> Iterator[Sequence[ScaledModule]]:
    """Modules in groups whose joined factors stay small."""
    some: list[ScaledModule] = []
    rank = 0
    for one in modules:
        more = one.module.rank or 0
        if some and rank + more > _MOST_RANK:
            yield some
            some, rank = [], 0
        some.append(one)
        rank += more
    if some:
        yield some


def _product(modules: Sequence[ScaledModule], tensor: Expression, wide: str) -> Expression:
    ups = tuple(one.module.parts["up"] for one in modules)
    downs = tuple(down_of(one.module, wide) for one in modules)
    scales = tuple(one.scale * one.module.factor for one in modules)
    return LowRank(tensor.shape, wide, ups=ups, downs=downs, scales=scales)


def _loha(scale: float, module: Module, tensor: Expression, wide: str) -> tuple[float, Expression]:
    factors = loha_factors(module, wide)
    return 1.0, Hadamard(tensor.shape, wide, factors=factors, scale=scale * module.factor)


def _lokr(scale: float, module: Module, tensor: Expression, wide: str) -> tuple[float, Expression]:
    first, second = (lokr_factor(module, which, wide) for which in ("lokr_w1", "lokr_w2"))
    change = Kronecker(tensor.shape, wide, factors=(first, second), scale=scale * module.factor)
    return 1.0, change


def _full(scale: float, module: Module, tensor: Expression, wide: str) -> tuple[float, Expression]:
    return scale, reshaped(module.parts["diff" if "diff" in module.parts else "w_norm"], tensor.shape)


_LYCORIS: Mapping[str, Callable[[float, Module, Expression, str], tuple[float, Expression]]] = {
    "loha": _loha,
    "lokr": _lokr,
    "full": _full,
    "norm": _full,
}
"""{kind: what it adds, whatever the weight is, with its factor}."""


def _dora(module: Module, tensor: Expression, wide: str) -> WeightChange:
    under = [ScaledModule(1.0, module, 0)]
    if module.is_product:
        change = _product(under, tensor, wide)
    else:
        _, change = _LYCORIS[module.form](1.0, module, tensor, wide)
    return Decomposed(tensor, (change, module.parts["dora_scale"]), wide)


def _glora(module: Module, tensor: Expression, wide: str) -> WeightChange:
    factors = tuple(module.parts[part] for part in ("a1", "a2", "b1", "b2"))
    return Generalised(tensor, factors, wide, module.factor)


def _ia3(module: Module, tensor: Expression, wide: str) -> WeightChange:
    return Rescaled(tensor, (module.parts["ia3_weight"],), wide, module.on_input)


def _oft(module: Module, tensor: Expression, wide: str) -> WeightChange:
    is_rotation = "oft_diag" in module.parts
    blocks = module.parts["oft_diag" if is_rotation else "oft_blocks"]
    limit = None if module.alpha is None else module.alpha * tensor.shape[0]
    scales = (module.parts["rescale"],) if "rescale" in module.parts else ()
    return Rotated(tensor, (blocks, *scales), wide, limit, is_rotation)


_OF_WEIGHT: Mapping[str, Callable[[Module, Expression, str], WeightChange]] = {
    "dora": _dora,
    "glora": _glora,
    "ia3": _ia3,
    "oft": _oft,
    "boft": _oft,
}
"""{kind: what it adds to a weight that it looks at, at strength 1}."""
