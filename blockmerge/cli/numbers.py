"""The numbers of merge methods on the command line: ``--number NAME=VALUE``, and some options of their own.

The built-in methods say which options there are (`Number.option`). They are only looked at when the command
runs or shows its help.
"""

from __future__ import annotations

from functools import cache

import click
from click.core import ParameterSource


class CommandWithNumbers(click.Command):
    """A command with ``--number``, as `numbers`: its function gets all numbers as one dict of texts."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, with those of single numbers before ``--number``."""
        params = super().get_params(ctx)
        place = [parameter.name for parameter in params].index("numbers")
        return [*params[:place], *_options().values(), *params[place:]]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line. Raises RecipeError for a number that cannot be read or is given twice."""
        rest = super().parse_args(ctx, args)
        named = {name: ctx.params.pop(name) for name in _options()}
        if ctx.resilient_parsing:  # a shell asks what may come next
            return rest
        given = {name: value for name, value in named.items() if value is not None}
        if ctx.get_parameter_source("seed") is ParameterSource.COMMANDLINE:
            given["seed"] = str(ctx.params["seed"])
        numbers = _with(given, ctx.params["numbers"])
        if "seed" in numbers:  # it is that of random weights, too
            ctx.params["seed"] = _whole(numbers.pop("seed"))
        ctx.params["numbers"] = numbers
        return rest


@cache
def _options() -> dict[str, click.Option]:
    """Return the options of single numbers, by the number's name."""
    from blockmerge.methods import METHODS

    options: dict[str, click.Option] = {}
    for method in METHODS.values():
        for number in method.numbers:
            if not number.option:
                continue
            default = "" if number.default is None else f" [default: {number.default:g}]"
            text = f"{method.name}: {number.option}{default}"
            if number.name in options:
                text = f"{options[number.name].help} {text}"
            options[number.name] = click.Option(
                [f"--{number.name.replace('_', '-')}"],
                metavar="NUMBERS" if number.kind == "numbers" else "NUMBER",
                help=text,
            )
    return options


def _whole(text: str) -> int:
    from blockmerge.errors import RecipeError, shown

    try:
        return int(text)
    except ValueError:
        raise RecipeError(f"the seed is a whole number; {shown(text)} given") from None


def _with(numbers: dict[str, str], texts: tuple[str, ...]) -> dict[str, str]:
    from blockmerge.errors import RecipeError, shown

    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip().replace("-", "_")  # as the options are written
        if not (name.isidentifier() and equals and value):
            raise RecipeError(f"cannot read --number '{shown(text)}': write NAME=VALUE, as in limit=0.02")
        if name in numbers:
            raise RecipeError(
                f"the number {shown(name)} is given twice: {shown(numbers[name])} and {shown(value)}"
            )
        numbers = {**numbers, name: value}
    return numbers
