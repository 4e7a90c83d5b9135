"""`blockmerge convert`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, not_empty, progress_bar, stdout_console
from blockmerge.cli.merge import configs_option, dtype_option, naming_option
from blockmerge.cli.opening import opening_options


@click.command(short_help="Write a model under other names, as another kind of file, in another dtype.")
@click.argument("model", metavar="IN")
@click.argument("output", metavar="OUT")
@naming_option("the model's own; ldm where a folder becomes a .safetensors file")
@dtype_option
@opening_options("drop|keep|use")
@click.option(
    "--vae",
    metavar="FILE",
    default="auto",
    callback=not_empty,
    help="Bake in this VAE: a file or a folder. [default: the model's own]",
)
@click.option("--prune", is_flag=True, help="Leave out all that no loader needs.")
@configs_option
@click.option(
    "--threads", metavar="N", type=int, help="How many workers. [default: twice the processors, at most 8]"
)
@click.option("--overwrite", is_flag=True, help="Replace an existing output.")
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Write NaN and infinity that --dtype makes or keeps, instead of refusing them.",
)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
def convert(
    model: str,
    output: str,
    naming: str | None,
    dtype: str,
    ema: str,
    vae: str,
    prune: bool,
    variant: str | None,
    configs: str | None,
    threads: int | None,
    overwrite: bool,
    allow_nonfinite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Convert a model: .ckpt, .safetensors or a diffusers folder, into a .safetensors file or a folder.

    \b
      blockmerge convert model.ckpt model.safetensors --dtype fp16
      blockmerge convert model.safetensors folder/ --to diffusers
      blockmerge convert ema-only.ckpt model.safetensors --vae kl-f8.safetensors --prune

    Nothing but --dtype changes values. What the output has no place for is left out and named.
    """
    from blockmerge.merging.convert import convert as run

    with progress_bar("converting", quiet=quiet or as_json) as progress:
        result = run(
            model,
            output,
            naming=naming,
            vae=vae,
            dtype=dtype,
            ema=ema,
            prune=prune,
            variant=variant,
            configs=configs,
            threads=threads,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if as_json:
        from blockmerge.rendering.json_text import merge_json

        click.echo(merge_json(result))
    elif not quiet:
        from blockmerge.rendering.terminal import print_merge

        print_merge(stdout_console(), result)
