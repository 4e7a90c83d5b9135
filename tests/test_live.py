"""A live merge: the bits of the file merge, in the module that is in use; nothing else touched, and
everything given back.

Over 500 lines: all of it is about one class, on the same few modules.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import LiveMerge
from blockmerge.demo import make_state_dicts
from blockmerge.errors import RecipeError
from blockmerge.methods import METHODS
from blockmerge.weights import WeightsRequest
from tests import method_oracle, oracle
from tests.conftest import FAMILIES
from tests.effort import in_turn
from tests.thin_unet import config

pytestmark = pytest.mark.usefixtures("one_thread")

PREFIX = "model.diffusion_model."
DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
OUT05 = "output_blocks.5.1.proj_in.weight"
CONV_IN = "input_blocks.0.0.weight"


def diffusers_unet(family, state_dict):
    """A UNet2DConditionModel with the weights of a model in LDM names, in their dtype."""
    unet = UNet2DConditionModel.from_config(config(family))
    converted = convert_ldm_unet_checkpoint(dict(state_dict), config=dict(unet.config))
    unet.load_state_dict(converted)
    return unet.to(next(iter(converted.values())).dtype)


def output_of(family, unet):
    dtype = next(unet.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    width = config(family)["cross_attention_dim"]
    latent, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 7, width, generator=generator)
    added = {}
    if family == "sdxl":
        added = {
            "text_embeds": torch.randn(1, 40, generator=generator).to(dtype),
            "time_ids": torch.ones(1, 6, dtype=dtype),
        }
    with torch.no_grad():
        return unet(latent.to(dtype), torch.tensor([10]), text.to(dtype), added_cond_kwargs=added).sample


def unet_of(state_dict):
    return {
        name.removeprefix(PREFIX): tensor for name, tensor in state_dict.items() if name.startswith(PREFIX)
    }


def module_of(tensors):
    """A module whose parameters have these names."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at._modules[part]
        at.register_parameter(
            last, torch.nn.Parameter(tensor.detach().clone(memory_format=torch.preserve_format))
        )
    return root


def values(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(oracle.bits(tensor.cpu()), oracle.bits(wanted[name].cpu())), name


@pytest.fixture(scope="module")
def dicts():
    """The U-Nets of two thin SD1 models, in float16 and LDM names without prefix."""
    return [
        {name: tensor.half() for name, tensor in unet_of(model).items()} for model in make_state_dicts("sd1")
    ]


# -- the values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, "F16") for family in FAMILIES), ("sd1", "BF16"), ("sd1", "F32")]
)
def test_the_unet_is_that_of_the_merged_file_bit_for_bit(pairs, tmp_path, family, dtype):
    a, b = pairs(family, (dtype, dtype))
    blockmerge.merge(a, b, preset="high_res", output=tmp_path / "out.safetensors")
    from_file = diffusers_unet(family, load_file(tmp_path / "out.safetensors"))
    unet = diffusers_unet(family, load_file(b))
    with LiveMerge(unet, a, b) as live:
        live.apply(preset="high_res")
        assert {parameter.dtype for parameter in unet.parameters()} == {DTYPES[dtype]}
        assert_same_bits(values(unet), values(from_file))
        assert torch.equal(output_of(family, unet), output_of(family, from_file))


def test_three_models_and_the_recipe_that_was_found_make_the_same_file(pairs, tmp_path):
    a, b = pairs()
    c, _ = pairs(seed=1)
    unet = diffusers_unet("sd1", load_file(a))
    live = LiveMerge(unet, a, b, c, method="add_difference")
    live.apply(weights=0.3)
    live.apply(weights={"IN04": 0.75, "BASE": 1}, changes="OUT03-OUT05=-0.5", keep=True)
    blockmerge.merge(
        a, b, c, weights=live.weights, method="add_difference", output=tmp_path / "out.safetensors"
    )
    assert_same_bits(values(unet), values(diffusers_unet("sd1", load_file(tmp_path / "out.safetensors"))))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_values_equal_the_oracle(pairs, device, dtype):
    a, b = (load_file(path) for path in pairs("sd1", (dtype, dtype)))
    module = module_of({name: tensor for name, tensor in a.items() if name.startswith(PREFIX)}).to(device)
    live = LiveMerge(module, a, b)
    live.apply(preset="high_res")
    found = values(module)
    assert {tensor.device.type for tensor in found.values()} == {device}
    weights = dict(zip(oracle.SD, oracle.numbers(oracle.HIGH_RES), strict=True))
    first, second = ({name: model[name] for name in found} for model in (a, b))
    oracle.assert_merged(
        {name: tensor.cpu() for name, tensor in found.items()}, first, second, weights, "sd1"
    )


def test_module_and_models_may_be_of_either_naming(dicts, tmp_path):
    in_diffusers = [
        convert_ldm_unet_checkpoint({PREFIX + n: t for n, t in d.items()}, config=config("sd1"))
        for d in dicts
    ]
    whole = [{PREFIX + name: tensor for name, tensor in model.items()} for model in dicts]
    torch.save({"state_dict": whole[0]}, tmp_path / "a.ckpt")
    save_file(in_diffusers[1], tmp_path / "b.safetensors")
    merged = blockmerge.merge_state_dicts(*dicts, preset="low_res")
    expected = {
        "bare": (dicts[1], merged),
        "whole": (whole[1], {PREFIX + name: tensor for name, tensor in merged.items()}),
        "diffusers": (in_diffusers[1], blockmerge.merge_state_dicts(*in_diffusers, preset="low_res")),
    }
    for own, wanted in expected.values():
        for a, b in [(tmp_path / "a.ckpt", in_diffusers[1]), (in_diffusers[0], tmp_path / "b.safetensors")]:
            module = module_of(own)
            LiveMerge(module, a, b).apply(preset="low_res")
            assert_same_bits(values(module), wanted)


def test_other_dtypes_are_rounded_to_the_modules_first(pairs):
    a, b = (unet_of(load_file(path)) for path in pairs("sd1", ("F32", "BF16")))
    halves = [{name: tensor.half() for name, tensor in model.items()} for model in (a, b)]
    module = module_of(halves[1])
    LiveMerge(module, *pairs("sd1", ("F32", "BF16"))).apply(weights=0.3)
    assert_same_bits(values(module), blockmerge.merge_state_dicts(*halves, weights=0.3))


NUMBERS = {
    "extract": {"gamma": 2.0},
    "average": {"ratios": (2, 1, 1)},
    "ties": {"density": 0.4},
    "dare": {"drop_rate": 0.3, "seed": 5},
}


@pytest.fixture(scope="module")
def three():
    """Three thin U-Nets in float32, not at all alike."""
    return [unet_of(make_state_dicts("sd1", seed=seed)[0]) for seed in range(3)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_its_definition(three, name, device):
    method, number = METHODS[name], NUMBERS.get(name, {})
    models = three[: method.models or 3]
    module = module_of(models[0]).to(device)
    live = LiveMerge(module, *models, method=name, **number)
    weights = {"alpha": 0.4, "beta": 0.3} if "beta" in method.weights else {"alpha": 0.4}
    live.apply(weights=0.4, **({"weights_beta": "IN00-M00=0.3,OUT00-OUT11=0.3"} if "beta" in weights else {}))
    function = getattr(method_oracle, name, None)
    if method.locality == "model":
        pairs = [(a.double().numpy(), models[1][key].double().numpy()) for key, a in models[0].items()]
        normalised = name == "cosine_a"
        limits = method_oracle.cosine_limits(pairs, normalised)

        def function(a, b, alpha):
            return method_oracle.cosine_merge(a, b, shift=alpha, limits=limits, normalised=normalised)

    found = values(module)
    chosen = [key for key in found if blockmerge.block_of(key) in ("IN00", "IN02", "OUT05")]
    assert len(chosen) > 40
    for key in chosen:
        arrays = [model[key].double().numpy() for model in models]
        given_numbers = {key: value for key, value in number.items() if key != "seed"}
        if method.random:
            from blockmerge.methods import key_of

            given_numbers["key"] = key_of(number.get("seed", 0), PREFIX + key)
        wanted = function(*arrays, **weights, **given_numbers)
        scale = max(np.abs(array).max() for array in (*arrays, wanted))
        assert np.abs(found[key].cpu().double().numpy() - wanted).max() <= 1e-6 * scale, key


def test_chance_depends_on_seed_and_ldm_name_alone(dicts):
    in_diffusers = convert_ldm_unet_checkpoint(
        {PREFIX + n: t for n, t in dicts[0].items()}, config=config("sd1")
    )

    def noisy(own, seed, *steps):
        module = module_of(own)
        live = LiveMerge(module, dicts[0], method="add_noise", seed=seed)
        for weight in steps:
            live.apply(weights=weight)
        return values(module)

    first, renamed = noisy(dicts[0], 1, 0.1), noisy(in_diffusers, 1, {"OUT05": 0.2}, 0.1)
    by_ldm = convert_ldm_unet_checkpoint(
        {PREFIX + name: tensor for name, tensor in first.items()}, config=config("sd1")
    )
    assert_same_bits(renamed, by_ldm)
    assert not torch.equal(first[OUT05], noisy(dicts[0], 2, {"OUT05": 0.1})[OUT05])


def test_a_users_own_method_and_one_that_fails(dicts):
    fail = []

    @blockmerge.merge_method()
    def halfway(a, b, *, alpha):
        if fail and alpha == 0.5:
            raise ValueError("no more")
        return a + alpha * (b - a)

    module = module_of(dicts[0])
    live = LiveMerge(module, *dicts, method=halfway)
    live.apply(weights={"OUT05": 0.25})
    a, b = (model[OUT05].float() for model in dicts)
    assert torch.equal(values(module)[OUT05], (a + 0.25 * (b - a)).half())
    before = live.weights
    fail.append(True)
    with pytest.raises(blockmerge.RecipeError, match="halfway failed: ValueError: no more"):
        live.apply(weights=0.5)
    assert live.weights == before
    values(module)[CONV_IN].fill_(7)  # what it left is nothing to rely on
    live.apply(weights=before)
    assert torch.equal(values(module)[CONV_IN], dicts[0][CONV_IN])
    assert torch.equal(values(module)[OUT05], (a + 0.25 * (b - a)).half())


# -- step by step --------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.booleans(),
        st.dictionaries(
            st.sampled_from(oracle.SD),
            st.sampled_from([0, 0.3, 0.3, 1, 1.5, "skip"]),
            min_size=1,
            max_size=20,
        ),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=12)
@given(steps=steps, as_text=st.booleans())
def test_the_way_to_some_weights_does_not_matter(dicts, steps, as_text):
    module = module_of(dicts[1])
    live = LiveMerge(module, *dicts)
    assert_same_bits(values(module), dicts[0])
    held = dict.fromkeys(oracle.SD, 0.0)
    for keep, weights in steps:
        held = {**(held if keep else dict.fromkeys(oracle.SD, 0.0)), **weights}
        given_weights = (
            ",".join(f"{block}={weight}" for block, weight in weights.items()) if as_text else weights
        )
        live.apply(weights=given_weights, keep=keep)
        assert live.weights == {block: None if weight == "skip" else weight for block, weight in held.items()}
    assert_same_bits(values(module), blockmerge.merge_state_dicts(*dicts, weights=held))


def test_only_blocks_whose_weight_changes_are_computed(dicts):
    module = module_of(dicts[0])
    live = LiveMerge(module, *dicts)
    live.apply(weights=0.5)
    mark = {"OUT05": OUT05, "OUT06": "output_blocks.6.1.proj_in.weight", "IN00": CONV_IN}
    for name in mark.values():
        values(module)[name].fill_(7)
    live.apply(weights={"OUT05": 0.7}, keep=True)
    live.apply(weights="BASE=1,OUT06=0.5,IN00=0.5", keep=True)
    assert (values(module)[OUT05] != 7).all()
    live.apply(weights=0.5, changes="OUT05=0.7")
    assert (values(module)[mark["OUT06"]] == 7).all()
    assert (values(module)[CONV_IN] == 7).all()


def test_weights_are_kept_for_beta_too(three):
    module = module_of(three[0])
    live = LiveMerge(module, *three, method="triple_sum")
    live.apply(weights=0.25, weights_beta=0.5)
    live.apply(weights_beta={"OUT05": 0.75}, keep=True)
    assert live.weights["OUT05"] == 0.25
    assert live.weights_beta["OUT05"] == 0.75
    assert live.weights_beta["OUT04"] == 0.5
    exact = 0.25 * three[1][OUT05].double() + 0.75 * three[2][OUT05].double()
    assert (values(module)[OUT05].double() - exact).abs().max() < 1e-6


def test_a_default_weight_need_not_be_given(three):
    module = module_of(three[0])
    live = LiveMerge(module, *three[:2], method="average")
    assert_same_bits(values(module), three[0])
    assert live.apply()["OUT05"] == 1.0
    exact = (three[0][OUT05].double() + three[1][OUT05].double()) / 2
    assert (values(module)[OUT05].double() - exact).abs().max() < 1e-6


# -- the module ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_the_module_gets_its_own_memory_back(dicts, device):
    module = module_of(dicts[1]).to(device)
    module.register_buffer("input_blocks_buffer", torch.ones(3))
    module.get_parameter(CONV_IN).requires_grad_(False)
    before = {
        name: (parameter, parameter.data_ptr(), parameter.detach().clone())
        for name, parameter in module.named_parameters()
    }
    with LiveMerge(module, *dicts) as live:
        live.apply(weights=0.5)
        assert not module.get_parameter(CONV_IN).requires_grad
        assert module.get_parameter(OUT05).requires_grad
        assert module.get_parameter(OUT05).grad_fn is None
        assert not torch.equal(module.get_parameter(OUT05), before[OUT05][2])
    assert dict(module.named_parameters()).keys() == before.keys()
    for name, parameter in module.named_parameters():
        own, address, value = before[name]
        assert parameter is own
        assert parameter.data_ptr() == address
        assert torch.equal(oracle.bits(parameter.detach().cpu()), oracle.bits(value.cpu()))
    assert torch.equal(module.input_blocks_buffer, torch.ones(3))
    live.close()
    with pytest.raises(
        blockmerge.RecipeError, match="this LiveMerge is closed, and the module has its own weights again"
    ):
        live.apply(weights=0.5)
    with pytest.raises(blockmerge.RecipeError, match="this LiveMerge is closed"), live:
        pass
    assert repr(live) == f"<LiveMerge: weighted_sum in a {type(module).__name__}, closed>"


def test_its_repr_is_one_line_of_what_it_is(dicts):
    module = module_of(dicts[0])
    dtype = module.get_parameter(OUT05).dtype
    with LiveMerge(module, *dicts, dicts[0], method="add_difference") as live:
        assert (
            repr(live)
            == f"<LiveMerge: add_difference of 3 models in a {type(module).__name__}, {dtype} on cpu>"
        )


def test_parameters_lie_block_after_block_and_aligned(dicts):
    module = module_of(dicts[0])
    LiveMerge(module, *dicts)
    found = values(module)
    first = min(tensor.data_ptr() for tensor in found.values())
    assert all((tensor.data_ptr() - first) % 256 == 0 for tensor in found.values())
    order = [blockmerge.block_of(name) for name in sorted(found, key=lambda name: found[name].data_ptr())]
    assert list(dict.fromkeys(order)) == oracle.SD[1:]
    assert order == sorted(order, key=oracle.SD.index)


@pytest.mark.parametrize("method", ["weighted_sum", "add_noise", "slerp"])
def test_gradients_and_inference_mode(dicts, method):
    module = module_of(dicts[0])
    with ThreadPoolExecutor(1) as fresh:  # a thread that has computed nothing before

        @fresh.submit
        def applied():
            with torch.inference_mode():
                live = LiveMerge(module, *dicts[: METHODS[method].models], method=method)
                live.apply(weights=0.5)
            live.apply(weights=0.25)

        applied.result()
    parameter = module.get_parameter(OUT05)
    (parameter.float() ** 2).sum().backward()
    assert torch.equal(parameter.grad, (2 * parameter.detach().float()).half())


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(METHODS))
def test_on_a_gpu_nothing_waits(three, name):
    live = LiveMerge(module_of(three[0]).cuda(), *three[: METHODS[name].models or 3], method=name)
    live.apply(weights=0.5)  # some look at the whole model first
    try:
        with warnings.catch_warnings():  # that not every wait is found
            warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype feature")
            torch.cuda.set_sync_debug_mode("error")
        live.apply(weights=0.25)
        live.apply(weights={"OUT05": 0.75, "IN00": 0}, keep=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_at_a_time(dicts):
    module = module_of(dicts[0])
    with LiveMerge(module, *dicts):
        with pytest.raises(
            RecipeError, match=r"another LiveMerge is open on this module: close\(\) it first"
        ):
            LiveMerge(module, *dicts)
        LiveMerge(module_of(dicts[0]), *dicts).apply(weights=0.5)
    LiveMerge(module, *dicts).apply(weights=0.5)
    LiveMerge(module, *dicts).apply(weights=0.5)  # nobody holds the last one any more


def test_random_weights_are_those_of_the_seed(dicts):
    live = LiveMerge(module_of(dicts[0]), *dicts)
    drawn = live.apply(weights="random", seed=7)
    assert (
        drawn
        == WeightsRequest(weights="random", seed=7).resolve("sd1")
        != live.apply(weights="random", seed=8)
    )


@pytest.mark.parametrize("method", ["weighted_sum", "slerp", "add_noise"])
def test_channels_last_stays(dicts, method):
    models = dicts[: METHODS[method].models]
    plain, last = module_of(dicts[0]), module_of(dicts[0])
    for parameter in last.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    strides = {name: parameter.stride() for name, parameter in last.named_parameters()}
    for module in (plain, last):
        LiveMerge(module, *models, method=method).apply(preset="high_res")
    assert {name: parameter.stride() for name, parameter in last.named_parameters()} == strides
    assert values(last)["input_blocks.1.0.in_layers.2.weight"].is_contiguous(
        memory_format=torch.channels_last
    )
    assert_same_bits(values(last), values(plain))


def test_a_module_that_is_moved_meanwhile(dicts):
    module = module_of(dicts[0])
    originals = values(module)
    live = LiveMerge(module, *dicts)
    module.float()
    for _ in range(2):
        with pytest.raises(
            blockmerge.RecipeError,
            match=r"parameters have been moved or replaced \(input_blocks\.0\.0\.weight, ",
        ):
            live.apply(weights=0.5)
    assert set(live.weights.values()) == {0.0}
    live.close()
    assert all(values(module)[name].data_ptr() == tensor.data_ptr() for name, tensor in originals.items())


# -- the first convolution of inpainting ---------------------------------------------------------------------


def widened(model, channels):
    weight = model[CONV_IN]
    extra = (
        torch.linspace(-1, 1, weight[:, :1].numel() * (channels - 4))
        .reshape(len(weight), -1, 3, 3)
        .to(weight.dtype)
    )
    return {**model, CONV_IN: torch.cat([weight, extra], 1)}


@pytest.mark.parametrize(("method", "wide"), in_turn(["weighted_sum", "triple_sum", "dare", "slerp"], [1, 0]))
def test_channels_that_only_one_model_has_are_kept(dicts, method, wide):
    models = [
        widened(model, 9) if number == wide else model for number, model in enumerate((*dicts, dicts[0]))
    ]
    models = models[: METHODS[method].models]
    module = module_of(widened(dicts[0], 9))
    narrow = module_of(dicts[0])
    live, reference = LiveMerge(module, *models, method=method), LiveMerge(narrow, *models, method=method)
    for weight in (0.5, 1.0, 0.0, 0.25):
        live.apply(weights=weight)
        reference.apply(weights=weight)
        found = values(module)
        assert torch.equal(found[CONV_IN][:, 4:], models[wide][CONV_IN][:, 4:])
        assert torch.equal(found[CONV_IN][:, :4], values(narrow)[CONV_IN])
        assert_same_bits(
            {n: t for n, t in found.items() if n != CONV_IN},
            {n: t for n, t in values(narrow).items() if n != CONV_IN},
        )
    if method == "weighted_sum":
        assert_same_bits(values(module), blockmerge.merge_state_dicts(*models, weights=0.25))


def test_the_module_decides_how_many_channels_there_are(dicts):
    wide = [widened(model, 9) for model in dicts]
    module = module_of(wide[0])
    LiveMerge(module, *wide).apply(weights=0.5)
    assert_same_bits(values(module), blockmerge.merge_state_dicts(*wide, weights=0.5))
    with pytest.raises(
        blockmerge.IncompatibleModelsError, match=r"takes 9 channels, and no model has so many"
    ):
        LiveMerge(module, *dicts)
    with pytest.raises(
        blockmerge.IncompatibleModelsError,
        match=r"in state dict B, input_blocks\.0\.0\.weight has shape \[8, 8, 3, 3\]",
    ):
        LiveMerge(module, wide[0], widened(dicts[1], 8))


# -- refusals ------------------------------------------------------------------------------------------------


def with_parameter(module, name, parameter):
    *path, last = name.split(".")
    module.get_submodule(".".join(path))._parameters[last] = parameter


def test_what_is_refused_and_how(dicts, tmp_path):
    a, b = dicts
    lacking = {name: tensor for name, tensor in b.items() if name != OUT05}
    halved = {**b, OUT05: b[OUT05][:4]}
    whole_numbers = {**b, OUT05: b[OUT05].to(torch.int8)}
    sdxl = unet_of(make_state_dicts("sdxl")[0])
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    refusals = [
        ((a,), {}, "RecipeError", "weighted_sum merges 2 models; 1 given"),
        ((a, b, b), {}, "RecipeError", "weighted_sum merges 2 models; 3 given"),
        ((a, None, b), {"method": "add_difference"}, "CheckpointError", "a NoneType is not a model"),
        (
            (a, b, b, "D.CKPT"),
            {},
            "RecipeError",
            "LiveMerge takes three models at most: D.CKPT stands where the method goes",
        ),
        (
            (a, b, b, tmp_path / "d.safetensors"),
            {},
            "RecipeError",
            "d.safetensors stands where the method goes",
        ),
        (
            (a, b, b, b),
            {},
            "RecipeError",
            "decorated with @blockmerge.merge_method() or a Method; dict given",
        ),
        ((a, b), {"gamma": 1}, "RecipeError", "unknown argument 'gamma': weighted_sum has no such number"),
        ((a, b), {"methd": "dare"}, "RecipeError", "weighted_sum has no such number; did you mean 'method'?"),
        (
            (a, b, None, "dare"),
            {"droprate": 0},
            "RecipeError",
            "dare has no such number; did you mean 'drop_rate'?",
        ),
        (
            (a, b),
            {"method": "weighted"},
            "RecipeError",
            "unknown method 'weighted'; did you mean 'weighted_sum'?",
        ),
        (
            (a, tmp_path / "x.safetensors"),
            {},
            "UnknownFamilyError",
            "x.safetensors holds no diffusion model",
        ),
        ((a, lacking), {}, "IncompatibleModelsError", f"state dict B lacks 1 tensor of the module ({OUT05})"),
        ((lacking, lacking), {}, "IncompatibleModelsError", "state dict A lacks 1 tensor of the module"),
        (
            (a, {**b, "out.3.weight": b[OUT05]}),
            {},
            "IncompatibleModelsError",
            "the module lacks 1 tensor of state dict B (out.3",
        ),
        (
            (a, halved),
            {},
            "IncompatibleModelsError",
            f"in state dict B, {OUT05} has shape [4, 32, 1, 1], the module's is [32, 32",
        ),
        ((a, whole_numbers), {}, "CheckpointError", "state dict B has I8 in place of floats (output_blocks"),
        (
            (a, sdxl),
            {},
            "IncompatibleModelsError",
            "the module is Stable Diffusion 1.x and state dict B is Stable Diffusion XL",
        ),
    ]
    for models, options, kind, says in refusals:
        module = module_of(a)
        before = {name: tensor.data_ptr() for name, tensor in values(module).items()}
        with pytest.raises(getattr(blockmerge, kind)) as caught:
            LiveMerge(module, *models, **options)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert {name: tensor.data_ptr() for name, tensor in values(module).items()} == before
    with pytest.raises(
        blockmerge.RecipeError,
        match=r"a dict is not a torch module: give the U-Net itself, as in LiveMerge\(pipe\.unet",
    ):
        LiveMerge(a, a, b)
    with pytest.raises(blockmerge.UnknownFamilyError, match="the module holds no diffusion model"):
        LiveMerge(torch.nn.Linear(2, 2), a, b)


class Quantised(torch.nn.Parameter):
    pass


def test_modules_that_cannot_be_merged_live(dicts):
    second = OUT05

    def made(change):
        module = module_of(dicts[0])
        change(module)
        return module

    def tie(module):
        with_parameter(module, second, module.get_parameter("output_blocks.4.1.proj_in.weight"))

    def meta(module):
        with_parameter(
            module, second, torch.nn.Parameter(torch.empty(16, 16, 1, 1, dtype=torch.float16, device="meta"))
        )

    def adapter(module):
        module.get_submodule("middle_block.1").register_parameter("lora_A", torch.nn.Parameter(torch.ones(2)))
        module.get_submodule("middle_block.1").add_module(
            "to_q", module_of({"base_layer.weight": torch.ones(2)})
        )

    cases = [
        (
            tie,
            "RecipeError",
            r"share memory, and cannot be merged on their own: output_blocks\.4\.1\.proj_in\.weight = output_blo",
        ),
        (
            meta,
            "CheckpointError",
            r"the module: output_blocks\.5\.1\.proj_in\.weight is a meta tensor, which has no values",
        ),
        (
            adapter,
            "RecipeError",
            r"has 2 parameters that no plain U-Net has \(middle_block\.1\.lora_A, middle_block\.1\.to_q\.base_l",
        ),
        (
            lambda m: with_parameter(m, second, Quantised(m.get_parameter(second).data)),
            "RecipeError",
            r"\(Quantised: output_bl",
        ),
        (
            lambda m: with_parameter(m, second, torch.nn.Parameter(m.get_parameter(second).float())),
            "RecipeError",
            "of several dtypes",
        ),
        (
            lambda m: m.double(),
            "RecipeError",
            r"parameters are torch\.float64: LiveMerge works in fp16, bf16 and fp32",
        ),
        (
            lambda m: m.middle_block._modules.clear(),
            "IncompatibleModelsError",
            "the module lacks 46 tensors of state dict A",
        ),
    ]
    for change, kind, says in cases:
        with pytest.raises(getattr(blockmerge, kind), match=says):
            LiveMerge(made(change), *dicts)


def test_adapters_by_diffusers_names(dicts):
    in_diffusers = convert_ldm_unet_checkpoint(
        {PREFIX + n: t for n, t in dicts[0].items()}, config=config("sd1")
    )
    extra = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0.weight"
    with pytest.raises(
        blockmerge.RecipeError, match=r"has 1 parameter that no plain U-Net has \(down_blocks.*to_k_ip"
    ):
        LiveMerge(module_of({**in_diffusers, extra: torch.ones(2, dtype=torch.float16)}), *dicts)


def test_weights_that_are_refused_change_nothing(dicts):
    module = module_of(dicts[0])
    live = LiveMerge(module, *dicts)
    live.apply(weights=0.5)
    before = {name: tensor.clone() for name, tensor in values(module).items()}
    refusals = [
        ({}, "how much of B?"),
        ({"preset": "high_res", "weights": 1}, "both a preset and weights are given"),
        ({"preset": "nothing"}, "nothing"),
        ({"preset": "high_res", "keep": True}, "only weights that name blocks keep the others"),
        ({"weights": 0.5, "keep": True}, "only weights that name blocks keep the others"),
        ({"weights": "0.5", "keep": True}, "cannot read '0.5' in the weights: write BLOCK=NUMBER"),
        ({"weights": {"OUT12": 0.5}, "keep": True}, "unknown block 'OUT12'"),
        ({"weights": {"OUT11": "much"}, "keep": True}, "weight of OUT11 is not a number: 'much'"),
        ({"weights": 0.5, "weights_beta": 0.5}, "weighted_sum takes no 'beta'"),
        ({"weights": "random", "seed": "x"}, "a whole number is needed as seed: found x"),
        ({"weights": {"OUT11": 0.25}, "keep": "yes"}, "keep is True or False; str given"),
    ]
    for options, says in refusals:
        with pytest.raises(blockmerge.RecipeError) as caught:
            live.apply(**options)
        assert says in str(caught.value)
    assert live.weights == dict.fromkeys(oracle.SD, 0.5)
    assert_same_bits(values(module), before)


def test_the_method_that_does_nothing_holds_a(dicts):
    module = module_of(dicts[0])
    with LiveMerge(module, dicts[1], method="convert") as live:
        live.apply()
        assert_same_bits(values(module), dicts[1])
        with pytest.raises(RecipeError, match=r"^convert takes no 'weights'$"):
            live.apply(weights=0.5)
