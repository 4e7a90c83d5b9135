"""Comparisons as one self-contained HTML page: no script, nothing fetched; for light, dark and paper."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING

from blockmerge.anatomy import FAMILIES, OUTSIDE, Arms
from blockmerge.errors import shown
from blockmerge.rendering.block_rows import has_arms, rows_of
from blockmerge.rendering.colours import span_of, warmth
from blockmerge.rendering.comparison import difference_text, remark, value_text, weight_text
from blockmerge.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment

    from blockmerge.comparing import SimilarityMatrix, SimilarityResult
    from blockmerge.explaining import Explanation


def similarity_html(result: SimilarityResult) -> str:
    """The references, and a heat map of blocks × models with exact figures on hover."""
    good = [one for one in result.references if one.error is None]
    return _render(
        "similarity.html",
        result=result,
        good=good,
        blocks=list(dict.fromkeys(block for one in good for block in one.parts)),
        span=span_of(value for one in good for value in one.parts.values()),
    )


def matrix_html(result: SimilarityMatrix) -> str:
    """All models beside all."""
    return _render(
        "matrix.html", result=result, span=span_of(value for row in result.similarity for value in row)
    )


def explanation_html(found: Explanation) -> str:
    """The verdict, the weights along the U, and tables of blocks, components and tensors."""
    others = list(dict.fromkeys(name for origin in found.blocks.values() for name in origin.weights))
    tables = {"Blocks": found.blocks, "Components": found.components, "Tensors": found.tensors}
    return _render(
        "explanation.html",
        found=found,
        others=others,
        weights={
            other: {block: origin.weights.get(other) for block, origin in found.blocks.items()}
            for other in others
        },
        places=_along_the_u(found.blocks, FAMILIES[found.family].arms) if has_arms(found.family) else [],
        rows=[] if has_arms(found.family) else rows_of(found.blocks),
        parts={title: origins for title, origins in tables.items() if origins},
    )


def _along_the_u(blocks: Collection[str], arms: Arms | None) -> list[tuple[str, str]]:
    """(place, block) in the order of a two-column grid: the left arm downwards, the right one upwards."""
    assert arms is not None
    inputs = [block for block in arms.left if block in blocks]
    outputs = [block for block in reversed(arms.right) if block in blocks]
    pairs = [block for pair in zip_longest(inputs, outputs) for block in pair if block is not None]
    return [
        *(("base", block) for block in blocks if block == OUTSIDE),
        *(("", block) for block in pairs),
        *(("middle", block) for block in arms.middle if block in blocks),
    ]


def _without_control_characters(value: object) -> object:
    return shown(value, 4000) if type(value) is str else value


def _bar(weight: float | None) -> float:
    return 0.0 if weight is None else min(1.0, max(0.0, weight))


def _render(template: str, **values: object) -> str:
    return _templates().get_template(template).render(version=__version__, **values)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Names of files and tensors are whatever somebody called them: all of them are escaped.
    environment = Environment(
        loader=PackageLoader("blockmerge.rendering"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_without_control_characters,
    )
    environment.globals.update(
        warmth=warmth,
        value_text=value_text,
        difference_text=difference_text,
        weight_text=weight_text,
        remark=remark,
        bar=_bar,
    )
    return environment
