"""blockmerge: merge checkpoints of image models block by block.

>>> import blockmerge
>>> blockmerge.block_of("model.diffusion_model.input_blocks.4.1.proj_in.weight")
'IN04'

The public names are those of `__all__`. None of them loads torch before it is needed.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from blockmerge.version import __version__ as __version__

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOMES = {
    name: home for home, name in re.findall(r"^from (\S+) import ([A-Za-z]\w*) as", _STUB, re.MULTILINE)
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Each name is fetched from its room when it is first used, so that `import blockmerge` itself costs next
    # to nothing.
    if name not in _HOMES:
        raise AttributeError(f"module 'blockmerge' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
