"""Attention similarity is the published one: held against the procedure written naively from its
definition.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import blockmerge
from blockmerge.demo import demo_layout
from tests.refusals import assert_refused

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
WIDTHS = {3: 1280, 4: 1280, 5: 1280, 6: 640, 7: 640, 8: 640, 9: 320, 10: 320}  # SD1.5's


def name_of(block, letter):
    return f"model.diffusion_model.output_blocks.{block}.1.transformer_blocks.0.attn1.to_{letter}.weight"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A function that gives the path of a model a, b or c whose self-attention is a `narrower`th of SD1.5's;
    the rest is thin.
    """
    folder = tmp_path_factory.mktemp("wide")
    rest = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in demo_layout("sd1").items()}

    def attention(narrower, seed):
        generator = torch.Generator().manual_seed(seed)
        widths = {
            name_of(block, letter): width // narrower for block, width in WIDTHS.items() for letter in "qkv"
        }
        return {
            name: torch.randn(width, width, generator=generator) * width**-0.5
            for name, width in widths.items()
        }

    @cache
    def path(model, dtype, narrower=4):
        share = 0.05 * "abc".index(model)
        tensors = attention(narrower, seed=0)
        if share:
            tensors = {
                name: tensors[name] + share * other
                for name, other in attention(narrower, "abc".index(model)).items()
            }
        file = folder / f"{model}-{dtype}-{narrower}.safetensors"
        save_file(rest | {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}, file)
        return file

    return path


def published(a_path, b_path):
    """The procedure as published: whole models, the global seed, nn.Linear, an einsum that is no attention
    product.
    """
    torch.manual_seed(114514)
    a, b = load_file(a_path), load_file(b_path)

    def attention(q, k, v):
        scores = torch.softmax(torch.einsum("ij,kj->ik", q, k), dim=-1)
        return torch.einsum("ik,jk->ik", scores, v)

    parts = {}
    with torch.no_grad():
        for block in range(3, 11):
            width = a[name_of(block, "q")].shape[0]
            x = torch.randn(width, width)
            layers = []
            for letter in "qkv":
                layers.append(nn.Linear(width, width, bias=False))
                layers[-1].weight.data = a[name_of(block, letter)].float()
            of_a = attention(*(layer(x) for layer in layers))
            of_b = attention(
                *(nn.functional.linear(x, b[name_of(block, letter)].float()) for letter in "qkv")
            )
            parts[f"OUT{block:02}"] = 100 * torch.cosine_similarity(of_a, of_b).mean().item()
    return sum(parts.values()) / 8, parts


@pytest.mark.parametrize(("dtype", "narrower"), [("fp16", 2), ("bf16", 4), ("fp32", 4)])
def test_it_is_the_published_number(wide, dtype, narrower):
    a, b = (wide(model, dtype, narrower) for model in "ab")
    expected, parts = published(a, b)
    assert expected < 99  # else it would prove little
    state = torch.random.get_rng_state()
    report = blockmerge.similarity(a, [b])
    assert torch.equal(torch.random.get_rng_state(), state)  # the global stream is nobody's to touch
    (found,) = report.references
    assert found.similarity == pytest.approx(expected, abs=0.01)
    assert found.parts.keys() == parts.keys()
    for part, value in parts.items():
        assert found.parts[part] == pytest.approx(value, abs=0.001)
    assert (report.seed, report.base) == (114514, a.name)


def test_the_order_of_references_changes_nothing(wide):
    a, b, c = (wide(model, "bf16") for model in "abc")
    one, two = blockmerge.similarity(a, [b, c]), blockmerge.similarity(a, [c, b, a])
    assert one.references == two.references[1:]
    assert [found.name for found in one.references] == [b.name, c.name]  # the best first
    assert f"{two.references[0].similarity:.2f}" == "100.00"


def test_a_model_in_another_dtype_is_the_same_model(wide):
    (found,) = blockmerge.similarity(wide("a", "fp32"), wide("a", "fp16")).references
    assert found.similarity == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_family(pairs, family):
    a, b = pairs(family)
    report = blockmerge.similarity(a, [b, a])
    assert [found.name for found in report.references] == [a.name, b.name]
    assert report.references[0].similarity == pytest.approx(100, abs=1e-4)
    assert 80 < report.references[1].similarity < 100
    blocks = range(6) if family == "sdxl" else range(3, 11)
    assert list(report.references[1].parts) == [f"OUT{block:02}" for block in blocks]
    where, *more = report.notes
    ends = "OUT00 to OUT05" if family == "sdxl" else "OUT03 to OUT10"
    assert where == (
        f"only the self-attention of {ends} is compared: method='weights' (--method weights) compares all weights"
    )
    assert bool(more) == (family == "sdxl")  # which says that it is an extension
    assert blockmerge.similarity_matrix([a, b]).notes == report.notes
    assert not blockmerge.similarity(a, [b], "weights").notes


def test_only_the_attention_is_read(pairs, tmp_path):
    """Whatever else is broken in a model does not matter here: it is never looked at."""
    a, b = pairs()
    tensors = load_file(b)
    tensors["model.diffusion_model.out.2.weight"].fill_(torch.nan)
    save_file(tensors, tmp_path / "b.safetensors")
    assert (
        blockmerge.similarity(a, [tmp_path / "b.safetensors"]).references[0].parts
        == blockmerge.similarity(a, [b]).references[0].parts
    )


def test_the_matrix_is_the_same_numbers(pairs):
    a, b = pairs()
    c = pairs(seed=1)[0].parent / "b.safetensors"
    matrix = blockmerge.similarity_matrix([a, b, c])
    assert matrix.names == ("a.safetensors", "b.safetensors", "b.safetensors (2)")
    for i, base in enumerate((a, b, c)):
        for j, other in enumerate((a, b, c)):
            expected = blockmerge.similarity(base, [other]).references[0].similarity
            assert matrix.similarity[i][j] == pytest.approx(expected, abs=1e-4)
            assert matrix.similarity[i][j] == matrix.similarity[j][i]


def test_models_beyond_a_tile(pairs, monkeypatch):
    from blockmerge.comparing import attention

    a, b = pairs()
    models = [a, b, *(pairs(seed=seed)[1] for seed in (1, 2, 3))]
    whole = blockmerge.similarity_matrix(models)
    monkeypatch.setattr(attention, "_AT_ONCE", 2)
    assert blockmerge.similarity_matrix(models) == whole


def test_a_broken_reference_is_a_row(pairs, tmp_path, capsys):
    a, b = pairs()
    tensors = load_file(b)
    nan = {**tensors, name_of(6, "k"): torch.full_like(tensors[name_of(6, "k")], torch.inf)}
    save_file(nan, tmp_path / "nan.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "output_blocks.5.1" not in n}, tmp_path / "lacks.safetensors"
    )
    (tmp_path / "empty.safetensors").touch()
    report = blockmerge.similarity(
        a, [tmp_path, b, pairs("sdxl")[0], tmp_path / "nope.safetensors", tmp_path / "*.ckpt"]
    )
    errors = {found.name: found.error for found in report.references}
    assert errors.pop("b.safetensors") is None
    assert report.references[0].error is None  # the good one comes first
    assert "NaN or infinity in model.diffusion_model.output_blocks.6.1" in errors["nan.safetensors"]
    assert "lacks" in errors["lacks.safetensors"]
    assert "is empty" in errors["empty.safetensors"]
    assert "is Stable Diffusion XL" in errors["a.safetensors"]
    assert "no such file" in errors["nope.safetensors"]
    assert "no file matches" in errors["*.ckpt"]
    assert len(report.failed) == 6
    assert not any(str(tmp_path) in str(found) for found in report.references)  # reports show no folders
    assert_refused(
        capsys,
        tmp_path,
        "similarity",
        tmp_path / "nan.safetensors",
        b,
        says=["nan.safetensors holds NaN or infinity"],
    )
