"""`convert_lora`: a LoRA under the names of other programs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from blockmerge.adapters import Adapter, Lora, LoraLike
from blockmerge.checkpoints import Readers, TensorInfo, check_output
from blockmerge.errors import counted, listing, shown
from blockmerge.expressions import Stored
from blockmerge.lora_making import metadata
from blockmerge.lora_making.making import LoraTarget
from blockmerge.lora_making.renaming import Piece, Renamed, check_form, is_power_of_two, renamed
from blockmerge.lora_making.result import LoraConversion
from blockmerge.lora_making.tasks import Made
from blockmerge.lora_making.writing import LoraFile, compute_all
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike


def convert_lora(
    lora: LoraLike,
    *,
    output: PathLike,
    to: str,
    dtype: DtypeLike | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoraConversion:
    """Write a LoRA under the names of other programs.

    >>> blockmerge.convert_lora("style.safetensors", output="style-peft.safetensors", to="diffusers")
    ... # doctest: +SKIP

    - `lora`: a path, an opened checkpoint, a state dict, or a `Lora` without strength and blocks.
    - `to`: ``"kohya"`` for the names of sd-scripts, which most programs read, such as
      ``lora_unet_….lora_down.weight``. ``"diffusers"`` for those of PEFT, such as ``unet.….lora_A.weight``.
    - `dtype`: ``"fp16"``, ``"bf16"`` or ``"fp32"``. The default is each tensor's own.
    - `output`, `overwrite`, `threads`, `progress`: as for `merge`.

    Diffusers' form has no alphas: alpha / rank goes into ``lora_B``. That is exact for powers of two, and one
    rounding for others. In fp16, values below 6e-5 lose digits. The notes say where.

    LoHa, other kinds and norms have no place in diffusers' form and are refused.

    Raises `CheckpointError` or `UnknownFamilyError` for files that cannot be used, `RecipeError` for
    arguments, `NonFiniteError` for values, and `OutputError` for the output.
    """
    check_form(to)
    target = LoraTarget.of(output, dtype, threads, overwrite, progress)
    return _Conversion(Lora.of(lora).as_it_is("converted").open(), to, target).run()


class _Conversion:
    """One conversion, from what is in the file to the result."""

    def __init__(self, adapter: Adapter, to: str, target: LoraTarget) -> None:
        self.adapter, self.to, self.target = adapter, to, target
        said = adapter.source.metadata
        recorded = metadata.alphas_of(said, (one.name for one in adapter.modules))
        asked = None if target.dtype is None else target.dtype_for("F32")
        self.tasks = renamed(adapter, to, asked, recorded)
        self.beside = _embeddings(adapter) if to == "kohya" else []
        self.alphas: dict[str, float] = {}
        self.rounded: dict[str, float] = {}

    def run(self) -> LoraConversion:
        """Write the file."""
        adapter, target = self.adapter, self.target
        tasks = [*self.tasks, *self.beside]
        place = check_output(target.output, adapter.source.files, overwrite=target.overwrite)
        dtypes = {name: dtype for task in tasks for name, dtype in task.dtypes.items()}
        recipe = {"method": "lora convert", "loras": [{"name": adapter.name}], "to": self.to}
        is_kohya = self.to == "kohya"
        is_plain = adapter.kinds.keys() <= {"lora", "locon", "dora"}
        network = ("networks.lora" if is_plain else "lycoris.kohya") if is_kohya else None
        said = metadata.converted(adapter.source.metadata, adapter.family, recipe, network)
        room = {task.name: task.shapes for task in tasks}
        with LoraFile(
            place,
            room,
            {**said, **self._about_alphas()},  # of about the length that it will have
            "F32",
            dtypes=dtypes,
            size=_size_of(tasks),
            overwrite=target.overwrite,
        ) as file:
            compute_all(
                tasks,
                self._work,
                file,
                in_file=len(tasks),
                nbytes=lambda task: task.nbytes,
                threads=target.threads,
                progress=target.progress,
            )
            adapter.source.check_unchanged()
            count = file.finish(self._about_alphas())
            swept = file.swept
        return LoraConversion(
            output=Path(target.output),
            form=self.to,
            family=adapter.family.name,
            modules=len(self.tasks),
            bytes=count,
            seconds=time.perf_counter() - target.started,
            notes=(*adapter.notes, *self._notes(), *swept),
        )

    def _work(self, task: Renamed, readers: Readers) -> Made:
        from blockmerge.lora_making.rewriting import rewritten

        parts, alpha, rounded = rewritten(task, self.adapter.name, readers)
        if alpha is not None:
            self.alphas[task.old] = alpha
        if rounded is not None:
            self.rounded[task.old] = rounded
        return Made(parts, task.rank or 0, 0.0, 0.0)

    def _about_alphas(self) -> dict[str, str]:
        """What the metadata say of ranks and alphas, as far as these are known."""
        is_kohya = self.to == "kohya"
        numbers = [
            (task.has_kernel, task.rank, self.alphas.get(task.old, float(task.rank)))
            for task in self.tasks
            if task.rank is not None
        ]
        said = metadata.of_alphas(self.adapter.source.metadata, numbers, always=is_kohya)
        if is_kohya:
            return said
        names = {task.old: task.name for task in self.tasks}
        before = {
            names[one.name]: one.alpha
            for one in self.adapter.modules
            if one.alpha is not None and one.factor != 1 and is_power_of_two(one.factor)
        }
        return {**said, **metadata.with_alphas(before)}

    def _notes(self) -> list[str]:
        name = shown(self.adapter.name)
        rounded = [one for one in sorted(self.rounded) if not is_power_of_two(self.rounded[one])]
        small = [one for one in sorted(self.rounded) if is_power_of_two(self.rounded[one])]
        notes = []
        if rounded:
            notes.append(
                f"{name}: alpha / rank goes into a factor, which rounds it once more in "
                f"{counted(len(rounded), 'module')} ({listing(rounded)})"
            )
        if small:
            notes.append(
                f"{name}: alpha / rank goes into a factor, which leaves the values nearest to 0 fewer digits "
                f"in {counted(len(small), 'module')} ({listing(small)}): dtype fp32 (--dtype fp32) keeps them"
            )
        if self.adapter.embeddings and self.to != "kohya":
            notes.append(
                f"{name}: {counted(len(self.adapter.embeddings), 'tensor')} of embeddings are left out, for "
                f"which diffusers' form has no place ({listing(self.adapter.embeddings)})"
            )
        return notes


def _embeddings(adapter: Adapter) -> list[Renamed]:
    """Embeddings that travel along, as they are."""
    pieces: dict[str, tuple[Piece, ...]] = {}
    for name in adapter.embeddings:
        module, _, part = name.rpartition(".")
        tensor = Stored.of(adapter.source, name)
        pieces[module] = (*pieces.get(module, ()), Piece(part, tensor, tensor.shape, tensor.dtype))
    return [Renamed(module, module, None, False, some) for module, some in pieces.items()]


def _size_of(tasks: Sequence[Renamed]) -> int:
    """How many bytes the tensors take."""
    return sum(
        TensorInfo(task.dtypes[f"{task.name}.{part}"], shape, 0).nbytes
        for task in tasks
        for part, shape in task.shapes.items()
    )
