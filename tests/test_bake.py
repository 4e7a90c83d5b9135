"""LoRAs baked in: the values of a float64 oracle, whatever the kind, the place and the form of the model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import Recipe
from blockmerge.demo import demo_layout
from blockmerge.merging.execute import Pace
from tests import oracle
from tests.forms import assert_same, read
from tests.lora_oracle import (
    KINDS,
    NO_BIAS,
    Factors,
    Place,
    assert_baked,
    baked,
    fits,
    parts_of,
    place,
    third,
    written,
)
from tests.other_names import in_diffusers
from tests.small_models import small_model, write_folder

pytestmark = pytest.mark.usefixtures("one_thread")

UNET = "model.diffusion_model."
DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
ALPHAS = [
    torch.tensor(1.5),
    torch.tensor([2.0]).half(),
    torch.tensor(7.0).bfloat16(),
    torch.tensor(0.3).double(),
]

RESBLOCK = "conditioner.embedders.1.model.transformer.resblocks.0"
SDXL = {
    "linear": place("lora_unet_mid_block_attentions_0_proj_in", f"{UNET}middle_block.1.proj_in", "M00"),
    "1x1": place("lora_unet_down_blocks_1_resnets_0_conv_shortcut", f"{UNET}input_blocks.4.0.skip_connection", "IN04"),
    "3x3": place("lora_unet_down_blocks_1_resnets_0_conv1", f"{UNET}input_blocks.4.0.in_layers.2", "IN04"),
    "wide": place("lora_te2_text_model_encoder_layers_0_mlp_fc1", f"{RESBLOCK}.mlp.c_fc", "BASE"),
    **{
        letter: third(f"lora_te2_text_model_encoder_layers_0_self_attn_{letter}_proj", f"{RESBLOCK}.attn", number)
        for number, letter in enumerate("qkv")
    },
    "projection": Place(
        "lora_te2_text_projection", "conditioner.embedders.1.model.text_projection", NO_BIAS, "BASE",
        is_transposed=True,
    ),
}  # fmt: skip
EVERYWHERE = ("linear", "1x1", "3x3", "wide", "k", "projection")
NORMS = (
    place("lora_unet_down_blocks_1_resnets_0_norm1", f"{UNET}input_blocks.4.0.in_layers.0", "IN04"),
    place("lora_te2_text_model_encoder_layers_0_layer_norm1", f"{RESBLOCK}.ln_1", "BASE"),
)


TONES_OF_SD1 = [0.0, -1.0, 1 / 3, 2 / 3]  # what brightness adds to the latent channels
NORM_PARTS = ("w_norm", "b_norm", "diff", "diff_b")


def model_of(family, places, seed=0, dtype=torch.float16, **options):
    """A small model that has the tensors of these places."""
    model = small_model(family, dtype, seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(
        {name for one in places for name in (one.weight, one.bias)} - model.keys() - {NO_BIAS}
    ):
        model[name] = torch.randn(demo_layout(family)[name], generator=generator).to(dtype)
    # No square matrix by chance: a transposed one would fit, too.
    projection = SDXL["projection"].weight
    if projection in model:
        model[projection] = model[projection][:, :32].contiguous()
    return model


@pytest.fixture(scope="module")
def sdxl():
    return model_of("sdxl", SDXL.values())


def shape_of(where, model):
    return tuple(where.of(model[where.weight]).shape)


def lora_for(places, model, kind="lora", alphas=ALPHAS, seed=0, **options):
    """A LoRA with a module of a kind for each of the places that it fits."""
    found = {}
    for number, where in enumerate(places):
        shape = shape_of(where, model)
        if fits(kind, where, shape):
            found[where] = parts_of(kind, shape, alphas[number % len(alphas)], seed=seed + number, **options)
    return found


def bake(model, loras, path, **options):
    """What is written, for LoRAs as (LoRA, strength[, blocks])."""
    given = [(written(lora), *others) for lora, *others in loras]
    blockmerge.bake(model, given, output=path / "out.safetensors", overwrite=True, **options)
    return load_file(path / "out.safetensors")


# -- each kind, everywhere -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_sort_of_weight(sdxl, tmp_path, kind):
    lora = lora_for([SDXL[name] for name in EVERYWHERE], sdxl, kind)
    assert lora
    changed = {name for one in lora for name in (one.weight, one.bias if "bias" in kind else one.weight)}
    for strength, dtype in zip((-1, 0.5, 2), DTYPES, strict=True):
        out = bake(sdxl, [(lora, strength)], tmp_path, dtype=dtype)
        assert assert_baked(out, sdxl, [(lora, strength)], DTYPES[dtype]) == changed
    assert_same(bake(sdxl, [(lora, 0)], tmp_path), sdxl)


@pytest.mark.parametrize("held", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(tmp_path, held, dtype):
    """Those of the model, the LoRA and the output may all be different ones."""
    model = model_of("sdxl", SDXL.values(), dtype=held)
    places = [SDXL[name] for name in EVERYWHERE]
    lora = lora_for(places, model, dtype=torch.float32) | lora_for(
        places[:2], model, "loha", dtype=torch.bfloat16
    )
    for strength in (-1, 0.5, 2):
        out = bake(model, [(lora, strength)], tmp_path, dtype=dtype)
        assert_baked(out, model, [(lora, strength)], DTYPES[dtype])


@pytest.mark.parametrize("alpha", [None, 0, 1, 4, 0.25, -2])
@pytest.mark.parametrize(
    "kind", ["lora", "loha", "lokr product, whole", "lokr whole, product", "lokr whole, whole"]
)
def test_alphas(sdxl, tmp_path, kind, alpha):
    """None is 1 times the product, 0 the rank; of whole factors it says nothing."""
    lora = lora_for([SDXL["linear"]], sdxl, kind, [None if alpha is None else torch.tensor(float(alpha))])
    assert_baked(bake(sdxl, [(lora, 0.7)], tmp_path), sdxl, [(lora, 0.7)])


def test_norms(sdxl, tmp_path):
    generator = torch.Generator().manual_seed(0)
    conv, text = (
        {part: torch.randn(len(sdxl[one.weight]), generator=generator) for part in NORM_PARTS}
        for one in NORMS
    )
    for of_conv, of_text in (
        (("w_norm", "b_norm"), ("w_norm",)),
        (("b_norm",), ("diff", "diff_b")),
        ((), ("diff_b",)),
    ):
        lora = {
            where: {part: parts[part] for part in wanted}
            for where, parts, wanted in zip(NORMS, (conv, text), (of_conv, of_text), strict=True)
        }
        out = bake(sdxl, [(lora, -0.5)], tmp_path, dtype="fp32")
        changed = assert_baked(out, sdxl, [(lora, -0.5)], torch.float32)
        assert len(changed) == len(of_conv) + len(of_text)


@pytest.mark.parametrize("letters", ["q", "k", "v", "qk", "kv", "qv", "qkv"])
@pytest.mark.parametrize("kind", ["lora", "full with a bias"])
def test_each_of_q_k_and_v_alone_and_together(sdxl, tmp_path, letters, kind):
    lora = lora_for([SDXL[letter] for letter in letters], sdxl, kind)
    out = bake(sdxl, [(lora, 1)], tmp_path)
    assert_baked(out, sdxl, [(lora, 1)])
    for letter in set("qkv") - set(letters):
        where = SDXL[letter]
        for name in (where.weight, where.bias):
            assert torch.equal(where.of(out[name]), where.of(sdxl[name]))


def test_several_at_once(sdxl, tmp_path):
    """Products of several ranks, kinds and strengths on the same weights, and on some of them."""
    everywhere = [SDXL[name] for name in SDXL]
    loras = [
        (lora_for(everywhere, sdxl), 0.8),
        (lora_for(everywhere[2:], sdxl, "loha", seed=20), -0.5),
        ({one: Factors(shape_of(one, sdxl), 3).lora(rank=1) for one in everywhere[:5]}, 2),
        (lora_for(everywhere, sdxl, "lokr whole, product", seed=30), 0.25),
        (lora_for(everywhere, sdxl, "full with a bias", seed=40), 1),
        (lora_for([SDXL["q"]], sdxl, "tucker"), 0),
        (lora_for([SDXL["3x3"]], sdxl, "tucker", seed=50), 1.5),
        (lora_for(everywhere, sdxl, "lora with a bias", seed=60), -1),
    ]
    loras = [(lora, strength) for lora, strength in loras if lora]
    for dtype in DTYPES:
        assert_baked(bake(sdxl, loras, tmp_path, dtype=dtype), sdxl, loras, DTYPES[dtype])


def test_what_looks_at_the_weight_sees_what_the_ones_before_have_left(sdxl, tmp_path):
    places = [SDXL[name] for name in EVERYWHERE]
    kinds = (
        "lora",
        "dora",
        "dora",
        "loha",
        "glora",
        "glora",
        "ia3",
        "ia3",
        "oft",
        "oft",
        "full",
        "dora by inputs",
        "boft",
    )
    loras = [(lora_for(places, sdxl, kind, seed=10 * n), 0.5 - n / 7) for n, kind in enumerate(kinds)]
    out = bake(sdxl, loras, tmp_path, dtype="fp32")
    assert_baked(out, sdxl, loras, torch.float32)
    assert not torch.equal(
        out[places[0].weight], bake(sdxl, loras[::-1], tmp_path, dtype="fp32")[places[0].weight]
    )


@pytest.mark.parametrize("kinds", [["lora"], ["lora", "dora"]])
def test_a_hundred_at_once(sdxl, tmp_path, kinds):
    loras = [
        (lora_for([SDXL["3x3"], SDXL["v"]], sdxl, kinds[n % len(kinds)], seed=10 * n), (n - 50) / 50)
        for n in range(100)
    ]
    assert_baked(bake(sdxl, loras, tmp_path), sdxl, loras)


FAMILIES = {
    "sd1": [
        place("lora_unet_mid_block_attentions_0_proj_in", f"{UNET}middle_block.1.proj_in", "M00"),
        place("lora_unet_up_blocks_1_resnets_0_conv2", f"{UNET}output_blocks.3.0.out_layers.3", "OUT03"),
        place(
            "lora_te_text_model_encoder_layers_0_mlp_fc2",
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2",
            "BASE",
        ),
        place("lora_unet_conv_in", f"{UNET}input_blocks.0.0", "IN00"),
    ],
    "sd2": [
        place("lora_unet_mid_block_attentions_0_proj_in", f"{UNET}middle_block.1.proj_in", "M00"),
        *(
            third(
                f"lora_te_text_model_encoder_layers_0_self_attn_{letter}_proj",
                "cond_stage_model.model.transformer.resblocks.0.attn",
                number,
            )
            for number, letter in enumerate("qkv")
        ),
    ],
    "sdxl_refiner": [
        place("lora_unet_down_blocks_1_resnets_0_conv1", f"{UNET}input_blocks.4.0.in_layers.2", "IN04"),
        *(
            third(
                f"lora_te2_text_model_encoder_layers_0_self_attn_{letter}_proj",
                "conditioner.embedders.0.model.transformer.resblocks.0.attn",
                number,
            )
            for number, letter in enumerate("qkv")
        ),
    ],
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path, family):
    model = model_of(family, FAMILIES[family])
    loras = [
        (lora_for(FAMILIES[family], model), 0.5),
        (lora_for(FAMILIES[family], model, "loha", seed=9), -1),
    ]
    assert len(assert_baked(bake(model, loras, tmp_path), model, loras)) >= 2


@pytest.mark.parametrize(
    ("channels", "kind"), [(9, "lora"), (8, "loha"), (9, "loha"), (8, "lokr whole, product"), (9, "full")]
)
def test_a_first_convolution_with_more_channels(tmp_path, channels, kind):
    """A LoRA of the usual model changes the first four, one that was made for it all; both do at once."""
    where = FAMILIES["sd1"][-1]
    model = small_model("sd1")
    usual = lora_for([where], model, kind)
    model[where.weight] = torch.randn(8, channels, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    own = lora_for([where], model, kind, seed=5)
    for loras in ([(usual, 0.5)], [(own, -1)], [(usual, 0.5), (own, -1)], [(own, 2), (usual, 0.5)]):
        for dtype in ("keep", "fp32"):
            assert_baked(bake(model, loras, tmp_path, dtype=dtype), model, loras, DTYPES[dtype])


def test_a_wider_first_convolution_that_only_b_has(tmp_path):
    where = FAMILIES["sd1"][-1]
    a, b = small_model("sd1"), small_model("sd1", seed=1)
    b[where.weight] = torch.randn(8, 9, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    merged = {**a, where.weight: torch.cat([a[where.weight], b[where.weight][:, 4:]], dim=1)}
    for model in (a, b):
        lora = lora_for([where], model)
        out = tmp_path / f"{len(lora[where])}.safetensors"
        blockmerge.merge(a, b, weights=0, loras=[(written(lora), 0.5)], output=out, overwrite=True)
        assert_baked(load_file(out), merged, [(lora, 0.5)])


# -- in the order of a merge ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_method_then_limits_then_loras_then_adjustment(tmp_path, dtype):
    first, last = FAMILIES["sd1"][-1], place("lora_unet_conv_out", f"{UNET}out.2", "OUT11")
    a, b = (small_model("sd1", seed=seed) for seed in range(2))
    lora = lora_for([first, last, *FAMILIES["sd1"][:3]], a, "full with a bias")
    merged = {
        name: (1.5 * b[name].double() - 0.5 * a[name].double()).clamp(
            torch.minimum(a[name], b[name]).double(), torch.maximum(a[name], b[name]).double()
        )
        if name.startswith(UNET)
        else a[name].double()
        for name in a
    }
    values, sizes = baked(merged, [(lora, 0.5)])
    into, out2, brightness = 8, -20, 3
    values[first.weight] *= 1 - into / 100
    values[first.bias] *= 1 + into / 50
    values[last.weight] *= 1 - out2 / 100
    values[last.bias] += 0.02 * brightness * torch.tensor(TONES_OF_SD1).double()
    out = tmp_path / "out.safetensors"
    adjust = f"{into},0,{out2},0,{brightness},0,0,0"
    options = {"weights": "BASE=0,IN00-OUT11=1.5", "clip": True, "adjust": adjust}
    blockmerge.merge(a, b, loras=[(written(lora), 0.5)], output=out, dtype=dtype, **options)
    for name, tensor in load_file(out).items():
        if tensor.is_floating_point():
            allowed = oracle.step_at(values[name], tensor.dtype) * 0.5001 + 2.0**-20 * sizes[name]
            assert ((tensor.double() - values[name]).abs() <= allowed).all(), name


# -- the same bits -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole():
    """A whole thin SDXL model."""
    return model_of("sdxl", SDXL.values(), for_a_folder=True)


@pytest.fixture(scope="module")
def loras(whole):
    """Three LoRAs with modules of all sorts, one of a rank that libraries multiply in several blocks."""
    places = list(SDXL.values())
    large = Factors(shape_of(SDXL["projection"], whole)).lora(rank=600)
    return [
        (lora_for(places, whole) | {SDXL["projection"]: large}, 0.8),
        (lora_for(places[:3], whole, "loha") | lora_for(places[3:], whole, "lokr whole, product"), -0.5),
        (lora_for(places[:3], whole, "oft") | lora_for(places[3:], whole, "dora"), 0.3),
    ]


def test_any_threads_and_chunks(whole, loras, tmp_path):
    save_file(whole, tmp_path / "a.safetensors")
    recipe = Recipe(
        tmp_path / "a.safetensors", method="bake", loras=[(written(one), strength) for one, strength in loras]
    )
    contents = set()
    for number, pace in enumerate(
        (Pace(1, 1 << 20), Pace(2, 1 << 20), Pace(8, 1 << 16, 4096), Pace(1, 12288, 8192))
    ):
        plan = replace(recipe.plan(tmp_path / f"{number}.safetensors"), pace=pace)
        plan.run()
        contents.add(plan.target.read_bytes())
    assert len(contents) == 1
    assert_baked(load_file(plan.target), whole, loras)


def test_files_and_folders_in_both_namings(whole, loras, tmp_path):
    save_file(whole, tmp_path / "a.safetensors")
    write_folder(tmp_path / "folder", whole, "sdxl")
    given = [(written(one), strength) for one, strength in loras]
    found = {}
    for source, naming in itertools.product(("a.safetensors", "folder"), ("ldm", "diffusers")):
        out = tmp_path / ("out" if naming == "diffusers" else "out.safetensors")
        blockmerge.bake(tmp_path / source, given, output=out, naming=naming, overwrite=True)
        found[source, naming] = read(out)
    from_file = found["a.safetensors", "ldm"]
    assert_baked(from_file, whole, loras)
    wanted = {"ldm": from_file, "diffusers": in_diffusers(from_file, "sdxl")}
    for (_, naming), tensors in found.items():
        assert_same(tensors, {name: wanted[naming][name] for name in tensors})
        missing = wanted[naming].keys() - tensors.keys()
        assert all(name.endswith("logit_scale") for name in missing)  # folders have none


@pytest.mark.parametrize("form", ["ldm", "diffusers"])
@pytest.mark.parametrize(
    "options", [{"weights": 0.3}, {"method": "dare", "weights": 0.5}, {"weights": 0, "clip": True}]
)
def test_state_dicts_and_files_have_the_same_bits(loras, tmp_path, form, options):
    models = [model_of("sdxl", SDXL.values(), seed) for seed in range(2)]
    given = [(written(one), strength, "BASE=1,IN04=0.5,M00=-1") for one, strength in loras]
    blockmerge.merge(*models, loras=given, output=tmp_path / "out.safetensors", **options)
    wanted = load_file(tmp_path / "out.safetensors")
    if form == "diffusers":
        models = [in_diffusers(model, "sdxl") for model in models]
        wanted = in_diffusers(wanted, "sdxl")
    found = blockmerge.merge_state_dicts(*models, loras=given, **options)
    assert_same(found, wanted)


def test_merging_with_weight_0_is_baking(sdxl, loras, tmp_path):
    given = [(written(one), strength) for one, strength in loras]
    blockmerge.merge(sdxl, sdxl, weights=0, loras=given, output=tmp_path / "merged.safetensors")
    assert_same(load_file(tmp_path / "merged.safetensors"), bake(sdxl, loras, tmp_path))
