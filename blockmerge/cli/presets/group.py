"""`blockmerge presets`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, stdout_console
from blockmerge.cli.presets.add import add
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
    if context.invoked_subcommand is not None:
        return
    from blockmerge.weights import presets as all_presets
    from blockmerge.weights import unreadable_presets

    if as_json:
        from blockmerge.rendering.json_text import presets_json

        click.echo(presets_json(all_presets()))
    else:
        from blockmerge.rendering.terminal import print_presets

        print_presets(stdout_console(), all_presets())
    for fault in unreadable_presets():
        click.echo(f"Left out: {fault}", err=True)


for command in (show, add, path):
    presets.add_command(command)
