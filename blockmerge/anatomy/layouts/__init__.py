"""Every tensor name and shape of real files, LDM naming: one JSON object per family."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

LAYOUTS = ("sd1", "sd2", "sdxl", "sdxl_refiner")
"""The families whose layouts are known."""


@cache
def layout(family: str) -> dict[str, tuple[int, ...]]:
    """Return {tensor name: shape} of a complete file of one of the families LAYOUTS."""
    text = files(__name__).joinpath(f"{family}.json").read_text(encoding="utf-8")
    return {name: tuple(shape) for name, shape in json.loads(text).items()}
