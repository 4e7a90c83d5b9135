"""Quantised weights: how names, dtypes and metadata tell them, and which can be read.

*Scaled fp8* is read: weights stored as 8-bit floats, each with a scale that it has to be multiplied by, one
number or one for each row. Its two spellings name, beside a weight `L.weight`:

- `L.scale_weight`, maybe `L.scale_input`, and one tensor `scaled_fp8` that marks all of the file or a
  component
- `L.weight_scale`, maybe `L.input_scale`, and `L.comfy_quant`, a JSON object in bytes whose `format` is
  float8_e4m3fn or float8_e5m2; or the same objects in the metadata, under `_quantization_metadata`

Scales of inputs are for programs that quantise activations, too: a weight does not need them. All other kinds
are told only to be refused by name: their codes are no numbers that could be averaged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blockmerge.anatomy import EMA_PREFIX
from blockmerge.checkpoints.checkpoint import Checkpoint, TensorInfo
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import CheckpointError, counted, listing, shown
from blockmerge.expressions import Dequantised, Expression, Stored

SCALED_FP8 = "scaled fp8"
QUANTISATION_KEY = "_quantization_metadata"
"""The metadata in which a file says how its layers are quantised."""

_SCALES = ("scale_weight", "weight_scale")
_SCALES_OF_INPUTS = ("scale_input", "input_scale")
_FORMAT = "comfy_quant"
_MARKER = "scaled_fp8"

_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}
_CODES = frozenset(_FORMATS.values())
_NUMBERS = frozenset({"F16", "BF16", "F32", "F64"})  # what scales are stored as
# What else a format may say without changing what the weights are.
_OF_NO_MATTER = frozenset({"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"})
_LARGEST_FORMAT = 1 << 16  # bytes; a format takes some dozens

# Kinds that are not read, and the last words of names that only they have; the most telling ones first.
_OTHER_KINDS: Mapping[str, frozenset[str]] = {
    "bitsandbytes nf4": frozenset({"bitsandbytes__nf4"}),
    "bitsandbytes fp4": frozenset({"bitsandbytes__fp4"}),
    "bitsandbytes int8": frozenset({"SCB", "weight_format"}),
    "bitsandbytes 4-bit": frozenset({"absmax", "quant_map", "nested_absmax", "nested_quant_map"}),
    "nvfp4": frozenset({"weight_scale_2"}),
    "weights smoothed by pre_quant_scale": frozenset({"pre_quant_scale"}),
    "block-scaled fp8": frozenset({"weight_scale_inv"}),
    "SVDQuant": frozenset({"wscales", "wcscales", "wtscale", "smooth_factor", "smooth_factor_orig"}),
    "GPTQ": frozenset({"g_idx"}),
    "AWQ or GPTQ": frozenset({"qweight", "qzeros"}),
    "quanto": frozenset({"_data", "_scale"}),
    "torchao": frozenset({"int_data", "_weight_qdata", "_weight_scale", "qdata"}),
    "HQQ": frozenset({"W_q"}),
    "packed integers": frozenset({"weight_packed", "weight_zero_point"}),
}
# What others call scales; of a layer they are only beside weights that are not plain floats.
_OTHER_SCALES = frozenset({"scale", "scales", "weight_scales"})
_WORDS = frozenset(
    {*_SCALES, *_OTHER_SCALES, *_SCALES_OF_INPUTS, _FORMAT, _MARKER}.union(*_OTHER_KINDS.values())
)
_IN_EMA = sorted(
    (
        "weight",
        *_SCALES,
        *(word for word in _WORDS if word.startswith("weight_")),
        *_SCALES_OF_INPUTS,
        _FORMAT,
        _MARKER,
    ),
    key=len,
    reverse=True,
)
"""With what the names of EMA copies end, which have lost the dot before it; longest first."""


@dataclass(frozen=True)
class Quantised:
    """How the weights of a checkpoint are quantised; `kind` is None where they are not.

    `weights` are those of scaled fp8, by their names in the file, as what they stand for. `aside` are the
    tensors that only say how: scales, formats and markers, which are none of the model. `faults` say, with
    names, what is wrong with it. `signs` are names that show a kind which cannot be read.
    """

    kind: str | None = None
    weights: Mapping[str, Expression] = field(default_factory=dict)
    aside: frozenset[str] = frozenset()
    faults: tuple[str, ...] = ()
    signs: tuple[str, ...] = ()

    @property
    def fault(self) -> str | None:
        """Why the weights cannot be read, to be put behind the name of the file; None where they can."""
        if self.signs:
            return (
                f"is quantised as {self.kind} ({listing(self.signs)}): of quantised weights only fp8 can be "
                "read, plain or scaled; take the model in fp16 or bf16"
            )
        if self.faults:
            found = counted(len(self.faults), "fault")
            return f"is {self.kind} with {found}: {listing(self.faults, width=300)}"
        return None

    def check(self, label: str) -> None:
        """Raise CheckpointError where the weights of the checkpoint called `label` cannot be read."""
        if self.fault is not None:
            raise CheckpointError(f"{shown(label)} {self.fault}")

    def shape_of(self, info: TensorInfo) -> tuple[int, ...]:
        """The shape that a tensor has in the model; none where it is packed, and its own would mislead."""
        is_packed = bool(self.signs) and info.dtype not in FLOAT_DTYPES and info.dtype != "I8"
        return () if is_packed else info.shape

    def tensor(self, checkpoint: Checkpoint, name: str) -> Expression:
        """What the tensor of that name is: its bytes, or what they stand for."""
        return self.weights.get(name) or Stored.of(checkpoint, name)

    def __str__(self) -> str:
        if self.kind != SCALED_FP8:
            return str(self.kind)
        dtypes = sorted({one.inputs[0].dtype for one in self.weights.values()})
        return f"{self.kind} ({counted(len(self.weights), 'weight')}, {' and '.join(dtypes) or 'none'})"


def quantised(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo] | None = None) -> Quantised:
    """Tell how a checkpoint's weights are quantised, all or those among `tensors`.

    Of the data only scales and formats are read. Raises CheckpointError when they cannot be.
    """
    tensors = checkpoint.tensors if tensors is None else tensors
    words = _words(tensors)
    said = checkpoint.metadata.get(QUANTISATION_KEY)
    if not words and said is None:
        return Quantised()
    formats = _Formats.of(checkpoint, tensors, words.get(_FORMAT, ()), said)
    for kind, signs in _other_kinds(tensors, words, formats):
        if signs:
            return Quantised(kind, signs=tuple(signs), aside=frozenset().union(*words.values()))
    return _Scaled(checkpoint, tensors, words, formats).found()


def _words(names: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """{last word: the names that end in it}, of the words that quantised models have."""
    found: dict[str, list[str]] = {}
    endings = tuple(_WORDS)
    for name in names:
        if not name.endswith(endings):
            continue
        word = name[len(_layer(name)) :]
        if word in _WORDS:
            found.setdefault(word, []).append(name)
    return found


def _layer(name: str) -> str:
    """A name without its last word: that of a layer, with the dot behind it, but in EMA copies."""
    layer = name[: max(name.rfind("."), name.rfind("/")) + 1]
    word = next((one for one in _IN_EMA if name.endswith(one)), "") if layer.endswith(EMA_PREFIX) else ""
    return name.removesuffix(word) if word else layer


@dataclass(frozen=True)
class _Formats:
    """What is said of layers in JSON: {name of the layer, with its dot: what}, and what cannot be read."""

    layers: Mapping[str, Mapping[str, Any]]
    faults: Sequence[str]

    @classmethod
    def of(
        cls,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        names: Sequence[str],
        metadata: str | None,
    ) -> _Formats:
        layers: dict[str, Mapping[str, Any]] = {}
        faults = []
        for layer, one in _in_metadata(metadata).items():
            for dotted in (f"{layer}.", layer):  # what a tool has left of another file says nothing
                if f"{dotted}weight" in tensors:
                    layers[dotted] = one if isinstance(one, dict) else {}
        data = checkpoint.read_all(name for name in names if _is_short(tensors[name]))
        for name in names:
            found = _json(data.get(name, b""))
            if isinstance(found, dict):
                layers[_layer(name)] = found
            else:
                faults.append(f"{shown(name)} is not the JSON object that says how a layer is quantised")
        return cls(layers, faults)

    def dtype_of(self, layer: str) -> str | None:
        """The dtype of a layer's codes, where something is said of it."""
        form = self.layers.get(layer, {}).get("format")
        return _FORMATS.get(form) if isinstance(form, str) else None

    def other_kinds(self) -> dict[str, list[str]]:
        """{kind that is not read: the layers of that kind}."""
        found: dict[str, list[str]] = {}
        for layer, said in self.layers.items():
            form = said.get("format")
            kind = form.replace("_", " ") if isinstance(form, str) else "an unknown format"
            more = [key for key, value in said.items() if value and key not in _OF_NO_MATTER]
            if not isinstance(form, str) or form not in _FORMATS:
                more = [key for key in more if key == "convrot"]
            elif not more:
                continue
            found.setdefault(shown(" with ".join((kind, *more))), []).append(layer.rstrip("."))
        return found


def _in_metadata(text: str | None) -> Mapping[str, Any]:
    found = _json((text or "").encode())
    layers = found.get("layers") if isinstance(found, dict) else None
    return layers if isinstance(layers, dict) else {}


def _is_short(info: TensorInfo) -> bool:
    return info.dtype in ("U8", "I8") and info.nbytes <= _LARGEST_FORMAT


def _json(data: bytes) -> Any:
    try:
        return json.loads(data.rstrip(b"\0"))
    except (ValueError, RecursionError):
        return None


def _other_kinds(
    tensors: Mapping[str, TensorInfo], words: Mapping[str, Sequence[str]], formats: _Formats
) -> Iterator[tuple[str, Sequence[str]]]:
    """Yield kinds that are not read, with the names that show them, what tells most first."""
    yield from formats.other_kinds().items()
    for kind, own in _OTHER_KINDS.items():
        yield kind, [name for word in sorted(own) for name in words.get(word, ())]
    by_dtype: dict[str, list[str]] = {}
    others = [
        name
        for word in sorted(_OTHER_SCALES)
        for name in words.get(word, ())
        if (weight := tensors.get(f"{_layer(name)}weight")) and weight.dtype not in _NUMBERS
    ]
    yield "fp8 or integers with scales of their own (as SDNQ writes)", others
    for name in (name for word in _SCALES for name in words.get(word, ())):
        weight = tensors.get(f"{_layer(name)}weight")
        told = _kind_by_dtypes(tensors[name].dtype, weight.dtype if weight else "", formats, name)
        if told is not None:
            by_dtype.setdefault(told, []).append(name)
    yield from by_dtype.items()


def _kind_by_dtypes(scale: str, weight: str, formats: _Formats, name: str) -> str | None:
    """What the dtypes of a weight and its scale tell, unless it is scaled fp8."""
    if scale in _CODES:
        return "nvfp4" if weight == "U8" else "block-scaled fp8"
    if scale in ("U8", "F8_E8M0"):
        return "mxfp8"
    if weight and weight not in FLOAT_DTYPES and not (weight == "U8" and formats.dtype_of(_layer(name))):
        return "int8" if weight == "I8" else f"packed integers ({weight})"
    return None


class _Scaled:
    """Reads scaled fp8: finds the scale of each weight, and what is wrong."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        tensors: Mapping[str, TensorInfo],
        words: Mapping[str, Sequence[str]],
        formats: _Formats,
    ) -> None:
        self._checkpoint, self._tensors, self._formats = checkpoint, tensors, formats
        self._faults = list(formats.faults)
        self._weights: dict[str, Expression] = {}
        self._data: dict[str, bytes] = {}
        self._scales: dict[str, str] = {}  # layer → the name of its scale
        for name in (name for word in _SCALES for name in words.get(word, ())):
            if _layer(name) in self._scales:
                self._faults.append(f"{shown(name)} is the second scale beside {self._scales[_layer(name)]}")
            self._scales[_layer(name)] = name
        self._markers = [name for name in words.get(_MARKER, ()) if self._tensors[name].elements <= 2]
        self._marked = {_layer(marker) for marker in self._markers}
        of_inputs = (name for word in _SCALES_OF_INPUTS for name in words.get(word, ()))
        self._aside = {
            *(name for word in (*_SCALES, _FORMAT) for name in words.get(word, ())),
            *self._markers,
            *(name for name in of_inputs if self._is_said_of(_layer(name))),
        }

    def found(self) -> Quantised:
        """All of it."""
        self._data = self._checkpoint.read_all(filter(self._is_to_be_read, self._scales.values()))
        for layer, scale in self._scales.items():
            if f"{layer}weight" in self._tensors:
                self._read(f"{layer}weight", scale)
            else:
                self._miss(scale, "is the scale of", layer)
        for layer in self._formats.layers:
            if f"{layer}weight" not in self._tensors:
                self._miss(layer + _FORMAT, "describes", layer)
        for name, info in self._tensors.items():
            if name.endswith("weight") and len(info.shape) > 1 and self._lacks_its_scale(name, info):
                self._faults.append(f"{shown(name)} should be scaled fp8, and its scale is not there")
        if not (self._weights or self._faults or self._aside):
            return Quantised()
        return Quantised(SCALED_FP8, self._weights, frozenset(self._aside), tuple(self._faults))

    def _is_to_be_read(self, scale: str) -> bool:
        """Whether it is numbers, and no more of them than its weight has rows."""
        info, weight = self._tensors[scale], self._tensors.get(f"{_layer(scale)}weight")
        return weight is not None and info.dtype in _NUMBERS and info.elements <= max(1, *weight.shape[:1])

    def _miss(self, name: str, what: str, layer: str) -> None:
        self._faults.append(f"{shown(name)} {what} {shown(layer)}weight, which is not there")

    def _is_said_of(self, layer: str) -> bool:
        """Whether something but a scale of its input says that a layer is quantised."""
        return layer in self._scales or layer in self._formats.layers or self._is_marked(layer)

    def _is_marked(self, layer: str) -> bool:
        """Whether a marker stands for all of the file, or for something that the layer is in."""
        return any(layer.startswith(marked) for marked in self._marked)

    def _lacks_its_scale(self, name: str, info: TensorInfo) -> bool:
        layer = _layer(name)
        if layer in self._scales or name != f"{layer}weight":
            return False
        if layer in self._formats.layers:
            return True
        return info.dtype in _CODES and self._is_said_of(layer)

    def _read(self, weight: str, scale: str) -> None:
        info = self._tensors[weight]
        said = self._formats.dtype_of(_layer(weight))
        # Bytes of 8-bit floats may be stored as whole numbers, where it is said what they are.
        dtype = said if said is not None and info.dtype == "U8" else info.dtype
        if said is not None and dtype != said:
            self._faults.append(f"{shown(weight)} is {info.dtype}, although it is said to be {said}")
            return
        values = self._values(weight, scale)
        if values is None:
            return
        if dtype not in _CODES:
            # Layers that are left as they were have a scale of 1 in some files.
            if any(value != 1 for value in values):
                fault = f"{shown(weight)} is {info.dtype} and has the scale {shown(scale)}, as only fp8 has"
                self._faults.append(fault)
            return
        codes = Stored(self._checkpoint, weight, dtype, info.shape)
        if len(values) == 1:
            self._weights[weight] = Dequantised(codes, values[0])
            return
        rows = Stored(self._checkpoint, scale, self._tensors[scale].dtype, (len(values),))
        self._weights[weight] = Dequantised(codes, rows)

    def _values(self, weight: str, scale: str) -> list[float] | None:
        """The scales of a weight: one, or one for each row."""
        info, of_weight = self._tensors[scale], self._tensors[weight].shape
        rows = of_weight[:1]
        is_by_row = info.shape[:1] == rows and (info.elements,) == rows
        if info.elements != 1 and not is_by_row:
            expected = f"[1] or {list(rows)}" if rows else "[1]"
            by_blocks = " (block-scaled fp8 is not read yet)" if len(info.shape) > 1 else ""
            self._faults.append(
                f"{shown(scale)} has the shape {shown(list(info.shape))}, expected {expected} "
                f"for {shown(weight)}, which is {shown(list(of_weight))}{by_blocks}"
            )
        elif info.dtype not in _NUMBERS:
            self._faults.append(f"{shown(scale)} is {info.dtype}, expected F32")
        else:
            values = _floats(self._data[scale], info.dtype)
            if all(map(math.isfinite, values)):
                return values
            self._faults.append(f"{shown(scale)} holds NaN or infinity")
        return None


def _floats(data: bytes, dtype: str) -> list[float]:
    """The numbers in a tensor's bytes, as float32 has them."""
    import numpy as np  # where numbers are read, and not before

    if dtype == "BF16":
        values = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(data, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype])
    with np.errstate(over="ignore", invalid="ignore"):
        found: list[float] = values.astype("<f4").tolist()
    return found
