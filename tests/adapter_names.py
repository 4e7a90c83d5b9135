"""What the modules of real adapters mean: names and shapes written down from the programs that make them.

`adapters/*.tsv` hold, for each family, every tensor that such modules change with its rows, block, shape and
whether it has a bias, and what each program calls it. Names are written as ``N|rest``: the first N letters of
the one above in that column, then the rest. An empty block or shape is that of the line above, ``-`` is
none, and ``=`` another program's name.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import NamedTuple

HOME = Path(__file__).parent / "adapters"
FIRST = 5
"""The first column that holds names of modules."""


class Named(NamedTuple):
    """What a module is said to mean: rows are (first, last + 1) or None for all."""

    ldm: str
    rows: tuple[int, int] | None
    block: str
    shape: tuple[int, ...]
    bias: str | None


PROGRAMS = {
    "sd1": ("sd15-kohya", "sd15-kohya-locon", "sd15-attn-procs"),
    "sd2": ("sd21-kohya",),
    "sdxl": ("sdxl-kohya", "sdxl-kohya-locon", "sdxl-diffusers-names", "sdxl-peft"),
}
ALL = [(family, program) for family, programs in PROGRAMS.items() for program in programs]


@cache
def modules(family, program):
    """{name of a module: Named} of a program's adapter."""
    head, *lines = (HOME / f"{family}.tsv").read_text().splitlines()
    column = head.split("\t").index(program)
    above = [""] * len(head.split("\t"))
    found = {}
    for line in lines:
        cells = [_cell(text, above, place) for place, text in enumerate(line.split("\t"))]
        ldm, rows, block, shape, bias = cells[:FIRST]
        name = cells[column]
        if name == "=":
            name = next(one for one in cells[FIRST:] if one not in (None, "="))
        if name is not None:
            found[name] = Named(
                ldm,
                tuple(map(int, rows.split("-"))) if rows else None,
                block,
                tuple(map(int, shape.split("x"))),
                ldm.removesuffix("weight") + "bias" if bias else None,
            )
    return found


def _cell(text, above, place):
    if text in ("-", "="):
        return None if text == "-" else text
    if place in (2, 3):
        text = text or above[place]
    elif "|" in text:
        shared, _, rest = text.partition("|")
        text = above[place][: int(shared)] + rest
    else:
        return text
    above[place] = text
    return text
