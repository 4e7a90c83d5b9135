"""Options of the commands that write a LoRA, and how their results are shown."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blockmerge.cli.console import json_option, stdout_console
from blockmerge.cli.output_options import threads_option

if TYPE_CHECKING:
    from blockmerge.lora_making import LoraResult

Command = TypeVar("Command", bound=Callable[..., Any])

output_option = click.option("-o", "--output", metavar="PATH", required=True, help="Where the LoRA goes.")


def size_options(where_neither: str) -> Callable[[Command], Command]:
    """The options for how large a LoRA may be; `where_neither` says what becomes of it without them."""

    def add(command: Command) -> Command:
        energy = click.option(
            "--energy",
            metavar="SHARE",
            type=float,
            help="The least rank that keeps this share of each module's squared norm, such as 0.99. "
            f"{where_neither}",
        )
        rank = click.option("--rank", metavar="N", type=int, help="The highest rank that a module gets.")
        return rank(energy(command))

    return add


def lora_options(dtype: str) -> Callable[[Command], Command]:
    """The options of all commands that write a LoRA; `dtype` says which one it has where nobody does."""

    def add(command: Command) -> Command:
        options = (
            click.option("--dtype", metavar="fp16|bf16|fp32", help=f"The output's dtype. [default: {dtype}]"),
            threads_option,
            click.option("--overwrite", is_flag=True, help="Replace an existing output."),
            json_option,
            click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors."),
        )
        for option in reversed(options):
            command = option(command)
        return command

    return add


def show(result: LoraResult, *, as_json: bool, quiet: bool) -> None:
    """Print a finished LoRA, as asked for."""
    if as_json:
        from blockmerge.rendering.json_text import lora_json

        click.echo(lora_json(result))
    elif not quiet:
        from blockmerge.rendering.loras import print_lora

        print_lora(stdout_console(), result)
