"""Options of the commands that write a model."""

from __future__ import annotations

from collections.abc import Callable

import click

from blockmerge.cli.console import json_option, not_empty
from blockmerge.cli.opening import Command, opening_options

dtype_option = click.option(
    "--dtype",
    metavar="keep|fp16|bf16|fp32|fp8_…",
    default="keep",
    help="The output's dtype: keep (each tensor keeps its own), fp16, bf16, fp32, fp8_e4m3fn, fp8_e5m2, "
    "or as torch calls them. "
    "[default: keep]",
)


def naming_option(default: str) -> Callable[[Command], Command]:
    """The option for the output's naming; `default` says what it is where nobody does."""
    about = f"The output's naming: ldm (one file) or diffusers (a folder). [default: {default}]"
    return click.option("--to", "naming", metavar="ldm|diffusers", help=about)


configs_option = click.option(
    "--configs",
    metavar="FOLDER",
    callback=not_empty,
    help="Take a new folder's configs and tokenizers from here: a diffusers folder, or a tokenizer's folder.",
)

threads_option = click.option(
    "--threads", metavar="N", type=int, help="How many workers. [default: twice the processors, at most 8]"
)

partial_option = click.option(
    "--partial",
    is_flag=True,
    help="Leave out a LoRA's modules that fit no tensor, instead of refusing the LoRA.",
)


def about_options(command: Command) -> Command:
    """The options for what a model's metadata say of it."""
    for key in reversed(("title", "author", "license", "description")):
        about = f"The model's {key}, for its metadata (modelspec.{key})."
        command = click.option(f"--{key}", metavar="TEXT", callback=not_empty, help=about)(command)
    about = "Also record the models' SHA-256 in the metadata. Models that were never hashed are read for it."
    return click.option("--hash", is_flag=True, help=about)(command)


def output_options(command: Command) -> Command:
    """The options of commands that write one model as it is, or with LoRAs."""
    options = (
        naming_option("the model's own; ldm where a folder becomes a .safetensors file"),
        dtype_option,
        opening_options("drop|keep|use"),
        click.option(
            "--vae",
            metavar="FILE",
            default="auto",
            callback=not_empty,
            help="Bake in this VAE: a file or a folder. [default: the model's own]",
        ),
        click.option("--prune", is_flag=True, help="Leave out what no loader needs."),
        configs_option,
        threads_option,
        click.option("--overwrite", is_flag=True, help="Replace an existing output."),
        click.option(
            "--allow-nonfinite",
            is_flag=True,
            help="Write NaN and infinity that --dtype makes or keeps, instead of refusing them.",
        ),
        json_option,
        click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
    )
    for option in reversed(options):
        command = option(command)
    return command
