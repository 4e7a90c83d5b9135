"""`blockmerge completion`."""

from __future__ import annotations

import os

import click

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_BLOCKMERGE_COMPLETE"
"""What the scripts set when they ask for completions."""


@click.command(short_help="Print the script that lets a shell complete commands.")
@click.argument("shell", metavar="|".join(SHELLS), required=False)
def completion(shell: str | None) -> None:
    """Print what lets a shell complete commands, options, presets, methods, families, blocks and model files.

    \b
      blockmerge completion bash >> ~/.bashrc
      blockmerge completion zsh >> ~/.zshrc
      blockmerge completion fish > ~/.config/fish/completions/blockmerge.fish

    It works in shells that are opened from then on. Without a name it is for the shell that you use.
    """
    from click.shell_completion import get_completion_class

    from blockmerge.cli.shells import register
    from blockmerge.errors import RecipeError, did_you_mean, shown

    name = os.path.basename(os.environ.get("SHELL", "")) if shell is None else shell
    register()
    found = get_completion_class(name) if name in SHELLS else None
    if found is None:
        which = f"unknown shell '{shown(name)}'{did_you_mean(name, SHELLS)}" if name else "name a shell"
        raise RecipeError(f"{which}: {', '.join(SHELLS)}")
    root = click.get_current_context().find_root()
    click.echo(found(root.command, {}, "blockmerge", VARIABLE).source())
