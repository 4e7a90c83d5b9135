"""`blockmerge inspect`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console
from blockmerge.cli.opening import variant_option


@click.command(short_help="Show what is in a model file.")
@click.argument("file")
@click.option(
    "--hash",
    "hashes",
    is_flag=True,
    help="Also compute AutoV1, AutoV2, AutoV3 and SHA-256 (reads the whole file).",
)
@click.option(
    "--tensors", is_flag=True, help="Also list every tensor, under the names that element rules look at."
)
@variant_option
@json_option
def inspect(file: str, hashes: bool, tensors: bool, variant: str | None, as_json: bool) -> None:
    """Show a model's family, components, blocks and metadata, from its header alone."""
    from blockmerge.inspecting import inspect as look

    with progress_bar("hashing", quiet=as_json or not hashes) as progress:
        found = look(file, hashes, progress, tensors=tensors, variant=variant)
    if as_json:
        from blockmerge.rendering.json_text import inspection_json

        click.echo(inspection_json(found))
    else:
        from blockmerge.rendering.terminal import print_inspection

        print_inspection(stdout_console(), found)
