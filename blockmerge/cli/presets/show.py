"""`blockmerge presets show`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, stdout_console


@click.command(short_help="Draw one.")
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Draw a preset's weights along the U-Net. NAME is a preset, a preset file, or FILE#NAME."""
    from blockmerge.weights import find_preset

    preset = find_preset(name)
    if as_json:
        from blockmerge.rendering.json_text import preset_json

        click.echo(preset_json(preset))
    else:
        from blockmerge.rendering.terminal import print_preset

        print_preset(stdout_console(), preset)
