"""`blockmerge run`."""

from __future__ import annotations

import click

from blockmerge.cli.carrying_out import carry_out
from blockmerge.cli.console import not_empty
from blockmerge.cli.recipe_options import recipe_options


@click.command(short_help="Merge by a recipe of one or many stages.")
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    callback=not_empty,
    help="Where it goes. [default: the recipe's output, or a file of the recipe's name beside it]",
)
@recipe_options
def run(
    recipe: str,
    output: str | None,
    models: tuple[str, ...],
    changes: tuple[str, ...],
    threads: int | None,
    device: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge by a recipe: a TOML file that names models, stages and their options.

    All stages are computed in one pass, without files in between, and rounded once.

    \b
      blockmerge run mix.toml
      blockmerge run mix.toml --set final.weights=0.4 --set X.preset=low_res -o other.safetensors

    docs/recipes.md says what a recipe looks like. RECIPE may also be a pinned one, as printed by
    blockmerge recipe FILE --pin. It makes exactly its file, or nothing.
    """
    from blockmerge.errors import BlockmergeError, shown
    from blockmerge.merging.again import Recorded, Searched, is_pinned
    from blockmerge.merging.default_name import output_beside
    from blockmerge.merging.recipe import Recipe

    pinned: dict[str, object] = {}
    if is_pinned(recipe):
        recorded = Recorded.of(recipe)
        found = recorded.recipe(Searched.beside_file(recorded, models), changes)
        if not changes:
            pinned = {"metadata": recorded.metadata, **({} if dry_run else {"sha256": recorded.sha256})}
    else:
        found = Recipe.load(recipe, models=models, changes=changes)
    try:
        carry_out(
            found,
            output or found.output or output_beside(recipe, found),
            "merging",
            device=device,
            threads=threads,
            overwrite=overwrite,
            **pinned,
            dry_run=dry_run,
            as_json=as_json,
            quiet=quiet,
        )
    except BlockmergeError as error:
        raise type(error)(f"{shown(recipe)}: {error}") from error
