"""`LiveMerge`: the same merge on the U-Net that is in use, again and again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakSet

from blockmerge.checkpoints import SUFFIXES, CheckpointLike, Opening
from blockmerge.errors import RecipeError, counted, listing, shown
from blockmerge.merging.planning.combining import Combination
from blockmerge.merging.planning.describing import differing_predictions
from blockmerge.merging.planning.request import check_flag, missing_beta
from blockmerge.merging.tree import Node, check_size, open_leaves
from blockmerge.methods import MethodLike, find_method
from blockmerge.weights import BlockWeights, WeightsLike, WeightsRequest

if TYPE_CHECKING:
    import torch

    from blockmerge.merging.flat_unet import Block, FlatUNet
    from blockmerge.merging.launching import Content, Launcher
    from blockmerge.merging.live_recipe import LiveStages

_OPEN: WeakSet[LiveMerge] = WeakSet()
_INSTEAD = "let go of other things there, or merge files"


class LiveMerge:
    """Merges models into a U-Net that is in use, in milliseconds on a GPU.

    >>> live = blockmerge.LiveMerge(pipe.unet, "a.safetensors", "b.safetensors")  # doctest: +SKIP
    >>> live.apply(preset="high_res")  # doctest: +SKIP
    >>> live.apply(weights={"OUT05": 0.7}, keep=True)  # doctest: +SKIP
    >>> live.close()  # doctest: +SKIP

    - `module`: a torch module whose parameters have a U-Net's names, in fp16, bf16 or fp32. Of a whole LDM
      model only the U-Net is touched.
    - `a`, `b`, `c`: paths, opened checkpoints or state dicts. They are copied once to the module's device, in
      its dtype. A recipe of stages may stand in place of `a`, alone.
    - `method`, `variant`, `ema`, `numbers`: as for `merge`.

    The module holds A at first, or the result of the recipe. `apply` merges, and `close` or the end of a
    ``with`` block gives the module its own parameters back.

    Meanwhile the parameters are views of flat buffers and must stay where they are: no `.to()`, no
    offloading. A LiveMerge is not thread-safe. Do not apply it while the module runs on another stream.

    Raises a `BlockmergeError` where the module or the models cannot be used. The module is then as it was.
    """

    _stages: LiveStages | None

    def __init__(
        self,
        module: torch.nn.Module,
        a: CheckpointLike | Node,
        b: CheckpointLike | None = None,
        c: CheckpointLike | None = None,
        method: MethodLike = "weighted_sum",
        *,
        variant: str | None = None,
        ema: str = "drop",
        **numbers: float | Sequence[float],
    ) -> None:
        import torch

        from blockmerge.merging.devices import devices_in, told_of
        from blockmerge.merging.flat_unet import FlatUNet
        from blockmerge.merging.launching import Launcher

        if isinstance(method, (str, os.PathLike)) and os.fspath(method).lower().endswith(SUFFIXES):
            raise RecipeError(
                f"LiveMerge takes three models at most: {shown(method)} stands where the method goes"
            )
        if isinstance(a, Node):
            given = {"b": b is not None, "c": c is not None, "method": method != "weighted_sum"}
            given |= {"variant": variant is not None, "ema": ema != "drop", **dict.fromkeys(numbers, True)}
            if wrong := [name for name, is_there in given.items() if is_there]:
                raise RecipeError(f"a recipe says all but its weights by itself: leave out {listing(wrong)}")
            self._merge_recipe(module, a)
            return
        self._stages = None
        self._method = find_method(method)
        self._method.check_names(numbers, others=("method", "variant", "ema"))
        sources = [a, b, c]
        while len(sources) > 1 and sources[-1] is None:
            sources.pop()
        self._method.check_models(len(sources))
        checked = self._method.check_numbers(numbers, len(sources))
        self._module_class = type(module).__name__
        opening = Opening(variant, ema)
        # Tensors that are made in inference mode could not be written to outside it.
        with told_of(devices_in(module, *sources), _INSTEAD), torch.inference_mode(False), torch.no_grad():
            models = [
                opening.model(source, f"state dict {letter}")  # type: ignore[arg-type]  # it refuses None
                for source, letter in zip(sources, "ABC", strict=False)
            ]
            opening.check(models)
            opening_notes = (note for model in models for note in model.notes)
            self._opening_notes = (*opening_notes, *differing_predictions(models))
            self._unet: FlatUNet = FlatUNet.of(module, models)
            if any(other._unet.shares_parameters(self._unet) for other in _OPEN):
                raise RecipeError("another LiveMerge is open on this module: close() it first")
            copies, out = self._unet.copies(models)
            self._originals = self._unet.place(out)
            combination = Combination.of(self._method, self._unet.family, checked)
            self._seed = combination.seed
            self._launcher: Launcher | None = Launcher(self._unet, copies, out, combination)
        _OPEN.add(self)
        self._held: dict[str, Content | None] = {block.name: copies[0] for block in self._unet.blocks}
        self._notes: tuple[str, ...] = ()
        start = 0.0 if self._method.copies(0.0, 0.0) == 0 else None
        self._weights = BlockWeights.flat(start, self._unet.family.blocks)
        self._weights_beta = BlockWeights.flat(0.0, self._unet.family.blocks)

    def _merge_recipe(self, module: torch.nn.Module, recipe: Node) -> None:
        """Put a recipe into the module, with the weights that it says."""
        import torch

        from blockmerge.merging.devices import devices_in, told_of
        from blockmerge.merging.flat_unet import FlatUNet
        from blockmerge.merging.live_recipe import LiveStages
        from blockmerge.merging.recipe_files import expanded

        self._module_class = type(module).__name__
        self._method = recipe.request.merge_method
        check_size(recipe)
        leaves = open_leaves(expanded(recipe))
        for model in leaves.models:
            model.source.check_whole()
        with told_of(devices_in(module), _INSTEAD), torch.inference_mode(False), torch.no_grad():
            self._opening_notes = (
                *(note for model in leaves.models for note in model.notes),
                *differing_predictions(leaves.models),
            )
            self._unet = FlatUNet.of(module, leaves.models)
            if any(other._unet.shares_parameters(self._unet) for other in _OPEN):
                raise RecipeError("another LiveMerge is open on this module: close() it first")
            copies, out = self._unet.copies(leaves.models)
            launcher = LiveStages(self._unet, leaves, copies, out)
            self._originals = self._unet.place(out)
        self._launcher = self._stages = launcher
        self._seed = recipe.request.weights.seed
        _OPEN.add(self)
        self._held = {block.name: None for block in self._unet.blocks}
        self._notes = ()
        self._apply_stages(launcher, {})

    def _apply_stages(self, launcher: LiveStages, changes: Mapping[str, Mapping[str, Any]]) -> BlockWeights:
        launcher.change(changes)
        self._show(launcher, launcher.contents())
        self._weights, self._weights_beta = launcher.result.alpha, launcher.result.beta
        return self._weights

    @property
    def weights(self) -> BlockWeights:
        """The weights that the module has now, fit for `merge`.

        None stands for a block that is A's although weight 0 would not be. BASE is what was asked for, and
        has no effect here.
        """
        return self._weights

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about how the models were opened, and about the weights that were applied last."""
        return (*self._opening_notes, *self._notes)

    @property
    def weights_beta(self) -> BlockWeights:
        """The second weights that the module has now: 0 for methods without."""
        return self._weights_beta

    def apply(
        self,
        preset: str | Sequence[str] | Mapping[str, Mapping[str, Any]] | None = None,
        weights: WeightsLike | None = None,
        changes: str | None = None,
        *,
        keep: bool = False,
        preset_beta: str | Sequence[str] | None = None,
        weights_beta: WeightsLike | None = None,
        sdxl_map: str | None = None,
        seed: int | None = None,
    ) -> BlockWeights:
        """Merge with these weights, and return those that all blocks have now.

        - `preset`, `weights`, `changes`, `preset_beta`, `weights_beta`, `sdxl_map`: as for `merge`.
        - `keep`: change only the blocks that are named in `weights`, `weights_beta` or `changes`.
        - `seed`: that of random weights. The default is the method's, or 0.

        A recipe's stages are changed by their names, with the keys of a recipe's file: ``live.apply({"final":
        {"weights": 0.3}})``. The other stages keep theirs.

        Blocks whose weights have not changed are not computed. The work is queued on the device's current
        stream, and nothing waits for it. NaN and infinity are not looked for.

        Raises `WeightsError` for weights that cannot be used. Raises `RecipeError` after `close`, or where
        the parameters have been moved.
        """
        launcher = self._opened()
        check_flag("keep", keep)
        if self._stages is not None:
            if not isinstance(preset, Mapping) or weights is not None or changes is not None or keep:
                raise RecipeError('a recipe is changed by stages: apply({"STAGE": {"weights": 0.3}})')
            return self._apply_stages(self._stages, preset)
        if isinstance(preset, Mapping):
            raise RecipeError("only a recipe has stages: give preset or weights")
        asked = {"alpha": (preset, weights, changes), "beta": (preset_beta, weights_beta)}
        for weight, given in asked.items():
            if weight not in self._method.weights and any(one is not None for one in given):
                what = "weights" if weight == "alpha" else weight
                raise RecipeError(f"{self._method.name} takes no '{what}'")
        seed = self._seed if seed is None else seed
        default = self._method.weights.get("alpha", 0.0)
        first = WeightsRequest(preset, weights, changes, sdxl_map, seed, default=default)
        of_beta = self._method.weights.get("beta")
        second = WeightsRequest(preset_beta, weights_beta, None, sdxl_map, seed, beta=True, default=of_beta)
        family = self._unet.family
        alpha = first.change(self._weights, family) if keep else first.resolve(family)
        beta = second.change(self._weights_beta, family) if keep else second.resolve(family)
        wanted = {name: launcher.content((alpha[name], beta[name])) for name in self._held}
        self._show(launcher, wanted)
        self._weights, self._weights_beta = alpha, beta
        self._notes = () if keep else tuple(self._notes_on(first, second))
        return alpha

    def _show(self, launcher: Launcher, wanted: Mapping[str, Content]) -> None:
        """Let blocks hold what is wanted, those that do not yet."""
        import torch

        from blockmerge.merging.devices import told_of

        changed = {name: content for name, content in wanted.items() if content != self._held[name]}
        with told_of([launcher.device], _INSTEAD), torch.no_grad():
            try:
                # Neighbours that are to hold the same lie side by side.
                for content, group in groupby(self._unet.blocks, lambda block: changed.get(block.name)):
                    if content is not None:
                        self._fill(launcher, list(group), content)
            finally:
                launcher.note_stream()
        if moved := self._unet.moved(launcher.out, changed):  # looked for while the device computes
            self._held.update(dict.fromkeys(changed))
            raise RecipeError(
                f"the module's parameters have been moved or replaced ({listing(moved)}): "
                "leave it on its device, without offloading, while it is merged live"
            )

    def close(self) -> None:
        """Give the module its own parameters back, bit for bit and in the same memory, and let go of the
        models.
        """
        for name, original in self._originals.items():
            self._unet.parameters[name].data = original
        if self._launcher is not None:
            self._launcher.note_stream()  # on which the module may be at work
        self._originals, self._launcher = {}, None
        _OPEN.discard(self)

    def __enter__(self) -> Self:
        """Raises RecipeError after `close`."""
        self._opened()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._launcher is None:
            return f"<LiveMerge: {self._method.name} in a {self._module_class}, closed>"
        models, out = self._launcher.models, self._launcher.out[0]
        what = f"{self._method.name} of {counted(len(models), 'model')} in a {self._module_class}"
        return f"<LiveMerge: {what}, {out.dtype} on {out.device}>"

    def _notes_on(self, first: WeightsRequest, second: WeightsRequest) -> Iterator[str]:
        family = self._unet.family
        yield from first.lost(family)
        yield from second.lost(family)
        if missing := missing_beta(self._method, second):
            yield missing

    def _opened(self) -> Launcher:
        if self._launcher is None:
            raise RecipeError(
                "this LiveMerge is closed, and the module has its own weights again: make a new one"
            )
        return self._launcher

    def _fill(self, launcher: Launcher, blocks: Sequence[Block], content: Content) -> None:
        """Give neighbouring blocks what they are to hold."""
        for block in blocks:
            self._held[block.name] = None  # what a method that fails leaves is nothing to rely on
        launcher.fill(blocks, content)
        for block in blocks:
            self._held[block.name] = content
