"""`Job`: what making a LoRA is the same in, whatever it is made of: checks, writing, and the result."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from blockmerge.adapters import Adapter
from blockmerge.anatomy import Family
from blockmerge.checkpoints import Checkpoint, Readers, check_output
from blockmerge.dtypes import DTYPES, short_dtype
from blockmerge.errors import CheckpointError, OutputError, RecipeError, counted, listing, shown
from blockmerge.lora_making.metadata import of_ranks
from blockmerge.lora_making.result import LoraResult
from blockmerge.lora_making.size import Size
from blockmerge.lora_making.tasks import Layer, Made, Shape
from blockmerge.lora_making.writing import LoraFile, compute_all, sizes_of
from blockmerge.streaming import Progress, thread_count
from blockmerge.types import PathLike

_NEGLIGIBLE = 1e-6
ENDING = ".safetensors"
DTYPES_OF_LORAS = ("fp16", "bf16", "fp32")

Task = TypeVar("Task")


@dataclass(frozen=True)
class LoraTarget:
    """Where a LoRA goes and how it is made; checked before anything is read.

    Raises OutputError for a place that cannot be written, RecipeError for `dtype` and `threads`.
    """

    output: PathLike
    dtype: str | None
    threads: int | None
    overwrite: bool
    progress: Progress | None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        if not isinstance(self.output, (str, os.PathLike)):
            raise OutputError(f"the output is a path; {type(self.output).__name__} given")
        if not os.fspath(self.output):
            raise OutputError(f"the output is an empty path: give the name of a {ENDING} file")
        if not os.fspath(self.output).endswith(ENDING):
            raise OutputError(f"{shown(self.output)}: a LoRA is a {ENDING} file: give it that ending")
        if self.dtype is not None and self.dtype not in DTYPES_OF_LORAS:
            raise RecipeError(
                f"'{shown(self.dtype)}' is not a dtype of LoRAs (--dtype): {', '.join(DTYPES_OF_LORAS)}"
            )
        if self.threads is not None:
            thread_count(self.threads)

    @classmethod
    def of(
        cls,
        output: PathLike,
        dtype: object,
        threads: int | None,
        overwrite: bool,
        progress: Progress | None,
    ) -> LoraTarget:
        """The target for what a caller says; `dtype` by any of its names, or None."""
        known = None if dtype is None else short_dtype(str(dtype)) or str(dtype)
        return cls(output, known, threads, overwrite, progress)

    def dtype_for(self, widest: str) -> str:
        """The dtype of the output, in safetensors' spelling: the one asked for, or that of the `widest`
        input, or the next that LoRAs have.
        """
        if self.dtype is not None:
            return next(name for name, one in DTYPES.items() if one.short == self.dtype)
        if DTYPES[widest].short in DTYPES_OF_LORAS:
            return widest
        return "F32" if DTYPES[widest].size > 2 else "F16"


@dataclass(frozen=True)
class Written:
    """A LoRA that has been written: what became of each task, its modules and bytes, and notes."""

    made: Sequence[Made]
    modules: int
    bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A LoRA to be made from `sources`, and what its metadata say."""

    target: LoraTarget
    family: Family
    sources: tuple[Checkpoint, ...]
    dtype: str
    metadata: Mapping[str, str]

    def write(
        self,
        tasks: Sequence[Task],
        slots: Sequence[tuple[Layer, Mapping[str, Shape]]],
        work: Callable[[Task, Readers], Made],
        nbytes: Callable[[Task], int],
        size: Size,
        if_nothing: Callable[[Sequence[Made]], str],
    ) -> Written:
        """Do all tasks, of which the first are the file's `slots`: layers, and the largest shapes of their
        tensors. Raises OutputError, and RecipeError, which says `if_nothing`, when there is nothing to write.
        """
        files = [file for one in self.sources for file in one.files]
        place = check_output(self.target.output, files, overwrite=self.target.overwrite)
        most = {layer.name: parts for layer, parts in slots}
        # What a share of the energy takes is known in the end.
        reserved = 0 if size.energy is not None else sizes_of(most, self.dtype)
        with LoraFile(
            place, most, self.metadata, self.dtype, size=reserved, overwrite=self.target.overwrite
        ) as file:
            made = compute_all(
                tasks,
                work,
                file,
                in_file=len(slots),
                nbytes=nbytes,
                threads=self.target.threads,
                progress=self.target.progress,
            )
            for source in self.sources:
                source.check_unchanged()
            if not file.tensors:
                raise RecipeError(f"nothing would be in the LoRA: {if_nothing(made)}")
            ranks: dict[bool, list[int]] = {False: [], True: []}
            for (layer, _), one in zip(slots, made, strict=False):
                if one.rank:
                    ranks[layer.has_kernel].append(one.rank)
            count = file.finish(of_ranks(ranks[False], ranks[True], size))
            return Written(made, file.modules, count, file.swept)

    def result(
        self,
        written: Written,
        layers: Sequence[Layer],
        notes: Sequence[str],
        *,
        is_exact: bool = False,
        held: Mapping[str, float] | None = None,
    ) -> LoraResult:
        """Describe what was written; `layers` are those of the first of what was made."""
        pairs = list(zip(layers, written.made, strict=False))
        kinds = dict.fromkeys("locon" if layer.has_kernel else "lora" for layer, one in pairs if one.rank)
        ranks = Counter(one.rank for _, one in pairs if one.rank)
        kept = shares(((layer.block, one) for layer, one in pairs if one.rank or one.total), self.family)
        return LoraResult(
            output=Path(self.target.output),
            family=self.family.name,
            kind="+".join(sorted(kinds, reverse=True)) or "norm",
            rank=max(ranks, default=0),
            ranks=dict(sorted(ranks.items())),
            modules=written.modules,
            lost={block: 0.0 if is_exact else 1 - share for block, share in kept.items()},
            dtype=self.dtype,
            bytes=written.bytes,
            seconds=time.perf_counter() - self.target.started,
            notes=tuple(dict.fromkeys((*notes, *_of_rounding(written.made, self.dtype), *written.notes))),
            held=held,
        )


def _of_rounding(made: Iterable[Made], dtype: str) -> Iterator[str]:
    """Say what the output's dtype takes of the factors' digits, if that is more than float32 does."""
    largest = max((one.rounding for one in made), default=0.0)
    if largest > _NEGLIGIBLE:
        share = f"{100 * min(1, largest):.3g} %"
        yield (
            f"rounding to {dtype} changes what a module adds by up to {share}: dtype fp32 (--dtype fp32) "
            "keeps more digits"
        )


def check_known(adapter: Adapter) -> None:
    """Raise CheckpointError for a LoRA with modules of which it is not known what they change."""
    if adapter.unmet:
        raise CheckpointError(
            f"{shown(adapter.name)} has {counted(len(adapter.unmet), 'module')} that {adapter.family.title} "
            f"does not have ({listing(adapter.unmet)}): bake it into a model without them (blockmerge bake "
            "--partial), and extract a LoRA from the result (blockmerge lora extract)"
        )


def shares(made: Iterable[tuple[str | None, Made]], family: Family) -> dict[str, float]:
    """{block: which share of its energy is kept}, in the family's order."""
    total: dict[str | None, float] = defaultdict(float)
    kept: dict[str | None, float] = defaultdict(float)
    for block, one in made:
        total[block] += one.total
        kept[block] += one.kept
    return {
        block: min(1.0, kept[block] / total[block]) if total[block] else 1.0
        for block in family.blocks
        if block in total
    }
