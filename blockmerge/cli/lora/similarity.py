"""`blockmerge lora similarity`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console


@click.command(short_help="Say how alike two LoRAs are.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--blocks", is_flag=True, help="Also show every block.")
@json_option
def similarity(a: str, b: str, blocks: bool, as_json: bool) -> None:
    """Print the cosine of what two LoRAs add to the weights.

    It is 1 for the same, 0 for nothing in common, and −1 for the opposite.

    \b
      blockmerge lora similarity v1.safetensors v2.safetensors --blocks

    Names, ranks, alphas and kinds may differ. A and B may be FILE:STRENGTH:BLOCKS, as in `bake`. No model is
    needed.
    """
    from blockmerge.comparing import lora_similarity

    with progress_bar("comparing", quiet=as_json) as progress:
        found = lora_similarity(a, b, blocks=blocks or as_json, progress=progress)
    if as_json:
        from blockmerge.rendering.json_text import lora_similarity_json

        click.echo(lora_similarity_json(found))
    else:
        from blockmerge.rendering.lora_files import print_lora_similarity

        print_lora_similarity(stdout_console(), found)
