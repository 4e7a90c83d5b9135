"""Methods of the user's own."""

from __future__ import annotations

import inspect
import math
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

import blockmerge
from blockmerge.cli.main import run
from blockmerge.errors import RecipeError
from blockmerge.methods import find_method
from tests.refusals import assert_refused
from tests.thin_unet import config

SOURCE = """
import blockmerge

@blockmerge.merge_method(formula="A + α·γ·(B − A)")
def soften(a, b, *, alpha, gamma=0.5, steps=2):
    assert a.dtype.itemsize >= 4
    return a + alpha * gamma * (b - a)

@blockmerge.merge_method()
def broken(a, b, *, alpha):
    return a[:1]

@blockmerge.merge_method()
def raising(a, b, *, alpha):
    return a.nothing

@blockmerge.merge_method()
def exiting(a, b, *, alpha):
    raise SystemExit(7)

@blockmerge.merge_method
def meta(a, b, *, alpha):
    return a.to("meta")

number = 5

def plain(a, b, *, alpha):
    return a
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of methods in the current folder; gives its name."""
    name = f"methods_of_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # beside it, where nothing is to change
    return name


def test_it_is_found_and_read(module):
    method = find_method(f"{module}:soften")
    assert (method.name, method.models, method.locality) == (f"{module}:soften", 2, "element")
    assert (method.formula, dict(method.weights), method.copies(0.0)) == (
        "A + α·γ·(B − A)",
        {"alpha": None},
        None,
    )
    assert [(number.name, number.default, number.kind) for number in method.numbers] == [
        ("gamma", 0.5, "number"),
        ("steps", 2, "whole number"),
    ]
    assert method.check_numbers({"gamma": 2}, 2) == {"gamma": 2.0, "steps": 2}
    a, b = torch.zeros(5).half(), torch.ones(5).half()
    out = method.function(a, b, alpha=0.5, gamma=0.25, steps=1, out=torch.empty_like(a))
    assert out.tolist() == [0.125] * 5


def test_it_is_rounded_once_and_its_inputs_are_copies():
    @blockmerge.merge_method(locality="tensor")
    def careless(*models, alpha=1.0, beta=0.25):
        models[0].mul_(0).add_(1 + 2**-12)
        return models[0] * (1 + 2**-12)

    method = find_method(careless)
    assert (method.models, method.least, dict(method.weights)) == (None, 2, {"alpha": 1.0, "beta": 0.25})
    assert careless.__name__ == "careless"
    a = torch.full((3, 2), 7.0, dtype=torch.float64)
    out = method.function(a, a, alpha=1.0, out=torch.empty(3, 2, dtype=torch.float16))
    assert a.eq(7).all()
    assert out.eq(torch.tensor((1 + 2**-12) ** 2).half()).all()  # 1, had it been rounded on the way


def test_merging_with_it(module, pairs, tmp_path):
    from safetensors.torch import load_file

    a, b = map(str, pairs())
    assert (
        run(
            [
                "merge",
                a,
                b,
                "-w",
                "0.5",
                "--vae",
                "blend",
                "--method",
                f"{module}:soften",
                "-o",
                str(tmp_path / "m.safetensors"),
                "-q",
            ]
        )
        == 0
    )
    blockmerge.merge(a, b, weights=0.25, vae="blend", output=tmp_path / "plain.safetensors")
    merged, plain = load_file(tmp_path / "m.safetensors"), load_file(tmp_path / "plain.safetensors")
    name = "model.diffusion_model.input_blocks.4.1.proj_in.weight"
    assert (merged[name].float() - plain[name].float()).abs().max() <= 1e-3
    assert not torch.equal(merged[name], load_file(a)[name])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("nowhere_at_all:f", "method nowhere_at_all:f: no module named 'nowhere_at_all', neither in the current folder nor where Python looks"),
        ("nowhere_at_all.sub:f", "method nowhere_at_all.sub:f: no module named 'nowhere_at_all', neither in the current folder nor where Python looks"),
        ("./mine.py:f", "method ./mine.py:f: before the colon goes a module's name, not a path: mine:f"),
        (r"C:\my\mine.py:f", r"method C:\my\mine.py:f: before the colon goes a module's name, not a path: mine:f"),
        ("mine.py:f", "method mine.py:f: before the colon goes a module's name, not a path: mine:f"),
        ("{}:sofen", "method {0}:sofen: {0} has no 'sofen'; did you mean 'soften'?"),
        ("{}:unlike", "method {0}:unlike: {0} has no 'unlike'"),
        ("{}:plain", "{}:plain is not a merge method: decorate it with @blockmerge.merge_method()"),
        (":f", "method :f: a method of your own is written MODULE:FUNCTION"),
        ("{}:", "method {0}:: a method of your own is written MODULE:FUNCTION"),
        ("{}:number", "{}:number is not a function: a method is one, decorated with @blockmerge.merge_method()"),
    ],
)  # fmt: skip
def test_methods_that_are_not_there(module, method, message):
    with pytest.raises(RecipeError) as caught:
        find_method(method.format(module))
    assert str(caught.value) == message.format(module)


def test_methods_that_fail(module):
    a = torch.zeros(5)
    with pytest.raises(
        RecipeError, match=r"^the method \S+:broken returned shape \[1\] for tensors of shape \[5\]: it must "
    ):
        find_method(f"{module}:broken").function(a, a, alpha=0.5, out=a)
    with pytest.raises(
        RecipeError,
        match=r"^the method \S+:raising failed: AttributeError: 'Tensor' object has no attribute 'nothing'$",
    ):
        find_method(f"{module}:raising").function(a, a, alpha=0.5, out=a)
    with pytest.raises(RecipeError, match=r"^the method \S+:exiting failed: SystemExit: 7$"):
        find_method(f"{module}:exiting").function(a, a, alpha=0.5, out=a)


def test_a_module_that_exits_or_returns_no_values_is_an_error_and_not_the_end(
    module, tmp_path, pairs, capsys
):
    (tmp_path / f"{module}_exits.py").write_text("import sys; sys.exit(3)")
    for method, says in (
        ("_exits:f", f"cannot import {module}_exits (SystemExit: 3)"),
        (":exiting", "failed: SystemExit: 7"),
        (":meta", f"the method {module}:meta returned a meta tensor: it must return one that holds values"),
    ):
        assert_refused(
            capsys,
            tmp_path,
            *pairs(),
            "-w",
            "0.5",
            "-m",
            f"{module}{method}",
            "-o",
            "o.safetensors",
            says=says,
        )


def test_a_module_that_lacks_another_and_one_whose_decorator_is_wrong(module, tmp_path):
    (tmp_path / f"{module}_lacks.py").write_text("import nowhere_at_all")
    with pytest.raises(
        RecipeError,
        match=r"cannot import \S+_lacks \(ModuleNotFoundError: No module named 'nowhere_at_all'\)$",
    ):
        find_method(f"{module}_lacks:f")
    faulty = f"{module}_faulty"
    (tmp_path / f"{faulty}.py").write_text(
        "import blockmerge\n@blockmerge.merge_method\ndef f(a, b): return a"
    )
    with pytest.raises(RecipeError) as caught:
        find_method(f"{faulty}:f")
    why = f"{faulty}:f takes no weight: a method is f(a, b, *, alpha)"
    assert str(caught.value) == f"method {faulty}:f: cannot import {faulty} ({why})"


SHAPE = "for tensors of shape [5]: it must return a tensor of the shape it gets"
FLOATS = "it must return a tensor of a float dtype, as those that it gets"


@pytest.mark.parametrize(
    ("result", "what"),
    [
        (lambda a: a.numpy(), "a ndarray: it must return a torch tensor"),
        (lambda a: a.tolist(), "a list: it must return a torch tensor"),
        (lambda a: None, "a NoneType: it must return a torch tensor"),
        (lambda a: a[1:], f"shape [4] {SHAPE}"),
        (lambda a: a.to(torch.complex64), f"numbers of torch.complex64: {FLOATS}"),
        (lambda a: a.int(), f"numbers of torch.int32: {FLOATS}"),
        (lambda a: a > 0, f"numbers of torch.bool: {FLOATS}"),
        (lambda a: a.to("meta"), "a meta tensor: it must return one that holds values"),
        (lambda a: a.to_sparse(), "a sparse tensor: it must return a dense one"),
    ],
)
def test_methods_that_return_something_else(result, what):
    @blockmerge.merge_method
    def odd(a, b, *, alpha):
        return result(a)

    a = torch.ones(5)
    with pytest.raises(RecipeError) as caught:
        find_method(odd).function(a, a, alpha=0.5, out=torch.empty(5))
    assert str(caught.value) == f"the method {__name__}:odd returned {what}"


def no_weight(a, b):
    return a


def no_models(*, alpha):
    return alpha


def no_default(a, b, *, alpha, strength):
    return a


def text_for_weight(a, b, *, alpha="x"):
    return a


def nothing_for_weight(a, b, *, alpha, beta=None):
    return a


def any_keyword(a, b, *, alpha, **more):
    return a


@pytest.mark.parametrize(
    ("function", "locality", "message"),
    [
        (no_weight, "element", "takes no weight: a method is f(a, b, *, alpha)"),
        (no_models, "element", "takes no models: a method is f(a, b, *, alpha)"),
        (no_default, "element", "the number strength needs a finite default, a whole number or a float"),
        (text_for_weight, "element", "the weight alpha needs a finite number as its default, or none"),
        (nothing_for_weight, "element", "the weight beta needs a finite number as its default, or none"),
        (any_keyword, "element", "takes any keyword (**): name each number, with its default"),
        (no_weight, "rows", "unknown locality 'rows' (element, row, tensor, model)"),
    ],
)
def test_functions_that_are_no_methods(function, locality, message):
    with pytest.raises(RecipeError) as caught:
        blockmerge.merge_method(locality=locality)(function)
    assert str(caught.value).startswith(f"{__name__}:{function.__name__}")
    assert str(caught.value).endswith(message)


@pytest.mark.parametrize("default", [7, 0.0, 1.5])
def test_the_seed_is_the_merges(default):
    def chance(a, b, *, alpha, seed=default):
        return a

    with pytest.raises(RecipeError, match="the seed is the merge's own, and 0 when nobody says"):
        blockmerge.merge_method(chance)


@pytest.mark.parametrize("default", [math.nan, math.inf, -np.float32(math.inf), True, np.True_, 10**400])
def test_defaults_are_finite_numbers(default):
    def weight(a, b, *, alpha=default):
        return a

    def number(a, b, *, alpha, strength=default):
        return a

    for function, says in (
        (weight, "weight alpha needs a finite number"),
        (number, "number strength needs a finite default"),
    ):
        with pytest.raises(RecipeError, match=says):
            blockmerge.merge_method(function)


def test_defaults_may_be_numpys():
    half, quarter, three = np.float64(0.5), np.float32(0.25), np.int64(3)

    @blockmerge.merge_method
    def mix(a, b, *, alpha=half, strength=quarter, steps=three):
        return a

    method = find_method(mix)
    assert dict(method.weights) == {"alpha": 0.5}
    assert [(one.default, type(one.default), one.kind) for one in method.numbers] == [
        (0.25, float, "number"),
        (3, int, "whole number"),
    ]


@pytest.mark.parametrize("thing", [3, max, "row"])
def test_things_that_are_no_functions(thing):
    for decorate in (blockmerge.merge_method, blockmerge.merge_method()):
        with pytest.raises(RecipeError) as caught:
            decorate(thing)
        assert str(caught.value) == f"{thing} is not a Python function: a method is f(a, b, *, alpha)"


def test_a_method_of_an_object_is_told_apart():
    class Mixer:
        def mix(self, a, b, *, alpha):
            return a

    with pytest.raises(RecipeError, match=r":mix is a method of an object: decorate a function of its own$"):
        blockmerge.merge_method(Mixer().mix)

    class Slotted:
        __slots__ = ()

        def __call__(self, a, b, *, alpha):
            return a

    with pytest.raises(
        RecipeError, match=r":Slotted is not a plain function: decorate a function of its own$"
    ):
        blockmerge.merge_method(Slotted())


@blockmerge.merge_method
def with_defaults(a, b, c, *, alpha=0.5, beta=0.25):
    return a + alpha * (b - a) + beta * (c - a)


def test_weights_by_default_are_those_of_the_function():
    unet = UNet2DConditionModel(**config("sd1"))
    models = [{name: torch.randn_like(t) for name, t in unet.state_dict().items()} for _ in range(3)]
    said = blockmerge.merge_state_dicts(*models, method=with_defaults, weights=0.5, weights_beta=0.25)
    for options in ({}, {"weights": 0.5}, {"weights_beta": 0.25}):
        merged = blockmerge.merge_state_dicts(*models, method=with_defaults, **options)
        assert all(torch.equal(tensor, said[name]) for name, tensor in merged.items()), options
    with blockmerge.LiveMerge(unet, *models, method=with_defaults) as live:
        live.apply()
        assert all(torch.equal(tensor, said[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("what", ["formula", "source"])
def test_what_is_told_of_a_method_is_text(what):
    with pytest.raises(RecipeError, match=rf":no_weight: {what} is a text; int given$"):
        blockmerge.merge_method(**{what: 3})(no_weight)


def test_no_number_is_called_as_an_argument_of_merging():
    taken = {
        parameter.name
        for function in (blockmerge.merge, blockmerge.merge_state_dicts, blockmerge.LiveMerge)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    }
    for name in taken - {"a", "b", "c", "seed"} | {"out"}:
        scope = {}
        exec(f"def f(a, b, *, alpha, {name}=1): return a", scope)
        with pytest.raises(
            RecipeError, match=rf"a number cannot be called {name}, which is an argument of merging itself$"
        ):
            blockmerge.merge_method(scope["f"])
