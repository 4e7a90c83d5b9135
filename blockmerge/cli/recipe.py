"""`blockmerge recipe`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from blockmerge.cli.console import json_option, not_empty, progress_bar, stdout_console
from blockmerge.cli.text_files import write_file


@click.command(short_help="Show what made a merge: a recipe to edit and run.")
@click.argument("file", metavar="FILE")
@click.option("--tree", is_flag=True, help="Draw what it was made from, and what its models were made from.")
@click.option(
    "--pin",
    is_flag=True,
    help="Print as JSON what `blockmerge again` needs to make the same file elsewhere, with its hashes.",
)
@click.option(
    "-o", "--output", metavar="PATH", callback=not_empty, help="Write it to a file instead of the terminal."
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@json_option
def recipe(file: str, tree: bool, pin: bool, output: str | None, overwrite: bool, as_json: bool) -> None:
    """Show the recipe in a merged file's metadata: TOML for `blockmerge run`, and the command.

    \b
      blockmerge recipe merged.safetensors
      blockmerge recipe merged.safetensors -o mix.toml
      blockmerge recipe merged.safetensors --tree
      blockmerge recipe merged.safetensors --pin -o release.json
    """
    from blockmerge.checkpoints import check_output
    from blockmerge.errors import OutputError, RecipeError, shown
    from blockmerge.merging.again import Recorded
    from blockmerge.rendering import recipes

    if tree and not (pin or as_json):
        if output is not None:
            raise RecipeError("--tree is drawn on the terminal: leave out -o, or --tree")
        recorded = Recorded.of(file)
        recipes.print_tree(stdout_console(), recorded.name, recorded.run)
        return
    target = None
    if output is not None:
        ending, form = (".json", "JSON") if pin or as_json else (".toml", "TOML")
        if not output.lower().endswith(ending):
            raise OutputError(f"{shown(output)}: the recipe is written as {form}: end its name with {ending}")
        target = check_output(output, [Path(file)] if os.path.exists(file) else [], overwrite=overwrite)
    text = _text_of(file, pin=pin, as_json=as_json)
    if target is None:
        click.echo(text)
    else:
        write_file(target, f"{text}\n".encode(), overwrite=overwrite)
        click.echo(f"wrote {shown(output)}", err=True)


def _text_of(file: str, *, pin: bool, as_json: bool) -> str:
    """The recipe as JSON with its hashes, as JSON, or as TOML."""
    from blockmerge.merging.again import Recorded, pinned
    from blockmerge.rendering.json_text import recipe_json
    from blockmerge.rendering.recipes import recipe_text

    if pin:
        with progress_bar("hashing", quiet=as_json) as progress:
            return recipe_json(pinned(file, progress))
    recorded = Recorded.of(file)
    return recipe_json(recorded.run) if as_json else recipe_text(recorded)
