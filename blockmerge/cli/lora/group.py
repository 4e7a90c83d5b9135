"""`blockmerge lora`: the group of the commands that are about LoRAs themselves."""

from __future__ import annotations

import click

from blockmerge.cli.lora.convert import convert
from blockmerge.cli.lora.extract import extract
from blockmerge.cli.lora.inspect import inspect
from blockmerge.cli.lora.merge import merge
from blockmerge.cli.lora.resize import resize
from blockmerge.cli.lora.similarity import similarity


@click.group(short_help="Look at LoRAs, and make new ones.")
def lora() -> None:
    """Look at LoRAs and their relatives, and make new ones.

    \b
      blockmerge lora inspect style.safetensors
      blockmerge lora similarity a.safetensors b.safetensors --blocks
      blockmerge lora merge a.safetensors:0.7 b.safetensors:0.4 -o ab.safetensors
      blockmerge lora resize big.safetensors -o small.safetensors --energy 0.99
      blockmerge lora extract tuned.safetensors base.safetensors -o style.safetensors --rank 32
      blockmerge lora convert style.safetensors -o style-peft.safetensors --to diffusers

    `blockmerge bake` puts them into a model.
    """


for command in (inspect, similarity, merge, resize, extract, convert):
    lora.add_command(command)
