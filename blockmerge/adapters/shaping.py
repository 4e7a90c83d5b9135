"""Whether the parts of a module belong together, and whether they fit the weight that it is to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from blockmerge.adapters.forms import BESIDE, FORMS, OF_BIASES, Form
from blockmerge.adapters.parts import NOT_READ
from blockmerge.adapters.targets import Shape
from blockmerge.dtypes import FLOAT_DTYPES
from blockmerge.errors import listing, shown
from blockmerge.expressions import Stored

Parts = Mapping[str, Stored]

_NUMBERS = ("alpha", "on_input")
_NO_NUMBERS = ("C64", "F8_E8M0")
_SCALED = "ia3_weight"


@dataclass(frozen=True)
class Shaped:
    """A module's parts as one of the forms, and {word of its shapes: (size, a tensor that has it)}."""

    form: Form
    parts: Parts
    sizes: Mapping[str, tuple[int, Stored]]

    @property
    def rank(self) -> int | None:
        """Its rank; None where its kind has none."""
        return self._size(self.form.rank) if self.form.rank else None

    @property
    def columns(self) -> int | None:
        """The columns of the weight that it changes; None where its parts do not tell."""
        return self._size(self.form.columns)

    @property
    def is_on_input(self) -> bool:
        """Whether it is IA3 that scales columns in place of rows, by the form that was chosen."""
        return self.form.parts.get(_SCALED) == "inputs"

    @property
    def axes(self) -> int:
        """The axes that its parts have at most."""
        return max(len(one.shape) for one in self.parts.values())

    def misfit(self, shape: Shape, *, has_bias: bool) -> str | None:
        """Say what does not fit a module whose own weight has that shape; None where everything does."""
        fault = self.misfit_at_any_width(shape, has_bias=has_bias)
        if fault is not None:
            return fault
        rows, inputs, kernel = (*shape[:1], 1)[0], (*shape[1:2], 1)[0], prod(shape[2:])
        for words, what, expected in (
            (self.form.rows, "rows", rows),
            ("rows", "rows", rows),
            (self.form.columns, "columns", inputs * kernel),
            ("columns", "columns", inputs * kernel),
            ("inputs", "input channels", inputs),
        ):
            found = self._size(words)
            if found is not None and found != expected:
                return f"{self._told(words)}, expected {expected} {what}"
        return None

    def misfit_at_any_width(self, shape: Shape, *, has_bias: bool) -> str | None:
        """Say what does not fit a module whose own weight has that shape, but for rows and input channels:
        its kernel, and its bias.
        """
        if self.form.columns and not self._has_kernel(prod(shape[2:])):
            expected = f"a kernel of {'×'.join(map(str, shape[2:]))}" if len(shape) > 2 else "no kernel"
            return f"{self._told(self.form.columns)}, expected {expected}"
        bias = next((part for part in OF_BIASES if part in self.parts), None)
        if bias is not None and not has_bias:
            return f"{shown(self.parts[bias].name)} is there, expected none: that layer has no bias"
        return None

    def _has_kernel(self, elements: int) -> bool:
        """Whether its kernel may be one of so many elements, by what has columns of the weight."""
        words = self.form.columns.split()
        own = [
            prod(one.shape[2:])
            for part, one in self.parts.items()
            if self.form.parts.get(part, "").split()[-1:] in [[word] for word in words]
        ]
        columns = self._size(self.form.columns) or 0
        return self._size("kernel") in (None, elements) and {*own} <= {1, elements} and not columns % elements

    def _size(self, words: str) -> int | None:
        """A product of sizes; None where the parts do not tell."""
        if any(word not in self.sizes for word in words.split()):
            return None
        return prod(self.sizes[word][0] for word in words.split())

    def _told(self, words: str) -> str:
        """The tensors from which a size is known, with their shapes."""
        tensors = dict.fromkeys(self.sizes[word][1] for word in words.split())
        return " and ".join(map(_described, tensors or self.parts.values()))


def shaped(parts: Parts, on_input: Callable[[Stored], bool]) -> list[Shaped] | str:
    """Return a module's parts as each of the forms that they have, or say what is wrong with them.

    There are several only where the weight that is changed has to tell. `on_input` reads which side IA3
    scales.
    """
    parts = _with_magnitude(parts)
    if odd := [one for part, one in parts.items() if _is_odd(part, one.dtype)]:
        return f"{shown(odd[0].name)} is {odd[0].dtype}, expected floats"
    forms = sorted((form for form in FORMS if form.holds(parts)), key=lambda form: _other_axes(form, parts))
    if not forms:
        return _fault_of_parts(parts)
    found = [_bound(form, parts) for form in forms]
    fitting = [one for one in found if isinstance(one, Shaped)]
    faults = [one for one in found if isinstance(one, str)]
    if fitting and "on_input" in parts:
        side = on_input(parts["on_input"])
        return [one for one in fitting if one.is_on_input == side]
    return fitting or faults[0]


def _other_axes(form: Form, parts: Parts) -> int:
    """How many parts have another number of axes than the words of their shape."""
    shapes = ((words.split(), parts[part].shape) for part, words in form.parts.items())
    return sum(len(words) != len(shape) for words, shape in shapes)


def _is_odd(part: str, dtype: str) -> bool:
    return dtype in _NO_NUMBERS if part in _NUMBERS else dtype not in FLOAT_DTYPES


def _with_magnitude(parts: Parts) -> Parts:
    """PEFT's magnitude vector, which has a number for each row whatever its axes, as others write theirs."""
    if "magnitude" not in parts or "dora_scale" in parts:
        return parts
    vector = parts["magnitude"]
    others = {part: one for part, one in parts.items() if part != "magnitude"}
    return {**others, "dora_scale": replace(vector, shape=(vector.elements, 1))}


def _fault_of_parts(parts: Parts) -> str:
    """Say why parts are those of no form."""
    for part, what in NOT_READ.items():
        if part in parts:
            return f"{shown(parts[part].name)} is {what}, which is not read"
    own = parts.keys() - BESIDE.keys()
    names = listing(one.name for one in parts.values())
    if not own:
        return f"{names} without anything that it belongs to"
    wanted = min(
        (form.parts.keys() - own for form in FORMS if own <= form.parts.keys()), key=len, default=None
    )
    if wanted:
        return f"{names} without {' and '.join(sorted(wanted))}"
    return f"{names} do not belong together: they are of different kinds"


def _bound(form: Form, parts: Parts) -> Shaped | str:
    """The parts with the sizes of their shapes, or what does not go together."""
    sizes: dict[str, tuple[int, Stored]] = {}
    for part, tensor in parts.items():
        if part in _NUMBERS:
            if tensor.elements != 1:
                return f"{_described(tensor)}, expected a single number"
            continue
        words = _words(form, part, tensor.shape)
        if len(tensor.shape) < len(words):
            return f"{_described(tensor)}, expected {len(words)} axes"
        if words[1:] and words[-1] == "inputs" and prod(tensor.shape[len(words) :]) > 1:
            return f"{_described(tensor)}, expected no kernel: that is in another of the module's tensors"
        if 0 in tensor.shape:
            is_rank = (form.rank, 0) in _each(words, tensor.shape)
            return f"{_described(tensor)}: {'rank 0, which changes nothing' if is_rank else 'it is empty'}"
        for word, size in _each(words, tensor.shape):
            known, other = sizes.setdefault(word, (size, tensor))
            if known != size and other is tensor:
                return f"{_described(tensor)}, whose sizes do not go together"
            if known != size:
                return f"{_described(other)}, which does not go with {_described(tensor)}"
    if form.kind == "boft" and (fault := _fault_of_stages(parts["oft_blocks"])) is not None:
        return fault
    return Shaped(form, {form.renamed.get(part, part): one for part, one in parts.items()}, sizes)


def _fault_of_stages(blocks: Stored) -> str | None:
    """Say what is wrong with BOFT's stages, each of which takes rows from twice as far as the one before."""
    stages, count, size = blocks.shape[:3]
    most = count.bit_length()
    if stages > most or count % (1 << (stages - 1)):
        return f"{_described(blocks)}: {count} blocks of {size} rows cannot be shuffled in {stages} stages"
    return None


def _each(words: list[str], shape: Shape) -> Iterator[tuple[str, int]]:
    """Each word with its size; the last has all axes that are left."""
    last = len(words) - 1
    yield from zip(words, (*shape[:last], prod(shape[last:])), strict=True)


def _words(form: Form, part: str, shape: Shape) -> list[str]:
    if part == "dora_scale" and shape[:1] == (1,) and prod(shape) > 1:
        return ["inputs"]
    return form.parts.get(part, BESIDE.get(part, "")).split()


def _described(tensor: Stored) -> str:
    return f"{shown(tensor.name)} is {shown(list(tensor.shape))}"
