"""`blockmerge run`."""

from __future__ import annotations

import click

from blockmerge.cli.carrying_out import carry_out
from blockmerge.cli.console import json_option, not_empty
from blockmerge.cli.models_folders import models_option
from blockmerge.cli.output_options import threads_option


@click.command(short_help="Merge by a recipe of one or many stages.")
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "-o", "--output", metavar="PATH", callback=not_empty, help="Where it goes. [default: the recipe's output]"
)
@models_option
@click.option(
    "--set",
    "changes",
    metavar="[STAGE.]KEY=VALUE",
    multiple=True,
    callback=not_empty,
    help="Change the recipe on the way: X.preset=low_res, dtype=fp32, or OUT05=0.7 of the result.",
)
@click.option(
    "--device", metavar="cpu|cuda[:N]|auto", default="cpu", show_default=True, help="Where the sums are done."
)
@threads_option
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option(
    "--dry-run", is_flag=True, help="Make all checks that need no weights, show the plan, and write nothing."
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
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
    """Merge by a recipe: a TOML file that names models, stages and their options. All stages are computed in
    one pass, without files in between, and rounded once.

    \b
      blockmerge run mix.toml
      blockmerge run mix.toml --set final.weights=0.4 --set X.preset=low_res -o other.safetensors

    What a recipe looks like is in docs/recipes.md. A pinned recipe, as blockmerge recipe FILE --pin prints
    it, makes its file, or nothing.
    """
    from blockmerge.errors import BlockmergeError, shown
    from blockmerge.merging.again import Recorded, Searched, is_pinned
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
            output,
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
