"""`blockmerge lora`: the group of the commands that are about LoRAs themselves."""

from __future__ import annotations

import click

from blockmerge.cli.lora.inspect import inspect
from blockmerge.cli.lora.similarity import similarity


@click.group(short_help="Look at LoRAs, and make new ones.")
def lora() -> None:
    """Look at LoRAs and their relatives, and make new ones.

    \b
      blockmerge lora inspect style.safetensors
      blockmerge lora similarity a.safetensors b.safetensors --blocks

    `blockmerge bake` puts them into a model.
    """


for command in (inspect, similarity):
    lora.add_command(command)
