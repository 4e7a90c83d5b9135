"""The options that say how models are opened: the same in all commands that open any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from blockmerge.cli.console import not_empty

Command = TypeVar("Command", bound=Callable[..., Any])

variant_option = click.option(
    "--variant",
    metavar="NAME",
    callback=not_empty,
    help="Which weights to read from diffusers folders that hold several kinds, such as fp16. "
    "[default: the plain ones, or the only ones]",
)
"""For commands that look at a file as it is; all others have `opening_options`."""


def opening_options(ema: str) -> Callable[[Command], Command]:
    """The options of commands that take a model for one U-Net; `ema` are the choices for EMA copies."""

    def add(command: Command) -> Command:
        about = "What happens to EMA copies; use makes them the U-Net. [default: drop]"
        with_ema = click.option("--ema", metavar=ema, default="drop", help=about)
        return with_ema(variant_option(command))

    return add
