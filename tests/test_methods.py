"""Every method against its definition in float64, on shapes of every kind; what plans rely on; and the list
of methods.

Over 500 lines: a definition for every method, side by side.
"""

from __future__ import annotations

import itertools
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import blockmerge
from blockmerge.cli.main import run
from blockmerge.errors import RecipeError
from blockmerge.methods import METHODS, arithmetic, find_method, key_of, purpose_of
from tests import method_oracle as oracle
from tests.every_pair import every_pair
from tests.oracle import bits, step_at

SHAPES = [(), (7,), (5, 3), (4, 3, 3, 3), (0,), (3, 0, 2), (1, 1), (6, 4, 1, 1)]
ALPHAS = [-0.5, 0.0, 0.3, 0.5, 1.0, 1.5]
PAIRS = [
    (0.0, 0.0),
    (1.0, 0.0),
    (0.0, 1.0),
    (0.5, 0.5),
    (0.3, 0.2),
    (0.7, 0.6),
    (1.0, 1.0),
    (-0.5, 1.5),
    (1.5, -0.5),
]
NUMBERS = {
    "average": [{}, {"ratios": (2.0, 1.0, -0.5)}],
    "dare": [{}, {"drop_rate": 0.0}, {"drop_rate": 0.9}],
    "extract": [{}, {"gamma": 0.0}, {"gamma": 2.5}],
    "ties": [{}, {"density": 0.0}, {"density": 0.5}, {"density": 1.0}],
}
KEY = key_of(3, "model.diffusion_model.input_blocks.0.0.weight")


def count_of(method):
    return 3 if method.models is None else method.models


def weights_of(method):
    if "beta" in method.weights:
        return [{"alpha": alpha, "beta": beta} for alpha, beta in PAIRS]
    return [{"alpha": alpha} for alpha in ALPHAS]


def apply(method, models, out_dtype=None, position=0, gathered=None, **numbers):
    """A method's result, flat where it may be given anything flat."""
    out = torch.empty(models[0].shape, dtype=out_dtype or models[0].dtype)
    if method.random:
        numbers.update(key=KEY, position=position)
    if method.locality == "model":
        numbers.update(gathered=method.gather([method.statistics(*models)]) if gathered is None else gathered)
    before = [model.clone() for model in models]
    flat = method.locality == "element"
    method.function(
        *(model.view(-1) if flat else model for model in models), out=out.view(-1) if flat else out, **numbers
    )
    assert all(torch.equal(model, was) for model, was in zip(models, before, strict=True)), (
        "an input was changed"
    )
    return out


def exact(method, models, **numbers):
    """What it should be, as float64."""
    arrays = [model.double().numpy() for model in models]
    if method.name == "ties" and models[0].itemsize == 2:
        arrays = [model.float().numpy() for model in models]
    if method.random:
        numbers["key"] = KEY
    if method.locality == "model":
        normalised = method.name == "cosine_a"
        alpha = numbers["alpha"]
        limits = oracle.cosine_limits([arrays], normalised)
        result = oracle.cosine_merge(
            *arrays, shift=abs(alpha) if normalised else alpha, limits=limits, normalised=normalised
        )
    else:
        result = getattr(oracle, method.name)(*arrays, **numbers)
    return torch.from_numpy(np.array(result, dtype=np.float64))


def tolerance(method, models, wanted, dtype, weights):
    """A step of the output dtype at the size of what is largest, and for what is not local a little of the
    tensor's scale.
    """
    size = wanted.abs()
    for model in models:
        size = torch.maximum(size, model.double().abs())
    allowed = step_at(size, dtype) * (8 if dtype == torch.float64 else 1)
    if method.name == "add_noise":  # the noise itself is of float32
        allowed = allowed + 4e-6 * abs(weights["alpha"])
    if method.locality != "element" and method.rows is None and size.numel():
        allowed = (
            allowed
            + (1e-12 if dtype in (torch.float32, torch.float64) else 1e-6)
            * (1 + abs(weights["alpha"]))
            * size.max()
        )
    return allowed


def inputs(shape, dtype, count, seed):
    generator = torch.Generator().manual_seed(seed)
    models = [torch.randn(shape, generator=generator).to(dtype) for _ in range(count)]
    zero = torch.zeros_like(models[0])
    yield models
    if count > 1:
        yield [models[0]] * count
        yield [models[0], *[zero] * (count - 1)]
        yield [zero, *models[1:]]
        yield [models[0], models[1], *[models[0]] * (count - 2)]
        yield [models[0], *[models[1]] * (count - 1)]
    yield [zero] * count


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_is_its_definition(name, dtype):
    method = METHODS[name]
    made = {
        shape: list(inputs(shape, dtype, count_of(method), seed=zlib.crc32(name.encode())))
        for shape in SHAPES
    }
    kinds = range(len(made[SHAPES[0]]))
    numbers = list(itertools.product(NUMBERS.get(name, [{}]), weights_of(method)))
    for shape, kind, (number, weights) in every_pair(SHAPES, kinds, numbers):
        models = made[shape][kind]
        out = apply(method, models, **weights, **number)
        wanted = exact(method, models, **weights, **number)
        where = (shape, kind, weights, number)
        assert torch.isfinite(out).all(), where
        assert ((out.double() - wanted).abs() <= tolerance(method, models, wanted, dtype, weights)).all(), (
            where
        )


@pytest.mark.parametrize("name", METHODS)
def test_where_it_says_that_it_copies_the_result_is_that_model(name):
    method = METHODS[name]
    for models in inputs((5, 3), torch.float16, count_of(method), seed=1):
        for weights in weights_of(method):
            source = method.copies(**weights)
            if source is not None:
                assert torch.equal(apply(method, models, **weights), models[source]), weights
    # What methods.md promises: all A at weight 0, but for those three.
    without = {"cosine_a", "cosine_b", "extract"}
    assert (method.copies(0.0, 0.0) == 0) == (name not in without)


@pytest.mark.parametrize(
    ("name", "weights", "source"),
    [
        ("weighted_sum", (1.0,), 1), ("weighted_sum", (1.5,), None), ("sigmoid", (1.5,), 1), ("slerp", (1.0,), 1),
        ("tensor_sum", (1.0, 0.3), 1), ("tensor_sum", (0.5, 0.0), None), ("tensor_sum_columns", (1.0,), 1), ("scale", (1.0,), 0),
        ("scale", (2.0,), None), ("triple_sum", (1.0, 0.0), 1), ("triple_sum", (0.0, 1.0), 2), ("triple_sum", (1.0, 1.0), None),
        ("sum_twice", (0.3, 1.0), 2), ("sum_twice", (1.0, 0.0), 1), ("sum_twice", (1.0, 0.5), None), ("sum_twice", (0.0, 0.5), None),
        ("add_difference", (1.0,), None), ("average", (1.0,), None), ("ties", (1.0,), None), ("extract", (0.0, 0.0), None),
    ],
)  # fmt: skip
def test_copies(name, weights, source):
    assert METHODS[name].copies(*weights) == source


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=30)
@given(data=st.data())
def test_finite_in_finite_out(name, data):
    method = METHODS[name]
    shape = data.draw(st.sampled_from([(), (1,), (4,), (2, 3), (2, 2, 2, 1)]))
    values = st.floats(-(2.0**50), 2.0**50, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1e-40])
    size = int(np.prod(shape))
    drawn = st.lists(values, min_size=size, max_size=size)
    models = [torch.tensor(data.draw(drawn)).reshape(shape).bfloat16() for _ in range(count_of(method))]
    weight = st.floats(-3, 3) | st.sampled_from([0.0, 0.5, 1.0])
    weights = {kind: data.draw(weight) for kind in method.weights}
    assert torch.isfinite(apply(method, models, out_dtype=torch.float32, **weights)).all()
    assert torch.isfinite(apply(method, models, **weights)).all()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.locality == "element"])
@settings(max_examples=8)
@given(
    cuts=st.sets(st.integers(0, 9001), max_size=4),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_it_may_be_cut_anywhere(name, cuts, dtype):
    method = METHODS[name]
    models = next(inputs((9001,), dtype, count_of(method), seed=5))
    weights = dict.fromkeys(method.weights, 0.3)
    whole = apply(method, models, **weights)
    borders = sorted({0, 9001, *cuts})
    for start, stop in itertools.pairwise(borders):
        part = apply(method, [model[start:stop] for model in models], position=start, **weights)
        assert torch.equal(part, whole[start:stop]), (start, stop)


@pytest.mark.parametrize("name", METHODS)
def test_the_stretches_that_it_goes_through_do_not_show(name, monkeypatch):
    method = METHODS[name]
    models = next(inputs((40, 6, 3, 3), torch.float16, count_of(method), seed=7))
    weights = dict.fromkeys(method.weights, 0.3)
    whole = apply(method, models, **weights)
    monkeypatch.setattr(arithmetic, "_SLAB", 100)
    monkeypatch.setattr(arithmetic, "_BLOCK", 100)
    again = apply(method, models, **weights)
    scale = max(float(model.abs().max()) for model in models)
    # Sums over a tensor may come out a bit different; then a value may be rounded the other way.
    assert float((again.float() - whole.float()).abs().max()) <= (
        0 if method.locality in ("element", "row") else scale * 2**-10
    )


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if method.locality == "row" and method.rows is None]
)
def test_rows_may_be_cut_along_the_first_axis(name):
    method = METHODS[name]
    for shape in [(9, 4), (9, 2, 3, 3)]:
        models = next(inputs(shape, torch.float16, count_of(method), seed=8))
        weights = dict.fromkeys(method.weights, 0.3)
        parts = [
            apply(method, [model[part] for model in models], **weights) for part in (slice(0, 2), slice(2, 9))
        ]
        assert torch.equal(torch.cat(parts), apply(method, models, **weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 320), (64, 40, 3, 3), (64, 5, 1, 1), (64, 7)])
def test_extract_may_be_cut_where_it_is_ill_conditioned(shape, dtype):
    """Near opposite directions, where a sum in another order would show in the result."""
    a, b = (
        torch.zeros(shape, dtype=dtype),
        next(inputs(shape, dtype, 1, seed=4))[0] * torch.logspace(-3, 3, shape[-1]),
    )
    models = [a, b.to(dtype), -b.to(dtype)]
    whole = apply(METHODS["extract"], models, alpha=0.2, beta=0.0)
    for cut in (1, 17, 51):
        parts = [
            apply(METHODS["extract"], [model[part] for model in models], alpha=0.2, beta=0.0)
            for part in (slice(cut), slice(cut, None))
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("length", [3, 7])
def test_extract_may_be_cut_at_any_row(length, gamma):
    """In float64, A being 0, it would show if the last rows were not computed as the others are: torch's
    power is not.
    """
    generator = torch.Generator().manual_seed(6)
    models = [
        torch.zeros(400, length, dtype=torch.float64),
        *torch.randn(2, 400, length, dtype=torch.float64, generator=generator),
    ]
    whole = apply(METHODS["extract"], models, alpha=0.2, gamma=gamma)
    for height in range(1, 20):
        parts = [
            apply(METHODS["extract"], list(part), alpha=0.2, gamma=gamma)
            for part in zip(*(model.split(height) for model in models), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole), height


@pytest.mark.parametrize("name", METHODS)
def test_the_result_may_take_the_place_of_a(name):
    method = METHODS[name]
    for dtype in (torch.float16, torch.float32, torch.float64):
        models = next(inputs((12, 5, 3, 3), dtype, count_of(method), seed=9))
        weights = {"alpha": 0.3, **({"beta": 0.6} if "beta" in method.weights else {})}
        wanted = apply(method, models, **weights)
        if method.random:
            weights.update(key=KEY, position=0)
        if method.locality == "model":
            weights.update(gathered=method.gather([method.statistics(*models)]))
        flat = [model.view(-1) if method.locality == "element" else model for model in models]
        method.function(*flat, out=flat[0], **weights)
        assert torch.equal(models[0], wanted)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_8_bit_floats(name, dtype):
    method = METHODS[name]
    models = next(inputs((6, 5, 3, 3), torch.float32, count_of(method), seed=10))
    models = [model.to(dtype) for model in models]
    weights = dict.fromkeys(method.weights, 0.3)
    found = apply(method, models, out_dtype=torch.float16, **weights).double()
    assert (found - exact(method, [model.float() for model in models], **weights)).abs().max() <= 4e-3
    rounded = apply(method, models, **weights).double()
    assert (
        (rounded - found).abs() <= found.abs() * 2.0 ** -(4 if dtype == torch.float8_e4m3fn else 3) + 1e-2
    ).all()


@given(
    st.sampled_from([(), (1,), (7,), (100, 2), (0, 3), (10, 1, 2)]),
    st.floats(-0.5, 1.5) | st.sampled_from([0.0, 0.29, 0.5, 1.0]),
    st.floats(-0.5, 1.5) | st.sampled_from([0.0, 0.1, 0.58, 1.0]),
)
def test_the_rows_of_a_plan_are_what_the_function_takes(shape, alpha, beta):
    method = METHODS["tensor_sum"]
    a, b = torch.zeros(shape), torch.ones(shape)
    rows = method.rows(shape, alpha, beta)
    assert [start for start, _, _ in rows][1:] == [stop for _, stop, _ in rows][:-1]  # without gaps
    assert sum(stop - start for start, stop, _ in rows) == (shape[0] if shape else 1)
    planned = torch.cat([(a, b)[source].reshape(-1 if shape else 1, *shape[1:])[start:stop] for start, stop, source in rows]
                        or [a])  # fmt: skip
    assert torch.equal(planned.reshape(shape), apply(method, [a, b], alpha=alpha, beta=beta))


def test_rows_are_counted_in_decimals():
    # 0.29 · 100 is 28.999… in binary, and 0.1 + 0.2 is more than 0.3.
    assert METHODS["tensor_sum"].rows((100, 2), 0.29, 0.0) == ((0, 29, 1), (29, 100, 0))
    assert METHODS["tensor_sum"].rows((10,), 0.8, 0.5) == ((0, 3, 1), (3, 5, 0), (5, 10, 1))


def test_ties_keeps_all_that_are_as_large_as_the_smallest_kept():
    a = torch.zeros(10)
    b = torch.tensor([3.0, -1, 1, 1, -1, 0.5, 0, 0, 0, 0])
    # Two of ten, and three more of the same magnitude.
    out = apply(METHODS["ties"], [a, b], alpha=1.0, density=0.2)
    assert out.tolist() == [3, -1, 1, 1, -1, 0, 0, 0, 0, 0]
    out = apply(METHODS["ties"], [a, b], alpha=1.0, density=0.1)
    assert out.tolist() == [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_the_figures_of_a_whole_model(name):
    method, normalised = METHODS[name], name == "cosine_a"
    shapes = [(30, 7), (8,), (), (6, 5, 3, 3), (4, 0), (3, 2)]
    pairs = [next(inputs(shape, torch.float16, 2, seed=shape.__hash__() % 1000)) for shape in shapes]
    pairs[-1][1].zero_()
    statistics = [method.statistics(*pair) for pair in pairs]
    limits = oracle.cosine_limits([[model.double().numpy() for model in pair] for pair in pairs], normalised)
    assert method.gather(statistics).tolist() == pytest.approx(limits, abs=1e-12)
    assert torch.equal(method.gather(statistics[::-1]), method.gather(statistics))
    low, high = method.gather([])
    assert low == high
    low, high = method.gather([torch.full((3,), torch.nan, dtype=torch.float64)])
    assert low == high
    a, b = pairs[0]
    for alpha in (0.0, 0.4, -0.4):
        out = apply(method, [a, b], alpha=alpha, gathered=method.gather(statistics))
        wanted = oracle.cosine_merge(
            a.double().numpy(),
            b.double().numpy(),
            shift=abs(alpha) if normalised else alpha,
            limits=limits,
            normalised=normalised,
        )
        assert (out.double() - torch.from_numpy(wanted)).abs().max() <= 2e-3
        assert torch.equal(apply(method, [a, a], alpha=alpha, gathered=method.gather(statistics)), a)


@pytest.mark.parametrize("name", ["cosine_a", "cosine_b"])
def test_cosines_of_opposite_and_huge_values(name):
    """A − B is too large for the dtype that is computed in."""
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        big = 0.9 * torch.finfo(dtype).max
        a = torch.tensor([big, -big, 1, 0], dtype=dtype)
        assert torch.equal(apply(METHODS[name], [a, -a], alpha=0.25), a)


def test_kept_memory_is_the_cpu_s():
    model = torch.arange(4.0)

    def merged():
        with torch.device("meta"):
            return METHODS["add_difference"].function(
                model, model, model, alpha=0.5, out=torch.empty_like(model)
            )

    with ThreadPoolExecutor(1) as fresh:  # a thread that has computed nothing before
        assert torch.equal(fresh.submit(merged).result(), model)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("dare", {"drop_rate": 1.0}, "dare needs a number from 0 to below 1 as drop_rate: found 1.0"),
        ("dare", {"drop_rate": float("nan")}, "dare needs a number from 0 to below 1 as drop_rate: found nan"),
        ("dare", {"seed": 1.5}, "dare needs a whole number as seed: found 1.5"),
        ("dare", {"drop": 0.5}, "unknown argument 'drop': dare has no such number; did you mean 'drop_rate'?"),
        ("extract", {"gamma": -1}, "extract needs a number of at least 0 as gamma: found -1"),
        ("ties", {"density": "much"}, "ties needs a number from 0 to 1 as density: found much"),
        ("average", {"ratios": (1, 1)}, "average: ratios are numbers, one for each model, whose sum is not 0; 2 numbers for 3 models"),
        ("average", {"ratios": (1, -2, 1)}, "average: ratios are numbers, one for each model, whose sum is not 0; the sum of [1.0, -2.0, 1.0] is 0"),
        ("weighted_sum", {"gamma": 1}, "unknown argument 'gamma': weighted_sum has no such number"),
    ],
)  # fmt: skip
def test_numbers_out_of_range(name, given, message):
    with pytest.raises(RecipeError) as caught:
        METHODS[name].check_numbers(given, 3)
    assert str(caught.value) == message


def test_numbers_have_defaults():
    assert METHODS["average"].check_numbers({}, 4) == {"ratios": (1.0, 1.0, 1.0, 1.0)}
    assert METHODS["dare"].check_numbers({"seed": "12345678901234567890"}, 2) == {
        "drop_rate": 0.5,
        "seed": 12345678901234567890,
    }
    assert METHODS["ties"].check_numbers({"density": 1}, 3) == {"density": 1.0}


@pytest.mark.parametrize(
    ("name", "fits", "not_these", "words"),
    [("weighted_sum", 2, [1, 3], "2 models"), ("scale", 1, [0, 2], "1 model"), ("ties", 5, [1], "2 models or more"),
     ("model_stock", 3, [2], "3 models or more")],
)  # fmt: skip
def test_the_number_of_models(name, fits, not_these, words):
    METHODS[name].check_models(fits)
    for count in not_these:
        with pytest.raises(RecipeError, match=f"^{name} merges {words}; {count} given$"):
            METHODS[name].check_models(count)


@pytest.mark.parametrize("name", ["weighted_sum", "sigmoid", "inverse_sigmoid"])
def test_files_and_state_dicts(pairs, tmp_path, name):
    from safetensors.torch import load_file

    a, b = pairs()
    blockmerge.merge(a, b, weights="IN04=0.25", method=name, output=tmp_path / "m.safetensors")
    merged, first, second = load_file(tmp_path / "m.safetensors"), load_file(a), load_file(b)
    again = blockmerge.merge_state_dicts(first, second, weights="IN04=0.25", method=name)
    for key, tensor in merged.items():
        assert torch.equal(tensor, again[key])
        if "input_blocks.4." in key:
            formula = getattr(oracle, name)
            wanted = torch.from_numpy(
                formula(first[key].double().numpy(), second[key].double().numpy(), alpha=0.25)
            )
            size = torch.maximum(first[key].abs(), second[key].abs())
            assert ((tensor.double() - wanted).abs() <= step_at(size, tensor.dtype)).all()
        else:
            assert torch.equal(tensor, first[key])


def test_the_list(capsys):
    assert run(["methods"]) == 0
    out = capsys.readouterr().out
    for method in METHODS.values():
        assert method.name in out
        assert method.formula in out
    assert run(["methods", "--json"]) == 0
    assert [found["name"] for found in json.loads(capsys.readouterr().out)] == list(METHODS)
    assert run(["methods", "extract", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["models"], found["weights"], found["locality"]) == (
        "extract",
        3,
        ["alpha", "beta"],
        "row",
    )
    assert [(number["name"], number["default"]) for number in found["numbers"]] == [("gamma", 1.0)]
    assert run(["methods", "sigmod"]) == 1
    assert "did you mean 'sigmoid'" in capsys.readouterr().err


def test_the_list_is_grouped_by_what_methods_are_for(capsys):
    """Every method is in one group, and groups are of methods that take as many models, where they say so."""
    assert run(["methods"]) == 0
    groups = {}
    for line in capsys.readouterr().out.splitlines():
        if line and not line.startswith(" "):
            groups[line.removesuffix(":")] = names = []
        elif line[:2] == "  " and line[2:3] != " ":
            names.append(line.strip())
    assert [name for names in groups.values() for name in names] == list(METHODS)
    assert groups.keys() == {purpose_of(method) for method in METHODS.values()}
    counts = {purpose: {METHODS[name].models for name in names} for purpose, names in groups.items()}
    assert counts["Blend two models"] == counts["Take parts of two models as they are"] == {2}
    assert counts["Blend three models"] == counts["Add to A what B has learned and C has not"] == {3}
    assert counts["Change one model"] == {1}
    assert run(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one["name"]: one["purpose"] for one in found} == {
        name: purpose for purpose, names in groups.items() for name in names
    }


def test_one_method(capsys):
    assert run(["methods", "dare"]) == 0
    assert capsys.readouterr().out == (
        "dare\n"
        "  A + α·(B − A)·Bernoulli(1 − p)/(1 − p)\n"
        "  for        join what several models have learned from the same base\n"
        "  models     2 models\n"
        "  alpha      a weight for each block\n"
        "  drop_rate  a number from 0 to below 1, 0.5 by default; p, the share of the differences that is dropped\n"
        "  seed       a whole number, 0 by default; with the tensor's name it decides what chance brings\n"
        "  looks at   one element\n"
        "  source     DARE, arXiv 2311.03099\n"
    )


def test_find_method_takes_a_method():
    assert find_method(METHODS["slerp"]) is METHODS["slerp"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.locality == "element"])
def test_a_zero_has_one_sign_wherever_it_stands(name, dtype):
    """torch computes the last few elements of a tensor by another way than the others."""
    method = METHODS[name]
    signed = torch.tensor([0.0, -0.0, 0.0, -0.0, 1.0, -1.0, 6e-8, -6e-8]).to(dtype)
    picked = torch.randint(len(signed), (method.models or 3, 150), generator=torch.Generator().manual_seed(1))
    models = signed[picked]
    for alpha, beta in itertools.product((0.0, 0.25, 0.5, 0.75, 1.0, 1.5), (0.0, 0.5, 1.0)):
        weights = {"alpha": alpha, "beta": beta} if "beta" in method.weights else {"alpha": alpha}
        if method.copies(**weights) is not None:
            continue

        def merged(start, stop, weights=weights):
            place = {"key": 7, "position": start} if method.random else {}
            parts = [model[start:stop].clone() for model in models]
            return method.function(*parts, out=torch.empty_like(parts[0]), **weights, **place)

        whole = merged(0, 150)
        for start, length in itertools.product(range(0, 66, 5), (1, 7, 33)):
            found = merged(start, start + length)
            assert torch.equal(bits(found), bits(whole[start : start + length])), weights


def test_the_docs_are_up_to_date():
    """`make docs` writes them."""
    from docs.methods_reference import reference

    assert (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8") == reference()
