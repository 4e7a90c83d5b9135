"""What the commands share: where they print, and the progress bar.

Loads rich late, since `--help` does without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from blockmerge.errors import RecipeError

if TYPE_CHECKING:
    from rich.console import Console

    from blockmerge.streaming import Progress


def not_empty(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse an empty text on the command line, which is most likely a variable of the shell that is not
    set.
    """
    assert parameter.name is not None
    is_given = context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    if is_given and not all(
        text.strip(" ,;\n") for text in (value if isinstance(value, tuple) else (value,))
    ):
        raise RecipeError(f"{parameter.opts[0]} is empty: give it a value, or leave it out")
    return value


json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object and nothing else.")


def stdout_console() -> Console:
    """The console for results. Names in them are never taken for markup."""
    from rich.console import Console

    console = Console(markup=False, highlight=False, emoji=False)
    if console.width < 20:  # no terminal is: COLUMNS=0 or a window that tells no size
        console.width = 80
    return console


@contextmanager
def progress_bar(what: str, *, quiet: bool = False) -> Iterator[Progress | None]:
    """Give a progress callback that draws a bar with bytes and rate on stderr; None where that is no
    terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True, markup=False), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
