"""`blockmerge lora extract`."""

from __future__ import annotations

from typing import Any

import click

from blockmerge.cli.console import progress_bar
from blockmerge.cli.lora.options import lora_options, output_option, show, size_options
from blockmerge.cli.opening import opening_options


@click.command(short_help="Make a LoRA from the difference of two models.")
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="BASE")
@output_option
@size_options("Give --rank or --energy.")
@click.option(
    "--conv-rank",
    metavar="N",
    type=int,
    help="With --rank: the rank of convolutions larger than 1×1. [default: they are left out]",
)
@opening_options("drop|use")
@lora_options("fp16")
def extract(tuned: str, base: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Make a LoRA from the difference of two models. It turns BASE into TUNED, as far as a LoRA can.

    \b
      blockmerge lora extract tuned.safetensors base.safetensors -o style.safetensors --rank 32
      blockmerge lora extract tuned.safetensors base.safetensors -o style.safetensors --energy 0.95

    Layers that do not differ are left out. Norms and biases have no place in a LoRA: if they differ, they are
    named. The result shows, for each block, how much of the difference the LoRA holds.
    """
    from blockmerge.lora_making import extract_lora

    with progress_bar("extracting", quiet=quiet or as_json) as progress:
        result = extract_lora(tuned, base, **options, progress=progress)
    show(result, as_json=as_json, quiet=quiet)
