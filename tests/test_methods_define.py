"""Defining a method: one decorator for the built-in ones and the user's own, and a registry without torch."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from importlib import import_module

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import blockmerge
from blockmerge.cli import numbers as cli_numbers
from blockmerge.cli.main import run
from blockmerge.errors import RecipeError
from blockmerge.methods import IDENTITY, METHODS, Number, builtin, find_method, key_of, planning, registry
from blockmerge.methods.arithmetic import round_into, wide_dtype
from blockmerge.methods.late import late
from blockmerge.methods.randomness import chosen, normal
from tests import method_oracle as oracle
from tests.oracle import step_at
from tests.refusals import assert_refused
from tests.small_models import small_model

TOY = '''
"""A toy."""
from blockmerge.methods import Number, planning
from blockmerge.methods.define import merge_method
from blockmerge.methods.late import torch

@merge_method(
    formula="A + α·γ·(B − A)",
    source="a test",
    copies=planning.a_at_zero,
    numbers=[Number("gentleness", text="how gently", low=0, high=1, option="how gently.")],
)
def toy(a: torch.Tensor, b: torch.Tensor, *, alpha: float, gentleness: float = 0.5) -> torch.Tensor:
    return a + alpha * gentleness * (b - a)
'''
UNET = "model.diffusion_model.input_blocks.1.0.out_layers.3.weight"


def same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


# -- built-in methods ----------------------------------------------------------------------------------------


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A method that one new file and one line of the registry add."""
    (tmp_path / "toys.py").write_text(TOY, encoding="utf-8")
    monkeypatch.setattr(builtin, "__path__", [*builtin.__path__, str(tmp_path)])
    monkeypatch.setitem(registry.BUILT_IN, "toy", "toys")
    cli_numbers._options.cache_clear()
    yield find_method("toy")
    cli_numbers._options.cache_clear()
    sys.modules.pop("blockmerge.methods.builtin.toys", None)


def test_a_new_method_is_one_file_and_one_line(toy, pairs, tmp_path, capsys):
    assert (toy.name, toy.models, toy.own, toy.source) == ("toy", 2, None, "a test")
    assert METHODS["toy"] is toy is list(METHODS.values())[-1]
    assert run(["methods", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["name"] == "toy"
    assert run(["methods"]) == 0
    assert capsys.readouterr().out.endswith("  toy\n    A + α·γ·(B − A)\n    2 models, alpha, gentleness\n")
    a, b = small_model(seed=0), small_model(seed=1)
    merged = blockmerge.merge_state_dicts(a, b, weights=0.5, method="toy", gentleness=1)
    same(merged, blockmerge.merge_state_dicts(a, b, weights=0.5, method=toy, gentleness=1.0))
    wanted = (a[UNET].double() + b[UNET].double()) / 2
    assert ((merged[UNET].double() - wanted).abs() <= step_at(wanted, torch.float16)).all()
    with pytest.raises(RecipeError, match="toy needs a number from 0 to 1 as gentleness: found 2"):
        blockmerge.merge_state_dicts(a, b, weights=0.5, method="toy", gentleness=2)
    # Its number is an option, as those of the others are.
    files = [str(path) for path in pairs()]
    for place, words in enumerate((["--gentleness", "1"], ["--number", "gentleness=1"])):
        output = str(tmp_path / f"{place}.safetensors")
        assert run(["merge", *files, "-w", "0.5", "-m", "toy", *words, "-q", "-o", output]) == 0
    same(*(load_file(tmp_path / f"{place}.safetensors") for place in range(2)))
    words = ["-w", "0.5", "-m", "toy", "--gentleness", "0.2", "--number", "gentleness=0.3"]
    says = "the number gentleness is given twice: 0.2 and 0.3"
    assert_refused(capsys, tmp_path, *files, *words, "-o", "no.safetensors", says=says)
    capsys.readouterr()
    assert run(["merge", "--help"]) == 0
    assert "--gentleness NUMBER             toy: how gently. [default: 0.5]" in capsys.readouterr().out


def test_a_built_in_method_may_have_a_number_of_the_name_of_anothers(toy, monkeypatch, tmp_path):
    text = TOY.replace("def toy", "def tender").replace("= 0.5", "= 1.0")
    (tmp_path / "more_toys.py").write_text(text, encoding="utf-8")
    monkeypatch.setitem(registry.BUILT_IN, "tender", "more_toys")
    found = cli_numbers._options()["gentleness"].help
    assert found == "toy: how gently. [default: 0.5] tender: how gently. [default: 1]"


def test_all_definitions_are_registered():
    defined = {}
    for module in pkgutil.iter_modules(builtin.__path__):
        for name, value in vars(import_module(f"{builtin.__name__}.{module.name}")).items():
            if getattr(value, "__module__", None) == f"{builtin.__name__}.{module.name}" and hasattr(
                value, "blockmerge_method"
            ):
                defined[name] = module.name
    assert defined == {**registry.BUILT_IN, "convert": "convert", "bake": "convert"}
    for name, method in METHODS.items():
        assert (method.name, method.own) == (name, None)
        assert find_method(method.function) is method


@pytest.mark.parametrize(
    ("arguments", "not_loaded"),
    [
        ("methods", {"torch", "numpy"}),
        ("methods cosine_a --json", {"torch", "numpy"}),
        ("A B -m ties -w 0.3 --density 0.1 --dry-run -o no.safetensors", {"torch"}),
    ],
)
def test_what_there_is_to_know_of_methods_needs_no_torch(arguments, not_loaded, pairs):
    files = dict(zip("AB", map(str, pairs()), strict=True))
    words = [files.get(word, word) for word in arguments.split()]
    code = (
        f"import sys; from blockmerge.cli.main import run; assert run({words!r}) == 0; "
        f"assert not {not_loaded!r} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_late_module_is_the_module():
    lately = late("math")
    assert "sqrt" not in vars(lately)
    assert lately.sqrt(4) == 2
    assert vars(lately)["sqrt"] is __import__("math").sqrt
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lately.nothing


def test_the_identity():
    assert find_method("convert") is IDENTITY
    assert "convert" not in METHODS
    assert (IDENTITY.models, IDENTITY.locality, IDENTITY.weights, IDENTITY.numbers) == (1, "element", {}, ())
    assert (IDENTITY.copies(0.3, 0.7), IDENTITY.copies()) == (0, 0)
    assert (IDENTITY.own, IDENTITY.random, IDENTITY.check_numbers({}, 1)) == (None, False, {})
    a = torch.randn(50)
    assert torch.equal(IDENTITY.function(a, out=torch.empty(50, dtype=torch.float16)), a.half())
    with pytest.raises(RecipeError, match=r"^convert merges 1 model; 2 given$"):
        IDENTITY.check_models(2)


# -- the user's own ------------------------------------------------------------------------------------------


@blockmerge.merge_method(copies=planning.a_to_b)
def mixed(a, b, *, alpha):
    """A mix."""
    return (1 - alpha) * a + alpha * b


def test_copies():
    a, b = small_model(seed=0), small_model(seed=1)
    b[UNET] = b[UNET].clone()
    b[UNET].view(-1)[0] = torch.nan  # which a computation would not get past
    merged = blockmerge.merge_state_dicts(a, b, weights=0.0, vae="a", method=mixed)
    assert torch.equal(merged[UNET], a[UNET])
    assert find_method(mixed).copies(1.0) == 1
    assert find_method(mixed).copies(0.5, 0.0) is None


@pytest.mark.parametrize("result", [2, -1, True, "A", 0.0])
def test_copies_of_no_model(result):
    @blockmerge.merge_method(copies=lambda alpha, beta: result)
    def faulty(a, b, *, alpha):
        return a

    says = rf"^copies of the method \S+:faulty gives {result} at alpha 0.5 and beta 0: .* from 0 for A to 1, "
    with pytest.raises(RecipeError, match=says):
        find_method(faulty).copies(0.5)


def test_what_fails_beside_the_function_is_an_error_of_the_method():
    @blockmerge.merge_method(
        locality="model",
        copies=lambda alpha, beta: 1 / 0,
        passes=(lambda a, b: a.nothing, lambda figures: figures[0]),
    )
    def faulty(a, b, *, alpha, gathered):
        return a

    method = find_method(faulty)
    for call in (
        lambda: method.copies(0.5, 0.5),
        lambda: method.statistics(torch.ones(2), torch.ones(2)),
        lambda: method.gather([]),
    ):
        with pytest.raises(
            RecipeError, match=r"^the method \S+:faulty failed: (ZeroDivision|Attribute|Index)Error: "
        ):
            call()


def test_numbers_with_ranges():
    @blockmerge.merge_method(
        numbers=[
            Number("steps", text="how many", low=1, high=9),
            Number("ratios", kind="numbers"),
            Number("power", 2.0, low=0, high=4, open_above=True),
        ]
    )
    def ranged(*models, alpha, ratios=(), steps=3, power, plain=0.5):
        return models[0]

    method = find_method(ranged)
    assert [(one.name, one.default, one.kind, one.range) for one in method.numbers] == [
        ("ratios", None, "numbers", "numbers, one for each model, whose sum is not 0"),
        ("steps", 3, "whole number", "a whole number from 1 to 9"),
        ("power", 2.0, "number", "a number from 0 to below 4"),
        ("plain", 0.5, "number", "a number"),
    ]
    assert method.check_numbers({"steps": "4"}, 2) == {
        "ratios": (1.0, 1.0), "steps": 4, "power": 2.0, "plain": 0.5,
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r":ranged needs a whole number from 1 to 9 as steps: found 10$"):
        method.check_numbers({"steps": 10}, 2)


@blockmerge.merge_method(chance=True)
def jitter(a, b, *, alpha, key, position, amount=0.5):
    """Noise on a mix."""
    noise = normal(key, position, a.numel(), a.device)
    return a + alpha * (b - a) + amount * noise


@blockmerge.merge_method(chance=True)
def swap(a, b, *, alpha, key, position, out):
    """B here and there."""
    kept = chosen(round(alpha * 65536), key, position, out.numel(), out.device)
    return out.copy_(torch.where(kept.bool(), b.to(out.dtype), a.to(out.dtype)))


@pytest.mark.parametrize("method", [jitter, swap])
def test_chance(pairs, tmp_path, method):
    assert [number.name for number in find_method(method).numbers][-1] == "seed"
    a, b = pairs()
    outputs = []
    for place, options in enumerate(({"threads": 1}, {"threads": 3}, {"seed": 4})):
        output = tmp_path / f"{place}.safetensors"
        blockmerge.merge(a, b, weights=0.3, vae="blend", method=method, output=output, **options)
        outputs.append(load_file(output))
    first, again, otherwise = outputs
    same(first, again)
    assert not torch.equal(first[UNET], otherwise[UNET])
    same(
        first,
        blockmerge.merge_state_dicts(load_file(a), load_file(b), weights=0.3, vae="blend", method=method),
    )
    one, other = (load_file(path)[UNET].double().numpy() for path in (a, b))
    if method is jitter:
        key = key_of(0, UNET)
        wanted = one + 0.3 * (other - one) + 0.5 * oracle.normals(key, one.size).reshape(one.shape)
        assert np.abs(first[UNET].double().numpy() - wanted).max() <= 4e-3
    else:
        found = first[UNET].double().numpy()
        assert ((found == one) | (found == other)).all()
        assert (found == other).mean() == pytest.approx(0.3, abs=0.05)


def most(figures):
    return torch.stack(figures).max()


@blockmerge.merge_method(
    locality="model", passes=(lambda a, b: (b - a).abs().max(), most), copies=planning.a_at_zero
)
def levelled(a, b, *, alpha, gathered):
    """A step in proportion to the greatest difference in the model."""
    assert a.dtype.itemsize >= 4
    return a + alpha * (b - a) / gathered


@pytest.mark.parametrize("number", [1, 2])
def test_passes(pairs, tmp_path, number):
    models = [load_file(path) for path in pairs()]
    output = tmp_path / "m.safetensors"
    blockmerge.merge(*pairs(), weights=0.25, vae="a", method=levelled, output=output, threads=number)
    merged = load_file(output)
    same(merged, blockmerge.merge_state_dicts(*models, weights=0.25, vae="a", method=levelled))
    a, b = ({name: tensor.double() for name, tensor in model.items()} for model in models)
    looked_at = [
        name for name in a if not name.startswith("first_stage_model") and name in b and a[name].numel()
    ]
    greatest = max(
        float((b[name] - a[name]).abs().max()) for name in looked_at if models[0][name].is_floating_point()
    )
    wanted = a[UNET] + 0.25 * (b[UNET] - a[UNET]) / greatest
    assert ((merged[UNET].double() - wanted).abs() <= step_at(wanted, torch.float16)).all()


def weighed(figures):
    """A sum that comes out otherwise in another order."""
    total = 0.0
    for figure in figures:
        total = total * 1.0009765625 + figure
    return total


@blockmerge.merge_method(locality="model", passes=(lambda a, b: float(a.double().sum()), weighed))
def in_order(a, b, *, alpha, gathered):
    """What it does depends on the order of the tensors."""
    return a + alpha * (b - a) * gathered


def test_passes_are_gathered_in_the_order_of_the_model(pairs, tmp_path):
    a, b = pairs(dtypes=("F32", "F32"))
    merged = blockmerge.merge_state_dicts(load_file(a), load_file(b), weights=0.25, vae="a", method=in_order)
    for threads in (1, 2, 3, 4, 4, 4):
        output = tmp_path / "m.safetensors"
        blockmerge.merge(
            a, b, weights=0.25, vae="a", method=in_order, output=output, threads=threads, overwrite=True
        )
        same(load_file(output), merged)


def halves(shape, alpha, beta):
    rows = shape[0] if shape else 1
    return ((0, rows // 2, 0), (rows // 2, rows, 1))


@blockmerge.merge_method(locality="row", rows=halves)
def half_and_half(a, b, *, alpha):
    """A above, B below."""
    return torch.cat([a[: len(a) // 2], b[len(a) // 2 :]]) if a.dim() else b


def test_rows(pairs, tmp_path):
    a, b = map(load_file, pairs())
    blockmerge.merge(
        *pairs(), weights=0.5, vae="blend", method=half_and_half, output=tmp_path / "m.safetensors"
    )
    merged = load_file(tmp_path / "m.safetensors")
    same(merged, blockmerge.merge_state_dicts(a, b, weights=0.5, vae="blend", method=half_and_half))
    assert find_method(half_and_half).rows((), 0.5, 0.0) == ((0, 1, 1),)  # nothing of nothing
    middle = len(a[UNET]) // 2
    assert torch.equal(merged[UNET], torch.cat([a[UNET][:middle], b[UNET][middle:]]))


@pytest.mark.parametrize(
    "rows",
    [
        ((0, 3, 0),),
        ((0, 2, 0), (3, 4, 1)),
        ((1, 4, 0),),
        ((0, 4, 2),),
        ((0, 5, 0), (5, 4, 1)),
        ((0, 4),),
        None,
        (),
        [("x", 4, 0)],
    ],
)
def test_rows_with_gaps(rows):
    @blockmerge.merge_method(locality="row", rows=lambda shape, alpha, beta: rows)
    def faulty(a, b, *, alpha):
        return a

    with pytest.raises(
        RecipeError, match=r"^the method \S+:faulty has the rows .* in order and without gaps$"
    ):
        find_method(faulty).rows((4, 2), 0.5, 0.0)


def test_a_function_that_writes_its_result_gets_the_tensors_as_they_are():
    seen = []

    @blockmerge.merge_method
    def direct(a, b, *, alpha, out):
        """Rounds for itself."""
        seen.append((a.dtype, b.dtype, out.dtype))
        wide = wide_dtype(a, b, out)
        return round_into(out, torch.lerp(a.to(wide), b.to(wide), alpha))

    a, b = torch.randn(2, 40)
    method = find_method(direct)
    assert (method.numbers, method.own is not None) == ((), True)
    out = method.function(a.half(), b, alpha=0.25, out=torch.empty(40, dtype=torch.bfloat16))
    assert seen == [(torch.float16, torch.float32, torch.bfloat16)]
    assert torch.equal(out, torch.lerp(a.half().float(), b, 0.25).bfloat16())
    models = small_model(seed=0), small_model(seed=1)
    merged = blockmerge.merge_state_dicts(*models, weights=0.25, vae="blend", method=direct)
    same(merged, blockmerge.merge_state_dicts(*models, weights=0.25, vae="blend"))


def nothing(a, b, *, alpha):
    return a


def counted(a, b, *, alpha, count=1):
    return a


def seeded(a, b, *, alpha, key, position, seed=0):
    return a


PASSES = (torch.sub, most)


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        (nothing, {"locality": "model"}, ": passes=(statistics, gather) are what the locality 'model' needs, and no other"),
        (nothing, {"passes": PASSES}, ": passes=(statistics, gather) are what the locality 'model' needs, and no other"),
        (nothing, {"locality": "model", "passes": PASSES}, " does not take the keyword gathered"),
        (nothing, {"locality": "model", "passes": most}, ": passes wants two functions, statistics and gather"),
        (nothing, {"chance": True}, " does not take the keyword key"),
        (seeded, {"chance": True}, " is of chance: it takes key and position in place of the seed"),
        (nothing, {"rows": halves}, ": rows are for the locality 'row'"),
        (nothing, {"locality": "row", "rows": 3}, ": rows wants a function"),
        (nothing, {"copies": 0}, ": copies wants a function"),
        (nothing, {"numbers": ["count"]}, ": numbers wants Numbers"),
        (nothing, {"numbers": [Number("count", 1)]}, ": the number count is not one of its keywords"),
        (counted, {"numbers": [Number("count", 2)]}, ": the number count has two defaults"),
        (counted, {"numbers": [Number("count", low=2)]}, " needs a whole number of at least 2 as count: found 1"),
    ],
)  # fmt: skip
def test_definitions_that_do_not_fit(function, options, message):
    with pytest.raises(RecipeError) as caught:
        blockmerge.merge_method(**options)(function)
    assert str(caught.value) == f"{__name__}:{function.__name__}{message}"


def test_chance_goes_by_the_place_in_the_tensor_live_too(monkeypatch):
    """A user's function gets a large tensor in stretches."""
    from blockmerge.merging import launching
    from tests.test_live import PREFIX, make_state_dicts, module_of, unet_of, values

    monkeypatch.setattr(launching, "_COPIED_ELEMENTS", 1000)
    models = [unet_of(make_state_dicts("sd1", seed=seed)[0]) for seed in range(2)]
    module = module_of(models[0])
    blockmerge.LiveMerge(module, *models, method=jitter).apply(weights=0.4)
    found = values(module)
    largest = max(found, key=lambda name: found[name].numel())
    a, b = (model[largest].double().numpy() for model in models)
    assert a.size > 10_000
    noise = oracle.normals(key_of(0, PREFIX + largest), a.size).reshape(a.shape)
    wanted = a + 0.4 * (b - a) + 0.5 * noise
    assert np.abs(found[largest].double().numpy() - wanted).max() <= 4e-3
