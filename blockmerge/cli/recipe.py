"""`blockmerge recipe`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console


@click.command(short_help="Show what made a merge: a recipe to edit and run.")
@click.argument("file", metavar="FILE")
@click.option("--tree", is_flag=True, help="Draw what it was made from, and what its models were made from.")
@click.option(
    "--pin",
    is_flag=True,
    help="Print as JSON what `blockmerge again` needs to make the same file elsewhere, with its hashes.",
)
@json_option
def recipe(file: str, tree: bool, pin: bool, as_json: bool) -> None:
    """Show the recipe in a merged file's metadata: TOML for `blockmerge run`, and the command.

    \b
      blockmerge recipe merged.safetensors
      blockmerge recipe merged.safetensors > mix.toml
      blockmerge recipe merged.safetensors --tree
      blockmerge recipe merged.safetensors --pin > release.json
    """
    from blockmerge.merging.again import Recorded, pinned

    if pin:
        from blockmerge.rendering.json_text import recipe_json

        with progress_bar("hashing", quiet=as_json) as progress:
            found = pinned(file, progress)
        click.echo(recipe_json(found))
        return
    recorded = Recorded.of(file)
    if as_json:
        from blockmerge.rendering.json_text import recipe_json

        click.echo(recipe_json(recorded.run))
        return
    from blockmerge.rendering import recipes

    if tree:
        recipes.print_tree(stdout_console(), recorded.name, recorded.run)
    else:
        click.echo(recipes.recipe_text(recorded))
