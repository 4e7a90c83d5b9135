"""`blockmerge presets path`."""

from __future__ import annotations

import click


@click.command(short_help="Print the folder of your own.")
def path() -> None:
    """Print the folder of your own presets, which need not be there yet."""
    from blockmerge.weights import user_folder

    click.echo(str(user_folder()))
