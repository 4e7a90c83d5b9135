"""`blockmerge inspect`."""

from __future__ import annotations

from functools import partial

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console
from blockmerge.cli.many_files import ManyFiles, are_several
from blockmerge.cli.opening import variant_option


@click.command(short_help="Show what is in a model file.")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
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
def inspect(files: tuple[str, ...], hashes: bool, tensors: bool, variant: str | None, as_json: bool) -> None:
    """Show a model's family, components, blocks and metadata, from its header alone.

    \b
      blockmerge inspect model.safetensors
      blockmerge inspect models/ more.ckpt

    If you give several files, folders or patterns, each file gets a line. If one cannot be read, its line
    says why, the others are still shown, and the exit code is 1.
    """
    from blockmerge.inspecting import inspect as look

    if are_several(files):
        _inspect_many(files, hashes, tensors, variant, as_json)
        return
    with progress_bar("hashing", quiet=as_json or not hashes) as progress:
        found = look(files[0], hashes, progress, tensors=tensors, variant=variant)
    if as_json:
        from blockmerge.rendering.json_text import inspection_json

        click.echo(inspection_json(found))
    else:
        from blockmerge.rendering.terminal import print_inspection

        print_inspection(stdout_console(), found)


def _inspect_many(
    files: tuple[str, ...], hashes: bool, tensors: bool, variant: str | None, as_json: bool
) -> None:
    from blockmerge.checkpoints import Unreadable
    from blockmerge.errors import CheckpointError, RecipeError, listing
    from blockmerge.inspecting import inspect as look
    from blockmerge.rendering.many_files import FileLines

    if tensors and not as_json:
        raise RecipeError("several files get a line each: name one for --tensors, or add --json")
    found = ManyFiles(files, variant).show(
        partial(look, hashes=hashes, tensors=tensors),
        FileLines.inspection,
        "hashing" if hashes else None,
        as_json=as_json,
    )
    failed = [name for name, one in found if isinstance(one, Unreadable)]
    if failed:
        raise CheckpointError(f"{len(failed)} of {len(found)} files cannot be read: {listing(failed)}")
