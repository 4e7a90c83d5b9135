"""`blockmerge presets` and `blockmerge presets show NAME`."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, stdout_console


@click.group(invoke_without_command=True, short_help="List the presets, or show one.")
@json_option
@click.pass_context
def presets(context: click.Context, as_json: bool) -> None:
    """List the presets: your own first, then those that come with blockmerge.

    Your own are TOML or text files in the folder `presets` of blockmerge's config folder (docs/presets.md).
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


@presets.command("show")
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
