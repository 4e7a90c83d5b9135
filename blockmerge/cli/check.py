"""`blockmerge check`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console
from blockmerge.cli.opening import variant_option


@click.command(short_help="Say what is wrong with a model file.")
@click.argument("file")
@click.option(
    "--fix",
    metavar="OUT",
    help="Write a repaired copy: a .safetensors file, or a folder if FILE is one.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing copy.")
@variant_option
@click.option(
    "--threads", metavar="N", type=int, help="How many workers. [default: twice the processors, at most 8]"
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but the line that says something is wrong.")
def check(
    file: str,
    fix: str | None,
    overwrite: bool,
    variant: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Look for what can be wrong with a model: missing, broken or superfluous tensors, NaN, metadata.

    The exit code is 1 for an error or a warning, and 0 for notes alone. Everything is read once.

    \b
      blockmerge check model.safetensors
      blockmerge check model.ckpt --fix repaired.safetensors

    With --fix, the exit code is about what could not be repaired. FILE itself is never changed.
    """
    from blockmerge.errors import CheckpointError, counted, listing, shown
    from blockmerge.inspecting import check as look
    from blockmerge.inspecting import repair

    with progress_bar("checking", quiet=as_json or quiet) as progress:
        if fix is None:
            found = look(file, progress, threads, variant=variant)
        else:
            found = repair(
                file, fix, threads=threads, overwrite=overwrite, variant=variant, progress=progress
            )
    if as_json:
        from blockmerge.rendering.json_text import check_json

        click.echo(check_json(found))
    elif not quiet:
        from blockmerge.rendering.terminal import print_check

        print_check(stdout_console(), found)
    if found.faults:
        codes = dict.fromkeys(problem.code for problem in found.faults)
        raise CheckpointError(
            f"{shown(found.name)} has {counted(len(found.faults), 'fault')}: {listing(codes, 10)}"
        )
