"""Tables that lose nothing in a narrow terminal."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table


def print_table(console: Console, table: Table, needed: int | None = None) -> None:
    """Print a table at least as wide as `needed` (by default its cells): the terminal breaks its lines."""
    width = console.width
    if needed is None:
        needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.width = max(width, needed)
    console.print(table, soft_wrap=False, crop=False)
    console.width = width
