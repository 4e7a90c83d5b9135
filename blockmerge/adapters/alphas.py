"""Which alpha modules have: from the tensors of that name, or from the configuration that PEFT writes."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blockmerge.checkpoints import Checkpoint, Readers
from blockmerge.dtypes import DTYPES, FLOAT_DTYPES, precision_of
from blockmerge.errors import CheckpointError, reason, shown
from blockmerge.expressions import Stored

METADATA_KEY = "lora_adapter_metadata"
"""The key of a file's metadata under which diffusers writes PEFT's configuration."""

_CONFIG_FILE = "adapter_config.json"
_LARGEST_CONFIG = 1 << 20
_PEFT = "base_model.model."
_PLAIN = re.compile(r"[\w.]+", re.ASCII)


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
    """PEFT's configurations, {what the modules' names begin with: its configuration}, the longest first.

    `are_missing` says that PEFT itself has written the file, and its configuration is not beside it.
    """

    each: Mapping[str, Mapping[str, Any]]
    are_missing: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint, modules: Iterable[str]) -> Configs:
        """Those in a file's metadata, or beside a file that PEFT itself has written.

        Raises CheckpointError when they are there and cannot be understood.
        """
        text, where = checkpoint.metadata.get(METADATA_KEY), f"{METADATA_KEY} in its metadata"
        peft = {name.partition(_PEFT)[0] + _PEFT for name in modules if _PEFT in name}
        if text is None and peft and checkpoint.path is not None:
            text, where = _beside(checkpoint.path), _CONFIG_FILE
        if text is None:
            return cls({}, bool(peft))
        said = _parsed(text, where, checkpoint.name)
        found = dict.fromkeys(peft, said) if where == _CONFIG_FILE else _by_prefix(said)
        for config in found.values():
            _check(config, where, checkpoint.name)
        return cls(dict(sorted(found.items(), key=lambda item: -len(item[0]))))

    def alpha_of(self, module: str, rank: int) -> float | None:
        """What a module's change is multiplied by, times its rank; None where nothing says so."""
        for prefix, config in self.each.items():
            if module.startswith(prefix):
                inner = module.removeprefix(prefix)
                pattern = config.get("alpha_pattern") or {}
                key = next((key for key in pattern if inner == key or inner.endswith(f".{key}")), None)
                alpha = float(config["lora_alpha"] if key is None else pattern[key])
                return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
        return None


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


def _parsed(text: str, where: str, whose: str) -> Mapping[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict):
        raise CheckpointError(f"{shown(whose)}: {where} cannot be read: it is not a JSON object of settings")
    return said


def _by_prefix(said: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{prefix: its settings} of settings such as ``unet.lora_alpha``; without one the prefix is empty."""
    prefixes = [key.removesuffix("lora_alpha") for key in said if re.fullmatch(r"([\w.]+\.)?lora_alpha", key)]
    return {
        prefix: {key.removeprefix(prefix): value for key, value in said.items() if key.startswith(prefix)}
        for prefix in prefixes
    }


def _check(config: Mapping[str, Any], where: str, whose: str) -> None:
    """Raise CheckpointError for a configuration that means what is not computed here."""
    pattern = config.get("alpha_pattern") or {}
    values = [config.get("lora_alpha"), *(pattern.values() if isinstance(pattern, dict) else [None])]
    if not all(_is_number(value) for value in values):
        raise CheckpointError(f"{shown(whose)}: {where} has an alpha that is not a number")
    if odd := [key for key in pattern if not _PLAIN.fullmatch(key)]:
        raise CheckpointError(
            f"{shown(whose)}: {where} has an alpha for '{shown(odd[0])}', which is not the name of a module"
        )
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise CheckpointError(
            f"{shown(whose)}: {where} says that it is of PEFT's kind '{shown(kind)}', not LORA"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
