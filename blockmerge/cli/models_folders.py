"""The option of commands that look for models by what is in them."""

import click

from blockmerge.cli.console import not_empty

models_option = click.option(
    "--models",
    metavar="FOLDER",
    multiple=True,
    callback=not_empty,
    help="Also look for models in this folder and its subfolders. May be repeated.",
)
