"""`blockmerge presets list`, which `blockmerge presets` does, too."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, stdout_console


@click.command("list", short_help="List the presets, as without a word.")
@json_option
def list_presets(as_json: bool) -> None:
    """List the presets with their curves from BASE and IN00 to OUT11: your own first."""
    print_all(as_json=as_json)


def print_all(*, as_json: bool) -> None:
    """Print all presets, and name what could not be read."""
    from blockmerge.weights import presets, unreadable_presets

    if as_json:
        from blockmerge.rendering.json_text import presets_json

        click.echo(presets_json(presets()))
    else:
        from blockmerge.rendering.terminal import print_presets

        print_presets(stdout_console(), presets())
    for fault in unreadable_presets():
        click.echo(f"Left out: {fault}", err=True)
