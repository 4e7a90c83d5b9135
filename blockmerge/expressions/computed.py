"""What has to be computed: casts, codes and their scales, merges by a method, what it gathers first, what is
done to a result.

Torch is loaded to compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from blockmerge.expressions.arrangements import Joined, Part
from blockmerge.expressions.expression import Expression, Locality, Shape
from blockmerge.methods import Method

if TYPE_CHECKING:
    import torch


_LOCALITIES: Mapping[str, Locality] = {
    "element": "element",
    "row": "row",
    "tensor": "tensor",
    "model": "tensor",
}


@dataclass(frozen=True)
class Cast(Expression):
    """A tensor in another dtype, each element rounded."""

    tensor: Expression
    dtype: str

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The tensor."""
        return (self.tensor,)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Cast:
        """Another tensor in that dtype."""
        return Cast(inputs[0], self.dtype)

    @property
    def shape(self) -> Shape:
        """That of the tensor."""
        return self.tensor.shape

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Round."""
        from blockmerge.methods.elementwise import cast

        cast(*inputs, out=out)

    def simplified(self) -> Expression:
        """A cast to the dtype that is there does nothing."""
        return self.tensor if self.tensor.dtype == self.dtype else self

    def _said(self) -> Sequence[str]:
        return [str(self.tensor), self.dtype]


@dataclass(frozen=True)
class Held(Expression):
    """A tensor of which more digits are held than it would have in a file: what a stage of a recipe makes,
    which is rounded with the result.

    `kept` is the dtype that it would have in a file. It does nothing, and so is simplified away.
    """

    tensor: Expression
    kept: str

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The tensor."""
        return (self.tensor,)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Held:
        """Another tensor that stands for one of that dtype."""
        return Held(inputs[0], self.kept)

    @property
    def dtype(self) -> str:
        """The dtype that it is held in."""
        return self.tensor.dtype

    @property
    def shape(self) -> Shape:
        """That of the tensor."""
        return self.tensor.shape

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Copy."""
        out.copy_(inputs[0])

    def simplified(self) -> Expression:
        """The tensor; where that was only widened, without that."""
        if isinstance(self.tensor, Merged):
            return replace(self.tensor, is_held=True)
        is_widened = isinstance(self.tensor, Cast) and self.tensor.tensor.dtype == self.kept
        return self.tensor.tensor if is_widened and isinstance(self.tensor, Cast) else self.tensor

    def rounded(self, dtype: str) -> Expression:
        """The same in `dtype`, rounded once: where it is computed, if that can be."""
        return _rounded(self.tensor, dtype)


def _rounded(tensor: Expression, dtype: str) -> Expression:
    if isinstance(tensor, Joined):
        return Joined(tuple(_rounded(one, dtype) for one in tensor.members), tensor.axis)
    if isinstance(tensor, Merged):
        return replace(tensor, dtype=dtype, is_held=False)
    return replace(tensor, dtype=dtype) if isinstance(tensor, (Cast, Scaled)) else Cast(tensor, dtype)


@dataclass(frozen=True)
class Dequantised(Expression):
    """Codes times their scale, in float32: the weights that were stored as 8-bit floats with a scale.

    `scale` is one number for all of them, or a tensor with a number for each entry of the first axis. Codes
    have so few digits that the only rounding is float32's own.
    """

    codes: Expression
    scale: float | Expression

    @property
    def dtype(self) -> str:
        """Wide enough for the products."""
        return "F32"

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The codes, and scales of which there are many."""
        return (self.codes, self.scale) if isinstance(self.scale, Expression) else (self.codes,)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Dequantised:
        """Other codes, and with them their scales."""
        codes, *scales = inputs
        return Dequantised(codes, scales[0] if scales else self.scale)

    @property
    def shape(self) -> Shape:
        """That of the codes."""
        return self.codes.shape

    @property
    def locality(self) -> Locality:  # type: ignore[override]
        """Where each row has its scale, an element must be told its row."""
        return "row" if isinstance(self.scale, Expression) else "element"

    @property
    def is_made_by_rows(self) -> bool:
        """A row needs nothing of the others."""
        return True

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Multiply."""
        out.copy_(inputs[0])
        if isinstance(self.scale, Expression):
            out.mul_(inputs[1].to(out.dtype).view(-1, *[1] * (out.dim() - 1)))
        else:
            out.mul_(self.scale)

    def _said(self) -> Sequence[str]:
        return [str(self.codes), f"× {self.scale}"]


@dataclass(frozen=True)
class Gathered(Expression):
    """What a method says of all tensors of its models, which it must have seen before it merges the first.

    `tensors` are these, those of the models together. It is no tensor itself, and has no shape: what
    `Method.gather` returns stands in its place among the inputs of `Merged`. Compared by identity, for it is
    large.
    """

    method: Method
    tensors: tuple[tuple[Expression, ...], ...]
    dtype: str = ""
    shape: Shape = ()

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """None that are read with the tensor: it has been gathered by then."""
        return ()

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Gathered:
        """There are none to change."""
        return self

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """It is gathered, not computed."""
        raise NotImplementedError

    def __str__(self) -> str:
        return f"gathered({self.method.name}, {len(self.tensors)} tensors)"


Figures = Mapping[Gathered, object]
"""What was gathered."""


@dataclass(frozen=True)
class Merged(Expression):
    """Tensors of one shape, merged by a method with its weights and numbers, rounded once to `dtype`.

    `numbers` are the method's own but for the seed, by name. A method of chance has the tensor's `key`, and
    `begin` is the number of the first element in the tensor that it is a part of. One that looks at all
    tensors first has what it `gathered`. What a stage of a recipe makes `is_held` until it is rounded.
    """

    method: Method
    tensors: tuple[Expression, ...]
    dtype: str
    alpha: float | None = None
    beta: float | None = None
    numbers: tuple[tuple[str, Any], ...] = ()
    key: int | None = None
    begin: int = 0
    gathered: Expression | None = None
    is_held: bool = False

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The tensors, and what was gathered."""
        return self.tensors if self.gathered is None else (*self.tensors, self.gathered)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Merged:
        """Other tensors merged alike."""
        count = len(self.tensors)
        # Not by `replace`, which takes twice as long: a plan does this for each tensor.
        return Merged(
            self.method,
            inputs[:count],
            self.dtype,
            self.alpha,
            self.beta,
            self.numbers,
            self.key,
            self.begin,
            None if self.gathered is None else inputs[count],
            self.is_held,
        )

    @property
    def shape(self) -> Shape:
        """That of all the tensors."""
        return self.tensors[0].shape

    @property
    def locality(self) -> Locality:  # type: ignore[override]
        """The method's; what looks at all tensors looks at each as a whole."""
        return _LOCALITIES[self.method.locality]

    @property
    def in_place(self) -> bool:  # type: ignore[override]
        """Methods that work element by element may write over A."""
        return self.method.locality == "element"

    @property
    def depends_on_place(self) -> bool:
        """Whether the method draws numbers."""
        return self.method.random

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Call the method's function."""
        given: dict[str, Any] = dict(self.numbers)
        for weight, value in (("alpha", self.alpha), ("beta", self.beta)):
            if weight in self.method.weights:
                given[weight] = value
        if self.gathered is not None:
            *inputs, given["gathered"] = inputs
        if self.depends_on_place:
            given.update(key=self.key, position=self.begin + first)
        if self.method.locality == "element" and out.dim() != 1:
            inputs, out = [tensor.reshape(-1) for tensor in inputs], out.view(-1)
        if not self.is_held:
            self.method.function(*inputs, out=out, **given)
            return
        from blockmerge.methods.arithmetic import held

        with held():
            self.method.function(*inputs, out=out, **given)

    def simplified(self) -> Expression:
        """A method that takes whole rows of its models is these rows, one behind the other."""
        if self.method.rows is None:
            return self
        rows = self.method.rows(self.shape, self.alpha, self.beta)
        if not rows:  # there are none to take
            return Cast(self.tensors[0], self.dtype).simplified()
        if not self.shape:
            return Cast(self.tensors[rows[0][2]], self.dtype).simplified()
        members = (Part(self.tensors[source], start, stop).simplified() for start, stop, source in rows)
        return Joined(tuple(Cast(one, self.dtype).simplified() for one in members)).simplified()

    def later(self, begin: int) -> Merged:
        """Chance goes by the place in the whole tensor."""
        return replace(self, begin=self.begin + begin) if self.depends_on_place else self

    def __str__(self) -> str:
        weights = [
            f"{name}={value}"
            for name, value in (("alpha", self.alpha), ("beta", self.beta))
            if value is not None
        ]
        said = [*map(str, self.inputs), *weights, *(f"{name}={value}" for name, value in self.numbers)]
        said += [f"key={self.key:x}"] if self.key is not None else []
        return f"{self.method.name}({', '.join(said)}, {self.dtype})"


@dataclass(frozen=True)
class Clipped(Expression):
    """A result limited, element by element, to what lies between two tensors; rounded to `dtype`, the
    result's.
    """

    result: Expression
    a: Expression
    b: Expression

    in_place = True

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The result and its limits."""
        return self.result, self.a, self.b

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Clipped:
        """Another result between other limits."""
        return Clipped(*inputs)

    @property
    def dtype(self) -> str:
        """The result's."""
        return self.result.dtype

    @property
    def shape(self) -> Shape:
        """That of all three."""
        return self.result.shape

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Limit what stands in `out`."""
        from blockmerge.methods.elementwise import clip

        result, a, b = inputs
        if result is not out:
            out.copy_(result)
        clip(a.reshape(-1), b.reshape(-1), out=out.view(-1))


@dataclass(frozen=True)
class Scaled(Expression):
    """A tensor times `scale`, plus `shift` (a number for each entry of its only axis), rounded to `dtype`."""

    tensor: Expression
    dtype: str
    scale: float = 1.0
    shift: tuple[float, ...] | None = None

    @property
    def inputs(self) -> tuple[Expression, ...]:
        """The tensor, wide enough that nothing is rounded twice."""
        return (self.tensor,)

    def with_inputs(self, inputs: tuple[Expression, ...]) -> Scaled:
        """Another tensor changed alike."""
        return Scaled(inputs[0], self.dtype, self.scale, self.shift)

    @property
    def shape(self) -> Shape:
        """That of the tensor."""
        return self.tensor.shape

    @property
    def locality(self) -> Locality:  # type: ignore[override]
        """Each entry has a shift of its own."""
        return "element" if self.shift is None else "tensor"

    def compute(self, inputs: Sequence[torch.Tensor], out: torch.Tensor, first: int) -> None:
        """Multiply, add, round."""
        import torch

        from blockmerge.methods.arithmetic import round_into

        values = inputs[0] * self.scale
        if self.shift is not None:
            shift = torch.tensor(self.shift, dtype=values.dtype)
            values += shift.to(out.device, non_blocking=out.device.type == "cuda")
        round_into(out, values)

    def _said(self) -> Sequence[str]:
        return [
            str(self.tensor),
            f"× {self.scale}",
            *([f"+ {list(self.shift)}"] if self.shift else []),
            self.dtype,
        ]
