"""Where reports go: the screen or a file, as a table, JSON, CSV or an HTML page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from blockmerge.cli.console import stdout_console
from blockmerge.cli.text_files import write_file

if TYPE_CHECKING:
    from rich.console import Console

FORMATS = ("table", "json", "csv", "html")
_SUFFIXES = {
    "": "table", ".txt": "table", ".json": "json", ".csv": "csv", ".html": "html", ".htm": "html",
}  # fmt: skip
_FILE_WIDTH = 120

Command = TypeVar("Command", bound=Callable[..., Any])


def report_options(command: Command) -> Command:
    """Give a command the options of all reports."""
    for option in (
        click.option("--overwrite", is_flag=True, help="Replace an existing report."),
        click.option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write the report to a file. Its ending decides the format: .txt, .json, .csv or .html.",
        ),
        click.option("--json", "as_json", is_flag=True, help="The same as --format json."),
        click.option("--format", "form", metavar="|".join(FORMATS), help="How to show it. [default: table]"),
    ):
        command = option(command)
    return command


def _files(inputs: Iterable[str]) -> Iterator[Path]:
    """What a report must spare: all that is named, and what is in folders that are."""
    for path in map(Path, inputs):
        yield path
        if path.is_dir():
            yield from path.rglob("*")


@dataclass(frozen=True)
class ReportTarget:
    """A format and a place, checked before any work is done."""

    form: str
    path: Path | None
    overwrite: bool

    @classmethod
    def of(
        cls, form: str | None, as_json: bool, output: str | None, overwrite: bool, inputs: tuple[str, ...]
    ) -> ReportTarget:
        """Raises RecipeError for an unknown format, OutputError for an ending that tells none and for a place
        that cannot be written.
        """
        from blockmerge.checkpoints import SUFFIXES, check_output
        from blockmerge.errors import OutputError, RecipeError, did_you_mean, shown

        ending = Path(output or "").suffix.lower()
        if output is not None and ending in SUFFIXES:
            raise OutputError(f"{shown(output)} has the ending of a model: give the report another")
        if form is None:
            form = "json" if as_json else _SUFFIXES.get(ending)
        if form is None:
            raise OutputError(
                f"{shown(output)}: a report cannot be written as {shown(ending)}: "
                f"end its name with {', '.join(filter(None, _SUFFIXES))}, or give --format"
            )
        if form not in FORMATS:
            raise RecipeError(
                f"unknown format '{shown(form)}'{did_you_mean(form, FORMATS)} ({', '.join(FORMATS)})"
            )
        path = None if output is None else check_output(output, _files(inputs), overwrite=overwrite)
        return cls(form, path, overwrite)

    @property
    def is_quiet(self) -> bool:
        """Whether a progress bar would disturb a program that reads along."""
        return self.path is None and self.form != "table"

    def write(self, draw: Callable[[Console], None], texts: Mapping[str, Callable[[], str]]) -> None:
        """Show a report: `draw` prints the table, `texts` make the other formats."""
        if self.path is None:
            if self.form == "table":
                draw(stdout_console())
            else:
                click.echo(texts[self.form]())
            return
        if self.form == "table":
            from rich.console import Console

            out = io.StringIO()
            draw(Console(file=out, width=_FILE_WIDTH, markup=False, highlight=False, emoji=False))
            self._save(out.getvalue())
        else:
            self._save(texts[self.form]() + "\n")

    def _save(self, text: str) -> None:
        from blockmerge.errors import shown

        assert self.path is not None
        write_file(self.path, text.encode("utf-8", "backslashreplace"), overwrite=self.overwrite)
        click.echo(f"wrote {shown(self.path)}", err=True)
