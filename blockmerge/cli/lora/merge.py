"""`blockmerge lora merge`."""

from __future__ import annotations

from typing import Any

import click

from blockmerge.cli.console import progress_bar
from blockmerge.cli.lora.options import lora_options, output_option, show, size_options


@click.command(short_help="Make one LoRA from several.")
@click.argument("loras", metavar="FILE[:STRENGTH[:BLOCKS]]…", nargs=-1, required=True)
@output_option
@size_options("[default: nothing is lost]")
@lora_options("the widest of the inputs'")
def merge(loras: tuple[str, ...], as_json: bool, quiet: bool, **options: Any) -> None:
    """Make one LoRA that does what several do together, each at its strength.

    \b
      blockmerge lora merge a.safetensors:0.7 b.safetensors:0.4 -o ab.safetensors
      blockmerge lora merge a.safetensors b.safetensors:-0.5:OUTALL -o ab.safetensors --rank 32

    Without --rank and --energy the result is exact, and the ranks add up. LoHa and LoKr become LoRAs. Kinds
    that look at the model's weights, such as DoRA, must be baked into a model first.
    """
    from blockmerge.lora_making import merge_loras

    with progress_bar("merging", quiet=quiet or as_json) as progress:
        result = merge_loras(loras, **options, progress=progress)
    show(result, as_json=as_json, quiet=quiet)
