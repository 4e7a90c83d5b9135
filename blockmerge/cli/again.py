"""`blockmerge again`."""

from __future__ import annotations

import click

from blockmerge.cli.carrying_out import carry_out
from blockmerge.cli.console import not_empty
from blockmerge.cli.recipe_options import recipe_options


@click.command(short_help="Make a merge again from its own recipe, the same or a variant.")
@click.argument("file", metavar="FILE")
@click.option("-o", "--output", metavar="PATH", required=True, callback=not_empty, help="Where it goes.")
@recipe_options
def again(
    file: str,
    output: str,
    models: tuple[str, ...],
    changes: tuple[str, ...],
    threads: int | None,
    device: str,
    overwrite: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a merge again from the recipe in its metadata. Without --set it is the same file, bit for bit.

    \b
      blockmerge again merged.safetensors -o same.safetensors
      blockmerge again merged.safetensors --models ~/models --set OUT05=0.7 -o variant.safetensors

    The models are found by their contents, whatever they are called now: beside FILE, in the current folder,
    and in the folders given. --set changes the recipe. A weight goes on top of those that the merge was made
    with.

    FILE may also be a pinned recipe, as blockmerge recipe FILE --pin prints it. Then the output gets its name
    only if it is that file, bit for bit.
    """
    from blockmerge.merging.again import Recorded, Searched, check_other

    recorded = Recorded.of(file)
    check_other(file, output)
    recipe = recorded.recipe(Searched.beside_file(recorded, models), changes)
    pinned = {} if changes or recorded.sha256 is None or dry_run else {"sha256": recorded.sha256}
    carry_out(
        recipe,
        output,
        "merging",
        device=device,
        threads=threads,
        overwrite=overwrite,
        metadata=None if changes else recorded.metadata,
        **pinned,
        dry_run=dry_run,
        as_json=as_json,
        quiet=quiet,
    )
