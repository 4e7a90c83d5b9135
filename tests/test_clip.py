"""Clipped merges: limited before they are rounded, and the same bits wherever a tensor lies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.methods import METHODS
from blockmerge.methods.elementwise import clip
from tests import oracle
from tests.every_pair import every_pair
from tests.small_models import in_diffusers, small_model

TORCH = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
ZEROS = torch.tensor([0.0, -0.0, 1.0, -1.0, 2.0, -2.0])


def limited(result, a, b):
    """The definition, in numpy: a 0 has the sign that the result had."""
    result, a, b = (tensor.double().numpy() for tensor in (result, a, b))
    found = np.minimum(np.maximum(result, np.minimum(a, b)), np.maximum(a, b))
    return torch.from_numpy(np.where(found == 0, np.copysign(0.0, result), found))


def same_bits(one, other):
    return torch.equal(oracle.bits(one), oracle.bits(other))


@given(st.data())
def test_values(data):
    values = st.lists(st.floats(-100, 100, width=16), min_size=6, max_size=6)
    a, b, result = (torch.tensor(data.draw(values)).half() for _ in range(3))
    wanted = limited(result, a, b).half()
    assert same_bits(clip(a, b, out=result), wanted)


@pytest.mark.parametrize("dtype", [*TORCH.values(), torch.float64])
@pytest.mark.parametrize("limits", [torch.float16, torch.float32])
def test_zeros_have_defined_signs_at_every_place_and_length(dtype, limits):
    """Three tensors with every triple of signs and zeros, cut at all places that a processor may care for."""
    grid = torch.cartesian_prod(ZEROS, ZEROS, ZEROS)
    result, a, b = (column.contiguous() for column in grid.unbind(1))
    result, a, b = result.to(dtype), a.to(limits), b.to(limits)
    wanted = limited(result, a, b).to(dtype)
    for start in range(66):
        for stop in (start + 1, start + 7, start + 33, start + 64, len(result)):
            part = slice(start, stop)
            found = clip(a[part], b[part], out=result[part].clone())
            assert same_bits(found, wanted[part]), (start, stop)


def test_nan_stays():
    number, nan = torch.ones(40), torch.full((40,), torch.nan)
    for a, b, result in ((nan, number, number), (number, nan, number), (number, number, nan)):
        assert clip(a, b, out=result.clone()).isnan().all()


def with_zeros(model, seed):
    """The same with many zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)

    def of(tensor):
        if not tensor.is_floating_point():
            return tensor
        signed = torch.copysign(torch.zeros_like(tensor), tensor)
        return torch.where(torch.rand(tensor.shape, generator=generator) < 0.7, signed, tensor)

    return {name: of(tensor) for name, tensor in model.items()}


@pytest.mark.parametrize("method", ["add_difference", "weighted_sum", "slerp", "dare", "ties"])
@pytest.mark.parametrize("adjust", ["", "1,-2,0.5,3,1,0.5,-0.5,2"])
def test_the_order_in_a_file_changes_no_bit(tmp_path, method, adjust):
    models = [with_zeros(small_model(seed=seed), seed) for seed in range(METHODS[method].models or 3)]
    given_ = {"method": method, "weights": 0.7, "clip": True, "adjust": adjust, "vae": "blend"}
    found = []
    for number in range(2):
        names = sorted(models[0], key=lambda name: name[:: -1 if number else 1])
        odd = {f"a{number}": torch.zeros(2 * number + 1).half()}  # what moves all that comes behind it
        files = [tmp_path / f"{number}-{place}.safetensors" for place in range(len(models))]
        for model, file in zip(models, files, strict=True):
            save_file({**odd, **{name: model[name] for name in names}}, file)
        blockmerge.merge(*files, output=tmp_path / f"{number}.safetensors", **given_)
        found.append(load_file(tmp_path / f"{number}.safetensors"))
    found.append(blockmerge.merge_state_dicts(*models, **given_))
    for name in models[0]:
        assert same_bits(found[0][name], found[1][name]), name
        assert same_bits(found[0][name], found[2][name]), name


@pytest.mark.parametrize(
    ("output", "dtype", "method"),
    every_pair(
        tuple(TORCH), ("float16", "float32", "bfloat16"), ("add_difference", "weighted_sum", "average")
    ),
)
def test_what_is_finite_once_it_is_clipped_is_written(tmp_path, output, dtype, method):
    """However far the method runs away, and whatever the output could hold of that."""
    models = [small_model(dtype=getattr(torch, dtype), seed=seed) for seed in range(3)]
    a, b, *_ = models = models[: METHODS[method].models or 3]
    given_ = {"method": method, "weights": 1e6, "clip": True, "vae": "blend"}
    blockmerge.merge(*models, output=tmp_path / "out.safetensors", dtype=output, **given_)
    out = load_file(tmp_path / "out.safetensors")
    free = blockmerge.merge_state_dicts(
        *({n: t.double() if t.is_floating_point() else t for n, t in model.items()} for model in models),
        **(given_ | {"clip": False}),
    )
    for name, tensor in out.items():
        if tensor.is_floating_point():
            is_far = free[name].abs() > 1000  # from A and B, one of which it becomes
            wanted = limited(free[name], a[name], b[name]).to(tensor.dtype).float()
            assert torch.equal(tensor.float()[is_far], wanted[is_far])
            assert is_far.float().mean() > 0.8 or is_far.numel() < 100


@pytest.mark.parametrize("adjust", ["", "1,-2,0.5,3,1,0.5,-0.5,2"])
@pytest.mark.parametrize("naming", ["ldm", "diffusers"])
def test_fp8_of_one_rounding(tmp_path, adjust, naming):
    """Weights of a few hundred, whose sum is beyond 448 and whose limits are not, inside and outside them."""
    models = [
        {n: t * 120 if t.is_floating_point() else t for n, t in small_model(seed=seed).items()}
        for seed in range(3)
    ]
    models = [{n: t.clamp(-440, 440) if t.is_floating_point() else t for n, t in m.items()} for m in models]
    if naming == "diffusers":
        models = [in_diffusers(model, "sd1") for model in models]
    given_ = {"method": "add_difference", "weights": 1.0, "clip": True, "dtype": "fp8_e4m3fn"}
    given_ |= {"adjust": adjust, "vae": "blend", "naming": "ldm"}
    blockmerge.merge(*models, output=tmp_path / "out.safetensors", **given_)
    out = load_file(tmp_path / "out.safetensors")
    assert all(tensor.float().isfinite().all() for tensor in out.values())
    if naming == "ldm" and not adjust:
        a, b, c = models
        for name, tensor in out.items():
            if tensor.is_floating_point():
                exact = limited(a[name].double() + b[name].double() - c[name].double(), a[name], b[name])
                assert torch.equal(tensor.float(), exact.to(torch.float8_e4m3fn).float()), name


def test_without_clip_what_is_too_large_is_refused(tmp_path):
    models = [
        {n: t * 120 if t.is_floating_point() else t for n, t in small_model(seed=seed).items()}
        for seed in range(3)
    ]
    with pytest.raises(blockmerge.NonFiniteError):
        blockmerge.merge(
            *models,
            method="add_difference",
            weights=1.0,
            dtype="fp8_e4m3fn",
            output=tmp_path / "out.safetensors",
        )
    # And where A and B are themselves too large, clipping is of no use.
    with pytest.raises(blockmerge.NonFiniteError):
        blockmerge.merge(
            *({n: t * 40 if t.is_floating_point() else t for n, t in model.items()} for model in models),
            method="add_difference", weights=1.0, dtype="fp8_e4m3fn", clip=True, output=tmp_path / "out.safetensors",
        )  # fmt: skip
    assert not list(tmp_path.iterdir())
