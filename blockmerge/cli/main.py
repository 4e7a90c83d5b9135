"""The command `blockmerge`: its group of commands, and what becomes of errors.

Exit codes: 0 done; 1 something the library refuses; 2 what click cannot parse; 130 interrupted.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType

import click
from click.shell_completion import CompletionItem
from click_default_group import DefaultGroup

from blockmerge.cli.again import again
from blockmerge.cli.bake import bake
from blockmerge.cli.check import check
from blockmerge.cli.completing import WORDS, add_completers
from blockmerge.cli.completion import VARIABLE, completion
from blockmerge.cli.convert import convert
from blockmerge.cli.demo import demo
from blockmerge.cli.explain import explain
from blockmerge.cli.help import show_help
from blockmerge.cli.inspect import inspect
from blockmerge.cli.lora.group import lora
from blockmerge.cli.merge import is_word, merge
from blockmerge.cli.methods import methods
from blockmerge.cli.presets.group import presets
from blockmerge.cli.recipe import recipe
from blockmerge.cli.run import run as run_recipe
from blockmerge.cli.shells import register
from blockmerge.cli.similarity import similarity
from blockmerge.cli.verify import verify
from blockmerge.errors import BlockmergeError, RecipeError, did_you_mean, reason
from blockmerge.version import __version__

_OTHERS_OPTIONS = {"alpha": "weights", "beta": "weights-beta"}
"""What other programs call options."""


class Commands(DefaultGroup):  # type: ignore[misc]
    """The commands, where `blockmerge A B …` means `blockmerge merge A B …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line, and keep it for completion."""
        ctx.meta[WORDS] = tuple(args)
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command of a name, or `merge` where it is the first model's.

        Raises RecipeError for a word that is neither a command nor a file, and near to a command.
        """
        is_misspelt = cmd_name not in self.commands and is_word(cmd_name) and not ctx.resilient_parsing
        if is_misspelt and (meant := self._meant(cmd_name)):
            raise RecipeError(f"{cmd_name}: no such file or command{meant}")
        found: click.Command | None = super().get_command(ctx, cmd_name)
        return found

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete commands, and what a merge begins with: its options and models."""
        default = self.commands["merge"]
        found = super().shell_complete(ctx, incomplete)
        with default.make_context("merge", [], parent=ctx, resilient_parsing=True) as merging:
            if incomplete.startswith("-"):
                more = default.shell_complete(merging, incomplete)
            else:
                more = default.params[0].shell_complete(merging, incomplete)
        return list({item.value: item for item in (*found, *more)}.values())

    def _meant(self, word: str) -> str:
        """Say which command has an option of that name, or is near to a word; nothing for any other word."""
        near = did_you_mean(word, self.commands)
        if any(name.startswith(word) or word.startswith(name) for name in self.commands):
            return near
        for name, command in self.commands.items():
            if any(f"--{word}" in parameter.opts for parameter in command.params):
                return f"; did you mean 'blockmerge {name} … --{word}'?"
        return near


@click.group(
    cls=Commands,
    default="merge",
    default_if_no_args=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", prog_name="blockmerge")
def cli() -> None:
    """Merge checkpoints of image models block by block.

    \b
      blockmerge a.safetensors b.safetensors --preset high_res
      blockmerge a.safetensors b.safetensors --weights 0.5 -o out.safetensors
      blockmerge presets show high_res

    `blockmerge A B …` means `blockmerge merge A B …`.
    """


for command in (
    merge, run_recipe, recipe, again, verify, convert, bake, lora, inspect, check, similarity, explain,
    presets, methods, demo, completion, show_help,
):  # fmt: skip
    cli.add_command(command)
add_completers(cli)


def main() -> None:
    """Run the command line and exit."""
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal or a stopped job should leave no temp file either
        # … but a signal that was switched off stays so: that is how nohup works.
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is not signal.SIG_IGN:
            signal.signal(getattr(signal, name), _interrupt)
    _give_missing_streams()
    for stream in (sys.stdout, sys.stderr):
        # A name or a bar that the terminal's encoding lacks must not end a merge that has been done.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    code = run(sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is done is done, and has been said
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run the command line on `arguments` and return the exit code."""
    if VARIABLE in os.environ:
        register()
    try:
        cli.main(arguments, prog_name="blockmerge", standalone_mode=False)
        sys.stdout.flush()
    except BlockmergeError as error:
        _say(f"Error: {error}")
        return 1
    except click.ClickException as error:
        if isinstance(error, click.NoSuchOption) and error.ctx is not None:
            name = error.option_name
            meant = f"--{_OTHERS_OPTIONS.get(name.removeprefix('--'))}"
            if any(meant in one.opts for one in error.ctx.command.params):
                error = click.UsageError(f"No such option '{name}'. Did you mean '{meant}'?", error.ctx)
        error.show()
        return error.exit_code
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say("Interrupted: no unfinished file is left")
        return 130
    except (BrokenPipeError, SystemExit):
        # Whoever read the output has seen enough (click makes a SystemExit of it). Without this, Python
        # complains once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # All the library's own are BlockmergeErrors: this is stdout, on a full disk or (on Windows) a closed
        # pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _say(f"Error: cannot print the result, though all else is done: {reason(error)}")
        return 1
    return 0


def _give_missing_streams() -> None:
    # A closed stdout or stderr (`>&-`) is None, and its number would go to the next file that is opened: the
    # output.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def _say(text: str) -> None:
    line = " ".join(text.split("\n"))
    try:
        click.echo(line, err=True)
    except UnicodeEncodeError:
        click.echo(line.encode("ascii", "backslashreplace").decode(), err=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
