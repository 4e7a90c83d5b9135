"""Writes docs/cli.md from the commands' own help: `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from blockmerge.cli.main import cli

_HEAD = """# The commands

Written by `make docs` from the commands' own `--help`. Results go to stdout, everything else to stderr.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | refused: one line on stderr says what and why, and nothing was written |
| 2 | not a valid command line: an unknown option, a missing argument, a text instead of a number |
| 130 | interrupted (Ctrl-C) |

If the result cannot be printed (stdout is a full disk), the exit code is 1 too. Everything else is done then.

`check`, `verify`, `similarity` and `explain` also exit with 1 for what they find. `--json` prints one JSON
object: see [json.md](json.md).
"""


def reference() -> str:
    """Return the text of docs/cli.md."""
    return _HEAD + "".join(
        f"\n## {title}\n\n```text\n{text}\n```\n" for title, text in _pages(cli, "blockmerge", None)
    )


def _pages(command: click.Command, title: str, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    # The help options are those of the outermost command; said here, since click remembers them from the
    # first call.
    settings = {**cli.context_settings, "max_content_width": 100, "terminal_width": 100}
    context = click.Context(command, info_name=title.split()[-1], parent=parent, **settings)
    yield title, command.get_help(context).strip()
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _pages(child, f"{title} {name}", context)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(reference(), encoding="utf-8")
