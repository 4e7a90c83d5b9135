"""`blockmerge methods`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, stdout_console


@click.command(short_help="List the merge methods, or show one.")
@click.argument("name", required=False)
@json_option
def methods(name: str | None, as_json: bool) -> None:
    """List the merge methods. With NAME, show one: its formula, weights, numbers and source."""
    from blockmerge.methods import METHODS, find_method

    chosen = list(METHODS.values()) if name is None else [find_method(name)]
    if as_json:
        from blockmerge.rendering.json_text import methods_json

        click.echo(methods_json(chosen))
    else:
        from blockmerge.rendering.terminal import print_method, print_methods

        if name is None:
            print_methods(stdout_console(), chosen)
        else:
            print_method(stdout_console(), *chosen)
