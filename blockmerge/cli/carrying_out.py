"""What the commands that write a model do once it is known what is asked for."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from blockmerge.cli.console import progress_bar, stdout_console

if TYPE_CHECKING:
    from blockmerge.merging import MergeResult, Recipe


def carry_out(
    recipe: Recipe,
    output: str | os.PathLike[str] | None,
    what: str,
    *,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **common: Any,
) -> None:
    """Run a recipe, or only plan it, and show the result; `what` stands before the progress bar, `common` are
    the arguments that `plan` and `run` share.
    """
    if dry_run:
        result = recipe.plan(output, **common).summary()
    else:
        with progress_bar(what, quiet=quiet or as_json) as progress:
            result = recipe.run(output, **common, progress=progress)
    show(result, as_json=as_json, quiet=quiet)


def show(result: MergeResult, *, as_json: bool, quiet: bool) -> None:
    """Print what was done, as it was asked for."""
    if as_json:
        from blockmerge.rendering.json_text import merge_json

        click.echo(merge_json(result))
    elif not quiet:
        from blockmerge.rendering.terminal import print_merge

        print_merge(stdout_console(), result)
