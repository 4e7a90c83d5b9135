"""`similarity` and `similarity_matrix`: how alike checkpoints are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from blockmerge.anatomy import COMPONENTS, component_of
from blockmerge.checkpoints import CheckpointLike, Model, old_hash
from blockmerge.comparing.results import Comparison, Differences, SimilarityMatrix, SimilarityResult
from blockmerge.comparing.sources import Source, open_sources, opening_to_compare, weights_of
from blockmerge.errors import (
    BlockmergeError,
    IncompatibleModelsError,
    NonFiniteError,
    RecipeError,
    counted,
    did_you_mean,
    listing,
    shown,
)
from blockmerge.streaming import Progress, thread_count

if TYPE_CHECKING:
    from blockmerge.comparing.sums import Sums

METHODS = ("attention", "weights")


def similarity(
    base: CheckpointLike,
    references: CheckpointLike | Iterable[CheckpointLike],
    method: str = "attention",
    *,
    common_base: CheckpointLike | None = None,
    variant: str | None = None,
    ema: str = "drop",
    threads: int | None = None,
    progress: Progress | None = None,
) -> SimilarityResult:
    """Say how alike one model is to each of several others.

    >>> report = blockmerge.similarity("mine.safetensors", ["sd12.safetensors"])  # doctest: +SKIP
    >>> report.references[0].similarity  # doctest: +SKIP
    97.31

    - `base`: a path, an opened checkpoint, a state dict or a recipe.
    - `references`: one or several of the same, folders (all model files in them), or patterns such as
      ``"refs/*.ckpt"``.
    - `method`: ``"attention"`` or ``"weights"``.
    - `common_base`: a model from which differences are taken, for ``"weights"``. It tells relatives apart.
    - `variant`, `ema`, `threads`, `progress`: as for `merge`.

    ``"attention"`` is the published attention similarity, in percent. It reads a few percent of the files.

    ``"weights"`` compares all weights by block, by component and in total. It gives the cosine, the relative
    difference ‖b − a‖ / ‖a‖ and the largest difference.

    A reference that cannot be compared becomes an entry with an error, and the others go on.

    Raises `RecipeError` for an unknown method or without any reference. Raises `CheckpointError`,
    `UnknownFamilyError` or `NonFiniteError` for the base.
    """
    check_method(method, common_base)
    thread_count(threads)
    opening = opening_to_compare(variant, ema)
    model = opening.model(base, "base")
    common = None if common_base is None else opening.model(common_base, "common base")
    if common is not None and not common.anatomy.family.is_like(model.anatomy.family):
        raise IncompatibleModelsError(f"the common base {shown(common.name)} {_is_not(common, model)}")
    opened = open_sources(references, opening)
    opening.check([model, *_models(opened), *([] if common is None else [common])])
    sources = [_of_family(source, model) for source in opened]
    usable = [source for source in sources if source.model is not None]
    models = [model, *(source.model for source in usable if source.model is not None)]
    compare = _attention if method == "attention" else _weights
    found = compare(models, common, threads, progress)
    comparisons = {
        id(source): replace(result, name=source.name, notes=(*opened_model.notes, *result.notes))
        for source, opened_model, result in zip(usable, models[1:], found, strict=True)
    }
    rows = [
        Comparison(source.name, error=source.error)
        if source.model is None
        else replace(comparisons[id(source)], hash=_hash(source.model))
        for source in sources
    ]
    rows.sort(key=lambda row: (row.error is not None, -_rank(row)))
    return SimilarityResult(
        method=method,
        seed=_seed() if method == "attention" else None,
        base=model.name,
        base_hash=_hash(model),
        family=model.anatomy.family.name,
        references=tuple(rows),
        common_base=None if common is None else common.name,
        notes=(*_notes(method, model), *model.notes, *(() if common is None else common.notes)),
    )


def similarity_matrix(
    models: CheckpointLike | Iterable[CheckpointLike],
    method: str = "attention",
    *,
    variant: str | None = None,
    ema: str = "drop",
    threads: int | None = None,
    progress: Progress | None = None,
) -> SimilarityMatrix:
    """Compare each of several models with all others.

    >>> table = blockmerge.similarity_matrix(["a.safetensors", "b.ckpt", "c/"])  # doctest: +SKIP
    >>> table.names[0], table.names[1], table.similarity[0][1]  # doctest: +SKIP
    ('a.safetensors', 'b.ckpt', 98.02)

    `models` are what `similarity` takes for references. The other arguments are those of `similarity`. A
    model that cannot be compared gets a row of None and an entry in `errors`.

    Raises `RecipeError` for an unknown method, or fewer than two models.
    """
    check_method(method)
    thread_count(threads)
    opening = opening_to_compare(variant, ema)
    sources = open_sources(models, opening)
    if len(sources) < 2:
        raise RecipeError("one model alone has nothing to be compared with: name at least two")
    if all_opened := _models(sources):
        opening.check(all_opened)
    first = next((source.model for source in sources if source.model is not None), None)
    if first is not None:
        sources = [_of_family(source, first) for source in sources]
    usable = [number for number, source in enumerate(sources) if source.model is not None]
    errors = {source.name: source.error for source in sources if source.error is not None}
    table: list[list[float | None]] = [[None] * len(sources) for _ in sources]
    opened = _models(sources)
    if opened:
        compare = _attention_pairs if method == "attention" else _weights_pairs
        pairs, failed = compare(opened, threads, progress)
        for (row, column), value in pairs.items():
            table[usable[row]][usable[column]] = table[usable[column]][usable[row]] = value
        errors.update({sources[usable[number]].name: why for number, why in failed.items()})
        for number, index in enumerate(usable):
            if number not in failed:
                table[index][index] = 100.0 if method == "attention" else 1.0
    return SimilarityMatrix(
        method=method,
        seed=_seed() if method == "attention" else None,
        names=tuple(source.name for source in sources),
        similarity=tuple(map(tuple, table)),
        errors=errors,
        notes=(
            *(() if first is None else _notes(method, first)),
            *(note for model in opened for note in model.notes),
        ),
    )


def _models(sources: Iterable[Source]) -> list[Model]:
    return [source.model for source in sources if source.model is not None]


# -- attention -----------------------------------------------------------------------------------------------


def _attention(
    models: Sequence[Model], common: Model | None, threads: int | None, progress: Progress | None
) -> list[Comparison]:
    from blockmerge.comparing.attention import AttentionComparison

    comparison = AttentionComparison(models, progress=progress)
    comparison.raise_error_of_first()
    found = comparison.against_first()
    comparison.raise_error_of_first()
    results = []
    for number, model in enumerate(models[1:], 1):
        if comparison.errors[number] is not None:
            results.append(Comparison(model.name, error=comparison.errors[number]))
            continue
        parts = {part: 100 * value for part, value in zip(comparison.parts, found[number], strict=True)}
        results.append(Comparison(model.name, similarity=_mean(parts.values()), parts=parts))
    return results


def _attention_pairs(
    models: Sequence[Model], threads: int | None, progress: Progress | None
) -> tuple[dict[tuple[int, int], float], dict[int, str]]:
    from blockmerge.comparing.attention import AttentionComparison

    comparison = AttentionComparison(models, progress=progress)
    pairs = comparison.all_pairs()
    failed = {number: error for number, error in enumerate(comparison.errors) if error is not None}
    return {pair: 100 * _mean(values) for pair, values in pairs.items()}, failed


# -- weights -------------------------------------------------------------------------------------------------


def _weights(
    models: Sequence[Model], common: Model | None, threads: int | None, progress: Progress | None
) -> list[Comparison]:
    from blockmerge.comparing.sums import NOT_FINITE, sum_pairs

    everything = [*models, *([] if common is None else [common])]
    columns = range(1, len(models))
    sums = sum_pairs(
        everything,
        [0],
        columns,
        common=None if common is None else len(models),
        threads=threads,
        progress=progress,
    )
    for number in (0, *([] if common is None else [len(models)])):
        if bad := sums.nonfinite(number):
            raise NonFiniteError(f"{shown(everything[number].name)} {NOT_FINITE} in {listing(bad)}")
    return [_weights_of_one(models, sums, column) for column in columns]


def _weights_of_one(models: Sequence[Model], sums: Sums, column: int) -> Comparison:
    base, model = models[0], models[column]
    if error := sums.error_of(column, model.name):
        return Comparison(model.name, error=error)
    family = base.anatomy.family
    compared = sums.compared(0, column)
    if not compared:
        return Comparison(
            model.name, error=f"{shown(model.name)} has no weights in common with {shown(base.name)}"
        )
    by_block: dict[str, list[int]] = {block: [] for block in family.blocks}
    by_component: dict[str, list[int]] = {component: [] for component in COMPONENTS}
    for index in compared:
        by_block[family.block_of(sums.names[index])].append(index)
        by_component[component_of(sums.names[index])].append(index)
    measure = _measure(sums, column)
    total = measure(compared)
    blocks = {block: measure(tensors) for block, tensors in by_block.items() if tensors}
    return Comparison(
        model.name,
        similarity=total.cosine,
        parts={block: found.cosine for block, found in blocks.items()},
        total=total,
        blocks=blocks,
        components={
            family.called_component(component): measure(tensors)
            for component, tensors in by_component.items()
            if tensors
        },
        notes=tuple(_not_compared(base, model, sums, compared)),
    )


def _weights_pairs(
    models: Sequence[Model], threads: int | None, progress: Progress | None
) -> tuple[dict[tuple[int, int], float], dict[int, str]]:
    from blockmerge.comparing.sums import MOST_ROWS, sum_pairs

    pairs: dict[tuple[int, int], float] = {}
    failed: dict[int, str] = {}
    count = len(models)
    for start in range(0, count, MOST_ROWS):
        rows = range(start, min(start + MOST_ROWS, count))
        sums = sum_pairs(
            models, rows, range(start, count), cosine_only=True, threads=threads, progress=progress
        )
        for number in range(start, count):
            if error := sums.error_of(number, models[number].name):
                failed[number] = error
        for row in rows:
            for column in range(row + 1, count):
                if sums.compared(row, column) and row not in failed and column not in failed:
                    pairs[row, column] = sums.cosine(row, column)
    return pairs, failed


def _measure(sums: Sums, column: int) -> Callable[[Sequence[int]], Differences]:
    return lambda tensors: sums.differences(0, column, tensors)


def _not_compared(base: Model, model: Model, sums: Sums, compared: Sequence[int]) -> Iterable[str]:
    names = {sums.names[index] for index in compared}
    for one, other in ((base, model), (model, base)):
        lacking = one.components - other.components - {"other"}
        if lacking:
            titles = ", ".join(component for component in COMPONENTS if component in lacking)
            yield f"{shown(other.name)} lacks {titles}: not compared"
    both = base.components & model.components | {"other"}
    every = dict.fromkeys((*weights_of(base), *weights_of(model)))
    left = [name for name in every if name not in names and component_of(name) in both]
    if left:
        yield (
            f"{counted(len(left), 'tensor')} that only one of the two has, or in another shape: "
            f"not compared ({listing(left)})"
        )


# -- both ----------------------------------------------------------------------------------------------------


def check_method(method: str, common_base: object = None) -> None:
    """Raise RecipeError for an unknown method, and for a common base where it is of no use."""
    if method not in METHODS:
        raise RecipeError(
            f"unknown method '{shown(method)}'{did_you_mean(method, METHODS)} (attention or weights)"
        )
    if common_base is not None and method != "weights":
        raise RecipeError(
            "a common base is for the method weights: attention similarity has no differences to take"
        )


def _of_family(source: Source, base: Model) -> Source:
    if source.model is None or source.model.anatomy.family.is_like(base.anatomy.family):
        return source
    return replace(source, model=None, error=f"{shown(source.name)} {_is_not(source.model, base)}")


def _is_not(model: Model, base: Model) -> str:
    return f"is {model.anatomy.family.title}, but {shown(base.name)} is {base.anatomy.family.title}"


def _notes(method: str, base: Model) -> Iterator[str]:
    attention = base.anatomy.family.attention
    if method == "attention" and attention.layers:
        blocks = list(attention.layers)
        of = f"only the self-attention of {blocks[0]} to {blocks[-1]} is compared"
        yield f"{of}: method='weights' (--method weights) compares all weights"
        if attention.note is not None:
            yield attention.note


def _hash(model: Model) -> str | None:
    checkpoint = model.source
    try:
        return old_hash(checkpoint) if len(checkpoint.files) == 1 else None
    except BlockmergeError:  # it went away meanwhile, which its row says
        return None


def _seed() -> int:
    from blockmerge.comparing.attention import SEED

    return SEED


def _rank(row: Comparison) -> float:
    if row.total is not None and row.total.difference_cosine is not None:
        return row.total.difference_cosine
    return row.similarity if row.similarity is not None else 0.0


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
