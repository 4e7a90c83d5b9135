"""Recipes' files where a command takes models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockmerge.merging import Recipe


def model_of(path: str) -> str | Recipe:
    """Return a recipe's file as the recipe, called as the file is; every other path as it is."""
    if not path.lower().endswith(".toml") or not os.path.isfile(path):
        return path
    from blockmerge.merging import Recipe

    return Recipe.load(path).named(os.path.basename(path))
