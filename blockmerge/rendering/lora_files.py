"""What is in LoRAs and how alike they are, drawn for a terminal with rich."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from blockmerge.anatomy import FAMILIES
from blockmerge.errors import bytes_text, counted, listing, shown
from blockmerge.rendering.block_rows import drawn_blocks
from blockmerge.rendering.tables import print_table
from blockmerge.rendering.u_net import SharesU

if TYPE_CHECKING:
    from blockmerge.comparing import LoraSimilarity
    from blockmerge.inspecting import LoraInspection
    from blockmerge.lora_making import LoraConversion

_MOST = 8
"""Different ranks or alphas that are shown."""


def print_lora_inspection(console: Console, found: LoraInspection) -> None:
    """Print what is in a LoRA, the share of each block along the U, and what people look for."""
    family = FAMILIES[found.family]
    said = f"  a LoRA for {family.title}, {counted(found.modules, 'module')}"
    _line(console, Text.assemble((shown(found.name), "bold"), said))
    facts = [
        ("kind", _listed(found.kinds)),
        ("rank", _listed({_short(rank): count for rank, count in found.ranks.items()})),
        ("alpha", _listed(_alphas(found))),
        ("dtype", _listed(found.dtypes)),
        ("‖ΔW‖", "" if found.norm is None else f"{found.norm:.4g} at strength 1"),
    ]
    for name, fact in facts:
        if fact:
            _line(console, Text.assemble((f"{name:<6} ", "dim"), fact))
    for note in found.notes:
        _line(console, Text(f"- {note}"))
    if found.blocks:
        console.print()
        _line(console, Text("the blocks' shares of ‖ΔW‖²"))
        console.print(SharesU(_shares(found)))
    if found.metadata:
        console.print()
    for key, value in found.metadata.items():
        _line(console, Text.assemble((f"{shown(key)}: ", "bold"), _value(value)))


def print_lora_conversion(console: Console, found: LoraConversion) -> None:
    """Print what was converted, the notes, and the file."""
    what = f"LoRA of {FAMILIES[found.family].title}: {counted(found.modules, 'module')}, {found.form} form"
    _line(console, Text(what))
    for note in found.notes:
        _line(console, Text(f"- {note}"))
    size = f"  {bytes_text(found.bytes)} in {found.seconds:.2f} s"
    _line(console, Text.assemble((shown(found.output), "bold"), size))


def print_lora_similarity(console: Console, found: LoraSimilarity) -> None:
    """Print the cosine of two LoRAs, and of each block where these were asked for."""
    a, b = map(shown, found.names)
    _line(console, Text.assemble((f"{_cosine(found.similarity)}  ", "bold"), f"{a} and {b}"))
    for note in found.notes:
        _line(console, Text(f"- {note}"))
    if found.parts:
        table = Table(box=None, pad_edge=False)
        table.add_column("block", style="bold", no_wrap=True)
        table.add_column("cosine", justify="right", no_wrap=True)
        for block, cosine in found.parts.items():
            table.add_row(block, _cosine(cosine))
        console.print()
        print_table(console, table)


def _shares(found: LoraInspection) -> dict[str, float | None]:
    """The share of every block of the family; those that are not known have no part in the whole."""
    squares = {block: None if one.norm is None else one.norm**2 for block, one in found.blocks.items()}
    whole = sum(square for square in squares.values() if square is not None) or 1.0
    shares: dict[str, float | None] = dict.fromkeys(drawn_blocks(found.family, found.blocks), 0.0)
    return {**shares, **{block: square and square / whole for block, square in squares.items()}}


def _alphas(found: LoraInspection) -> dict[str, int]:
    """{alpha: modules}, those that have none among them."""
    alphas = {_short(alpha): count for alpha, count in found.alphas.items()}
    without = sum(found.ranks.values()) - sum(alphas.values())
    return {**alphas, **({"none, for which the rank counts": without} if without else {})}


def _listed(counts: Mapping[str, int]) -> str:
    """What there is, the most frequent first, with how often where there are several."""
    ordered = sorted(counts.items(), key=lambda one: -one[1])
    return listing((name if len(counts) == 1 else f"{name} ({count})" for name, count in ordered), _MOST)


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(_tags(value))
    return shown(value, 400)


def _tags(tags: Mapping[str, int]) -> Iterator[str]:
    for tag, count in tags.items():
        yield f"{shown(tag)} ({count})"


def _short(number: float) -> str:
    return f"{number + 0.0:g}"  # -0.0 + 0.0 is 0.0


def _cosine(value: float) -> str:
    return f"{round(value, 6) + 0.0:.6f}"  # -0.0 + 0.0 is 0.0


def _line(console: Console, text: Text) -> None:
    # Names and notes are copied from the screen, so they are never broken.
    console.print(text, soft_wrap=True)
