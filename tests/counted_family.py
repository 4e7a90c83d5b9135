"""Families whose blocks are counted from the file: several of one name, with aliases and lists of numbers."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

from blockmerge.anatomy import FAMILIES, register, unregister

ALIASES = {
    "DOUBLE#": ("D#",),
    "double_blocks.#.": ("D#",),
    "transformer_blocks.#.": ("D#",),
    "single_blocks.#.": ("S#",),
    "img_in.": ("IN",),
    "txt_in.": ("IN",),
    "CLIP": ("BASE",),
    "T5": ("BASE",),
}
NUMBERS = {61: ("CLIP", "T5", "IN", "D00-D18", "S00-S37", "OUT")}


def numbered(letters, count, digits=2):
    return [f"{letters}{number:0{digits}}" for number in range(count)]


def flux_blocks(double=19, single=38):
    return ["BASE", "IN", *numbered("D", double), *numbered("S", single), "OUT"]


def counted(name="counted", blocks=None, **data):
    """A family that is not in arms."""
    given = {"called": "Counted", "title": "Toy Counted", "aliases": ALIASES, "number_lists": NUMBERS, **data}
    return replace(
        FAMILIES["sd1"],
        name=name,
        blocks=tuple(blocks or flux_blocks()),
        arms=None,
        carried={},
        adjusted={},
        **given,
    )


@contextmanager
def known(*families):
    """These families are among all until the end of the block."""
    for family in families:
        register(family)
    try:
        yield families
    finally:
        for family in families:
            unregister(family.name)
