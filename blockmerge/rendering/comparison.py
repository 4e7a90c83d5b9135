"""Comparisons drawn for a terminal with rich."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockmerge.errors import shown
from blockmerge.rendering.block_rows import arms_of, has_arms
from blockmerge.rendering.colours import rgb, span_of, warmth
from blockmerge.rendering.tables import print_table
from blockmerge.rendering.u_net import WeightsU

if TYPE_CHECKING:
    from blockmerge.comparing import Comparison, Differences, SimilarityMatrix, SimilarityResult
    from blockmerge.explaining import BlockOrigin, Explanation

_TITLES = {
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "vae": "VAE",
    "unet": "U-Net",
}


def print_similarity(console: Console, result: SimilarityResult, *, blocks: bool = False) -> None:
    """Print the base, then each reference, best first; with `blocks` a heat map of blocks × models."""
    _line(
        console,
        Text.assemble(("base  ", "dim"), (shown(result.base), "bold"), f"  {_hash(result.base_hash)}"),
    )
    if result.seed is not None:
        _line(console, Text.assemble(("seed  ", "dim"), str(result.seed)))
    if result.common_base is not None:
        _line(console, Text.assemble(("differences from  ", "dim"), (shown(result.common_base), "bold")))
    console.print()
    print_table(console, _attention_table(result) if result.method == "attention" else _weights_table(result))
    good = [reference for reference in result.references if reference.error is None]
    if blocks and good:
        console.print()
        print_table(console, _heat_map(good, result.method))
    for note in result.notes:
        _line(console, Text(f"- {note}"))
    for reference in good:
        for note in reference.notes:
            _line(console, Text(f"- {note}"))
    for reference in result.failed:
        _line(console, Text.assemble((shown(reference.name), "bold"), f"  not compared: {reference.error}"))


def print_matrix(console: Console, result: SimilarityMatrix) -> None:
    """Print a numbered list of the models, and the table of all with all."""
    table = Table(box=None, pad_edge=False)
    table.add_column("", style="bold", no_wrap=True)
    for number in range(1, len(result.names) + 1):
        table.add_column(str(number), justify="right", no_wrap=True)
    span = span_of(value for row in result.similarity for value in row)
    for number, row in enumerate(result.similarity, 1):
        cells = [_cell(value, result.method, span) for value in row]
        table.add_row(str(number), *cells)
    for number, name in enumerate(result.names, 1):
        error = result.errors.get(name)
        _line(
            console,
            Text.assemble((f"{number}  ", "bold"), shown(name), f"  not compared: {error}" if error else ""),
        )
    console.print()
    print_table(console, table)
    for note in result.notes:
        _line(console, Text(f"- {note}"))


def print_explanation(console: Console, found: Explanation) -> None:
    """Print the verdict, the weights along the U, and what could not be told."""
    _line(console, Text(found.verdict, "bold"))
    for note in found.notes:
        _line(console, Text(f"- {note}"))
    console.print()
    if found.method != "copy" or not found.exact:
        _print_origins(console, found)
    if found.tensors:
        print_table(console, _origins(found, found.tensors, "tensor"))
    for name, why in found.left_out.items():
        _line(console, Text.assemble((shown(name), "bold"), f"  left out: {why}"))


def _print_origins(console: Console, found: Explanation) -> None:
    """Print the weights along the U, and those of blocks and components."""
    single = [name for name in found.parents if name != found.base]
    if found.method in ("weighted_sum", "add_difference") and found.parents and found.blocks:
        weights = {block: origin.weights.get(single[0]) for block, origin in found.blocks.items()}
        _line(
            console, Text(f"how much of {shown(single[0])} each block took ({shown(found.base)} is the base)")
        )
        if not has_arms(found.family) or arms_of(weights) is not None:
            console.print(WeightsU(weights, unknown="?"))
            console.print()
    if found.blocks:
        print_table(console, _origins(found, found.blocks, "block"))
    if found.components:
        console.print()
        components = {_TITLES.get(name, name): origin for name, origin in found.components.items()}
        print_table(console, _origins(found, components, "component"))
    if (found.blocks or found.components) and found.tensors:
        console.print()


def weight_text(value: float | None) -> str:
    """A weight to four decimals, or ``"?"`` where it cannot be told."""
    return "?" if value is None else f"{round(value, 4) + 0.0:.4f}".rstrip("0").rstrip(".")


def value_text(value: float | None, method: str) -> str:
    """A similarity as people read it: percent with two decimals, or a cosine with six."""
    if value is None:
        return "–"
    digits = 2 if method == "attention" else 6
    return f"{round(value, digits) + 0.0:.{digits}f}"  # -0.0 + 0.0 is 0.0


def difference_text(value: float | None) -> str:
    """A relative difference in percent; ``"–"`` where there is nothing to be relative to."""
    return "–" if value is None else f"{value:.3%}"


def _attention_table(result: SimilarityResult) -> Table:
    table = _table("reference", "hash", ">percent")
    for one in result.references:
        table.add_row(Text(shown(one.name), "bold"), _hash(one.hash), value_text(one.similarity, "attention"))
    return table


def _weights_table(result: SimilarityResult) -> Table:
    based = result.common_base is not None
    table = _table(
        "reference", "hash", ">cosine", ">difference", ">largest", *([">of differences"] if based else [])
    )
    for one in result.references:
        total = one.total
        cells = (
            ["–"] * (4 if based else 3)
            if total is None
            else [
                value_text(total.cosine, "weights"),
                difference_text(total.relative_difference),
                f"{total.max_difference:.4g}",
                *([value_text(total.difference_cosine, "weights")] if based else []),
            ]
        )
        table.add_row(Text(shown(one.name), "bold"), _hash(one.hash), *cells)
        for component, found in one.components.items():
            table.add_row(
                Text(f"  {_TITLES.get(component, component)}", "dim"), "", *_component_cells(found, based)
            )
    return table


def _component_cells(found: Differences, based: bool) -> Iterable[str]:
    yield value_text(found.cosine, "weights")
    yield difference_text(found.relative_difference)
    yield f"{found.max_difference:.4g}"
    if based:
        yield value_text(found.difference_cosine, "weights")


def _heat_map(references: Sequence[Comparison], method: str) -> Table:
    table = _table("block", *(f">{shown(one.name, 24)}" for one in references))
    blocks = list(dict.fromkeys(block for one in references for block in one.parts))
    span = span_of(value for one in references for value in one.parts.values())
    for block in blocks:
        table.add_row(Text(block, "bold"), *(_cell(one.parts.get(block), method, span) for one in references))
    return table


def _origins(found: Explanation, origins: Mapping[str, BlockOrigin], title: str) -> Table:
    others = list(dict.fromkeys(name for origin in origins.values() for name in origin.weights))
    table = _table(title, *(f">{shown(name, 24)}" for name in others), ">±", ">unexplained", "")
    for name, origin in origins.items():
        table.add_row(
            Text(shown(name), "bold"),
            *(weight_text(origin.weights.get(other)) for other in others),
            "–" if origin.uncertainty is None else f"{origin.uncertainty:.4f}",
            "–" if origin.residual is None else f"{origin.residual:.3%}",
            remark(origin),
        )
    return table


def remark(origin: BlockOrigin) -> str:
    """What there is to say of a block beside its weights."""
    if origin.divided:
        return "changes within"
    if not origin.explained:
        return "more than rounding"
    return "" if origin.determined else "undetermined"


def _cell(value: float | None, method: str, span: tuple[float, float]) -> Text:
    if value is None:
        return Text("–", "dim")
    red, green, blue = rgb(warmth(value, span))
    ink = "white" if red + green < 300 else "black"
    return Text(f" {value_text(value, method)} ", f"{ink} on rgb({red},{green},{blue})")


def _table(*headings: str) -> Table:
    """A table whose columns are flush right where the heading begins with ``>``."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        right = heading.startswith(">")
        title = Text(heading.removeprefix(">"))
        table.add_column(
            title, justify="right" if right else "left", no_wrap=right or heading == "hash", overflow="fold"
        )
    return table


def _hash(value: str | None) -> str:
    return f"[{value}]" if value else ""


def _line(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)
