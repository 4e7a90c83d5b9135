"""`Recipe`: a merge that can be written down, read back, planned and run; and the `Plan` of one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, Union

from blockmerge.adapters import LoraLike
from blockmerge.checkpoints import (
    AtomicFile,
    Checkpoint,
    CheckpointLike,
    DiffusersFolder,
    check_output,
    no_garbage_collection,
)
from blockmerge.errors import OutputError, RecipeError, counted, reason, shown
from blockmerge.merging.execute import Pace
from blockmerge.merging.made import MadeCheckpoint
from blockmerge.merging.outputs import choose_output
from blockmerge.merging.planning.plan import PlannedOutput, make_plan
from blockmerge.merging.planning.request import MergeRequest, check_flag, make_request
from blockmerge.merging.planning.written import (
    as_asked,
    asked_of_run,
    from_asked,
    has_stages,
    is_as_run,
    path_of,
)
from blockmerge.merging.ready import Plan
from blockmerge.merging.recipe_files import Places, expanded, load, read_recipe, recipe_of
from blockmerge.merging.recipe_tables import RESULT
from blockmerge.merging.recipe_writing import dumped
from blockmerge.merging.result import MergeResult
from blockmerge.merging.tree import Node, check_size, inner_first, open_models
from blockmerge.methods import MethodLike
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike
from blockmerge.weights import AdjustLike, RulesLike, WeightsLike, WeightsRequest

Leaf = Union[CheckpointLike, "Recipe"]
"""What a recipe merges: a model, or what another recipe makes."""


@dataclass(frozen=True, init=False, eq=False)
class Recipe(Node):
    """What to merge and how, as data. Nothing is opened before `plan` or `run`.

    >>> recipe = blockmerge.Merge("a.safetensors", "b.safetensors", preset="high_res", dtype="fp16")
    >>> recipe.to_dict()
    {'models': ['a.safetensors', 'b.safetensors'], 'preset': 'high_res', 'dtype': 'fp16'}
    >>> blockmerge.Recipe.from_dict(recipe.to_dict()) == recipe
    True
    >>> recipe.run("merged.safetensors")  # doctest: +SKIP

    The arguments are those of `merge` that decide what is written, and `prune` of `convert`.

    A recipe may be a model of another. Such a stage is not rounded on the way; with ``rounding="each"`` it
    has the values that a file would have.

    >>> stage = blockmerge.Merge("a.safetensors", "b.safetensors", preset="high_res")
    >>> recipe = blockmerge.Merge(stage, "c.safetensors", weights=0.3, dtype="fp16")

    Raises `RecipeError` for arguments that cannot be used. Weights, presets and models are checked by `plan`.
    """

    models: tuple[Leaf, ...]
    request: MergeRequest
    name: str | None = None
    output: str | None = None

    def __init__(
        self,
        *models: Leaf,
        preset: str | Sequence[str] | None = None,
        weights: WeightsLike | None = None,
        changes: str | None = None,
        method: MethodLike = "weighted_sum",
        preset_beta: str | Sequence[str] | None = None,
        weights_beta: WeightsLike | None = None,
        changes_beta: str | None = None,
        rules: RulesLike = "",
        adjust: AdjustLike = "",
        clip: bool = False,
        seed: int = 0,
        vae: CheckpointLike = "auto",
        text_encoder: str = "auto",
        dtype: DtypeLike = "keep",
        sdxl_map: str | None = None,
        allow_nonfinite: bool = False,
        naming: str | None = None,
        ema: str = "drop",
        prune: bool = False,
        configs: CheckpointLike | None = None,
        variant: str | None = None,
        loras: Sequence[LoraLike] = (),
        partial: bool = False,
        rounding: str = "end",
        about: Mapping[str, str] | None = None,
        hash: bool = False,
        **numbers: Any,
    ) -> None:
        request = make_request(
            method,
            numbers,
            WeightsRequest(preset, weights, changes, sdxl_map, seed=seed),
            WeightsRequest(preset_beta, weights_beta, changes_beta, sdxl_map, seed=seed, beta=True),
            rules=rules,
            adjust=adjust,
            clip=clip,
            vae=vae,
            text_encoder=text_encoder,
            dtype=str(dtype),
            allow_nonfinite=allow_nonfinite,
            naming=naming,
            ema=ema,
            prune=prune,
            configs=configs,
            variant=variant,
            loras=loras,
            partial=partial,
            rounding=rounding,
            about=about or {},
            hash=hash,
            arguments=Recipe.__init__.__kwdefaults__,
        )
        self._set(models, request)

    @classmethod
    def of(
        cls, models: Sequence[CheckpointLike | Node], request: MergeRequest, name: str | None = None
    ) -> Self:
        """Return the recipe of a request that is made already; as a stage, it has a name."""
        recipe = cls.__new__(cls)
        recipe._set(models, request, name)
        return recipe

    def _set(
        self, models: Sequence[CheckpointLike | Node], request: MergeRequest, name: str | None = None
    ) -> None:
        plain = tuple(os.fspath(model) if isinstance(model, os.PathLike) else model for model in models)
        object.__setattr__(self, "models", plain)
        object.__setattr__(self, "request", request)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "output", None)

    def named(self, name: str | None, output: str | None = None) -> Self:
        """The same with the name that a stage has, and where its file says that the result goes."""
        recipe = self.of(self.models, self.request, name)
        object.__setattr__(recipe, "output", output)
        return recipe

    def __eq__(self, other: object) -> bool:
        """Whether the two ask for the same of the same models; those in memory are the same where they are
        one.
        """
        if not isinstance(other, Recipe):
            return NotImplemented
        return self._compared() == other._compared()

    def __hash__(self) -> int:
        return hash((len(self.models), self.request.method_name, self.request.dtype))

    def _compared(self) -> tuple[object, ...]:
        """What is asked for, of stages within it too: each once, the others by their numbers."""
        numbers: dict[int, int] = {}
        told: list[object] = []
        for node in inner_first(self):
            loras = node.request.loras
            leaves = (*node.models, node.request.vae, node.request.configs, *(lora.file for lora in loras))
            told += [_told(leaf, numbers) for leaf in leaves]
            asked = tuple(replace(lora, file="") for lora in loras)
            told.append(replace(node.request, vae="auto", configs=None, loras=asked))
            numbers[id(node)] = len(numbers)
        return tuple(told)

    # -- as data ---------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data, ready for JSON: `models`, and every argument that is not the
        default.

        Keys are the command line's long options with `_` for `-`, and the names of the method's numbers.
        Paths are as they were given.

        Raises `RecipeError` for models in memory, which have no path.
        """
        models = [
            model.to_dict() if isinstance(model, Recipe) else path_of(model, f"model {number}")
            for number, model in enumerate(self.models, start=1)
        ]
        return {"models": models, **as_asked(self.request)}

    @classmethod
    def from_dict(
        cls,
        written: Mapping[str, Any],
        *,
        models: Sequence[CheckpointLike] | None = None,
        vae: CheckpointLike | None = None,
        configs: CheckpointLike | None = None,
        loras: Sequence[CheckpointLike] | None = None,
        methods: Mapping[str, object] | None = None,
    ) -> Self:
        """Return the recipe that `to_dict` or the metadata of a merged file holds.

        >>> with safe_open("merged.safetensors", "pt") as file:  # doctest: +SKIP
        ...     written = json.loads(file.metadata()["blockmerge.recipe"])
        >>> recipe = blockmerge.Recipe.from_dict(written, models=["a.safetensors", "b.safetensors"])
        ... # doctest: +SKIP

        - `written`: the plain data.
        - `models`, `vae`, `configs`, `loras`: files in place of those that are written. Metadata hold names
          without folders, so these must be given for them.
        - `methods`: {``"module:function"``: function} for methods of your own. Nothing is imported because a
          recipe names it.

        Block weights are those that the file was made with, even if the preset has changed since.

        Raises `RecipeError` for data that cannot be read, or for files that are missing.
        """
        if not isinstance(written, Mapping):
            raise RecipeError(f"a recipe is a table of options; {type(written).__name__} given")
        try:
            given = {"vae": vae, "configs": configs, "loras": loras}
            if models is None and not is_as_run(written) and has_stages(written):
                return recipe_of(cls, written, Places(), methods)
            return cls._read(written, models, given, methods)
        except RecursionError:
            raise RecipeError("recipe: merges within merges, too deep") from None

    @classmethod
    def _read(
        cls,
        written: Mapping[str, Any],
        models: Sequence[CheckpointLike] | None,
        given: Mapping[str, Any],
        methods: Mapping[str, object] | None,
    ) -> Self:
        if models is not None and (isinstance(models, (str, Mapping)) or not isinstance(models, Sequence)):
            raise RecipeError(f"models are a list of them, A first; {type(models).__name__} given")
        leaves = _leaves(written if models is None or "models" in written else {"models": [""] * len(models)})
        if models is not None and len(models) != len(leaves):
            names = ", ".join(shown(leaf) if isinstance(leaf, str) else "a merge" for leaf in leaves)
            raise RecipeError(
                f"the recipe is one of {counted(len(leaves), 'model')} ({names}); {len(models)} given"
            )
        asked = {key: value for key, value in written.items() if key != "models"}
        if is_as_run(written):
            if written.get("stages"):
                raise RecipeError(
                    "this recipe has stages, whose files are found by what is in them: blockmerge again "
                    "FILE, or blockmerge recipe FILE to edit it"
                )
            asked, places = asked_of_run(written, len(leaves))
            missing = [f"its {key}, {shown(name)}" for key, name in places.items() if given[key] is None]
            if models is None:
                missing.insert(0, f"its models, {', '.join(map(shown, leaves))}")
            if missing:
                raise RecipeError(f"this recipe has names only, no paths: give {' and '.join(missing)}")
        read: Sequence[Leaf] = models or [
            cls._read(leaf, None, dict.fromkeys(given), methods) if isinstance(leaf, Mapping) else leaf
            for leaf in leaves
        ]
        return cls.of(read, from_asked(asked, methods, **given))

    def dump(self, path: PathLike, *, overwrite: bool = False) -> None:
        """Write the recipe to a file: JSON where the name ends in ``.json``, else TOML. `load` reads it.

        Raises `RecipeError` for models in memory, `OutputError` where the file cannot be written.
        """
        _check_path(path)
        try:
            text = dumped(self, path)
        except ValueError as error:
            raise RecipeError(f"this recipe cannot be written down: {error}") from error
        target = check_output(path, self._files(), overwrite=overwrite)
        data = text.encode()
        with AtomicFile(target, len(data), overwrite=overwrite) as file:
            try:
                file.path.write_bytes(data)
            except OSError as error:
                raise OutputError(f"cannot write {shown(path)}: {reason(error)}") from error
            file.commit()

    def _files(self) -> Iterator[Path]:
        """All files that the recipe names, or that are in folders it names; those of merges within it too."""
        for node in inner_first(self):
            loras = (lora.file for lora in node.request.loras)
            for leaf in (*node.models, node.request.vae, node.request.configs, *loras):
                if isinstance(leaf, Checkpoint):
                    yield from leaf.files
                elif isinstance(leaf, (str, os.PathLike)):
                    yield Path(leaf)
                    yield from Path(leaf).rglob("*")

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        models: Sequence[PathLike] = (),
        changes: Sequence[str] = (),
        methods: Mapping[str, object] | None = None,
    ) -> Self:
        """Read a recipe's file, TOML or JSON, of one merge or of several stages.

        >>> recipe = blockmerge.Recipe.load("mix.toml", changes=["X.preset=low_res", "OUT05=0.7"])
        ... # doctest: +SKIP

        - `models`: folders in which files are looked for that are not beside the recipe. The current folder
          comes last.
        - `changes`: what the option ``--set`` takes, ``"STAGE.KEY=VALUE"`` or ``"BLOCK=WEIGHT"``.
        - `methods`: as for `from_dict`.

        Raises `RecipeError`, which names the file, the stage and the key.
        """
        _check_path(path)
        written = read_recipe(path)
        if not is_as_run(written):
            return load(cls, path, models=models, changes=changes, methods=methods)
        try:
            return cls.from_dict(written, methods=methods)
        except RecipeError as error:
            raise type(error)(f"{shown(path)}: {error}") from error

    # -- doing it --------------------------------------------------------------------------------------------

    def plan(
        self,
        output: PathLike | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> Plan:
        """Open the models, check all that their headers tell, and say what would be done.

        The arguments are those of `merge`. The default of `output` is the one that the recipe's file names,
        and `metadata` takes the place of the output's own. No weight is read and nothing is written.

        Raises what `merge` raises before it reads a weight. An output that exists is refused by `Plan.run`.
        """
        started = time.perf_counter()
        check_flag("overwrite", overwrite)
        output = self.output if output is None else output
        if output is None:
            raise OutputError("no output is named: give a path (-o)")
        planned, pace, device = self.computed(output, device=device, threads=threads, metadata=metadata)
        target = planned.output.check(_inputs(planned, self.request), overwrite=True)
        seconds = time.perf_counter() - started
        return Plan(self, target, planned, pace, device, overwrite, seconds)

    def computed(
        self,
        output: PathLike,
        *,
        device: str = "cpu",
        threads: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> tuple[PlannedOutput, Pace, str]:
        """Return what is computed for such an output, which need not be written, the pace, and the device.

        Raises what `plan` raises, but for what is about writing.
        """
        device, pace = _choose_pace(self.request, str(device), threads)
        self.request.check_model_count(len(self.models))
        check_size(self)
        with no_garbage_collection():
            opened = open_models(expanded(self))
            has_vae = self.request.vae_file(len(opened)) is not None
            is_whole = has_vae or any(
                model.alone is None and model.components != {"unet"} for model in opened
            )
            kind = choose_output(
                output, opened[0], self.request.naming, self.request.configs, is_whole=is_whole
            )
            name = None if self.name == RESULT else self.name
            return make_plan(opened, self.request, kind, metadata, name), pace, device

    def as_checkpoint(self) -> Checkpoint:
        """Return what the recipe makes as a checkpoint, whose tensors are computed when they are read.

        >>> blockmerge.similarity(blockmerge.Recipe.load("mix.toml"), ["refs/"])  # doctest: +SKIP

        Its names are LDM's, and its bits are those of the file. Raises what `plan` raises.
        """
        in_ldm = self.of(self.models, replace(self.request, naming="ldm", configs=None), self.name)
        planned, pace, _ = in_ldm.computed("made.safetensors")
        return MadeCheckpoint(planned, pace, self.name or "the recipe")

    def run(
        self,
        output: PathLike | None = None,
        *,
        device: str = "cpu",
        threads: int | None = None,
        overwrite: bool = False,
        metadata: Mapping[str, str] | None = None,
        sha256: str | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> MergeResult:
        """Merge: `plan` and then `Plan.run`, or with `dry_run` only `Plan.summary`.

        The arguments are those of `plan` and `Plan.run`. Raises what these raise.
        """
        check_flag("dry_run", dry_run)
        plan = self.plan(output, device=device, threads=threads, overwrite=overwrite, metadata=metadata)
        return plan.summary() if dry_run else plan.run(progress, sha256=sha256)


def _told(leaf: object, numbers: Mapping[int, int]) -> object:
    """What a model is compared by: its path, its number where it is a stage, or that it is this very one."""
    if isinstance(leaf, str):
        return os.path.abspath(leaf)
    return leaf if leaf is None else ("stage", numbers[id(leaf)]) if id(leaf) in numbers else id(leaf)


def _check_path(path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise RecipeError(f"a recipe's file is a path; {type(path).__name__} given")


def _leaves(written: Mapping[str, Any]) -> list[Any]:
    """The models of a recipe that was read: texts, and tables that are recipes themselves."""
    leaves = written.get("models")
    if not isinstance(leaves, (list, tuple)) or not leaves:
        raise RecipeError("recipe: models are a list of files, A first")
    for leaf in leaves:
        if not isinstance(leaf, (str, Mapping)):
            raise RecipeError(f"recipe: a model is a file; {type(leaf).__name__} given")
    return list(leaves)


def _choose_pace(request: MergeRequest, device: str, threads: int | None) -> tuple[str, Pace]:
    pace = Pace.default(threads)
    if device == "cpu":
        return device, pace
    from blockmerge.merging.devices import choose_device

    device = choose_device(device, request.merge_method)
    if device == "cpu":
        return device, pace
    # A GPU is worth asking for whole pieces only.
    return device, Pace(pace.threads, pace.piece_bytes, chunk_bytes=pace.piece_bytes)


def _inputs(plan: PlannedOutput, request: MergeRequest) -> list[Path]:
    """All files and folders that are read, and that the output must spare."""
    inputs = [file for checkpoint in plan.decided.checkpoints for file in checkpoint.files]
    # Their files may be links to others elsewhere.
    inputs += [one.path for one in plan.decided.checkpoints if isinstance(one, DiffusersFolder)]
    configs = getattr(request.configs, "path", request.configs)
    return [*inputs, Path(configs)] if isinstance(configs, (str, os.PathLike)) else inputs
