"""`blockmerge similarity`."""

from __future__ import annotations

from typing import Any

import click

from blockmerge.cli.console import progress_bar
from blockmerge.cli.opening import opening_options
from blockmerge.cli.recipes_as_models import model_of
from blockmerge.cli.report import ReportTarget, report_options


@click.command(short_help="Say how alike models are.")
@click.argument("models", metavar="BASE REF...", nargs=-1, required=True)
@click.option(
    "--method",
    metavar="attention|weights",
    default="attention",
    show_default=True,
    help="The published attention similarity in percent, or the cosine of all weights.",
)
@click.option("--blocks", is_flag=True, help="Also show every block.")
@click.option("--matrix", is_flag=True, help="Compare all with all.")
@click.option(
    "--common-base", metavar="C", help="With --method weights: also the cosine of the differences from C."
)
@opening_options("drop|use")
@click.option("--threads", metavar="N", type=int, help="How many workers, for --method weights.")
@report_options
def similarity(
    models: tuple[str, ...],
    method: str,
    blocks: bool,
    matrix: bool,
    common_base: str | None,
    variant: str | None,
    ema: str,
    threads: int | None,
    form: str | None,
    as_json: bool,
    output: str | None,
    overwrite: bool,
) -> None:
    """Say how alike BASE is to every REF: a model, a folder of models, or a pattern.

    \b
      blockmerge similarity mine.safetensors refs/*.safetensors
      blockmerge similarity mine.safetensors refs/ --method weights --blocks
      blockmerge similarity a.safetensors b.safetensors c.safetensors --matrix -o report.html

    The attention similarity gives the numbers of ASimilarityCalculator. It reads a few percent of the files.
    A file that cannot be compared gets a line that says why. The others go on, and the exit code is 1.
    """
    from blockmerge.comparing import check_method, similarity_matrix
    from blockmerge.comparing import similarity as compare
    from blockmerge.errors import CheckpointError, RecipeError, listing, shown

    if matrix and (common_base is not None or blocks):
        raise RecipeError("a matrix shows one number for two models: leave out --blocks and --common-base")
    check_method(method, common_base)
    target = ReportTarget.of(
        form, as_json, output, overwrite, (*models, *([common_base] if common_base else []))
    )
    opening: dict[str, Any] = {"variant": variant, "ema": ema}
    given = list(map(model_of, models))
    if matrix:
        with progress_bar("comparing", quiet=target.is_quiet) as progress:
            table = similarity_matrix(given, method, **opening, threads=threads, progress=progress)
        from blockmerge.rendering.comparison import print_matrix
        from blockmerge.rendering.csv_text import matrix_csv
        from blockmerge.rendering.html_page import matrix_html
        from blockmerge.rendering.json_text import matrix_json

        target.write(
            lambda console: print_matrix(console, table),
            {
                "json": lambda: matrix_json(table),
                "csv": lambda: matrix_csv(table),
                "html": lambda: matrix_html(table),
            },
        )
        failed = list(table.errors)
    else:
        base, *references = given
        if not references:
            raise RecipeError(f"nothing to compare {shown(models[0])} with: name one more model, or a folder")
        with progress_bar("comparing", quiet=target.is_quiet) as progress:
            result = compare(
                base,
                references,
                method,
                common_base=None if common_base is None else model_of(common_base),
                **opening,
                threads=threads,
                progress=progress,
            )
        from blockmerge.rendering.comparison import print_similarity
        from blockmerge.rendering.csv_text import similarity_csv
        from blockmerge.rendering.html_page import similarity_html
        from blockmerge.rendering.json_text import similarity_json

        target.write(
            lambda console: print_similarity(console, result, blocks=blocks),
            {
                "json": lambda: similarity_json(result),
                "csv": lambda: similarity_csv(result),
                "html": lambda: similarity_html(result),
            },
        )
        failed = [one.name for one in result.failed]
    if failed:
        raise CheckpointError(f"{len(failed)} of the models could not be compared: {listing(failed)}")
