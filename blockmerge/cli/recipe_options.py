"""Options of the commands that merge by a recipe."""

from __future__ import annotations

import click

from blockmerge.cli.console import json_option, not_empty
from blockmerge.cli.models_folders import models_option
from blockmerge.cli.opening import Command
from blockmerge.cli.output_options import threads_option


def recipe_options(command: Command) -> Command:
    """All but where the output goes."""
    options = (
        models_option,
        click.option(
            "--set",
            "changes",
            metavar="[STAGE.]KEY=VALUE",
            multiple=True,
            callback=not_empty,
            help="Change the recipe before it runs: X.preset=low_res for a stage, dtype=fp32 or OUT05=0.7 "
            "for the result. May be repeated.",
        ),
        click.option(
            "--device",
            metavar="cpu|cuda[:N]|auto",
            default="cpu",
            show_default=True,
            help="Where to compute.",
        ),
        threads_option,
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option(
            "--dry-run",
            is_flag=True,
            help="Make all checks that need no weights, show the plan, and write nothing.",
        ),
        json_option,
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    )
    for option in reversed(options):
        command = option(command)
    return command
