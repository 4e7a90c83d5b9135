"""Comparisons as CSV: one row for each number, so that any spreadsheet or script can sort and filter them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from blockmerge.errors import shown

if TYPE_CHECKING:
    from blockmerge.comparing import Comparison, SimilarityMatrix, SimilarityResult
    from blockmerge.explaining import Explanation


def similarity_csv(result: SimilarityResult) -> str:
    """A row per reference and part (``total`` first)."""
    if result.method == "attention":
        head = ["reference", "hash", "part", "similarity", "error"]
        return _text([head, *(row for one in result.references for row in _attention_rows(one))])
    head = [
        "reference",
        "hash",
        "part",
        "similarity",
        "relative_difference",
        "max_difference",
        "difference_similarity",
        "error",
    ]
    return _text([head, *(row for one in result.references for row in _weights_rows(one))])


def matrix_csv(result: SimilarityMatrix) -> str:
    """The matrix with the models' names along both sides."""
    return _text(
        [
            ["", *result.names],
            *([name, *row] for name, row in zip(result.names, result.similarity, strict=True)),
        ]
    )


def explanation_csv(found: Explanation) -> str:
    """A row per block, component and tensor, a column for the weight of each parent but the base."""
    others = list(dict.fromkeys(name for origin in found.blocks.values() for name in origin.weights))
    head = ["kind", "name", *others, "uncertainty", "residual", "determined", "explained"]
    rows = [
        [
            kind,
            name,
            *(one.weights.get(n) for n in others),
            one.uncertainty,
            one.residual,
            one.determined,
            one.explained,
        ]
        for kind, part in (
            ("block", found.blocks),
            ("component", found.components),
            ("tensor", found.tensors),
        )
        for name, one in part.items()
    ]
    return _text([head, *rows])


def _attention_rows(one: Comparison) -> Iterable[Sequence[object]]:
    yield [one.name, one.hash, "total", one.similarity, one.error]
    for part, value in one.parts.items():
        yield [one.name, one.hash, part, value, None]


def _weights_rows(one: Comparison) -> Iterable[Sequence[object]]:
    if one.total is None:
        yield [one.name, one.hash, "total", None, None, None, None, one.error]
        return
    for part, found in {"total": one.total, **one.blocks, **one.components}.items():
        numbers = (found.cosine, found.relative_difference, found.max_difference, found.difference_cosine)
        yield [one.name, one.hash, part, *numbers, None]


def _text(rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_safe(cell) for cell in row] for row in rows)
    return out.getvalue().rstrip("\n")


def _safe(cell: object) -> object:
    if not isinstance(cell, str):
        return cell
    text = shown(cell, 4000)
    # A file's name may begin like a formula, which spreadsheets would carry out.
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
