"""Commands that look at models, where several are named: each in turn, whatever is wrong with the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from blockmerge.cli.console import progress_bar, stdout_console
from blockmerge.errors import BlockmergeError, RecipeError, shown

if TYPE_CHECKING:
    from blockmerge.checkpoints import Checkpoint, Unreadable
    from blockmerge.rendering.many_files import FileLines


class _Found(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


Found = TypeVar("Found", bound=_Found)


def are_several(files: Sequence[str]) -> bool:
    """Whether more than one model is named, or a folder of models or a pattern."""
    from blockmerge.checkpoints import stands_for_several

    return len(files) > 1 or stands_for_several(files[0])


class ManyFiles:
    """The models that a command is to look at; `names` are what they are called, told apart by folders."""

    def __init__(self, files: Sequence[str], variant: str | None) -> None:
        """Raises CheckpointError for a variant that none of the models has."""
        from blockmerge.checkpoints import (
            Unreadable,
            check_variant,
            name_of,
            names_apart,
            single_models,
        )

        self._models = list(single_models(files))
        self._variant = variant
        named = [
            (one.name, None) if isinstance(one, Unreadable) else (name_of(one), one) for one in self._models
        ]
        self.names = names_apart(named)
        if variant is not None:
            opened = [self._open(one) for one in self._models]
            check_variant([one for one in opened if not isinstance(one, Unreadable)], variant)

    def show(
        self,
        look: Callable[..., Found],
        line: Callable[[FileLines, str, Found], None],
        bar: str | None,
        *,
        as_json: bool,
        quiet: bool = False,
    ) -> list[tuple[str, Found | Unreadable]]:
        """Look at each, show it, and return what was found beside the name.

        `look(checkpoint, progress=…)` looks at one, `line` prints it; `bar` stands before the progress bars,
        and without it there are none.
        """
        from blockmerge.checkpoints import Unreadable
        from blockmerge.rendering.json_text import files_json
        from blockmerge.rendering.many_files import FileLines

        lines = FileLines(stdout_console(), self.names)
        done: list[tuple[str, Found | Unreadable]] = []
        for name, model in zip(self.names, self._models, strict=True):
            with progress_bar(f"{bar} {shown(name)}", quiet=as_json or quiet or bar is None) as progress:
                found = self._look_at(model, partial(look, progress=progress))
            done.append((name, found))
            if as_json or quiet:
                continue
            if isinstance(found, Unreadable):
                lines.unreadable(name, found.error)
            else:
                line(lines, name, found)
        if as_json:
            click.echo(files_json([{**found.to_dict(), "name": name} for name, found in done]))
        return done

    def _open(self, model: str | Path | Unreadable) -> Checkpoint | Unreadable:
        from blockmerge.checkpoints import Unreadable, open_source

        if isinstance(model, Unreadable):
            return model
        try:
            return open_source(model, variant=self._variant)
        except BlockmergeError as error:
            return Unreadable.of(model, error)

    def _look_at(self, model: str | Path | Unreadable, look: Callable[..., Found]) -> Found | Unreadable:
        from blockmerge.checkpoints import Unreadable

        opened = self._open(model)
        if isinstance(opened, Unreadable):
            return opened
        try:
            return look(opened)
        except RecipeError:  # what was asked for makes no sense, whatever the file
            raise
        except BlockmergeError as error:
            return Unreadable(opened.name, str(error))
