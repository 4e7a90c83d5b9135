"""`blockmerge verify`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console
from blockmerge.cli.models_folders import models_option
from blockmerge.cli.output_options import threads_option


@click.command(short_help="Check that a merge is what its recipe says.")
@click.argument("file", metavar="FILE")
@models_option
@threads_option
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def verify(file: str, models: tuple[str, ...], threads: int | None, as_json: bool, quiet: bool) -> None:
    """Check that a merge is what its recipe says: make it again in memory, and compare every bit.

    \b
      blockmerge verify merged.safetensors
      blockmerge verify merged.safetensors --models ~/models

    The exit code is 0 if all bits are the same, else 1. Tensors that differ are named.
    """
    from blockmerge.errors import CheckpointError, shown
    from blockmerge.merging.verify import verify as verify_file

    with progress_bar("comparing", quiet=quiet or as_json) as progress:
        found = verify_file(file, models, threads=threads, progress=progress)
    if as_json:
        from blockmerge.rendering.json_text import verification_json

        click.echo(verification_json(found))
    elif not quiet:
        from blockmerge.rendering.recipes import print_verification

        print_verification(stdout_console(), found)
    if not found.same:
        raise CheckpointError(f"{shown(found.name)} is not what its recipe makes: {found.said}")
