"""`blockmerge lora …`: the commands about LoRAs, one file each."""

import click

from blockmerge.cli.lora.extract import extract
from blockmerge.cli.lora.merge import merge
from blockmerge.cli.lora.resize import resize


@click.group(short_help="Merge, extract and resize LoRAs.")
def lora() -> None:
    """Make LoRAs of other LoRAs, or of two models."""


for command in (merge, extract, resize):
    lora.add_command(command)
