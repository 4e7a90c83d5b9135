"""Changes of a weight: the values of a float64 oracle, and the same bits however they are cut."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockmerge.checkpoints import StateDict
from blockmerge.expressions import (
    Change,
    Changed,
    Contracted,
    Hadamard,
    Joined,
    Known,
    Kronecker,
    LowRank,
    Part,
    Programs,
    Stored,
    Transposed,
    simplify,
)
from blockmerge.merging.in_memory import tensor_of
from blockmerge.merging.planning.runs import Drafter, PlannedFile
from blockmerge.streaming import PAGE

NAMES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class Weights:
    """Random tensors, as expressions of a state dict."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors = {}

    def new(self, *shape, dtype=torch.float16, scale=1.0):
        name = str(len(self.tensors))
        self.tensors[name] = (torch.randn(shape, generator=self.generator) * scale).to(dtype)
        return name

    def stored(self, name):
        return Stored.of(StateDict(self.tensors, "a"), name)

    def exact(self, name):
        return self.tensors[name].double()


def low_rank(weights, rows, *inner, ranks=(4,), scales=(0.7,), dtype="F32"):
    """A LowRank, and its value in float64."""
    pairs = [(weights.new(rows, rank), weights.new(rank, *inner)) for rank in ranks]
    change = LowRank(
        (rows, *inner),
        dtype,
        ups=tuple(weights.stored(up) for up, _ in pairs),
        downs=tuple(weights.stored(down) for _, down in pairs),
        scales=scales,
    )
    value = sum(
        scale * weights.exact(up) @ weights.exact(down).reshape(len(weights.exact(down)), -1)
        for scale, (up, down) in zip(scales, pairs, strict=True)
    )
    return change, value.view(rows, *inner)


def hadamard(weights, rows, *inner):
    names = [weights.new(rows, 3), weights.new(3, *inner), weights.new(rows, 3), weights.new(3, *inner)]
    a, b, c, d = map(weights.exact, names)
    change = Hadamard((rows, *inner), "F32", factors=tuple(map(weights.stored, names)), scale=0.3)
    return change, 0.3 * ((a @ b.view(3, -1)) * (c @ d.view(3, -1))).view(rows, *inner)


def kronecker(weights, rows, *inner):
    width, *kernel = inner
    names = [weights.new(2, 2), weights.new(rows // 2, width // 2, *kernel)]
    first, second = map(weights.exact, names)
    first = first.view(2, 2, *[1] * len(kernel))
    change = Kronecker((rows, *inner), "F32", factors=tuple(map(weights.stored, names)), scale=1.5)
    return change, 1.5 * torch.kron(first, second)


def tucker(weights, rows, width, *kernel):
    """A LowRank whose down is made of two factors."""
    up, mid, down = weights.new(rows, 4), weights.new(4, 5, *kernel), weights.new(5, width)
    folded = Contracted(
        "nm...,mi->ni...",
        (weights.stored(mid), weights.stored(down)),
        (4, width, *kernel),
        "F32",
    )
    change = LowRank((rows, width, *kernel), "F32", ups=(weights.stored(up),), downs=(folded,), scales=(0.5,))
    value = torch.einsum("on,nmkl,mi->oikl", weights.exact(up), weights.exact(mid), weights.exact(down))
    return change, 0.5 * value


KINDS = {
    "matrix": (low_rank, (200, 48)),
    "convolution": (low_rank, (70, 8, 3, 3)),
    "hadamard": (hadamard, (150, 20)),
    "hadamard of a convolution": (hadamard, (66, 4, 3, 3)),
    "kronecker": (kronecker, (140, 30)),
    "kronecker of a convolution": (kronecker, (140, 6, 3, 3)),
    "tucker": (tucker, (130, 6, 3, 3)),
    "wide rows": (low_rank, (100, 4100)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind):
    make, shape = KINDS[kind]
    weights = Weights()
    base = weights.new(*shape)
    change, value = make(weights, *shape)
    assert change.shape == shape
    changed = Changed(weights.stored(base), (change,), (1.0,), "F16")
    wanted = weights.exact(base) + value
    found = tensor_of(changed)
    size = torch.maximum(wanted.abs(), value.abs()) + 1
    assert found.dtype == torch.float16
    assert ((found.double() - wanted).abs() <= 2.0**-11 * size + 1e-5 * size).all()
    in_float32 = tensor_of(Changed(weights.stored(base), (change,), (1.0,), "F32"))
    assert torch.allclose(in_float32.double(), wanted, rtol=1e-5, atol=1e-4)


def test_several_are_one_product_and_float64_is_exact():
    weights = Weights()
    base = weights.new(100, 40, dtype=torch.float32)
    change, value = low_rank(weights, 100, 40, ranks=(4, 1, 7), scales=(0.5, -2.0, 1.0), dtype="F64")
    found = tensor_of(Changed(weights.stored(base), (change,), (1.0,), "F32"))
    assert torch.equal(found, (weights.exact(base) + value).float())


def test_changes_that_are_stored_have_a_scale():
    weights = Weights()
    base, diff = weights.new(31), weights.new(31)
    found = tensor_of(Changed(weights.stored(base), (weights.stored(diff),), (-0.5,), "F16"))
    assert torch.equal(found, (weights.exact(base) - 0.5 * weights.exact(diff)).half())


def in_cuts(expression, cuts):
    """The values of an expression, computed stretch by stretch as a file merge does."""
    program, operands = Programs().of(expression)
    tensors = [tensor_of(one).contiguous() for one in operands]
    out = torch.empty(expression.elements, dtype=NAMES[expression.dtype])
    borders = [0, *sorted({min(cut, len(out)) for cut in cuts}), len(out)]
    for start, stop in itertools.pairwise(borders):
        for first, elements in program.stretches(start, stop - start, 5000):
            given = []
            for place, tensor in enumerate(tensors):
                begin, shape = program.stretch(place, first, elements)
                count = torch.Size(shape).numel()
                given.append(tensor.view(-1)[begin : begin + count].clone().view(shape))
            program.run(given, program.shaped(out[first : first + elements]), first)
    return out.view(expression.shape)


@settings(max_examples=25)
@given(
    kind=st.sampled_from(list(KINDS)),
    cuts=st.lists(st.integers(0, 500_000), max_size=5),
    seed=st.integers(0, 3),
)
def test_the_bits_do_not_depend_on_cuts(kind, cuts, seed):
    make, shape = KINDS[kind]
    weights = Weights(seed)
    base = weights.stored(weights.new(*shape))
    change, _ = make(weights, *shape)
    changed = Changed(base, (change,), (1.0,), "F32")
    assert torch.equal(in_cuts(changed, cuts), tensor_of(changed))


@pytest.mark.parametrize("kind", ["matrix", "hadamard", "kronecker", "wide rows"])
def test_parts_joined_and_transposed_have_the_same_bits(kind):
    make, shape = KINDS[kind]
    weights = Weights()
    base = weights.stored(weights.new(*shape))
    change, _ = make(weights, *shape)
    changed = Changed(base, (change,), (1.0,), "F32")
    whole = tensor_of(changed)
    part = simplify(Part(changed, 7, 33))
    assert torch.equal(tensor_of(part), whole[7:33])
    joined = Joined((Changed(base, (), (), "F32"), changed))
    assert torch.equal(tensor_of(simplify(Part(joined, shape[0] + 5, shape[0] + 20))), whole[5:20])
    assert torch.equal(tensor_of(simplify(Transposed(changed))), whole.T)
    assert torch.equal(in_cuts(part, [100, 333]), whole[7:33])


@pytest.mark.parametrize("size", [64 << 10, 600 << 10, 1 << 20, 4 << 20])
def test_pieces_end_where_weights_begin_or_between_tiles(size):
    """What lies on both sides of an end would be computed twice; but a small piece is cut anywhere."""
    weights = Weights()
    start, drafted = 100, []
    for _ in range(3):
        change, _ = low_rank(weights, 1000, 640)
        base = weights.stored(weights.new(1000, 640))
        drafted.append((start, Changed(base, (change,), (1.0,), "F16")))
        start += base.nbytes
    header = Known(bytes(100), "U8", (100,))
    file = PlannedFile("", {}, Drafter().all([(0, header), *drafted]))
    pieces = list(file.pieces(size))
    assert [stop for _, stop in pieces] == [*(start for start, _ in pieces[1:]), file.size]
    tile = change.tile * 2
    assert all(stop - start <= size for start, stop in pieces)
    between = {base for base, _ in drafted} | {
        base + end for base, one in drafted for end in range(0, one.nbytes, tile)
    }
    ends = [stop for _, stop in pieces[:-1]]
    assert size < tile or all(end in between for end in ends)
    assert all(end in between or end % PAGE == 0 for end in ends)


def test_a_change_says_what_it_is():
    change, _ = low_rank(Weights(), 6, 4)
    assert isinstance(change, Change)
    assert str(change) == "lowrank(0.7 × a[0] @ a[1])"
