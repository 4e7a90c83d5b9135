"""Every error that blockmerge raises on purpose.

::

    BlockmergeError                 the base of all; its text is one line that says what to do
    ├── CheckpointError             a model cannot be read: missing, damaged, changed, of an unknown kind
    ├── UnknownFamilyError          a model can be read, but holds no known U-Net or transformer
    ├── IncompatibleModelsError     models cannot be merged or compared: families, names, shapes
    ├── RecipeError                 the request makes no sense: unknown method, dtype, …
    │   └── WeightsError            block weights: unknown block, wrong count, not a number
    │       └── PresetError         a preset that does not exist or a preset file that cannot be read
    ├── NonFiniteError              a merged tensor would hold NaN or infinity, or a compared one does
    └── OutputError                 the output cannot be written: it exists, is an input, the disk is full

Only the command line turns these into messages and exit codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

__all__ = [
    "BlockmergeError",
    "CheckpointError",
    "IncompatibleModelsError",
    "NonFiniteError",
    "OutputError",
    "PresetError",
    "RecipeError",
    "UnknownFamilyError",
    "WeightsError",
]


class BlockmergeError(Exception):
    """Base class of every error that blockmerge raises on purpose."""


class CheckpointError(BlockmergeError):
    """A model cannot be read: it is missing, damaged, of an unknown kind, or was changed meanwhile."""


class UnknownFamilyError(BlockmergeError):
    """A model can be read, but holds no diffusion model that blockmerge knows."""


class IncompatibleModelsError(BlockmergeError):
    """Models cannot be merged or compared: their families, tensor names or shapes differ."""


class RecipeError(BlockmergeError):
    """What was asked for makes no sense: an unknown method, dtype or device, or a wrong number of models."""


class WeightsError(RecipeError):
    """Block weights that cannot be used: an unknown block, a wrong count, or text that is not a number."""


class PresetError(WeightsError):
    """A preset that does not exist, or a preset file that cannot be read."""


class NonFiniteError(BlockmergeError):
    """A merged tensor would hold NaN or infinity, or one that is to be compared does."""


class OutputError(BlockmergeError):
    """The output cannot be written: it exists, it is an input, its folder is missing, or the disk is full."""


def shown(text: object, limit: int = 120) -> str:
    """Return `text` fit for one line of a message: control characters escaped, overlong middles cut.

    Names come from files that may be hostile, and a terminal obeys what is printed to it.
    """
    line = str(text)
    if len(line) > 8 * limit:  # cut before it is looked at letter by letter: it may be of megabytes
        line = line[: 4 * limit] + line[-4 * limit :]
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in line)
    return line if len(line) <= limit else f"{line[: limit // 2]}…{line[-limit // 2 :]}"


def listing(items: Iterable[object], limit: int = 3, width: int = 120) -> str:
    """Return the first few of `items`, each within `width`, and how many more there are: ``"a, b, c and 4
    more"``.
    """
    everything = list(items)
    more = len(everything) - limit
    return ", ".join(shown(item, width) for item in everything[:limit]) + (
        f" and {more} more" if more > 0 else ""
    )


def counted(count: int, noun: str) -> str:
    """Return ``"1 tensor"`` or ``"2 tensors"``."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def bytes_text(count: int) -> str:
    """Return bytes as people read them, 1000 bytes being 1 kB: ``"12 B"``, ``"1.2 kB"``, ``"2.13 GB"``."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def reason(error: OSError) -> str:
    """Return what the operating system said, without errno and path: ``"no space left on device"``."""
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def did_you_mean(word: object, known: Collection[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to `word`, or nothing when none is near or
    it is no text.
    """
    if not isinstance(word, str):
        return ""
    by_fold = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word.casefold(), by_fold, n=1, cutoff=0.6)
    return f"; did you mean '{by_fold[near[0]]}'?" if near else ""
