"""`blockmerge help`, another way to write `--help`."""

from __future__ import annotations

import click


@click.command("help", short_help="Show the help of a command.")
@click.argument("words", nargs=-1, metavar="[COMMAND]")
@click.pass_context
def show_help(context: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of blockmerge, or of a command.

    \b
      blockmerge help lora merge
    """
    from blockmerge.errors import RecipeError, did_you_mean, shown

    shown_of = context.find_root()
    for word in words:
        commands = getattr(shown_of.command, "commands", {})
        if word not in commands:
            raise RecipeError(f"{shown(word)}: no such command{did_you_mean(word, commands)}")
        shown_of = click.Context(commands[word], parent=shown_of, info_name=word)
    click.echo(shown_of.get_help())
