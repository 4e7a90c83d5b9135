"""`merge_loras`: several LoRAs as one."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

from blockmerge.adapters import (
    Applied,
    Lora,
    LoraLike,
    Module,
    Target,
    Whereabouts,
    matrix_of,
    product_of,
    written_names,
)
from blockmerge.anatomy import Family
from blockmerge.checkpoints import Checkpoint, Readers
from blockmerge.dtypes import precision_of, size_of
from blockmerge.errors import (
    BlockmergeError,
    CheckpointError,
    IncompatibleModelsError,
    RecipeError,
    counted,
    listing,
    shown,
)
from blockmerge.lora_making.making import Job, LoraTarget, check_known
from blockmerge.lora_making.metadata import new_metadata, of_family
from blockmerge.lora_making.result import LoraResult
from blockmerge.lora_making.size import Size
from blockmerge.lora_making.tasks import Layer, Made, Sum, Term
from blockmerge.streaming import Progress
from blockmerge.types import DtypeLike, PathLike

AppliedModule = tuple[Applied, float, Module]
"""A LoRA with its strength, one of its modules, and how much of that is added."""


def merge_loras(
    loras: Sequence[LoraLike],
    *,
    output: PathLike,
    rank: int | None = None,
    energy: float | None = None,
    dtype: DtypeLike | None = None,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> LoraResult:
    """Write one LoRA that does what several do together, each at its strength.

    >>> blockmerge.merge_loras([("a.safetensors", 0.7), ("b.safetensors", 0.4)], output="ab.safetensors")
    ... # doctest: +SKIP

    - `loras`: paths, ``(path, strength)``, ``(path, strength, blocks)``, texts as on the command line, or
      `Lora` objects.
    - `output`: the path of the new file.
    - `rank`: the highest rank of a module.
    - `energy`: in place of `rank`, the share of each module's squared norm that is kept, such as 0.99.
    - `dtype`: ``"fp16"``, ``"bf16"`` or ``"fp32"``. The default is the widest of the inputs'.
    - `overwrite`, `threads`, `progress`: as for `merge`.

    Without `rank` and `energy`, the factors are joined and nothing is lost but the rounding to `dtype`. LoHa
    and LoKr become LoRAs. Kinds that look at the model's weights (DoRA, GLoRA, IA3, OFT, BOFT) are refused.

    Raises `CheckpointError` or `UnknownFamilyError` for files that cannot be used, `RecipeError` for
    arguments, `NonFiniteError` for values, and `OutputError` for the output. Raises `IncompatibleModelsError`
    for LoRAs of different families.
    """
    size = Size(rank, energy)
    target = LoraTarget.of(output, dtype, threads, overwrite, progress)
    if isinstance(loras, (str, os.PathLike, Lora, Checkpoint, Mapping)):
        loras = [loras]
    asked = [Lora.of(one) for one in loras]
    if not asked:
        raise RecipeError("no LoRA to merge: give at least one")
    applied, family = opened(asked)
    recipe = {"method": "lora merge", "loras": written(applied), "rank": rank, "energy": energy}
    metadata = new_metadata(
        of_family(family, [one.adapter.source.metadata for one in applied]),
        recipe,
        " + ".join(lora.label for lora in asked),
        [one.adapter.name for one in applied],
    )
    return added_up(target, family, applied, size, metadata)


def written(applied: Sequence[Applied]) -> list[dict[str, Any]]:
    """LoRAs as a recipe has them."""
    return [
        {"name": one.adapter.name, "strength": one.strength, "blocks": dict(one.weights)} for one in applied
    ]


def opened(asked: Sequence[Lora]) -> tuple[list[Applied], Family]:
    """Open LoRAs, which have to be of one family. Raises IncompatibleModelsError when they are not, and as
    `Adapter.of` does.
    """
    adapters = [lora.open() for lora in asked]
    failure: BlockmergeError | None = None
    for family in dict.fromkeys(adapter.family for adapter in adapters):
        # What fits several families may have been taken for another one than its fellows.
        try:
            adapters = [
                one if one.family is family else lora.open(family)
                for one, lora in zip(adapters, asked, strict=True)
            ]
        except IncompatibleModelsError as error:
            failure = failure or error
            continue
        return [
            Applied(one, lora.strength, lora.weights(family))
            for one, lora in zip(adapters, asked, strict=True)
        ], family
    assert failure is not None
    raise failure


def added_up(
    target: LoraTarget,
    family: Family,
    applied: Sequence[Applied],
    size: Size,
    metadata: Mapping[str, str],
    notes: Sequence[str] = (),
) -> LoraResult:
    """Write the LoRA that is a sum of others, cut to a size."""
    for one in applied:
        _check(one)
    sums = _sums(applied, family)
    if not sums:
        raise RecipeError(
            "nothing would be in the LoRA: every strength, or every block's weight, is 0; give another"
        )
    notes = [*notes, *(note for one in applied for note in one.adapter.notes)]
    notes += _notes(applied, sums, size)
    sources = tuple(one.adapter.source for one in applied)
    job = Job(target, family, sources, target.dtype_for(_widest(applied)), metadata)

    def work(task: Sum, readers: Readers) -> Made:
        from blockmerge.lora_making.computing import merged

        return merged(task, size, job.dtype, readers)

    slots = [(one.layer, one.most_parts(size)) for one in sums]
    done = job.write(sums, slots, work, lambda one: one.nbytes, size, _nothing)
    return job.result(done, [one.layer for one in sums], notes, is_exact=size.is_exact)


def _nothing(_: Sequence[Made]) -> str:
    return "what is to go into it adds up to 0; give others, or other strengths"


def _widest(applied: Sequence[Applied]) -> str:
    """The dtype that holds what all modules hold best: the widest, of equally wide ones the most precise."""
    dtypes = {
        tensor.dtype
        for one in applied
        for _, module in one.scaled()
        for part, tensor in module.parts.items()
        if part != "alpha"
    }
    return max(dtypes, key=lambda dtype: (size_of(dtype), precision_of(dtype).mantissa))


def _check(one: Applied) -> None:
    """Raise CheckpointError for a LoRA that is no sum on its own, or has modules that nothing is known of."""
    name = one.adapter.name
    looking = [module for _, module in one.scaled() if module.looks_at_weights]
    if looking:
        kinds = " and ".join(dict.fromkeys(module.kind for module in looking))
        raise CheckpointError(
            f"{shown(name)} has {counted(len(looking), 'module')} of the kind {kinds}, which looks at the "
            "model's weights and is not a LoRA without them: bake it into its model (blockmerge bake), and "
            "extract a LoRA from the result (blockmerge lora extract)"
        )
    check_known(one.adapter)


def _sums(applied: Sequence[Applied], family: Family) -> list[Sum]:
    """The modules of the output, in the order of their names."""
    names = written_names(family)
    together: dict[Whereabouts, list[AppliedModule]] = defaultdict(list)
    for one in applied:
        for scale, module in one.scaled():
            assert module.target is not None
            together[Whereabouts(module.target.ldm, module.target.place)].append((one, scale, module))
    found = [_sum(names[place], scaled, family) for place, scaled in together.items()]
    return sorted(found, key=lambda one: f"{one.layer.name}.")


def _sum(name: str, scaled: Sequence[AppliedModule], family: Family) -> Sum:
    target = scaled[0][2].target
    assert target is not None
    vectors: dict[str, list[Term]] = defaultdict(list)
    terms: list[Term] = []
    for one, scale, module in scaled:
        for part, factor, tensor in module.of_bias:
            where = "b_norm" if part == "b_norm" else "diff_b"
            vectors[where].append(Term(one.adapter.name, scale * factor, matrix=tensor))
        if not module.changes_weight:
            continue
        term = _term(one, scale, module)
        if len(target.shape) > 1:
            terms.append(term)
        else:
            vectors["w_norm" if "w_norm" in module.parts else "diff"].append(term)
    shape = _shape(name, [*terms, *(term for each in vectors.values() for term in each)], target, family)
    return Sum(
        Layer(name, target.block, shape if terms else shape[:1]),
        tuple(terms),
        {part: tuple(each) for part, each in vectors.items()},
        all(module.is_product for _, _, module in scaled),
    )


def _term(one: Applied, scale: float, module: Module) -> Term:
    product = product_of(module, "F64")
    if product is not None:
        return Term(one.adapter.name, scale * module.factor, *product)
    return Term(one.adapter.name, scale * module.factor, matrix=matrix_of(module, "F32"))


def _shape(name: str, terms: Sequence[Term], target: Target, family: Family) -> tuple[int, ...]:
    """The shape of a module's weight by those of its factors. Raises IncompatibleModelsError where these
    differ, but for input channels that some have beside the others'.
    """
    kernel = target.shape[2:]
    labels = {
        (term.rows, term.columns // prod(kernel) if term.columns > 1 else 1): term.label for term in terms
    }
    rows, inputs = ({extent[axis] for extent in labels} for axis in (0, 1))
    if len(rows) > 1 or (len(inputs - {1}) > 1 and target.ldm != family.input_layer):
        each = " and ".join(f"{shown(label)} for {list(extent)}" for extent, label in labels.items())
        raise IncompatibleModelsError(
            f"{shown(name)} is of different widths: {each}; only LoRAs for models of one width can be merged"
        )
    return (*rows, max(inputs), *kernel)


def _notes(applied: Sequence[Applied], sums: Sequence[Sum], size: Size) -> Iterator[str]:
    for one in applied:
        kinds = Counter(module.kind for _, module in one.scaled() if module.kind in ("loha", "lokr"))
        for kind, count in kinds.items():
            yield f"{shown(one.adapter.name)}: {counted(count, 'module')} of the kind {kind} become LoRA"
    whole = [one.layer.name for one in sums if one.ranks is None]
    if whole:
        at_what = ", at full rank, which is large: energy (--energy 0.99) is smaller" if size.is_exact else ""
        yield (
            f"{counted(len(whole), 'module')} that are not products of small factors ({listing(whole)}) are "
            f"decomposed by their singular values{at_what}"
        )
    vectors = [one.layer.name for one in sums if one.vectors]
    if vectors:
        yield (
            f"{counted(len(vectors), 'module')} of norms and biases ({listing(vectors)}) are added up as "
            "they are: not every program reads them"
        )
