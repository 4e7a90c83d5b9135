"""Transformers as diffusers folders: what diffusers loads and computes is what it had before the weights went
into a file of original names.
"""

from __future__ import annotations

import json
import shutil
from functools import cache
from importlib import import_module
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError
from blockmerge.anatomy import FAMILIES
from blockmerge.anatomy.configs import folder_configs
from blockmerge.demo import make_state_dicts
from tests.forms import assert_same, read
from tests.oracle import bits
from tests.thin_transformers import THIN

PREFIX = "model.diffusion_model."
# diffusers with the newest numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.FluxPosEmbed. is deprecated:FutureWarning"),  # in its own Chroma
]


@cache
def thin(name, seed=0):
    """diffusers' model, and its weights under original names."""
    model = THIN[name].build(seed)
    return model, THIN[name].original(model)


def written(tmp_path, name, seed=0, prefix=""):
    path = tmp_path / f"{name.replace(' ', '-')}-{seed}.safetensors"
    save_file({prefix + own: one for own, one in thin(name, seed)[1].items()}, path)
    return path


def in_folder(tmp_path, name, seed=0):
    folder = tmp_path / f"{name.replace(' ', '-')}-{seed}-folder"
    blockmerge.convert(written(tmp_path, name, seed), folder, naming="diffusers")
    return folder


def json_of(path):
    return json.loads(path.read_text())


@pytest.fixture(autouse=True)
def _resizing(monkeypatch):
    """Without torchvision, diffusers' Cosmos has nothing to resize its mask with, to the size that it has."""
    module = import_module("diffusers.models.transformers.transformer_cosmos")
    if not hasattr(module, "transforms"):
        resize = SimpleNamespace(resize=lambda mask, size, interpolation: mask)
        stub = SimpleNamespace(functional=resize, InterpolationMode=SimpleNamespace(NEAREST=0))
        monkeypatch.setattr(module, "transforms", stub, raising=False)


@torch.no_grad()
def one_pass(model, inputs):
    found = model(**inputs, return_dict=False)[0]
    return found[0] if isinstance(found, list) else found


@pytest.mark.parametrize("name", THIN)
def test_diffusers_loads_it_and_computes_the_same(tmp_path, name):
    one = THIN[name]
    expected, original = thin(name)
    folder = tmp_path / "folder"
    result = blockmerge.convert(written(tmp_path, name), folder, naming="diffusers")
    assert sorted(path.name for path in folder.iterdir()) == ["model_index.json", "scheduler", "transformer"]
    loaded, told = getattr(diffusers, one.kind).from_pretrained(
        folder, subfolder="transformer", output_loading_info=True
    )
    assert {what: list(names) for what, names in told.items() if names} == {}
    for key, value in one.config.items():
        assert loaded.config[key] == value or list(loaded.config[key]) == list(value), key
    assert_same(loaded.state_dict(), expected.state_dict())
    assert torch.equal(one_pass(loaded.eval(), one.inputs), one_pass(expected, one.inputs))
    for dropped in one.drops:
        assert any(dropped in note for note in result.notes), dropped

    index, scheduler = (
        json_of(folder / "model_index.json"),
        json_of(folder / "scheduler/scheduler_config.json"),
    )
    assert index["_class_name"] == one.pipeline
    assert hasattr(diffusers, one.pipeline)
    assert index["transformer"] == ["diffusers", one.kind]
    assert index["scheduler"] == ["diffusers", scheduler["_class_name"]]
    diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")

    back = tmp_path / "back.safetensors"
    blockmerge.convert(folder, back, naming="ldm")
    assert_same(load_file(back), {own: tensor for own, tensor in original.items() if own not in one.drops})


@pytest.mark.parametrize("name", ["dev", "sd3.5-medium", "z_image", "lumina2", "cosmos"])
def test_names_in_a_folder_do_not_matter_to_a_merge(tmp_path, name):
    drops = THIN[name].drops
    files = [written(tmp_path, name, seed) for seed in (0, 1)]
    folders = [in_folder(tmp_path, name, seed) for seed in (0, 1)]
    expected = None
    for a, b in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        output = tmp_path / f"merged-{a}{b}.safetensors"
        pair = (folders[0] if a else files[0]), (folders[1] if b else files[1])
        blockmerge.merge(*pair, output=output, weights=0.3, naming="ldm")
        found = load_file(output)
        expected = found if expected is None else expected
        assert found.keys() | drops.keys() == expected.keys()
        # What no model uses comes from the one that has it, where only one has.
        alike = found.keys() - drops.keys()
        assert_same({own: found[own] for own in alike}, {own: expected[own] for own in alike})


def test_a_merge_of_a_folder_is_a_folder_with_its_configs(tmp_path):
    a, b = in_folder(tmp_path, "dev"), written(tmp_path, "dev", 1)
    scheduler = a / "scheduler/scheduler_config.json"
    own = json_of(scheduler) | {"shift": 2.5}
    scheduler.write_text(json.dumps(own))
    (a / "tokenizer_2").mkdir()
    (a / "tokenizer_2/spiece.model").write_bytes(b"words")
    blockmerge.merge(a, b, output=tmp_path / "merged", weights=0.5)
    merged = tmp_path / "merged"
    assert json_of(merged / "scheduler/scheduler_config.json") == own
    assert (merged / "tokenizer_2/spiece.model").read_bytes() == b"words"
    blockmerge.merge(written(tmp_path, "dev"), b, output=tmp_path / "file.safetensors", weights=0.5)
    blockmerge.convert(merged, tmp_path / "back.safetensors", naming="ldm")
    assert_same(load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "file.safetensors"))


def test_configs_of_another_variant_are_not_taken(tmp_path):
    schnell = in_folder(tmp_path, "schnell", 1)
    result = blockmerge.merge(
        written(tmp_path, "dev"), schnell, output=tmp_path / "merged", naming="diffusers", weights=0.5
    )
    assert json_of(tmp_path / "merged/transformer/config.json")["guidance_embeds"] is True
    assert json_of(tmp_path / "merged/scheduler/scheduler_config.json")["use_dynamic_shifting"] is True
    assert any("of another variant of Flux.1" in note for note in result.notes)


def test_configs_of_another_kind_of_model_are_refused(tmp_path):
    medium, large = in_folder(tmp_path, "sd3"), written(tmp_path, "sd3.5-large")
    with pytest.raises(IncompatibleModelsError, match=r"configs of another kind of model.*qk_norm"):
        blockmerge.convert(large, tmp_path / "out", naming="diffusers", configs=medium)


def test_a_transformer_that_lacks_a_tensor_becomes_no_folder(tmp_path):
    _, original = thin("dev")
    for lost, says in (
        (
            "double_blocks.1.img_mlp.0.bias",
            r"is not a whole Flux\.1 transformer: it lacks 1 tensor \(.*img_mlp",
        ),
        ("guidance_in.out_layer.bias", r"cannot become a diffusers folder.*missing"),
    ):
        save_file({own: one for own, one in original.items() if own != lost}, tmp_path / "cut.safetensors")
        with pytest.raises(IncompatibleModelsError, match=says):
            blockmerge.convert(tmp_path / "cut.safetensors", tmp_path / "out", naming="diffusers")
        assert not (tmp_path / "out").exists()


def test_the_folder_of_the_transformer_alone_is_read(tmp_path):
    folder = in_folder(tmp_path, "z_image")
    expected = {own: one for own, one in thin("z_image")[1].items() if own not in THIN["z_image"].drops}
    blockmerge.convert(folder / "transformer", tmp_path / "alone.safetensors", naming="ldm")
    assert_same(load_file(tmp_path / "alone.safetensors"), expected)
    again = tmp_path / "again"
    blockmerge.convert(folder / "transformer", again, naming="diffusers")
    assert_same(read(again), read(folder))


def test_shards_are_read(tmp_path):
    folder = in_folder(tmp_path, "schnell")
    state = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    names = sorted(state)
    index = {}
    for number in range(3):
        shard = f"diffusion_pytorch_model-{number + 1:05}-of-00003.safetensors"
        save_file({name: state[name] for name in names[number::3]}, folder / "transformer" / shard)
        index |= dict.fromkeys(names[number::3], shard)
    (folder / "transformer/diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (folder / "model_index.json").unlink()
    shutil.rmtree(folder / "scheduler")
    for source in (folder, folder / "transformer"):
        output = tmp_path / "out.safetensors"
        blockmerge.convert(source, output, naming="ldm", overwrite=True)
        assert_same(load_file(output), thin("schnell")[1])


def test_anima_is_two_folders_that_its_own_blocks_load(tmp_path):
    state, _ = make_state_dicts(FAMILIES["anima"].sized((2, 6)))
    save_file(
        {f"net.{name.removeprefix(PREFIX)}": one for name, one in state.items()}, tmp_path / "a.safetensors"
    )
    folder = tmp_path / "folder"
    blockmerge.convert(tmp_path / "a.safetensors", folder, naming="diffusers")
    pipeline = diffusers.AnimaAutoBlocks().init_pipeline(str(folder))
    pipeline.load_components(["transformer", "text_conditioner", "scheduler"])
    assert pipeline.scheduler.config.shift == 3.0
    conditioner, told = diffusers.AnimaTextConditioner.from_pretrained(
        folder, subfolder="text_conditioner", output_loading_info=True
    )
    assert {what: list(names) for what, names in told.items() if names} == {}
    adapter = {
        name.removeprefix(f"{PREFIX}llm_adapter."): one
        for name, one in state.items()
        if "llm_adapter." in name
    }
    assert_same(conditioner.state_dict(), adapter)
    assert_same(pipeline.text_conditioner.state_dict(), adapter)
    assert len(pipeline.transformer.state_dict()) + len(adapter) == len(state)
    blockmerge.convert(folder, tmp_path / "back.safetensors", naming="ldm")
    assert_same(
        load_file(tmp_path / "back.safetensors"),
        {name.removeprefix(PREFIX): one for name, one in state.items()},
    )


PUBLISHED = {
    ("flux1", "", "schnell"): {
        "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False, "in_channels": 64,
        "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 19, "num_single_layers": 38,
        "patch_size": 1, "pooled_projection_dim": 768,
    },
    ("chroma", "", "base"): {
        "approximator_hidden_dim": 5120, "approximator_layers": 5, "approximator_num_channels": 64,
        "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "num_attention_heads": 24,
    },
    ("sd3", "medium", "medium"): {
        "attention_head_dim": 64, "caption_projection_dim": 1536, "in_channels": 16, "joint_attention_dim": 4096,
        "num_attention_heads": 24, "num_layers": 24, "out_channels": 16, "patch_size": 2,
        "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": None, "sample_size": 128,
        "dual_attention_layers": [],
    },
    ("sd3", "3.5-medium", "3.5-medium"): {
        "attention_head_dim": 64, "num_attention_heads": 24, "num_layers": 24, "pos_embed_max_size": 384,
        "qk_norm": "rms_norm", "dual_attention_layers": list(range(13)),
    },
    ("sd3", "3.5-large", "3.5-large"): {
        "attention_head_dim": 64, "num_attention_heads": 38, "num_layers": 38, "pos_embed_max_size": 192,
        "qk_norm": "rms_norm", "dual_attention_layers": [],
    },
    ("z_image", "", "base"): {
        "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "cap_feat_dim": 2560, "dim": 3840,
        "in_channels": 16, "n_heads": 30, "n_kv_heads": 30, "n_layers": 30, "n_refiner_layers": 2,
        "rope_theta": 256.0, "t_scale": 1000.0,
    },
    ("lumina2", "", "base"): {
        "axes_dim_rope": [32, 32, 32], "axes_lens": [300, 512, 512], "cap_feat_dim": 2304, "hidden_size": 2304,
        "in_channels": 16, "multiple_of": 256, "num_attention_heads": 24, "num_kv_heads": 8, "num_layers": 26,
    },
    ("cosmos_predict2", "", "base"): {
        "in_channels": 16, "num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 28, "mlp_ratio": 4,
        "text_embed_dim": 1024, "adaln_lora_dim": 256, "rope_scale": [1.0, 4.0, 4.0],
        "extra_pos_embed_type": None,
    },
    ("anima", "", "base"): {"num_attention_heads": 16, "num_layers": 28, "rope_scale": [1.0, 4.0, 4.0]},
}  # fmt: skip
"""{family, version, variant: of the published transformer/config.json}."""


@pytest.mark.parametrize("model", PUBLISHED, ids="-".join)
def test_full_size_configs_are_the_published_ones_and_build_their_shapes(model):
    name, version, variant = model
    family = FAMILIES[name].sized((38,) if version == "3.5-large" else FAMILIES[name].counts, version)
    shapes = {}
    for own, shape in family.layout.items():
        for place, origin in family.origins((own,), "ldm", "diffusers").items():
            rows = origin.rows
            parts = sum((one.stop - one.start) * shape[0] // one.of for one in rows) if shape else 0
            shapes[place] = (parts, *shape[1:]) if any(one.of > 1 for one in rows) else shape
    configs = folder_configs(shapes, family, variant=variant)
    config = configs["transformer/config.json"]
    assert {key: config[key] for key in PUBLISHED[model]} == PUBLISHED[model]
    for component in {place.partition("/")[0] for place in shapes}:
        config = configs[f"{component}/config.json"]
        with torch.device("meta"):
            built = getattr(diffusers, config["_class_name"]).from_config(config)
        expected = {f"{component}/{own}": tuple(one.shape) for own, one in built.state_dict().items()}
        assert expected == {
            place: shape for place, shape in shapes.items() if place.startswith(f"{component}/")
        }


def test_values_are_copied_bit_for_bit_in_half_precision(tmp_path):
    half = {own: one.to(torch.bfloat16) for own, one in thin("sd3.5-large")[1].items()}
    save_file(half, tmp_path / "half.safetensors")
    blockmerge.convert(tmp_path / "half.safetensors", tmp_path / "folder", naming="diffusers")
    blockmerge.convert(tmp_path / "folder", tmp_path / "back.safetensors", naming="ldm")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == half.keys()
    assert all(torch.equal(bits(back[own]), bits(one)) for own, one in half.items())


def test_a_model_of_no_known_family_becomes_no_folder(tmp_path):
    state = {
        f"blk.{n}.{part}.weight": torch.randn(8, 8) for n in range(6) for part in ("q", "k", "ff", "out")
    }
    save_file(state, tmp_path / "any.safetensors")
    with pytest.raises(IncompatibleModelsError, match="not known what a diffusers folder is to say"):
        blockmerge.convert(tmp_path / "any.safetensors", tmp_path / "out", naming="diffusers")
