"""`blockmerge explain`."""

from __future__ import annotations

import click

from blockmerge.cli.console import progress_bar
from blockmerge.cli.opening import opening_options
from blockmerge.cli.recipes_as_models import model_of
from blockmerge.cli.report import ReportTarget, report_options


@click.command(short_help="Say which models a merge was made from, and how.")
@click.argument("merge")
@click.argument("candidates", metavar="CANDIDATE...", nargs=-1, required=True)
@click.option(
    "--tensors",
    is_flag=True,
    help="Also list every tensor, for merges whose weights change within blocks.",
)
@opening_options("drop|use")
@click.option(
    "--threads", metavar="N", type=int, help="How many workers. [default: twice the processors, at most 8]"
)
@report_options
def explain(
    merge: str,
    candidates: tuple[str, ...],
    tensors: bool,
    variant: str | None,
    ema: str,
    threads: int | None,
    form: str | None,
    as_json: bool,
    output: str | None,
    overwrite: bool,
) -> None:
    """Say which CANDIDATEs MERGE was made from, and with which weights. Or say that it was not.

    \b
      blockmerge explain merged.safetensors a.safetensors b.safetensors c.safetensors
      blockmerge explain merged.safetensors models/ -o report.html

    Candidates are models, folders of models, or patterns. The fewest that explain the file win. Then the
    merge is made again in memory and compared with the file. Everything is read twice.
    """
    from blockmerge.errors import CheckpointError, listing
    from blockmerge.explaining import explain as find_origin

    target = ReportTarget.of(form, as_json, output, overwrite, (merge, *candidates))
    with progress_bar("looking", quiet=target.is_quiet) as progress:
        found = find_origin(
            model_of(merge),
            list(map(model_of, candidates)),
            tensors=tensors,
            variant=variant,
            ema=ema,
            threads=threads,
            progress=progress,
        )
    from blockmerge.rendering.comparison import print_explanation
    from blockmerge.rendering.csv_text import explanation_csv
    from blockmerge.rendering.html_page import explanation_html
    from blockmerge.rendering.json_text import explanation_json

    target.write(
        lambda console: print_explanation(console, found),
        {
            "json": lambda: explanation_json(found),
            "csv": lambda: explanation_csv(found),
            "html": lambda: explanation_html(found),
        },
    )
    if output is not None:
        click.echo(found.verdict, err=True)
    if found.left_out:
        raise CheckpointError(
            f"{len(found.left_out)} of the candidates could not be used: {listing(found.left_out)}"
        )
