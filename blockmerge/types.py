"""Kinds of arguments that belong to no room."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Union

if TYPE_CHECKING:
    import torch

PathLike = Union[str, "os.PathLike[str]"]
"""A file or folder: a text, or a `pathlib.Path`."""

DtypeLike = Union[str, "torch.dtype"]
"""A dtype: ``"fp16"``, ``"bf16"``, ``"fp32"``, ``"fp8_e4m3fn"``, ``"fp8_e5m2"``, or torch's own.

``"keep"`` stands for the dtype that each tensor has, where a function says so.
"""
