"""Every method against its formula in float64, on shapes of every kind; and the list of methods."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import blockmerge
from blockmerge.cli.main import run
from blockmerge.methods import METHODS
from blockmerge.methods import elementwise as functions
from tests.oracle import step_at

FORMULAS = {
    "weighted_sum": lambda a, b, t: (1 - t) * a + t * b,
    "sigmoid": lambda a, b, t: a + np.interp(t, [0, 1], [0, 1]) ** 2 * (3 - 2 * np.interp(t, [0, 1], [0, 1])) * (b - a),
    "inverse_sigmoid": lambda a, b, t: a + (0.5 - np.sin(np.arcsin(1 - 2 * np.clip(t, 0, 1)) / 3)) * (b - a),
}
SHAPES = [(), (7,), (5, 3), (4, 3, 3, 3), (0,), (3, 0, 2), (6, 4, 1, 1)]


def test_every_method_has_its_formula_here():
    assert METHODS.keys() == FORMULAS.keys()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("alpha", [-0.5, 0, 0.25, 0.5, 0.9, 1, 1.5])
def test_it_is_its_formula(name, dtype, alpha):
    generator = torch.Generator().manual_seed(2)
    for shape in SHAPES:
        a, b = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        for second in (b, a, torch.zeros_like(b)):
            out = getattr(functions, name)(a, second, alpha=alpha, out=torch.empty_like(a))
            exact = torch.from_numpy(np.asarray(FORMULAS[name](a.double().numpy(), second.double().numpy(), alpha)))
            # Beyond [0, 1] the result may be larger than either input.
            size = torch.maximum(torch.maximum(a.abs(), second.abs()).double(), exact.abs()) if a.numel() else exact
            assert out.dtype == dtype
            assert torch.isfinite(out).all()
            assert ((out.double() - exact).abs() <= step_at(size, dtype)).all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 1.0, 2.0])
def test_copies_are_what_the_formula_gives(name, alpha):
    source = METHODS[name].copies(alpha)
    a, b = np.float64(3), np.float64(5)
    assert (FORMULAS[name](a, b, alpha) == (a, b)[source]) if source is not None else name == "weighted_sum"


@pytest.mark.parametrize("name", METHODS)
def test_files_and_state_dicts(pairs, tmp_path, name):
    from safetensors.torch import load_file

    a, b = pairs()
    blockmerge.merge(a, b, weights="IN04=0.25", method=name, output=tmp_path / "m.safetensors")
    merged, first, second = load_file(tmp_path / "m.safetensors"), load_file(a), load_file(b)
    again = blockmerge.merge_state_dicts(first, second, weights="IN04=0.25", method=name)
    for key, tensor in merged.items():
        assert torch.equal(tensor, again[key])
        if "input_blocks.4." in key:
            exact = torch.from_numpy(FORMULAS[name](first[key].double().numpy(), second[key].double().numpy(), 0.25))
            size = torch.maximum(first[key].abs(), second[key].abs())
            assert ((tensor.double() - exact).abs() <= step_at(size, tensor.dtype)).all()
        else:
            assert torch.equal(tensor, first[key])


def test_the_list(capsys):
    assert run(["methods"]) == 0
    out = capsys.readouterr().out
    for method in METHODS.values():
        assert method.name in out
        assert method.formula in out
    assert run(["methods", "sigmoid", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["name"], found["models"], found["weights"], found["locality"]) == ("sigmoid", 2, ["alpha"], "element")
    assert run(["methods", "sigmod"]) == 1
    assert "did you mean 'sigmoid'" in capsys.readouterr().err
