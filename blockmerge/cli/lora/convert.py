"""`blockmerge lora convert`."""

from __future__ import annotations

from typing import Any

import click

from blockmerge.cli.console import progress_bar, stdout_console
from blockmerge.cli.lora.options import lora_options, output_option


@click.command(short_help="Write a LoRA under other programs' names.")
@click.argument("lora", metavar="FILE")
@output_option
@click.option("--to", metavar="kohya|diffusers", required=True, help="Whose names the modules get.")
@lora_options("each tensor's own")
def convert(lora: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write a LoRA under kohya's names (sd-scripts, most web UIs) or diffusers' names (PEFT).

    \b
      blockmerge lora convert style.safetensors -o style-peft.safetensors --to diffusers
      blockmerge lora convert style-peft.safetensors -o style.safetensors --to kohya

    diffusers' form has no alphas, so alpha / rank is multiplied into a factor. This is exact for powers of
    two, except for fp16 values near 0; a note says so. Kinds that have no place there, such as LoHa, are
    refused.
    """
    from blockmerge.lora_making import convert_lora

    with progress_bar("converting", quiet=quiet or as_json) as progress:
        result = convert_lora(lora, **options, progress=progress)
    if as_json:
        from blockmerge.rendering.json_text import lora_conversion_json

        click.echo(lora_conversion_json(result))
    elif not quiet:
        from blockmerge.rendering.lora_files import print_lora_conversion

        print_lora_conversion(stdout_console(), result)
