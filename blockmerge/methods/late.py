"""torch and numpy for the methods, each imported when something of it is first used.

So a method's description and its function stand in one place, and nobody who only wants to know what methods
there are loads torch. What has been used once is found as fast as in the module itself.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["np", "torch"]


def late(name: str) -> ModuleType:
    """Return what stands for a module until something of it is used."""
    stand_in = ModuleType(name)

    def fetch(attribute: str) -> Any:
        value = getattr(import_module(name), attribute)
        setattr(stand_in, attribute, value)
        return value

    stand_in.__getattr__ = fetch  # type: ignore[method-assign]
    return stand_in


if TYPE_CHECKING:
    import numpy as np
    import torch
else:
    np, torch = late("numpy"), late("torch")
