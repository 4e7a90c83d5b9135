"""A recipe of stages merged live: its files in flat memory, each once, and its stages with their weights.

Loads torch: imported late.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from blockmerge.anatomy import Family
from blockmerge.checkpoints import made
from blockmerge.errors import RecipeError, did_you_mean, listing, shown
from blockmerge.expressions import Expression, Held, simplify
from blockmerge.merging.flat_unet import Buffers, FlatModel, FlatUNet, Slot
from blockmerge.merging.in_memory import Task
from blockmerge.merging.launching import Content, Launcher
from blockmerge.merging.planning.adapting import Adapted
from blockmerge.merging.planning.combining import Combination
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.merging.tree import Leaves, Node
from blockmerge.weights import BlockWeights, WeightsRequest

_CHANGING = ("preset", "weights", "set", "preset_beta", "weights_beta", "set_beta")
"""The keys of a recipe that change live."""


@dataclass(frozen=True)
class LiveStage:
    """A stage with the weights that it has now."""

    request: MergeRequest
    combination: Combination
    alpha: BlockWeights
    beta: BlockWeights

    @classmethod
    def of(cls, node: Node, leaves: Leaves, unet: FlatUNet) -> LiveStage:
        """The stage as the recipe has it. Raises RecipeError for what cannot be done live."""
        request, name = node.request, leaves.names[node]
        if request.adjust or request.merge_method.locality == "model":
            what = "adjust" if request.adjust else f"the method {request.method_name}"
            raise RecipeError(f"stage {shown(name)}: {what} is not merged live: run the recipe into a file")
        family = unet.family
        numbers = request.merge_method.check_numbers(request.numbers, len(node.models))
        combination = Combination.of(request.merge_method, family, numbers, clip=request.clip)
        if request.loras:
            models = [leaves.below(one) for one in leaves.places[node]]
            combination = replace(combination, changes=Adapted.of(request, models).changes)
        resolved = request.resolve(family, len(node.models))
        return cls(request, combination, resolved.weights, resolved.beta)

    @property
    def joins(self) -> bool:
        """Whether neighbours in memory may be computed as one."""
        method = self.combination.method
        is_plain = method.locality == "element" and not method.random and method.rows is None
        return is_plain and not self.request.rules.rules and not self.combination.changes

    def changed(self, changes: Mapping[str, Any], family: Family) -> LiveStage:
        """The same with other weights. Raises RecipeError for anything else."""
        if unknown := [str(key) for key in changes if key not in _CHANGING]:
            near = did_you_mean(unknown[0], _CHANGING)
            raise RecipeError(f"only weights change live, not {listing(unknown)}{near}")
        request = replace(
            self.request,
            weights=_other(self.request.weights, changes, ""),
            beta=_other(self.request.beta, changes, "_beta"),
            found=None,
        )
        resolved = request.resolve(family, 2)
        return replace(self, request=request, alpha=resolved.weights, beta=resolved.beta)


def _other(request: WeightsRequest, changes: Mapping[str, Any], suffix: str) -> WeightsRequest:
    """A request with what is changed of it: weights take the place of a preset, and a preset that of
    weights.
    """
    preset, weights = (changes.get(f"{key}{suffix}") for key in ("preset", "weights"))
    if preset is None and weights is None:
        preset, weights = request.preset, request.weights
    on_top = changes.get(f"set{suffix}", request.changes)
    return replace(request, preset=preset, weights=weights, changes=on_top)


@dataclass(frozen=True)
class StageWeights:
    """What a block holds: the weights of every stage there, the result's first."""

    weights: tuple[tuple[float | None, float | None], ...]


class LiveStages(Launcher):
    """Merges a recipe whose files lie in flat memory."""

    def __init__(self, unet: FlatUNet, leaves: Leaves, copies: Sequence[FlatModel], out: Buffers) -> None:
        self._leaves = leaves
        self._stages = {node: LiveStage.of(node, leaves, unet) for node in leaves.places}
        self._result = next(iter(leaves.places))
        super().__init__(unet, copies, out, self._stages[self._result].combination)

    @property
    def result(self) -> LiveStage:
        """The result's stage."""
        return self._stages[self._result]

    def change(self, changes: Mapping[str, Mapping[str, Any]]) -> None:
        """Give stages other weights, by their names. Raises RecipeError, and changes nothing then."""
        by_name = {name: node for node, name in self._leaves.names.items()}
        if unknown := [str(name) for name in changes if name not in by_name]:
            near = did_you_mean(unknown[0], by_name)
            raise RecipeError(f"no stage {listing(unknown)}{near} (stages are {listing(by_name)})")
        stages = dict(self._stages)
        for name, one in changes.items():
            if not isinstance(one, Mapping):
                raise RecipeError(
                    f"stage {shown(name)}: a table of weights is needed; {type(one).__name__} given"
                )
            stages[by_name[name]] = stages[by_name[name]].changed(one, self._unet.family)
        self._stages = stages
        self._known_tasks.clear()

    def contents(self) -> dict[str, Content]:
        """{block: what it is to hold}."""
        return {
            block.name: StageWeights(  # type: ignore[misc]  # whatever is equal holds the same
                tuple((stage.alpha[block.name], stage.beta[block.name]) for stage in self._stages.values())
            )
            for block in self._unet.blocks
        }

    @property
    def _method_joins(self) -> bool:
        return all(stage.joins for stage in self._stages.values())

    def _tasks(self, slot: Slot, out: Any, content: Content) -> Sequence[Task]:
        return self._new_tasks(slot, out, content)

    def _merged(self, slot: Slot, content: Content) -> Expression:
        tensor = self._made(self._result, slot.ldm, is_result=True)
        return simplify(made(slot.origin, {slot.ldm: tensor}, "the module"))

    def _made(self, node: Node, ldm: str, *, is_result: bool = False) -> Expression:
        """What a stage makes of a tensor, held wide where it is not the result."""
        stage, family = self._stages[node], self._unet.family
        tensors = [
            self._made(one, ldm) if isinstance(one, Node) else self._tensors[ldm][one]
            for one in self._leaves.places[node]
        ]
        block = family.block_of(ldm)
        rules = stage.request.rules.resolve(family)
        weights = rules.weight(block, ldm, stage.alpha[block]), stage.beta[block]
        dtype = self._tensors[ldm][0].dtype
        wide = dtype if is_result else ("F64" if dtype == "F32" else "F32")
        expression = stage.combination.combine(ldm, tensors, weights, wide).expression
        return expression if wide == dtype else Held(simplify(expression), dtype)
