"""`blockmerge lora inspect`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, progress_bar, stdout_console


@click.command(short_help="Show what is in a LoRA, and where it works.")
@click.argument("file")
@json_option
def inspect(file: str, as_json: bool) -> None:
    """Show a LoRA's kind, family, ranks and alphas, and how much of its change is in each block.

    Then show its trigger words, and the model that it was trained on. No model is needed.
    """
    from blockmerge.inspecting import inspect_lora

    with progress_bar("reading", quiet=as_json) as progress:
        found = inspect_lora(file, progress=progress)
    if as_json:
        from blockmerge.rendering.json_text import lora_inspection_json

        click.echo(lora_inspection_json(found))
    else:
        from blockmerge.rendering.lora_files import print_lora_inspection

        print_lora_inspection(stdout_console(), found)
