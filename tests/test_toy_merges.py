"""What is added from outside works like what is built in: a family with rows that change places, and a kind
of expression.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.checkpoints import Model, open_checkpoint
from blockmerge.demo import write_pair
from blockmerge.expressions import Expression
from blockmerge.merging.execute import Pace, execute
from blockmerge.merging.outputs import WeightFile, choose_output
from blockmerge.merging.planning.plan import make_plan, planned_file
from blockmerge.merging.planning.request import make_request
from blockmerge.methods import METHODS
from blockmerge.weights import WeightsRequest
from tests import toy_family
from tests.forms import assert_same, read

PREFIX = "model.diffusion_model."


@pytest.fixture
def toy(tmp_path):
    with toy_family.registered(tmp_path) as family:
        yield family


@pytest.fixture
def models(toy):
    return [model for seed in (0, 1) for model in toy_family.make_pair(seed)][:3]


def in_diffusers(model):
    """The same under the family's other names, by hand."""
    found = {}
    for name, tensor in model.items():
        own = name.removeprefix(PREFIX)
        if own.startswith("embed."):
            found[f"unet/pos_embed.proj.{own.removeprefix('embed.')}"] = tensor
        elif own.startswith("layers."):
            _, number, part, last = own.split(".")
            if part == "qkv":
                for which, rows in zip("qkv", torch.split(tensor, [24, 8, 8]), strict=True):
                    found[f"unet/blocks.{number}.attn.to_{which}.{last}"] = rows
            else:
                found[f"unet/blocks.{number}.{'norm1' if part == 'norm' else 'attn.to_out'}.{last}"] = tensor
        elif own.startswith("final.modulation."):
            shift, scale = tensor.chunk(2)
            found[f"unet/norm_out.linear.{own.rpartition('.')[2]}"] = torch.cat([scale, shift])
        elif own == "final.out.weight":
            found["unet/proj_out.weight"] = tensor
        else:
            found[f"text_encoder/{name.removeprefix('toy_text.')}"] = tensor
    return {name: tensor.contiguous() for name, tensor in found.items()}


def files(models, folder):
    paths = [folder / f"{letter}.safetensors" for letter in "abc"]
    for model, path in zip(models, paths, strict=False):
        save_file(model, path, {"format": "pt"})
    return paths


def folders(models, folder):
    """The same as diffusers folders, written by hand."""
    for letter, model in zip("abc", models, strict=False):
        for component in ("unet", "text_encoder"):
            home = folder / f"{letter}-folder" / component
            home.mkdir(parents=True)
            named = {
                name.partition("/")[2]: one
                for name, one in in_diffusers(model).items()
                if name.startswith(component)
            }
            save_file(
                named,
                home
                / (
                    "model.safetensors"
                    if component == "text_encoder"
                    else "diffusion_pytorch_model.safetensors"
                ),
            )
        (folder / f"{letter}-folder" / "model_index.json").write_text("{}")
    return [folder / f"{letter}-folder" for letter in "abc"]


def test_it_is_converted_there_and_back(models, tmp_path):
    a, *_ = files(models, tmp_path)
    blockmerge.convert(a, tmp_path / "there", naming="diffusers")
    assert_same(read(tmp_path / "there"), in_diffusers(models[0]))
    result = blockmerge.convert(tmp_path / "there", tmp_path / "back.safetensors")
    assert result.family == toy_family.NAME
    assert_same(load_file(tmp_path / "back.safetensors"), models[0])


@pytest.mark.parametrize("name", METHODS)
def test_all_methods_merge_it_alike_in_both_namings(name, models, tmp_path):
    method = METHODS[name]
    count = method.models or 3
    options = {"method": name, "weights": "BASE=0.5,L00=0.25,L01=0.75"}
    if "beta" in method.weights:
        options["weights_beta"] = 0.25
    single, folder = files(models, tmp_path)[:count], folders(models, tmp_path)[:count]
    out = tmp_path / "out.safetensors"
    blockmerge.merge(*single, output=out, **options)
    merged = load_file(out)
    mixed = [one if n % 2 else other for n, (one, other) in enumerate(zip(single, folder, strict=True))]
    blockmerge.merge(*mixed, output=tmp_path / "mixed.safetensors", naming="ldm", **options)
    assert_same(load_file(tmp_path / "mixed.safetensors"), merged)
    blockmerge.merge(*folder, output=tmp_path / "out", **options)
    assert_same(read(tmp_path / "out"), in_diffusers(merged))
    assert_same(blockmerge.merge_state_dicts(*models[:count], **options), merged)
    if name == "weighted_sum":
        for tensor, result in merged.items():
            weight = {"layers.0": 0.25, "embed.": 0.25, "layers.1": 0.75, "final.": 0.75}
            share = next((w for part, w in weight.items() if f"{PREFIX}{part}" in tensor), 0.5)
            exact = (1 - share) * models[0][tensor].double() + share * models[1][tensor].double()
            assert torch.allclose(result.double(), exact, rtol=1e-6, atol=1e-7), tensor


def module_of(tensors):
    """A torch module whose parameters have these names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        home = root
        for part in path:
            if part not in home._modules:
                home.add_module(part, torch.nn.Module())
            home = home._modules[part]
        home.register_parameter(last, torch.nn.Parameter(tensor.clone()))
    return root


@pytest.mark.parametrize("name", ["weighted_sum", "slerp", "dare", "tensor_sum", "cosine_a", "extract"])
@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_it_is_merged_live(name, naming, models):
    method = METHODS[name]
    unets = [{n: t for n, t in model.items() if n.startswith(PREFIX)} for model in models]
    own = [{n.removeprefix("unet/"): t for n, t in in_diffusers(model).items()} for model in unets]
    module = module_of(own[0] if naming == "diffusers" else unets[0])
    options = {"weights": "L00=0.25,L01=1", **({"weights_beta": 0.5} if "beta" in method.weights else {})}
    expected = blockmerge.merge_state_dicts(*unets[: method.models], method=name, **options)
    expected = (
        {n.removeprefix("unet/"): t for n, t in in_diffusers(expected).items()}
        if naming == "diffusers"
        else expected
    )
    with blockmerge.LiveMerge(module, *unets[: method.models], method=name) as live:
        live.apply(**options)
        assert_same({n: p.detach() for n, p in module.named_parameters()}, expected)


def test_explain_and_similarity_know_its_blocks(models, tmp_path):
    a, b, _ = files(models, tmp_path)
    blockmerge.merge(a, b, output=tmp_path / "m.safetensors", weights="BASE=0.5,L00=0.25,L01=0.75")
    origin = blockmerge.explain(tmp_path / "m.safetensors", [a, b])
    found = {block: one.weights["b.safetensors"] for block, one in origin.blocks.items()}
    assert found == pytest.approx({"BASE": 0.5, "L00": 0.25, "L01": 0.75}, abs=1e-3)
    report = blockmerge.similarity(a, [b], method="weights")
    assert set(report.references[0].blocks) == {"BASE", "L00", "L01"}


# -- a kind of expression of one's own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Mirrored(Expression):
    """A tensor with its first axis reversed."""

    tensor: Expression

    locality = "tensor"

    @property
    def inputs(self):
        return (self.tensor,)

    def with_inputs(self, inputs):
        return Mirrored(*inputs)

    @property
    def dtype(self):
        return self.tensor.dtype

    @property
    def shape(self):
        return self.tensor.shape

    def compute(self, inputs, out, first):
        out.copy_(inputs[0].flip(0))


@dataclass(frozen=True)
class Negated(Mirrored):
    """A tensor with all signs changed."""

    locality = "element"

    def with_inputs(self, inputs):
        return Negated(*inputs)

    def compute(self, inputs, out, first):
        torch.neg(inputs[0], out=out)


def plan_of(*models, output):
    opened = [Model.of(open_checkpoint(path)) for path in models]
    recipe = make_request("weighted_sum", {}, WeightsRequest(weights=0.5), WeightsRequest(beta=True))
    return make_plan(opened, recipe, choose_output(output, opened[0]))


@pytest.mark.parametrize("kind", [Mirrored, Negated])
@pytest.mark.parametrize("piece", [4096, 1 << 20])
def test_a_kind_of_ones_own_is_planned_and_computed(kind, piece, tmp_path):
    """Every tensor of a real plan is wrapped in it; plan, workers and evaluator have never heard of it."""
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_pair(a, b)
    plan = plan_of(a, b, output=tmp_path / "out.safetensors")
    tensors = [
        dataclasses.replace(one, expression=kind(one.expression)) if one.dtype == "F16" and one.shape else one
        for one in plan.decided.tensors
    ]
    plan = dataclasses.replace(
        plan,
        decided=dataclasses.replace(plan.decided, tensors=tuple(tensors)),
        files=(planned_file(WeightFile("", {one.name: one for one in tensors}), {"format": "pt"}),),
    )
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"")
    execute(plan, lambda _: target, Pace(2, piece, 4096), shown_as=target)
    with target.open("r+b") as file:
        file.truncate(plan.files[0].size)
    plain = tmp_path / "plain.safetensors"
    blockmerge.merge(a, b, output=plain, weights=0.5)
    made = {Mirrored: lambda one: one.flip(0), Negated: torch.neg}[kind]
    wanted = {
        name: made(one) if one.dtype == torch.float16 and one.dim() else one
        for name, one in load_file(plain).items()
    }
    assert_same(load_file(target), wanted)
