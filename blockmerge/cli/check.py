"""`blockmerge check`."""

from __future__ import annotations

from functools import partial

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console
from blockmerge.cli.many_files import ManyFiles, are_several
from blockmerge.cli.opening import variant_option


@click.command(short_help="Say what is wrong with a model file.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
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
    files: tuple[str, ...],
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
      blockmerge check models/ more.safetensors
      blockmerge check model.ckpt --fix repaired.safetensors

    If you give several files, folders or patterns, each file gets a line. With --fix, the exit code is about
    what could not be repaired. FILE itself is never changed.
    """
    from blockmerge.errors import CheckpointError, counted, listing, shown
    from blockmerge.inspecting import check as look
    from blockmerge.inspecting import repair

    if are_several(files):
        _check_many(files, fix, variant, threads, as_json, quiet)
        return
    (file,) = files
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


def _check_many(
    files: tuple[str, ...],
    fix: str | None,
    variant: str | None,
    threads: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    from blockmerge.checkpoints import Unreadable
    from blockmerge.errors import CheckpointError, RecipeError, listing
    from blockmerge.inspecting import check as look
    from blockmerge.rendering.many_files import FileLines

    if fix is not None:
        raise RecipeError("--fix writes a copy of one model: name one file, or leave out --fix")
    found = ManyFiles(files, variant).show(
        partial(look, threads=threads), FileLines.check, "checking", as_json=as_json, quiet=quiet
    )
    failed = [name for name, one in found if isinstance(one, Unreadable) or one.faults]
    if failed:
        raise CheckpointError(
            f"faults in {len(failed)} of {len(found)} files, or they cannot be read: {listing(failed)}"
        )
