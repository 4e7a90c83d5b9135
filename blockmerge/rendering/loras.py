"""LoRAs drawn for a terminal with rich."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from blockmerge.anatomy import FAMILIES
from blockmerge.errors import bytes_text, counted, shown

if TYPE_CHECKING:
    from blockmerge.lora_making import LoraResult

_LEAST = 0.0005  # of all: what is shown as more than nothing


def print_lora(console: Console, result: LoraResult) -> None:
    """Print what a new LoRA is, how much it holds of what was to be in it, the notes, and the file."""
    ranks = [*result.ranks]
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    what = f"{counted(result.modules, 'module')} ({result.kind}, {result.dtype})"
    title = FAMILIES[result.family].title
    _line(console, Text.assemble(("LoRA", "bold"), f" of {title}: {', '.join(filter(None, (what, rank)))}"))
    for line in _shares(result):
        _line(console, Text(line))
    for note in result.notes:
        _line(console, Text(f"- {note}"))
    size = f"{bytes_text(result.bytes)} in {result.seconds:.2f} s"
    _line(console, Text.assemble((shown(result.output), "bold"), f"  {size}"))


def _shares(result: LoraResult) -> Iterator[str]:
    if result.held is not None:
        yield f"holds of the difference: {_each(result.held)}"
    elif any(share >= _LEAST for share in result.lost.values()):
        yield f"lost: {_each({block: share for block, share in result.lost.items() if share >= _LEAST})}"


def _each(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{block} {100 * share:.1f} %" for block, share in shares.items())


def _line(console: Console, text: Text) -> None:
    # Paths and notes are copied from the screen, so they are never broken.
    console.print(text, soft_wrap=True)
