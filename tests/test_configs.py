"""Configs of folders made from single files: diffusers and transformers build from them just what the weights
fit.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blockmerge import UnknownFamilyError
from blockmerge.anatomy import layout
from blockmerge.anatomy.configs import folder_configs
from blockmerge.demo import make_state_dicts
from tests.other_names import in_diffusers

FAMILIES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
VARIANTS = {"base": 4, "depth": 5, "pix2pix": 8, "inpainting": 9}
CASES = [(family, "base") for family in FAMILIES] + [
    (family, variant)
    for family in FAMILIES[:3]
    for variant in VARIANTS
    if variant != "base" and (variant != "depth" or family == "sd2")
]
FULL = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
# diffusers with the newest numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PIPELINES = {
    ("sd1", "base"): "StableDiffusionPipeline",
    ("sd1", "inpainting"): "StableDiffusionInpaintPipeline",
    ("sd1", "pix2pix"): "StableDiffusionInstructPix2PixPipeline",
    ("sd2", "depth"): "StableDiffusionDepth2ImgPipeline",
    ("sdxl", "base"): "StableDiffusionXLPipeline",
    ("sdxl", "inpainting"): "StableDiffusionXLInpaintPipeline",
    ("sdxl", "pix2pix"): "StableDiffusionXLInstructPix2PixPipeline",
    ("sdxl_refiner", "base"): "StableDiffusionXLImg2ImgPipeline",
}


def thin_refiner():
    """The demo makes none: 8 channels for 384, 40 text channels for 1280."""
    generator = torch.Generator().manual_seed(0)
    text = {1280: 40, 3840: 120, 5120: 160, 49408: 1544}
    vae = {128: 8, 256: 16, 512: 32}
    found = {}
    for name, shape in layout("sdxl_refiner").items():
        if name.startswith("model."):
            thin = [text.get(n, 60 if n == 2560 else n // 48 if n % 384 == 0 else n) for n in shape]
        else:
            thin = [(vae if name.startswith("first_stage") else text).get(n, n) for n in shape]
        found[name] = torch.randn(thin, generator=generator)
    return found


@cache
def thin(family):
    return in_diffusers(thin_refiner() if family == "sdxl_refiner" else make_state_dicts(family)[0], family)


def with_variant(tensors, variant):
    if variant == "base":
        return tensors
    first = tensors["unet/conv_in.weight"]
    more = torch.randn(
        first.shape[0], VARIANTS[variant] - 4, 3, 3, generator=torch.Generator().manual_seed(1)
    )
    return tensors | {"unet/conv_in.weight": torch.cat([first, more], 1)}


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_folder(folder, tensors, family, **options):
    configs = folder_configs(shapes_of(tensors), family, **options)
    for path, content in configs.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(content))
    for component in {name.split("/")[0] for name in tensors}:
        stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
        mine = {
            name.removeprefix(component + "/"): tensor
            for name, tensor in tensors.items()
            if name.startswith(component + "/")
        }
        save_file(mine, folder / component / f"{stem}.safetensors", {"format": "pt"})
    return configs


def classes():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    return {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_every_component_loads_without_a_key_missing_or_left(tmp_path, family, variant):
    tensors = with_variant(thin(family), variant)
    write_folder(tmp_path, tensors, family)
    components = {name.split("/")[0] for name in tensors}
    assert components == {"unet", "vae"} | {
        "sdxl": {"text_encoder", "text_encoder_2"},
        "sdxl_refiner": {"text_encoder_2"},
    }.get(family, {"text_encoder"})
    for component in components if variant == "base" else {"unet"}:
        model, told = classes()[component].from_pretrained(tmp_path / component, output_loading_info=True)
        wrong = {what: list(names) for what, names in told.items() if names}
        assert wrong == {}, component
        state = model.state_dict()
        prefix = "" if any(name.startswith("text_model.") for name in state) else "text_model."
        mine = {
            name.removeprefix(f"{component}/{prefix}"): tensor
            for name, tensor in tensors.items()
            if name.startswith(component + "/")
        }
        mine = {
            name.removeprefix(component + "/"): tensor
            for name, tensor in mine.items()
            if "position_ids" not in name
        }
        assert {name for name in state if "position_ids" not in name} == mine.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in mine.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_full_size_configs_build_the_published_shapes(family):
    from transformers import CLIPTextConfig

    with torch.device("meta"):
        tensors = in_diffusers({name: torch.empty(shape) for name, shape in layout(family).items()}, family)
        configs = folder_configs(shapes_of(tensors), family)
        built = {}
        for component in {name.split("/")[0] for name in tensors}:
            config, of = configs[f"{component}/config.json"], classes()[component]
            model = of(CLIPTextConfig(**config)) if component.startswith("text") else of.from_config(config)
            built[component] = without_details(
                {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
            )
    ours = {
        part: without_details(
            {n.split("/", 1)[1]: s for n, s in shapes_of(tensors).items() if n.startswith(part + "/")}
        )
        for part in built
    }
    assert built == ours
    if family in FULL:
        published = json.loads(
            (Path(__file__).parent / "layouts" / f"{FULL[family]}-diffusers.json").read_text()
        )
        assert built == {
            part: without_details({name: tuple(shape) for name, shape in names.items()})
            for part, names in published.items()
        }


def without_details(shapes):
    """Without what differs between versions of transformers."""
    return {
        name.removeprefix("text_model."): shape
        for name, shape in shapes.items()
        if "position_ids" not in name
    }


PUBLISHED = {
    "sd1": {
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "sample_size": 64,
        "use_linear_projection": False,
    },
    "sd2": {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "sample_size": 64,
        "use_linear_projection": True,
    },
    "sdxl": {
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "sample_size": 128,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
    },
    "sdxl_refiner": {
        "attention_head_dim": [6, 12, 24, 24],
        "cross_attention_dim": 1280,
        "sample_size": 128,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
    },
}
TEXT = {
    ("sd1", "text_encoder"): ("quick_gelu", 12, 12, 768),
    ("sd2", "text_encoder"): ("gelu", 16, 23, 1024),
    ("sdxl", "text_encoder"): ("quick_gelu", 12, 12, 768),
    ("sdxl", "text_encoder_2"): ("gelu", 20, 32, 1280),
    ("sdxl_refiner", "text_encoder_2"): ("gelu", 20, 32, 1280),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_shapes_alone_do_not_tell_is_as_published(family):
    """Facts of the published folders' configs (stable-diffusion-v1-5, -2-base, -xl-base-1.0,
    -xl-refiner-1.0).
    """
    with torch.device("meta"):
        tensors = in_diffusers({name: torch.empty(shape) for name, shape in layout(family).items()}, family)
    configs = folder_configs(shapes_of(tensors), family)
    unet = configs["unet/config.json"]
    assert {key: unet[key] for key in PUBLISHED[family]} == PUBLISHED[family]
    assert unet["norm_num_groups"] == configs["vae/config.json"]["norm_num_groups"] == 32
    assert configs["vae/config.json"]["scaling_factor"] == (0.13025 if family.startswith("sdxl") else 0.18215)
    for (of, component), facts in TEXT.items():
        if of == family:
            text = configs[f"{component}/config.json"]
            assert (
                tuple(
                    text[key]
                    for key in ("hidden_act", "num_attention_heads", "num_hidden_layers", "hidden_size")
                )
                == facts
            )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_thin_configs_have_the_shapes_of_the_thin_u_net_that_runs(family):
    from tests.thin_unet import config

    ours = folder_configs(shapes_of(thin(family)), family)["unet/config.json"]
    assert {
        key: ours.get(key)
        for key in config(family)
        if key not in ("sample_size", "attention_head_dim", "transformer_layers_per_block")
    } == {
        key: value
        for key, value in config(family).items()
        if key not in ("sample_size", "attention_head_dim", "transformer_layers_per_block")
    }


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_the_pipelines_of_diffusers_load_the_folder(tmp_path, family, variant):
    import diffusers

    tensors = with_variant(thin(family), variant)
    index = write_folder(tmp_path, tensors, family)["model_index.json"]
    assert (
        index["_class_name"]
        == PIPELINES["sd1" if family == "sd2" and variant != "depth" else family, variant]
    )
    # Those of SD insist on being given what they need and the folder lacks.
    options = {} if family.startswith("sdxl") and variant != "pix2pix" else {"tokenizer": None}
    if family == "sdxl" and variant == "pix2pix":
        options["tokenizer_2"] = None
    if variant == "depth":
        options |= {"depth_estimator": None, "feature_extractor": None}
    pipe = getattr(diffusers, index["_class_name"]).from_pretrained(tmp_path, **options)
    assert pipe.tokenizer is None
    assert (pipe.text_encoder is None) == (family == "sdxl_refiner")
    assert torch.equal(pipe.unet.conv_in.weight, tensors["unet/conv_in.weight"])
    assert isinstance(pipe.scheduler, getattr(diffusers, index["scheduler"][1]))


def test_a_pipeline_draws(tmp_path):
    """With prompt embeddings given: a tokenizer is in no single file."""
    import diffusers

    write_folder(tmp_path, thin("sdxl"), "sdxl")
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    prompt, pooled = torch.zeros(1, 77, 64), torch.zeros(1, 40)
    image = pipe(
        prompt_embeds=prompt,
        pooled_prompt_embeds=pooled,
        num_inference_steps=2,
        guidance_scale=1,
        height=64,
        width=64,
        output_type="pt",
    ).images
    assert image.shape == (1, 3, 64, 64)
    assert torch.isfinite(image).all()


SCHEDULES = [
    ("sd1", "epsilon", False),
    ("sd2", "v_prediction", False),
    ("sdxl", "epsilon", False),
    ("sdxl", "v_prediction", True),
    ("sd1", "v_prediction", True),
]


@pytest.mark.parametrize(("family", "prediction", "zero_snr"), SCHEDULES)
def test_schedules(tmp_path, family, prediction, zero_snr):
    import diffusers

    configs = folder_configs(shapes_of(thin(family)), family, prediction=prediction, zero_snr=zero_snr)
    content = configs["scheduler/scheduler_config.json"]
    (tmp_path / "scheduler_config.json").write_text(json.dumps(content))
    scheduler = getattr(diffusers, content["_class_name"]).from_pretrained(tmp_path)
    assert scheduler.config.prediction_type == prediction
    # Rombach et al., "scaled linear".
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    expected = torch.cumprod(1 - betas, 0)
    if zero_snr:
        assert scheduler.alphas_cumprod[-1] < 1e-7
        assert torch.isclose(scheduler.alphas_cumprod[0].double(), expected[0], rtol=1e-4)
    else:
        torch.testing.assert_close(scheduler.alphas_cumprod.double(), expected, rtol=1e-4, atol=0)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == (999 if zero_snr else 901)
    size = {"sd1": 64, "sd2": 96, "sdxl": 128}[family]
    assert configs["unet/config.json"]["sample_size"] == size
    assert configs["vae/config.json"]["sample_size"] == size * 8


def test_parts_that_are_not_there_are_null():
    shapes = {name: shape for name, shape in shapes_of(thin("sdxl")).items() if name.startswith("unet/")}
    configs = folder_configs(shapes, "sdxl")
    assert configs.keys() == {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json"}
    index = configs["model_index.json"]
    assert [part for part in index if isinstance(index[part], list) and index[part] != [None, None]] == [
        "scheduler",
        "unet",
    ]
    assert index["vae"] == index["tokenizer"] == index["text_encoder_2"] == [None, None]
    assert folder_configs({}, "sd1").keys() == {"model_index.json", "scheduler/scheduler_config.json"}
    sd1 = folder_configs(shapes_of(thin("sd1")), "sd1")["model_index.json"]
    assert (sd1["safety_checker"], sd1["requires_safety_checker"]) == ([None, None], False)


@pytest.mark.parametrize(
    "gone",
    [
        "unet/conv_in.weight",
        "unet/down_blocks.1.resnets.0.conv1.weight",
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight",
        "unet/down_blocks.0.attentions.0.proj_in.weight",
        "vae/encoder.conv_in.weight",
        "vae/decoder.conv_out.weight",
        "text_encoder/text_model.embeddings.token_embedding.weight",
        "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight",
    ],
)
def test_a_tensor_that_tells_is_missing(gone):
    shapes = shapes_of(thin("sd1"))
    part, name = gone.split("/")
    del shapes[gone]
    with pytest.raises(
        UnknownFamilyError, match=rf"^holds no whole {part}: {name.replace('.', '[.]')} is missing$"
    ):
        folder_configs(shapes, "sd1")
    shapes[gone] = ()
    with pytest.raises(UnknownFamilyError, match=r"has the shape \[\]"):
        folder_configs(shapes, "sd1")
