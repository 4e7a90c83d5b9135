"""Shells as click completes them, but for what bash does to texts with `=` and `:` in them, and to spaces,
and for what click's script for fish does to commas.
"""

from __future__ import annotations

import os
import re
from typing import Any

from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    add_completion_class,
    split_arg_string,
)

_SOURCE = """\
%(complete_func)s() {
    local IFS=$'\\n' line
    for line in $(env COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD \\
            %(complete_var)s=bash_complete "$1" 2>/dev/null); do
        COMPREPLY+=("$line")
        [[ $line == *[=/] ]] && compopt -o nospace
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class Bash(BashComplete):
    """Completes the words that bash makes of ``BASE=0.5,OUT1`` (three, of which it replaces the last) as the
    one that it is; and nothing that is completed falls apart at a space.
    """

    source_template = _SOURCE
    _kept = ""

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the one to complete, and that."""
        cut = split_arg_string(os.environ["COMP_WORDS"])[: int(os.environ["COMP_CWORD"]) + 1]
        is_begun = len(cut) > int(os.environ["COMP_CWORD"])
        joined: list[str] = []
        for word in cut if is_begun else [*cut, ""]:
            is_inner = bool(joined) and (_BREAKS.fullmatch(word) or _BREAKS.fullmatch(joined[-1][-1:]))
            if is_inner:
                joined[-1] += word
            else:
                joined.append(word)
        *words, incomplete = joined
        self._kept = incomplete[: max(map(incomplete.rfind, "=:")) + 1]
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """One candidate, as it would be typed in place of what bash takes for the word."""
        value: Any = item.value
        return re.sub(r"([^\w./~@%+,=:#-])", r"\\\1", str(value).removeprefix(self._kept))


_BREAKS = re.compile(r"[=:]+")


class Fish(FishComplete):
    """Cuts what it is told after the first comma only, since weights of blocks have more."""

    source_template = FishComplete.source_template.replace('string split ","', 'string split -m 1 ","')


def register() -> None:
    """Let click use them."""
    add_completion_class(Bash)
    add_completion_class(Fish)
