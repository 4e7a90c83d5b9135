"""A line for each of several files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from blockmerge.anatomy import FAMILIES
from blockmerge.errors import bytes_text, counted, shown

if TYPE_CHECKING:
    from blockmerge.inspecting import CheckResult, Inspection

_FAMILY, _NAMING, _DTYPES, _SIZE = 28, 9, 11, 9  # columns at least
_NONE = "–"
_WORST = {"error": "bold red", "warning": "yellow"}


class FileLines:
    """Prints a line for each file as soon as it is looked at; `names` are those of all, for the first
    column's width.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._width = max((cell_len(shown(name)) for name in names), default=0)

    def inspection(self, name: str, found: Inspection) -> None:
        """Print family, kind, naming, dtypes, size and hashes, and what is odd about it."""
        parts = found.components.values()
        dtypes = Counter[str]()
        for part in parts:
            dtypes.update(part.dtypes)
        cells = [
            f"{_family(found):<{_FAMILY}}",
            f"{found.naming or _NONE:<{_NAMING}}",
            f"{'+'.join(dtype for dtype, _ in dtypes.most_common()) or _NONE:<{_DTYPES}}",
            f"{bytes_text(sum(part.bytes for part in parts)):>{_SIZE}}",
        ]
        if found.hashes:
            # AutoV2 is how the SHA-256 begins.
            cells += [found.hashes.autov1, f"{found.hashes.autov3 or _NONE:<12}", found.hashes.sha256]
        self._line(name, [*cells, "; ".join(_odd(found))])

    def check(self, name: str, found: CheckResult) -> None:
        """Print family and kind, and how many problems there are of which codes, the worst first."""
        counts = Counter(problem.severity for problem in found.problems)
        said = ", ".join(counted(count, severity) for severity, count in counts.items())
        codes = ", ".join(dict.fromkeys(problem.code for problem in found.problems))
        result = f"{said}: {codes}" if said else "nothing is wrong"
        if what_it_is := [one.message for one in found.problems if one.code in ("no_unet", "lora")]:
            result += f"; {what_it_is[0].removeprefix(f'{shown(found.name)} ')}"
        style = _WORST.get(next(iter(counts), ""), "")
        self._line(name, [f"{_family(found):<{_FAMILY}}"], (result, style))

    def unreadable(self, name: str, error: str) -> None:
        """Print why a file cannot be looked at."""
        self._line(name, [], (error, "bold red"))

    def _line(self, name: str, cells: Iterable[str], last: tuple[str, str] = ("", "")) -> None:
        padding = " " * (self._width - cell_len(shown(name)))
        text = Text.assemble((shown(name), "bold"), padding)
        for cell in cells:
            text.append(f"  {cell}")
        text.append(f"  {last[0]}", last[1] or None)
        text.rstrip()
        self._console.print(text, soft_wrap=True)


def _family(found: Inspection | CheckResult) -> str:
    if not found.family:
        return _NONE
    title, kind = FAMILIES[found.family].title_and_kind(found.variant or "")
    return f"{title}, {kind}" if kind else title


def _odd(found: Inspection) -> Iterator[str]:
    if found.why_unknown:
        yield found.why_unknown
    if found.missing:
        yield f"incomplete: it lacks {counted(len(found.missing), 'tensor')}"
    if found.broken_off:
        yield found.broken_off
    if found.quantised:
        yield f"quantised: {found.quantised}"
    for note in found.notes:
        yield note.removeprefix(f"{shown(found.name)} ")
