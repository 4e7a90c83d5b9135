"""`blockmerge demo`."""

from __future__ import annotations

from pathlib import Path

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console


@click.command(short_help="Make two models and merge them.")
@click.argument("folder", metavar="[DIR]", default="blockmerge-demo")
@click.option(
    "--family", metavar="sd1|sd2|sdxl", default="sd1", show_default=True, help="Which family of models."
)
@click.option(
    "--full-size", is_flag=True, help="Real widths: 2.1 GB (sd1), 2.6 GB (sd2) or 6.9 GB (sdxl) each."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random weights.")
@click.option("--overwrite", is_flag=True, help="Replace the files of an earlier demo.")
@json_option
def demo(folder: str, family: str, full_size: bool, seed: int, overwrite: bool, as_json: bool) -> None:
    """Write two models with real tensor names into DIR and merge them with the preset high_res.

    DIR gets a.safetensors, b.safetensors and a+b-high_res.safetensors: a few MB, unless --full-size is given.
    """
    from blockmerge.demo import write_pair
    from blockmerge.errors import OutputError, reason, shown
    from blockmerge.merging import merge

    home = Path(folder)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {shown(folder)}: {reason(error)}") from error
    a, b, output = home / "a.safetensors", home / "b.safetensors", home / "a+b-high_res.safetensors"
    if not overwrite and (existing := [path for path in (a, b, output) if path.exists()]):
        raise OutputError(f"{shown(existing[0])} exists: give another folder, or --overwrite")
    with progress_bar("making models", quiet=as_json) as progress:
        write_pair(a, b, family, full_size=full_size, seed=seed, overwrite=overwrite, progress=progress)
    with progress_bar("merging", quiet=as_json) as progress:
        result = merge(a, b, preset="high_res", output=output, overwrite=overwrite, progress=progress)
    if as_json:
        from blockmerge.rendering.json_text import merge_json

        click.echo(merge_json(result))
    else:
        from blockmerge.rendering.terminal import print_merge

        print_merge(stdout_console(), result)
