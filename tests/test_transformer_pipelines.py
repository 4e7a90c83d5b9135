"""All-in-one files of transformers, with text encoders and VAE as ComfyUI names them, as whole pipelines: every
component loads with its own library and has the weights that the test began with.
"""

from __future__ import annotations

import json
from functools import cache

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import CheckpointError, IncompatibleModelsError
from blockmerge.anatomy import FAMILIES
from blockmerge.demo import make_state_dicts
from tests.forms import assert_same
from tests.thin_transformers import THIN

# diffusers with the newest numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),  # in its own Chroma
]

PREFIX = "model.diffusion_model."
LIBRARIES = {"diffusers": diffusers, "transformers": transformers}


def randomised(model):
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.normal_(0.0, 0.2)
    return model.eval()


def clip(width, act):
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=2 * width, num_attention_heads=max(1, width // 64),
        num_hidden_layers=2, vocab_size=99, max_position_embeddings=77, projection_dim=width, hidden_act=act,
        bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    return transformers.CLIPTextModelWithProjection(config)


def t5(feed_forward="gated-gelu"):
    config = transformers.T5Config(
        d_model=64, d_kv=8, d_ff=96, num_layers=2, num_heads=4, vocab_size=120, feed_forward_proj=feed_forward,
        is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return transformers.T5EncoderModel(config)


def qwen3():
    config = transformers.Qwen3Config(
        vocab_size=90, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-6, rope_theta=1000000,
    )  # fmt: skip
    return transformers.Qwen3Model(config)


def gemma2():
    config = transformers.Gemma2Config(
        vocab_size=90, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    return transformers.Gemma2Model(config)


TEXT = {
    "schnell": {"clip_l": ("text_encoder", clip, 64, "quick_gelu"), "t5xxl": ("text_encoder_2", t5)},
    "chroma": {"t5xxl": ("text_encoder", t5)},
    "sd3": {
        "clip_l": ("text_encoder", clip, 64, "quick_gelu"),
        "clip_g": ("text_encoder_2", clip, 128, "gelu"),
        "t5xxl": ("text_encoder_3", t5),
    },
    "z_image": {"qwen3_4b": ("text_encoder", qwen3)},
    "lumina2": {"gemma2_2b": ("text_encoder", gemma2)},
    "cosmos": {"oldt5_xxl": ("text_encoder", t5, "relu")},
    "anima": {"qwen3_06b": ("text_encoder", qwen3)},
}
"""{model: {ComfyUI's name of a text encoder: its folder, and how it is made}}."""
VAES = {
    "schnell": "vae.",
    "chroma": "vae.",
    "sd3": "first_stage_model.",
    "z_image": "vae.",
    "lumina2": "vae.",
}
VIDEO_VAES = {"cosmos": "vae.", "anima": "vae."}
SCALES = {"sd3": (1.5305, 0.0609)}
DROPPED = {"schnell": {"text_encoders.clip_l.transformer.text_projection.weight"}}


@cache
def vae():
    """A VAE of 16 channels and without quant_conv, under original names."""
    generator = torch.Generator().manual_seed(4)
    thin = {128: 8, 256: 16, 512: 32}
    found = {}
    for name, shape in FAMILIES["sdxl"].layout.items():
        own = name.removeprefix("first_stage_model.")
        if own == name or "quant_conv" in own:
            continue
        shape = [thin.get(extent, extent) for extent in shape]
        if own.startswith("encoder.conv_out"):
            shape[0] = 32
        if own == "decoder.conv_in.weight":
            shape[1] = 16
        found[own] = torch.randn(shape, generator=generator)
    return found


@cache
def video_vae():
    """Wan's VAE under original names, which diffusers' converter makes its class's of; and under those."""
    torch.manual_seed(6)
    state = randomised(diffusers.AutoencoderKLWan(base_dim=8, z_dim=16)).state_dict()
    resnet = {
        "residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2",
        "shortcut": "conv_shortcut", "resample.1": "resample.1", "time_conv": "time_conv",
    }  # fmt: skip
    pairs = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        pairs |= {f"{side}.conv1": f"{side}.conv_in", f"{side}.head.0": f"{side}.norm_out"}
        pairs[f"{side}.head.2"] = f"{side}.conv_out"
        for part in ("norm", "to_qkv", "proj"):
            pairs[f"{side}.middle.1.{part}"] = f"{side}.mid_block.attentions.0.{part}"
        for ours, theirs in resnet.items():
            pairs |= {
                f"{side}.middle.{2 * n}.{ours}": f"{side}.mid_block.resnets.{n}.{theirs}" for n in (0, 1)
            }
    for ours, theirs in resnet.items():
        pairs |= {f"encoder.downsamples.{n}.{ours}": f"encoder.down_blocks.{n}.{theirs}" for n in range(11)}
        for n in range(15):
            unit = "upsamplers.0" if n % 4 == 3 else f"resnets.{n % 4}"
            pairs[f"decoder.upsamples.{n}.{ours}"] = f"decoder.up_blocks.{n // 4}.{unit}.{theirs}"
    found = {
        f"{ours}.{end}": state[f"{theirs}.{end}"]
        for ours, theirs in pairs.items()
        for end in ("weight", "bias", "gamma")
        if f"{theirs}.{end}" in state
    }
    assert_same(single_file_utils.convert_wan_vae_to_diffusers(dict(found)), state)
    return found, state


@cache
def text_encoders(name):
    torch.manual_seed(5)
    return {own: (folder, randomised(make(*how))) for own, (folder, make, *how) in TEXT[name].items()}


@cache
def all_in_one(name):
    """What a file of ComfyUI's holds, and the transformer as diffusers has it."""
    if name == "anima":
        model, found = None, dict(make_state_dicts(FAMILIES[name].sized((2, 6)))[0])
    else:
        model = THIN[name].build()
        found = {PREFIX + own: tensor for own, tensor in THIN[name].original(model).items()}
    for own, (_, encoder) in text_encoders(name).items():
        prefix = f"text_encoders.{own}.transformer."
        # Those of language models are in ComfyUI as in their whole models.
        inner = "" if own.startswith(("clip", "t5", "oldt5")) else "model."
        found |= {
            prefix + inner + key: one
            for key, one in encoder.state_dict().items()
            if "embed_tokens" not in key or inner
        }
        found[f"text_encoders.{own}.logit_scale"] = torch.tensor(4.6)
    if name in VAES:
        found |= {VAES[name] + key: one for key, one in vae().items()}
    if name in VIDEO_VAES:
        found |= {VIDEO_VAES[name] + key: one for key, one in video_vae()[0].items()}
    return {key: one.contiguous().clone() for key, one in found.items()}, model


def json_of(path):
    return json.loads(path.read_text())


def loaded(folder, component, library, kind):
    model, told = getattr(LIBRARIES[library], kind).from_pretrained(
        folder, subfolder=component, output_loading_info=True
    )
    assert {what: list(names) for what, names in told.items() if names} == {}, component
    return model.eval()


@pytest.mark.parametrize("name", TEXT)
def test_a_whole_file_becomes_a_pipeline_and_back(tmp_path, name):
    state, transformer = all_in_one(name)
    save_file(state, tmp_path / "whole.safetensors")
    folder = tmp_path / "folder"
    result = blockmerge.convert(tmp_path / "whole.safetensors", folder, naming="diffusers")
    index = json_of(folder / "model_index.json")
    assert index["_class_name"] == (THIN[name].pipeline if name in THIN else "AnimaModularPipeline")
    models = {
        component: loaded(folder, component, *of)
        for component, of in index.items()
        if (folder / component / "config.json").exists()
    }
    components = {component for component, *_ in TEXT[name].values()} | {"transformer", "vae"}
    assert models.keys() == components | ({"text_conditioner"} if name == "anima" else set())
    if transformer is not None:
        assert_same(models["transformer"].state_dict(), transformer.state_dict())
    for component, encoder in text_encoders(name).values():
        check_encoder(models[component], encoder)
    if name in VAES:
        check_vae(models["vae"], SCALES.get(name, (0.3611, 0.1159)))
    else:
        assert_same(models["vae"].state_dict(), video_vae()[1])
    dropped = DROPPED.get(name, set()) | {PREFIX + own for own in (THIN[name].drops if name in THIN else ())}
    dropped |= {own for own in state if own.endswith("logit_scale")}
    left_out = next(note for note in result.notes if "left out" in note)
    assert "unknown" not in left_out
    assert left_out.startswith(f"{len(dropped)} tensor")
    assert any(own in left_out for own in dropped)
    lacking = [note for note in result.notes if "lacks tokenizer" in note]
    assert len(lacking) == 1

    blockmerge.convert(folder, tmp_path / "back.safetensors", naming="ldm")
    assert_same(
        load_file(tmp_path / "back.safetensors"),
        {own: one for own, one in state.items() if own not in dropped},
    )


@torch.no_grad()
def check_encoder(found, expected):
    """The same weights, and the same values for a text, by what shapes do not tell as well."""
    ours, theirs = found.state_dict(), expected.state_dict()
    strip = "" if any(key.startswith("text_model.") for key in ours) else "text_model."
    theirs = {key.removeprefix(strip): one for key, one in theirs.items()}
    assert ours.keys() <= theirs.keys()
    assert {key.partition(".")[0] for key in theirs.keys() - ours.keys()} <= {"text_projection"}
    assert_same(ours, {key: theirs[key] for key in ours})
    tokens = torch.tensor([[5, 7, 11, 2]])
    one, other = (model(tokens).last_hidden_state for model in (found, expected))
    assert torch.equal(one, other)


def check_vae(found, scales):
    assert (found.config.scaling_factor, found.config.shift_factor) == scales
    assert found.config.latent_channels == 16
    widths = found.config.block_out_channels
    levels = {"down_block_types": [0] * len(widths), "up_block_types": [0] * len(widths)}
    prefixed = {f"first_stage_model.{key}": one.clone() for key, one in vae().items()}
    expected = single_file_utils.convert_ldm_vae_checkpoint(prefixed, levels)
    expected = {key: one.reshape(found.state_dict()[key].shape) for key, one in expected.items()}
    assert_same(found.state_dict(), expected)


def test_a_merge_with_a_whole_pipeline_is_a_whole_pipeline(tmp_path):
    state, _ = all_in_one("sd3")
    other = {own: one * 1.25 if own.startswith(PREFIX) else one for own, one in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    blockmerge.convert(tmp_path / "b.safetensors", tmp_path / "b", naming="diffusers")
    blockmerge.merge(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        output=tmp_path / "one.safetensors",
        weights=0.4,
    )
    blockmerge.merge(
        tmp_path / "a.safetensors", tmp_path / "b", output=tmp_path / "two.safetensors", weights=0.4
    )
    assert_same(load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors"))
    blockmerge.merge(tmp_path / "b", tmp_path / "a.safetensors", output=tmp_path / "folder", weights=0.6)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "model_index.json", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae",
    ]  # fmt: skip


def alone(tmp_path, name):
    """The transformer of a whole file, alone."""
    path = tmp_path / f"{name}.safetensors"
    state = {own: one for own, one in all_in_one(name)[0].items() if own.startswith(PREFIX)}
    save_file(state, path)
    return path, state


@pytest.mark.parametrize(
    ("name", "prefix"), [("schnell", "vae."), ("sd3", "first_stage_model."), ("anima", "vae.")]
)
def test_a_vae_is_baked_in(tmp_path, name, prefix):
    own = video_vae()[0] if name in VIDEO_VAES else vae()
    save_file({key: one.contiguous() for key, one in own.items()}, tmp_path / "vae.safetensors")
    path, state = alone(tmp_path, name)
    blockmerge.convert(path, tmp_path / "whole.safetensors", vae=tmp_path / "vae.safetensors")
    assert_same(
        load_file(tmp_path / "whole.safetensors"), state | {prefix + key: one for key, one in own.items()}
    )
    blockmerge.convert(path, tmp_path / "folder", naming="diffusers", vae=tmp_path / "vae.safetensors")
    index = json_of(tmp_path / "folder/model_index.json")
    loaded(tmp_path / "folder", "vae", *index["vae"])


@pytest.mark.parametrize("name", ["schnell", "anima"])
def test_a_vae_of_another_kind_is_refused(tmp_path, name):
    own = vae() if name in VIDEO_VAES else video_vae()[0]
    save_file({key: one.contiguous() for key, one in own.items()}, tmp_path / "vae.safetensors")
    path, _ = alone(tmp_path, name)
    for output in ("out.safetensors", "out"):
        with pytest.raises(CheckpointError, match="holds no VAE that"):
            blockmerge.convert(
                path, tmp_path / output, vae=tmp_path / "vae.safetensors",
                naming="ldm" if "." in output else "diffusers",
            )  # fmt: skip


@pytest.mark.parametrize("name", ["z_image", "lumina2"])
def test_language_models_with_and_without_their_head_are_the_same(tmp_path, name):
    state, _ = all_in_one(name)
    save_file(state, tmp_path / "whole.safetensors")
    blockmerge.convert(tmp_path / "whole.safetensors", tmp_path / "folder", naming="diffusers")
    weights = tmp_path / "folder/text_encoder/model.safetensors"
    had = load_file(weights)
    inside = all(own.startswith("model.") for own in had)
    save_file(
        {own.removeprefix("model.") if inside else f"model.{own}": one for own, one in had.items()}, weights
    )
    blockmerge.convert(tmp_path / "folder", tmp_path / "back.safetensors", naming="ldm")
    back = load_file(tmp_path / "back.safetensors")
    assert_same(back, {own: state[own] for own in back})
    assert {own for own in state.keys() - back.keys() if "text_encoders" in own} == {
        own for own in state if own.endswith("logit_scale")
    }


def test_a_text_encoder_that_lacks_a_tensor_becomes_no_folder(tmp_path):
    state, _ = all_in_one("schnell")
    for lost in (
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.1.DenseReluDense.wi_1.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.k.weight",
        "text_encoders.t5xxl.transformer.shared.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1.bias",
    ):
        save_file({own: one for own, one in state.items() if own != lost}, tmp_path / "cut.safetensors")
        with pytest.raises(IncompatibleModelsError, match="cannot become a diffusers folder"):
            blockmerge.convert(tmp_path / "cut.safetensors", tmp_path / "out", naming="diffusers")


def test_a_vae_of_other_latent_images_is_refused(tmp_path):
    own = {key: one.contiguous() for key, one in vae().items()}
    own["decoder.conv_in.weight"] = own["decoder.conv_in.weight"][:, :4].contiguous()
    save_file(own, tmp_path / "vae.safetensors")
    path, _ = alone(tmp_path, "sd3")
    with pytest.raises(CheckpointError, match="which have 16 channels"):
        blockmerge.convert(path, tmp_path / "out.safetensors", vae=tmp_path / "vae.safetensors")
