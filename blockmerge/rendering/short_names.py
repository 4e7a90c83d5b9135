"""Names of models as a narrow column has them: without what all of them have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile

from blockmerge.errors import shown

_ENDING = re.compile(r"\.(safetensors|ckpt|pth?|bin)(?=$| \(\d+\)$)", re.IGNORECASE)
_WORD = re.compile(r"[^ _.+-]*[ _.+-]+|[^ _.+-]+")


def short_names(names: Sequence[str], limit: int = 24) -> list[str]:
    """Return the names without their endings and the words that all begin or end with, their middles cut.

    >>> short_names(["sd15_anime_v2-fp16.safetensors", "sd15_photo-fp16.safetensors"])
    ['anime_v2', 'photo']

    Endings stay where two names differ in nothing else.
    """
    stems = [_ENDING.sub("", name) for name in names]
    words = [words_of(name) for name in (stems if len(set(stems)) == len(stems) else names)]
    words = _without_first(words)
    words = [one[::-1] for one in _without_first([one[::-1] for one in words])]
    short = ("".join(one).strip(" _.+-") for one in words)
    return [shown(one or name, limit) for one, name in zip(short, names, strict=True)]


def words_of(name: str) -> list[str]:
    """Return the words of a name, each with the underscores, hyphens, dots or spaces after it."""
    return _WORD.findall(name)


def _without_first(words: list[list[str]]) -> list[list[str]]:
    """Leave out the first words while they are the same in all, but never a name's last one."""
    if len(words) < 2:
        return words
    alike = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))))
    alike = min(alike, min(map(len, words)) - 1)
    return [one[max(alike, 0) :] for one in words]
