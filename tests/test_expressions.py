"""The algebra of tensors: expressions mean what plain torch says, simplified or not, whole or cut, read or
computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockmerge.checkpoints import Readers, StateDict
from blockmerge.dtypes import torch_dtype, wide_dtype
from blockmerge.expressions import (
    Cast,
    Clipped,
    Dequantised,
    Expression,
    Joined,
    Known,
    Merged,
    Part,
    Programs,
    Reshaped,
    Scaled,
    Stored,
    Transposed,
    is_arranged,
    leaves_of,
    operands_of,
    simplify,
)
from blockmerge.merging.in_memory import tasks_of, tensor_of
from blockmerge.methods import METHODS


@dataclass(frozen=True)
class Both:
    """An expression and the tensor that it is, made with torch alone."""

    expression: Expression
    tensor: torch.Tensor


def stored(shape, dtype=torch.float32, seed=0):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return Both(Stored.of(StateDict({"before": torch.zeros(3), "x": tensor}, f"s{seed}"), "x"), tensor)


def part(one, start, stop, axis=0):
    return Both(Part(one.expression, start, stop, axis), one.tensor.narrow(axis, start, stop - start))


def joined(*several, axis=0):
    return Both(
        Joined(tuple(one.expression for one in several), axis),
        torch.cat([one.tensor for one in several], axis),
    )


def transposed(one):
    return Both(Transposed(one.expression), one.tensor.T)


def reshaped(one, shape):
    return Both(Reshaped(one.expression, shape), one.tensor.reshape(shape))


def dequantised(one, seed, *, by_row):
    """Each row, or all of it, times a scale, in float32."""
    scale = stored((one.tensor.shape[0],), seed=seed)
    if by_row:
        return Both(Dequantised(one.expression, scale.expression), one.tensor * scale.tensor[:, None])
    number = scale.tensor[0].item()
    return Both(Dequantised(one.expression, number), one.tensor * number)


@st.composite
def arrangements(draw, shape=None, depth=3):
    """Matrices that are read in another order, of random shape unless one is asked for."""
    rows, columns = shape or (draw(st.integers(1, 7)), draw(st.integers(1, 7)))
    kind = draw(
        st.sampled_from(["stored", "part", "joined", "transposed", "reshaped"] if depth else ["stored"])
    )
    deeper = depth - 1
    if kind == "part":
        axis = draw(st.integers(0, 1))
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        whole = (rows + before + after, columns) if axis == 0 else (rows, columns + before + after)
        return part(draw(arrangements(whole, deeper)), before, before + (rows, columns)[axis], axis)
    if kind == "joined":
        axis = draw(st.integers(0, 1))
        cut = draw(st.integers(0, (rows, columns)[axis]))
        if 0 < cut < (rows, columns)[axis]:
            shapes = (
                [(cut, columns), (rows - cut, columns)] if axis == 0 else [(rows, cut), (rows, columns - cut)]
            )
            return joined(*(draw(arrangements(one, deeper)) for one in shapes), axis=axis)
    if kind == "transposed":
        return transposed(draw(arrangements((columns, rows), deeper)))
    if kind == "reshaped":
        return reshaped(draw(arrangements((rows * columns, 1), deeper)), (rows, columns))
    return stored((rows, columns), seed=draw(st.integers(0, 1 << 20)))


@st.composite
def computations(draw, shape=None, depth=2):
    """What is computed of them, with one method element by element and its float64 oracle."""
    shape = shape or (draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    kinds = ["merged", "scaled", "cast", "dequantised", "arranged", "turned", "cut", "reshaped"]
    kind = draw(st.sampled_from(kinds if depth else ["dequantised", "arranged"]))
    if kind == "merged":
        a, b = (draw(computations(shape, depth - 1)) for _ in range(2))
        alpha = draw(st.sampled_from([0.25, 0.5, 2.0]))
        return Both(
            Merged(METHODS["weighted_sum"], (a.expression, b.expression), "F64", alpha),
            (1 - alpha) * a.tensor.double() + alpha * b.tensor.double(),
        )
    if kind == "scaled":
        one = draw(computations(shape, depth - 1))
        return Both(Scaled(Cast(one.expression, "F64"), "F64", 0.5), one.tensor.double() * 0.5)
    if kind == "cast":
        one = draw(computations(shape, depth - 1))
        return Both(Cast(one.expression, "F64"), one.tensor.double())
    if kind == "dequantised":
        codes = draw(arrangements(shape, 2))
        return dequantised(codes, draw(st.integers(0, 1 << 20)), by_row=draw(st.booleans()))
    if kind == "reshaped":
        return reshaped(draw(computations((shape[0] * shape[1], 1), depth - 1)), shape)
    if kind == "turned":
        return transposed(draw(computations(shape[::-1], depth - 1)))
    if kind == "cut":
        rows, columns = shape
        before = draw(st.integers(0, 2))
        return part(draw(computations((rows + before + 1, columns), depth - 1)), before, before + rows)
    return draw(arrangements(shape, 2))


def computed(expression):
    """Its value, by the evaluator for tensors in memory."""
    out = torch.empty(expression.shape, dtype=torch_dtype(expression.dtype))
    for task in tasks_of(expression, out, Programs(), 7, "x"):
        task.run({})
    return out


def assert_near(found, expected):
    assert found.shape == expected.shape
    assert torch.allclose(found.double(), expected.double(), rtol=1e-12, atol=1e-12)


@given(arrangements())
def test_what_is_arranged_is_what_torch_makes_of_it(both):
    simple = simplify(both.expression)
    for expression in (both.expression, simple):
        assert is_arranged(expression)
        assert expression.shape == both.tensor.shape
        assert torch.equal(tensor_of(expression), both.tensor)
    assert simplify(simple) == simple


@given(arrangements(), st.data())
def test_bytes_are_read_in_that_order_wherever_one_begins(both, data):
    raw = both.tensor.numpy().tobytes()
    for expression in (both.expression, simplify(both.expression)):
        with Readers() as readers:
            for _ in range(3):
                start = data.draw(st.integers(0, len(raw)))
                stop = data.draw(st.integers(start, len(raw)))
                buffer = bytearray(stop - start)
                readers.read_into(expression, start, memoryview(buffer))
                assert bytes(buffer) == raw[start:stop]


@given(computations())
def test_computed_as_written_and_simplified(both):
    simple = simplify(both.expression)
    assert (simple.shape, simple.dtype) == (both.expression.shape, both.expression.dtype)
    assert_near(computed(both.expression), both.tensor)
    assert torch.equal(computed(simple), computed(both.expression))


@given(computations(), st.data())
def test_what_is_computed_is_read_like_bytes_wherever_one_begins(both, data):
    raw = computed(both.expression).contiguous().numpy().tobytes()
    for expression in (both.expression, simplify(both.expression)):
        with Readers() as readers:
            for _ in range(3):
                start = data.draw(st.integers(0, len(raw)))
                stop = data.draw(st.integers(start, len(raw)))
                buffer = bytearray(stop - start)
                readers.read_into(expression, start, memoryview(buffer))
                assert bytes(buffer) == raw[start:stop]


@settings(max_examples=50)
@given(st.integers(1, 40), st.integers(1, 9), st.sampled_from(["dare", "add_noise"]), st.data())
def test_chance_goes_by_the_place_in_the_whole_tensor(rows, columns, name, data):
    """Parts of a merge of chance, moved inside it, are parts of the whole merge."""
    method = METHODS[name]
    inputs = tuple(stored((rows, columns), seed=n).expression for n in range(method.models))
    numbers = tuple((one.name, one.default) for one in method.numbers if one.name != "seed")
    whole = Merged(method, inputs, "F32", 0.5, numbers=numbers, key=99)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    some = simplify(Part(whole, start, stop))
    assert isinstance(some, Merged)
    assert torch.equal(computed(some), computed(whole)[start:stop])


@pytest.mark.parametrize("name", ["slerp", "ties", "extract", "smooth_add_difference"])
def test_parts_do_not_move_into_what_looks_at_more_than_elements(name):
    method = METHODS[name]
    inputs = tuple(stored((6, 5), seed=n).expression for n in range(method.models or 2))
    numbers = tuple((one.name, one.default) for one in method.numbers)
    beta = 0.0 if "beta" in method.weights else None
    whole = Merged(method, inputs, "F32", 0.3, beta, numbers)
    some = simplify(Part(whole, 2, 4))
    assert isinstance(some, Part)
    assert torch.equal(computed(some), computed(whole)[2:4])


@pytest.mark.parametrize("by_row", [False, True])
def test_parts_of_codes_have_their_own_scales_and_nothing_else_is_read(by_row):
    whole = dequantised(stored((6, 5)), 7, by_row=by_row)
    some = simplify(Part(whole.expression, 2, 4))
    assert isinstance(some, Dequantised)
    assert [one.shape for one in some.inputs] == [(2, 5), (2,)][: 1 + by_row]
    assert torch.equal(computed(some), whole.tensor[2:4])
    program, _ = Programs().of(whole.expression)
    assert program.locality == ("row" if by_row else "element")


def test_what_does_nothing_goes():
    one = stored((6, 4))
    x = one.expression
    assert simplify(Part(x, 0, 6)) == x
    assert simplify(Cast(x, "F32")) is x
    assert simplify(Transposed(Transposed(x))) is x
    assert simplify(Joined((Part(x, 0, 2), Part(x, 2, 6)))) == x
    assert simplify(Joined((Part(x, 0, 1, axis=1), Part(x, 1, 4, axis=1)), axis=1)) == x
    assert simplify(Reshaped(x, (24,))) == Stored(x.source, "x", "F32", (24,))
    assert simplify(Part(x, 1, 3)) == Stored(x.source, "x", "F32", (2, 4), begin=4)
    assert simplify(Part(Joined((x, Part(x, 0, 2))), 6, 8)) == simplify(Part(x, 0, 2))
    halves = Merged(METHODS["weighted_sum"], (Transposed(x), Transposed(x)), "F32", 0.5)
    assert simplify(Transposed(halves)) == Merged(METHODS["weighted_sum"], (x, x), "F32", 0.5)


def test_rows_taken_from_models_are_bytes():
    a, b = stored((6, 4), seed=1), stored((6, 4), seed=2)
    rows = simplify(Merged(METHODS["tensor_sum"], (a.expression, b.expression), "F32", 0.5, 0.0))
    assert is_arranged(rows)
    assert torch.equal(tensor_of(rows), torch.cat([b.tensor[:3], a.tensor[3:]]))


def test_neighbours_have_one_program():
    programs = Programs()
    method = METHODS["weighted_sum"]

    def program(shape, alpha, dtype=torch.float16):
        inputs = tuple(stored(shape, dtype, seed).expression for seed in range(2))
        return programs.of(Merged(method, inputs, "F16", alpha))

    (first, operands), (second, others) = program((4, 3), 0.5), program((7, 2, 2), 0.5)
    assert first is second
    assert first.joins
    assert [one.shape for one in operands] == [(4, 3)] * 2
    assert others[0].shape == (7, 2, 2)
    assert program((4, 3), 0.25)[0] is not first
    assert program((4, 3), 0.5, torch.float32)[0] is not first


def test_one_model_twice_is_one_operand():
    x = stored((5,)).expression
    program, operands = Programs().of(Merged(METHODS["weighted_sum"], (x, x), "F32", 0.5))
    assert operands == (x,)
    assert not program.may_overwrite_first


def test_expressions_can_be_read():
    a, b = (stored((6, 4), torch.float16, seed).expression for seed in (1, 2))
    merged = Merged(METHODS["weighted_sum"], (a, simplify(Part(b, 1, 3))), "F16", 0.5)
    assert str(merged) == "weighted_sum(s1[x], s2[x][4:12], alpha=0.5, F16)"
    assert str(Scaled(Cast(Joined((a, b), axis=1), "F32"), "F16", 2.0)) == (
        "scaled(cast(joined(s1[x], s2[x], axis 1), F32), × 2.0, F16)"
    )
    assert [str(one) for one in leaves_of(merged)] == ["s1[x]", "s2[x][4:12]"]
    assert [str(one) for one in operands_of(Cast(Transposed(a), "F32"))] == ["transposed(s1[x])"]
    assert str(Known(b"\1\2", "U8", (2,))) == "known(U8, [2], 0102)"


def test_limits_are_those_of_a_and_b_in_the_results_dtype():
    a, b, c = (stored((50,), torch.float16, seed) for seed in range(3))
    inputs = (a.expression, b.expression, c.expression)
    result = Merged(METHODS["add_difference"], inputs, "F16", 1.0)
    found = computed(Clipped(result, a.expression, b.expression))
    assert torch.equal(
        found, computed(result).clamp(torch.minimum(a.tensor, b.tensor), torch.maximum(a.tensor, b.tensor))
    )


@pytest.mark.parametrize(
    ("inputs", "output", "wide"),
    [
        (("F16",), "F16", "F32"),
        (("F16", "F64"), "F16", "F64"),
        (("BF16",), "F32", "F64"),
        (("F8_E4M3",), "F8_E5M2", "F32"),
    ],
)
def test_one_step_wider_than_the_result(inputs, output, wide):
    assert wide_dtype(inputs, output) == wide
