"""`blockmerge lora extract`."""

from __future__ import annotations

from typing import Any

import click

from blockmerge.cli.console import progress_bar
from blockmerge.cli.lora.options import lora_options, output_option, show, size_options
from blockmerge.cli.opening import opening_options


@click.command(short_help="Make a LoRA of the difference of two models.")
@click.argument("tuned", metavar="TUNED")
@click.argument("base", metavar="BASE")
@output_option
@size_options("One of both has to be given.")
@click.option(
    "--conv-rank",
    metavar="N",
    type=int,
    help="With --rank: the rank of convolutions of more than one place. [default: they are left out]",
)
@opening_options("drop|use")
@lora_options("fp16")
def extract(tuned: str, base: str, as_json: bool, quiet: bool, **options: Any) -> None:
    """Make a LoRA that makes of BASE what TUNED is, as far as a LoRA can.

    \b
      blockmerge lora extract tuned.safetensors base.safetensors -o style.safetensors --rank 32
      blockmerge lora extract tuned.safetensors base.safetensors -o style.safetensors --energy 0.95

    Layers that do not differ are left out. What differs and has no place in a LoRA, as norms and biases, is
    named. How much of the difference the LoRA holds is shown for each block.
    """
    from blockmerge.lora_making import extract_lora

    with progress_bar("extracting", quiet=quiet or as_json) as progress:
        result = extract_lora(tuned, base, **options, progress=progress)
    show(result, as_json=as_json, quiet=quiet)
