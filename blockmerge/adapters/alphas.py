"""Which alpha modules have: from the tensors of that name, or from the configuration that PEFT writes."""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blockmerge.checkpoints import Checkpoint, Readers
from blockmerge.dtypes import DTYPES, FLOAT_DTYPES, precision_of
from blockmerge.errors import CheckpointError, listing, reason, shown
from blockmerge.expressions import Stored

METADATA_KEY = "lora_adapter_metadata"
"""The key of a file's metadata under which diffusers writes PEFT's configuration."""

_CONFIG_FILE = "adapter_config.json"
_LARGEST_CONFIG = 1 << 20
_LARGEST = 1e300
_PEFT = "base_model.model."
_ALPHA, _PATTERN, _KIND, _LORA = "lora_alpha", "alpha_pattern", "peft_type", "LORA"
_BY_ROOT = "use_rslora"
_ANEW = "download it again, or have its trainer save it anew"
_PLAIN = re.compile(r"[\w.]+", re.ASCII)

Settings = Mapping[str, Any]


def numbers(tensors: Iterable[Stored]) -> Iterator[float]:
    """Yield the number in each of some tensors that hold one.

    Raises CheckpointError when it cannot be read.
    """
    with Readers() as readers:
        for tensor in tensors:
            data = bytearray(tensor.nbytes)
            readers.read_into(tensor, 0, memoryview(data))
            yield number(bytes(data), tensor.dtype)


def number(data: bytes, dtype: str) -> float:
    """Return the number that bytes are in one of the dtypes of floats, or of whole numbers.

    >>> number(b"\\x00\\x3c", "F16"), number(b"\\x08\\x00", "I16")
    (1.0, 8.0)
    """
    bits = int.from_bytes(data, "little")
    if dtype not in FLOAT_DTYPES:
        return float(int.from_bytes(data, "little", signed=dtype.startswith("I")))
    precision, width = precision_of(dtype), 8 * len(data)
    fraction = bits & ((1 << precision.mantissa) - 1)
    largest = (1 << (width - 1 - precision.mantissa)) - 1
    exponent = bits >> precision.mantissa & largest
    sign = -1.0 if bits >> (width - 1) else 1.0
    if exponent == largest and DTYPES[dtype].infinity:
        return math.nan if fraction else sign * math.inf
    if exponent == largest and fraction == (1 << precision.mantissa) - 1:
        return math.nan
    if exponent:
        fraction |= 1 << precision.mantissa
    power = precision.least_exponent + max(exponent, 1) - 1 - precision.mantissa
    return sign * math.ldexp(fraction, power)


@dataclass(frozen=True)
class Configs:
    """PEFT's settings, {what the names of its modules begin with, without the dot: settings}.

    `are_missing` says that PEFT itself has written the file, and its settings are not beside it.
    """

    each: Mapping[str, Settings]
    are_missing: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint, modules: Iterable[str]) -> Configs:
        """Those in a file's metadata, or beside a file that PEFT itself has written.

        Raises CheckpointError when they are there and cannot be understood.
        """
        text, where = checkpoint.metadata.get(METADATA_KEY), f"{METADATA_KEY} in its metadata"
        if text is not None:
            return cls(_checked(_by_prefix(_parsed(text, where, checkpoint.name)), where, checkpoint.name))
        prefixes = {name.partition(_PEFT)[0] + _PEFT.removesuffix(".") for name in modules if _PEFT in name}
        if not prefixes:
            return cls({})
        text = None if checkpoint.path is None else _beside(checkpoint.path)
        if text is None:
            return cls({}, are_missing=True)
        settings = _parsed(text, _CONFIG_FILE, checkpoint.name)
        return cls(_checked(dict.fromkeys(prefixes, settings), _CONFIG_FILE, checkpoint.name))

    def alpha_of(self, module: str, rank: int) -> tuple[float, float] | None:
        """The alpha that a module has, and the one that counts, its factor times its rank; None where nothing
        says so.
        """
        words = module.split(".")
        for count in range(len(words) - 1, -1, -1):
            settings = self.each.get(".".join(words[:count]))
            if settings is not None:
                alpha = _alpha(settings, words[count:])
                return alpha, alpha * math.sqrt(rank) if settings.get(_BY_ROOT) else alpha
        return None

    @property
    def are_by_root(self) -> bool:
        """Whether alphas are divided by the root of the rank (rs-LoRA)."""
        return any(settings.get(_BY_ROOT) for settings in self.each.values())


def _alpha(settings: Settings, words: Sequence[str]) -> float:
    """The alpha of a module by the words of its name: the usual one, or that of the first name in the pattern
    with which it ends.
    """
    pattern = settings.get(_PATTERN) or {}
    ends = {".".join(words[begin:]) for begin in range(len(words))} & pattern.keys()
    if len(ends) > 1:
        ends = {next(name for name in pattern if name in ends)}
    return float(pattern[ends.pop()] if ends else settings[_ALPHA])


def _beside(path: os.PathLike[str]) -> str | None:
    """The configuration that PEFT wrote beside a file; None without one."""
    place = os.path.join(os.path.dirname(os.path.abspath(path)), _CONFIG_FILE)
    try:
        with open(place, encoding="utf-8", errors="replace") as file:
            return file.read(_LARGEST_CONFIG)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"cannot read {shown(place)}: {reason(error)}") from error


def _parsed(text: str, where: str, whose: str) -> Settings:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(
            f"{shown(whose)}: {where} cannot be read: it is not a JSON object of settings; {_ANEW}"
        )
    return said


def _by_prefix(said: Settings) -> dict[str, Settings]:
    """{prefix: its settings} of settings such as ``unet.lora_alpha``; without a prefix it is empty."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in said.items():
        prefix, _, setting = key.rpartition(".")
        found[prefix][setting] = value
    return {prefix: settings for prefix, settings in found.items() if _ALPHA in settings or _KIND in settings}


def _checked(found: dict[str, Settings], where: str, whose: str) -> dict[str, Settings]:
    """The same. Raises CheckpointError for settings that mean what is not computed here."""
    for settings in found.values():
        kind = settings.get(_KIND, _LORA)
        if kind != _LORA:
            raise CheckpointError(f"{shown(whose)}: {where} says PEFT's {shown(kind)}: only {_LORA} is read")
        pattern = settings.get(_PATTERN) or {}
        values = [settings.get(_ALPHA), *(pattern.values() if isinstance(pattern, dict) else [None])]
        if not all(map(_is_number, values)):
            raise CheckpointError(f"{shown(whose)}: {where} has an alpha that is not a number; {_ANEW}")
        if odd := [name for name in pattern if not _PLAIN.fullmatch(name)]:
            raise CheckpointError(
                f"{shown(whose)}: {where} has an alpha for {listing(odd)}: only names of modules are read"
            )
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _LARGEST
