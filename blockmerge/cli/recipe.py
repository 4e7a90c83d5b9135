"""`blockmerge recipe`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, stdout_console


@click.command(short_help="Show what made a merge: a recipe to edit and run.")
@click.argument("file", metavar="FILE")
@click.option("--tree", is_flag=True, help="Draw where it comes from, and what its models come from.")
@json_option
def recipe(file: str, tree: bool, as_json: bool) -> None:
    """Show the recipe in a merged file's metadata, as TOML that `blockmerge run` takes, and the command.

    \b
      blockmerge recipe merged.safetensors
      blockmerge recipe merged.safetensors > mix.toml
      blockmerge recipe merged.safetensors --tree
    """
    from blockmerge.merging.again import Recorded

    recorded = Recorded.of(file)
    if as_json:
        from blockmerge.rendering.json_text import recipe_json

        click.echo(recipe_json(recorded.run))
        return
    from blockmerge.rendering import recipes

    if tree:
        recipes.print_tree(stdout_console(), recorded.source.name, recorded.run)
    else:
        click.echo(recipes.recipe_text(recorded))
