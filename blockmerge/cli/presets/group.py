"""`blockmerge presets`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option
from blockmerge.cli.presets.add import add
from blockmerge.cli.presets.list import list_presets, print_all
from blockmerge.cli.presets.path import path
from blockmerge.cli.presets.show import show


@click.group(invoke_without_command=True, short_help="List the presets, or show one.")
@json_option
@click.pass_context
def presets(context: click.Context, as_json: bool) -> None:
    """List the presets with their curves from BASE and IN00 to OUT11: your own first.

    Your own are TOML or text files in the folder that `blockmerge presets path` prints (docs/presets.md).
    Files, and lines of a file, that cannot be read are left out and named.
    """
    if context.invoked_subcommand is None:
        print_all(as_json=as_json)


for command in (list_presets, show, add, path):
    presets.add_command(command)
