"""Comparisons as one self-contained HTML page: no script, nothing fetched; for light, dark and paper."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cache
from itertools import zip_longest
from typing import TYPE_CHECKING

from blockmerge.anatomy import FAMILIES, OUTSIDE, Arms
from blockmerge.errors import shown
from blockmerge.rendering.bars import BarScale
from blockmerge.rendering.block_charts import BlockChart
from blockmerge.rendering.block_rows import has_arms, rows_of
from blockmerge.rendering.candidates import candidates_of
from blockmerge.rendering.comparison import difference_text, remark, value_text, weight_text
from blockmerge.rendering.heat_tables import HeatTable, Label, labels_of
from blockmerge.rendering.short_names import words_of
from blockmerge.version import __version__

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

    from blockmerge.comparing import Comparison, SimilarityMatrix, SimilarityResult
    from blockmerge.comparing.dendrogram import Dendrogram
    from blockmerge.explaining import Explanation


def similarity_html(result: SimilarityResult) -> str:
    """The references with bars, curves over the blocks, and a heat map of blocks × models."""
    good = [one for one in result.references if one.error is None]
    labels = labels_of([one.name for one in good])
    blocks = list(dict.fromkeys(block for one in good for block in one.parts))
    return _render(
        "similarity.html",
        result=result,
        labels=labels,
        good=good,
        bars=BarScale.of(map(_main_figure, good), usual=_usual_figure(result)),
        chart=BlockChart(blocks, [(label, one.parts) for label, one in zip(labels, good, strict=True)]),
        table=HeatTable(
            [Label(block, block) for block in blocks],
            labels,
            [[one.parts.get(block) for one in good] for block in blocks],
            result.method,
        ),
    )


def matrix_html(result: SimilarityMatrix) -> str:
    """All models beside all, those that are alike side by side, below the tree that says so."""
    from blockmerge.comparing.dendrogram import dendrogram_of

    tree = dendrogram_of(result)
    labels = labels_of([result.names[place] for place in tree.order])
    values = [[result.similarity[row][column] for column in tree.order] for row in tree.order]
    table = HeatTable(labels, labels, values, result.method, square=True, tree=tuple(_lines_of(tree)))
    return _render("matrix.html", result=result, table=table, nearest=_nearest(values))


def explanation_html(found: Explanation) -> str:
    """The verdict, every candidate, curves over the blocks, the weights along the U, and tables."""
    others = list(dict.fromkeys(name for origin in found.blocks.values() for name in origin.weights))
    tables = {"Blocks": found.blocks, "Components": found.components, "Tensors": found.tensors}
    weights = {
        other: {block: origin.weights.get(other) for block, origin in found.blocks.items()}
        for other in others
    }
    candidates = list(candidates_of(found))
    named = {label.whole: label for label in labels_of([one.name for one in candidates])}
    labels = [named[other] for other in others]
    return _render(
        "explanation.html",
        found=found,
        core=f"the {FAMILIES[found.family].core_title}",
        others=others,
        labels=labels,
        weights=weights,
        candidates=candidates,
        share_bars=BarScale.of(one.mean for one in candidates),
        bars=BarScale.of(weight for taken in weights.values() for weight in taken.values()),
        chart=BlockChart(
            list(found.blocks),
            [(label, weights[label.whole]) for label in labels],
            holds=(0.0, 1.0),
        ),
        places=_along_the_u(found.blocks, FAMILIES[found.family].arms) if has_arms(found.family) else [],
        rows=[] if has_arms(found.family) else rows_of(found.blocks),
        parts={title: origins for title, origins in tables.items() if origins},
    )


def _main_figure(one: Comparison) -> float | None:
    """What the bar of a reference shows: percent, the cosine of differences, or how large they are."""
    if one.total is None:
        return one.similarity
    if one.total.difference_cosine is not None:
        return one.total.difference_cosine
    return one.total.relative_difference


def _usual_figure(result: SimilarityResult) -> float | None:
    if result.method == "attention":
        return 100.0
    return 1.0 if result.common_base else None


def _nearest(values: list[list[float | None]]) -> list[int | None]:
    """The place of the model most like each."""
    found: list[int | None] = []
    for row, alike in enumerate(values):
        known = [(value, -place) for place, value in enumerate(alike) if value is not None and place != row]
        found.append(-max(known)[1] if known else None)
    return found


def _lines_of(tree: Dendrogram) -> Iterator[str]:
    """A path for each join of a tree: up from one group, across, and down to the other."""
    top = max((join.height for join in tree.joins), default=0.0) or 1.0
    ends = [(place + 0.5, 1.0) for place in range(len(tree.order))]
    for join in tree.joins:
        (left, low), (right, other_low) = (ends[number] for number in join.groups)
        y = 1.0 - 0.97 * join.height / top
        ends.append(((left + right) / 2, y))
        yield f"M{left:g} {low:.3f}V{y:.3f}H{right:g}V{other_low:.3f}"


def _along_the_u(blocks: Collection[str], arms: Arms | None) -> list[tuple[str, str]]:
    """(place, block) in the order of a two-column grid: the left arm downwards, the right one upwards."""
    assert arms is not None
    inputs = [block for block in arms.left if block in blocks]
    outputs = [block for block in reversed(arms.right) if block in blocks]
    sides = (
        pair for left, right in zip_longest(inputs, outputs) for pair in (("left", left), ("right", right))
    )
    return [
        *(("base", block) for block in blocks if block == OUTSIDE),
        *((side, block) for side, block in sides if block is not None),
        *(("middle", block) for block in arms.middle if block in blocks),
    ]


def _without_control_characters(value: object) -> object:
    return shown(value, 4000) if type(value) is str else value


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line after each of its words."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(map(escape, words_of(shown(name, 4000))))


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
    environment.filters["breakable"] = _breakable
    environment.globals.update(
        value_text=value_text,
        difference_text=difference_text,
        weight_text=weight_text,
        remark=remark,
    )
    return environment
