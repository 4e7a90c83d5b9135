"""`blockmerge convert`."""

from __future__ import annotations

from typing import Any

import click

from blockmerge.cli.carrying_out import show
from blockmerge.cli.console import not_empty, progress_bar
from blockmerge.cli.output_options import output_options


@click.command(short_help="Write a model under other names, as another kind of file, in another dtype.")
@click.argument("model", metavar="IN")
@click.argument("output", metavar="OUT")
@click.option(
    "--only",
    metavar="unet|vae|text_encoder|…",
    callback=not_empty,
    help="Write one component alone: unet (or transformer), vae, text_encoder, text_encoder_2, "
    "text_encoder_3.",
)
@output_options
def convert(
    model: str,
    output: str,
    only: str | None,
    variant: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Convert a model: .ckpt, .safetensors or a diffusers folder, into a .safetensors file or a folder.

    \b
      blockmerge convert model.ckpt model.safetensors --dtype fp16
      blockmerge convert model.safetensors folder/ --to diffusers
      blockmerge convert model.safetensors vae.safetensors --only vae
      blockmerge convert ema-only.ckpt model.safetensors --vae kl-f8.safetensors --prune

    A VAE or a text encoder alone is converted, too.

    Nothing but --dtype changes values. What the output has no place for is left out and named.
    """
    from blockmerge.merging.convert import convert as run

    with progress_bar("converting", quiet=quiet or as_json) as progress:
        result = run(
            model,
            output,
            only=only,
            variant=variant,
            **options,
            progress=progress,
        )
    show(result, as_json=as_json, quiet=quiet)
