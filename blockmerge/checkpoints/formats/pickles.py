"""Pickles read as data: a small machine that imports nothing, looks nothing up and calls nothing that a
pickle names.

It knows the opcodes that pickle protocols 2 to 5 write, and of everything a pickle can name only what
rebuilds tensors and dicts. What training scripts are known to leave beside a state dict becomes an inert
`Unbuilt`; any other name is refused where it is named. Storages are described, never loaded. The formats are
those of Python's `pickletools` and of `torch.save` (torch/_utils.py, torch/serialization.py).

Everything is bounded before it is made: a count against the bytes there are and `LARGEST_PICKLE`, operations
by `_MOST_OPERATIONS`, for all pickles of a file together.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from blockmerge.errors import shown

LARGEST_PICKLE = 32 << 20  # bytes; SDXL with EMA and an optimizer takes some 6 MB
_MOST_OPERATIONS = 600_000  # a tensor takes some 30; SDXL with EMA and Adam's state 275,000
_LONGEST_NAME = 1000
_CUT_SHORT = f"its pickle is cut short, or of more than {LARGEST_PICKLE >> 20} MB"
_LONGEST_INT = 64  # bytes; none in a model file is longer than torch's magic number of 10

_INERT_MODULES = frozenset({
    # state dicts of trainers: their callbacks, loops, schedulers and configurations
    "pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "omegaconf",
    "accelerate", "transformers", "diffusers", "deepspeed", "bitsandbytes", "peft", "tensorflow", "wandb",
    "yaml", "easydict", "ml_collections",
    # the training code itself
    "ldm", "sgm", "taming", "k_diffusion", "main", "__main__",
    # values: dtypes, devices, random states, paths, dates
    "torch", "torchvision", "numpy", "collections", "argparse", "pathlib", "datetime", "enum", "typing",
    "types", "functools", "uuid", "decimal",
})  # fmt: skip
"""Modules whose names training scripts are known to leave in checkpoints. Nothing of them is ever built."""

_INERT_NAMES = frozenset(
    [f"{builtins}.{name}" for builtins in ("builtins", "__builtin__") for name in (
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object",
        "range", "set", "slice", "str", "tuple", "long", "unicode",
    )]
    + [f"{copyreg}.{name}" for copyreg in ("copyreg", "copy_reg") for name in (
        "_reconstructor", "__newobj__", "__newobj_ex__",
    )]
)  # fmt: skip

_REFUSED_NAMES = frozenset({"torch.storage._load_from_bytes"})  # a pickle inside the pickle

_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "Untyped": "U8", "ComplexFloat": "C64",
    "ComplexDouble": "complex128", "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32",
    "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
}  # fmt: skip

_DTYPES = {
    "float64": "F64", "double": "F64", "float32": "F32", "float": "F32", "float16": "F16", "half": "F16",
    "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int64": "I64", "long": "I64",
    "int32": "I32", "int": "I32", "int16": "I16", "short": "I16", "int8": "I8", "uint8": "U8",
    "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL", "complex64": "C64", "cfloat": "C64",
}  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Unbuilt:
    """Something that was named and not built; `what` is the name."""

    what: str


@dataclass(frozen=True, slots=True, eq=False)
class Dtype:
    """The dtype that a dtype or a type of storage stands for, as safetensors spells it, else as torch
    does.
    """

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """A storage as a pickle names it: its key, and what it says of its dtype and its number of elements."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """What a pickle says of a tensor, none of it checked: strides and `offset` in elements; None: the
    storage's dtype.
    """

    storage: Any
    offset: Any
    shape: Any
    strides: Any
    dtype: Any = None
    metadata: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class _Builder:
    """A name that stands for something: what makes it of its arguments.

    Raises ValueError or TypeError for others.
    """

    build: Callable[..., object]


def pickles_in(file: BinaryIO, size: int, storages: dict[str, Storage]) -> Iterator[object]:
    """Read the pickles in `file`, which holds at most `size` bytes more, one by one; each leaves the file
    behind it.

    Yields plain data: numbers, texts, bytes, None, tuples, lists (also for sets), dicts, and the classes
    above. `storages` gets every storage that is named. Raises ValueError, in words for people, for what is
    refused or damaged.
    """
    machine = _Machine(file, size, storages)
    while True:
        yield machine.run()


class _Machine:
    def __init__(self, file: BinaryIO, size: int, storages: dict[str, Storage]) -> None:
        self.file = file
        # For all pickles together: a file of the old layout holds five, and each could use up all that there
        # is.
        self.left = min(size, LARGEST_PICKLE)  # an upper bound: opcodes are not counted
        self.operations = iter(range(_MOST_OPERATIONS))
        self.storages = storages

    def run(self) -> object:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks below each mark
        self.memo: dict[int, Any] = {}
        read = self.file.read
        try:
            for _ in self.operations:
                code = read(1)
                if code == b".":
                    return self.stack.pop()
                if code not in _OPERATIONS:
                    raise ValueError(_refused_opcode(code))
                _OPERATIONS[code](self)
        except IndexError:
            raise ValueError("its pickle takes more from its stack than is there") from None
        raise ValueError(f"its pickle takes more than {_MOST_OPERATIONS:,} steps")

    def take(self, count: int) -> bytes:
        self.left -= count
        data = self.file.read(count) if self.left >= 0 else b""
        if len(data) != count:
            raise ValueError(_CUT_SHORT)
        return data

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> str:
        data = self.file.readline(_LONGEST_NAME)
        self.left -= len(data)
        if not data.endswith(b"\n") or self.left < 0:
            raise ValueError(f"{_CUT_SHORT}, or holds a name that is too long")
        return data[:-1].decode("utf-8", "backslashreplace")

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.below.pop()
        return items

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Unbuilt):
            raise ValueError("its pickle appends to something that is not a list")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2 or not isinstance(target, (dict, Unbuilt)):
            raise ValueError("its pickle sets items of something that is not a dict")
        if isinstance(target, dict):
            target.update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError("its pickle recalls what it never remembered")
        self.stack.append(self.memo[index])

    def long(self, size: int) -> None:
        data = self.take(size)
        fits = size <= _LONGEST_INT
        self.push(int.from_bytes(data, "little", signed=True) if fits else Unbuilt(f"number of {size} bytes"))

    def text(self, size: int) -> None:
        self.push(self.take(size).decode("utf-8", "surrogatepass"))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(name, str) and isinstance(module, str)):
            raise ValueError("its pickle names something by a value that is not a name")
        self.push(_named(module, name))

    def call(self, arguments: object) -> None:
        function = self.stack.pop()
        if isinstance(function, (Unbuilt, Dtype)):
            self.push(Unbuilt(function.what if isinstance(function, Unbuilt) else function.name))
        elif isinstance(function, _Builder) and isinstance(arguments, tuple):
            try:
                self.push(function.build(*arguments))
            except TypeError:  # too many or too few
                raise ValueError("its pickle builds a tensor or a dict from something else") from None
        else:
            raise ValueError("its pickle calls something that is not a name")

    def build(self) -> None:
        # The state of a dict (its attributes, such as `_metadata`) and of what is not built anyway is left
        # out.
        self.stack.pop()
        if not self.stack:
            raise IndexError

    def persistent(self) -> None:
        match self.stack.pop():
            case ("storage", Dtype(name=dtype), str(key), _, int(elements), *views) if (
                len(views) < 2 and elements >= 0
            ):
                if views and views[0] is not None:
                    raise ValueError(
                        "it holds views of storages, as torch wrote them before 0.4: save it anew with torch"
                    )
                storage = self.storages.setdefault(key, Storage(key, dtype, elements))
                self.push(storage if storage.dtype == dtype else Storage(key, dtype, elements))
            case ("storage", Unbuilt(what=what), *_):
                raise ValueError(f"it holds a storage of the unknown type {shown(what)}")
            # The class of a model that was saved whole, with its source.
            case ("module", Unbuilt() as module, *_):
                self.push(module)
            case _:
                raise ValueError("its pickle refers to something outside it that is not a storage")


def _refused_opcode(code: bytes) -> str:
    import pickletools

    if not code:
        return _CUT_SHORT
    known = [opcode.name for opcode in pickletools.opcodes if opcode.code == code.decode("latin1")]
    return (
        f"its pickle holds the opcode {known[0] if known else repr(code)}, "
        "which torch never writes: it is refused"
    )


def _key(key: object) -> object:
    # Only what no file can make collide: of tuples and long numbers, thousands with one hash are easily made.
    if isinstance(key, (str, bytes, float)) or (isinstance(key, int) and key.bit_length() <= 64):
        return key
    return Unbuilt("key that is not text")


def _named(module: str, name: str) -> object:
    """What a name stands for. Raises ValueError for one that no model file needs."""
    full = f"{module}.{name}"
    if full in _BUILDERS:
        return _BUILDERS[full]
    if module in ("torch", "torch.storage", "torch.cuda"):
        kind = name.removeprefix("_").removesuffix("Storage") if name.endswith("Storage") else ""
        if kind in _STORAGES:
            return Dtype(_STORAGES[kind])
        if name in _DTYPES and module == "torch":
            return Dtype(_DTYPES[name])
    # A dotted name may lead from an innocent module to any other that it imports; in a class, it is a class
    # too.
    walks = "." in name and not name[0].isupper()
    if full in _INERT_NAMES or (
        module.split(".")[0] in _INERT_MODULES and full not in _REFUSED_NAMES and not walks
    ):
        return Unbuilt(full)
    raise ValueError(
        f"its pickle names {shown(full)}, which no model needs: it is refused, and nothing of it was run"
    )


def _ordered_dict() -> dict[object, object]:
    return {}


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> StoredTensor:
    """Versions 1 and 2: `more` is requires_grad, hooks and, lately, metadata."""
    return StoredTensor(storage, offset, shape, strides, None, more[2] if len(more) > 2 else None)


def _rebuild_tensor_v3(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> StoredTensor:
    """Of a storage without a dtype of its own: `more` is requires_grad, hooks, dtype and maybe metadata."""
    if len(more) < 3:
        raise TypeError
    return StoredTensor(storage, offset, shape, strides, more[2], more[3] if len(more) > 3 else None)


def _rebuild_parameter(data: object, *_: object) -> object:
    return data


def _rebuild_from_type(function: object, _type: object, arguments: object, _state: object) -> object:
    """A tensor that had attributes of its own."""
    if (
        not isinstance(function, _Builder)
        or function.build is _rebuild_from_type
        or not isinstance(arguments, tuple)
    ):
        raise TypeError
    return function.build(*arguments)


def _size(extents: object = ()) -> object:
    return extents


def _plain(*_: object) -> None:
    """A number or bytes, whose value no model needs."""


_BUILDS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch._tensor._rebuild_from_type": _rebuild_from_type,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch.tensor._rebuild_from_type": _rebuild_from_type,
    "torch.Size": _size,
    "_codecs.encode": _plain,
    "numpy.core.multiarray.scalar": _plain,
    "numpy._core.multiarray.scalar": _plain,
}

_BUILDERS = {name: _Builder(build) for name, build in _BUILDS.items()}


def _protocol(machine: _Machine) -> None:
    if machine.number(1) > 5:
        raise ValueError("its pickle is of a protocol above 5")


def _frame(machine: _Machine) -> None:
    if machine.number(8) > machine.left:
        raise ValueError(_CUT_SHORT)


def _mark(machine: _Machine) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise IndexError
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return make


def _new_object_ex(machine: _Machine) -> None:
    machine.stack.pop()  # the arguments by name
    machine.call(machine.stack.pop())


def _set_item(machine: _Machine) -> None:
    value, key = machine.stack.pop(), machine.stack.pop()
    machine.set_items([key, value])


_OPERATIONS: dict[bytes, Callable[[_Machine], object]] = {
    b"\x80": _protocol,
    b"\x95": _frame,
    b"(": _mark,
    b"0": lambda m: m.stack.pop(),
    b"1": lambda m: m.pop_to_mark(),
    b"2": lambda m: m.push(m.stack[-1]),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"J": lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    b"K": lambda m: m.push(m.take(1)[0]),
    b"M": lambda m: m.push(m.number(2)),
    b"\x8a": lambda m: m.long(m.number(1)),
    b"\x8b": lambda m: m.long(m.number(4)),
    b"G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    b"X": lambda m: m.text(m.number(4)),
    b"\x8c": lambda m: m.text(m.number(1)),
    b"\x8d": lambda m: m.text(m.number(8)),
    b"B": lambda m: m.push(m.take(m.number(4))),
    b"C": lambda m: m.push(m.take(m.number(1))),
    b"\x8e": lambda m: m.push(m.take(m.number(8))),
    b"\x96": lambda m: m.push(m.take(m.number(8))),
    b"T": lambda m: m.push(m.take(m.number(4)).decode("latin1")),  # texts of Python 2
    b"U": lambda m: m.push(m.take(m.number(1)).decode("latin1")),
    b")": lambda m: m.push(()),
    b"]": lambda m: m.push([]),
    b"}": lambda m: m.push({}),
    b"\x8f": lambda m: m.push([]),  # a set: no item of one is ever hashed
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x91": lambda m: m.push(m.pop_to_mark()),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"a": lambda m: m.extend([m.stack.pop()]),
    b"e": lambda m: m.extend(m.pop_to_mark()),
    b"\x90": lambda m: m.extend(m.pop_to_mark()),
    b"s": _set_item,
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"q": lambda m: m.remember(m.take(1)[0]),
    b"r": lambda m: m.remember(m.number(4)),
    b"\x94": lambda m: m.remember(len(m.memo)),
    b"h": lambda m: m.recall(m.take(1)[0]),
    b"j": lambda m: m.recall(m.number(4)),
    b"c": lambda m: m.push(_named(m.line(), m.line())),
    b"\x93": lambda m: m.stack_global(),
    b"R": lambda m: m.call(m.stack.pop()),
    b"\x81": lambda m: m.call(m.stack.pop()),
    b"\x92": _new_object_ex,
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.persistent(),
}
"""What each opcode does. INST, OBJ, EXT1…4, PERSID, out-of-band buffers and the texts of protocol 0 are none
of them.
"""
