"""`blockmerge lora resize`."""

from __future__ import annotations

from typing import Any

import click

from blockmerge.cli.console import progress_bar
from blockmerge.cli.lora.options import lora_options, output_option, show, size_options


@click.command(short_help="Make a LoRA smaller.")
@click.argument("lora", metavar="FILE")
@output_option
@size_options("Give --rank or --energy.")
@lora_options("the input's widest")
def resize(lora: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Make a LoRA smaller: the best approximation of each module at a lower rank.

    \b
      blockmerge lora resize big.safetensors -o small.safetensors --energy 0.99
      blockmerge lora resize big.safetensors -o small.safetensors --rank 16

    Metadata about the training is kept.
    """
    from blockmerge.lora_making import resize_lora

    with progress_bar("resizing", quiet=quiet or as_json) as progress:
        result = resize_lora(lora, **options, progress=progress)
    show(result, as_json=as_json, quiet=quiet)
