"""Models that nobody has described: blocks found in their names, and what is never taken for such a model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import BlockmergeError, CheckpointError, IncompatibleModelsError, UnknownFamilyError
from blockmerge.anatomy import FAMILIES
from blockmerge.anatomy.numbered import numbered_lists
from blockmerge.checkpoints import Model, open_checkpoint
from blockmerge.demo import demo_layout, make_state_dicts
from tests.published import UNKNOWN, layouts, thin, write_sparse


def members(template, count, modules, **more):
    return [f"{template.format(n)}.{module}.weight" for n in range(count) for module in modules]


ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "input_layernorm")
SCHEMES = {
    # what: (names, {list: how many})
    "Llama": (
        [*members("model.layers.{}", 32, ATTENTION), "model.embed_tokens.weight", "lm_head.weight"],
        {"model.layers": 32},
    ),
    "GPT-2": ([*members("transformer.h.{}", 12, ("attn.c_attn", "mlp.c_fc", "ln_1")), "transformer.wte.weight"], {"transformer.h": 12}),
    "GPT-NeoX": (members("gpt_neox.layers.{}", 6, ("attention.dense", "mlp.dense_4h_to_h")), {"gpt_neox.layers": 6}),
    "T5": (
        [
            *members("encoder.block.{}", 24, ("layer.0.SelfAttention.q", "layer.0.layer_norm", "layer.1.DenseReluDense.wi_0")),
            *members("decoder.block.{}", 24, ("layer.0.SelfAttention.q", "layer.1.EncDecAttention.q", "layer.2.layer_norm")),
            "shared.weight",
        ],
        {"encoder.block": 24, "decoder.block": 24},
    ),
    "CLIP": (
        [
            *members("text_model.encoder.layers.{}", 12, ("self_attn.q_proj", "mlp.fc1")),
            *members("vision_model.encoder.layers.{}", 24, ("self_attn.q_proj", "mlp.fc1")),
            "logit_scale",
        ],
        {"text_model.encoder.layers": 12, "vision_model.encoder.layers": 24},
    ),
    "ViT": (members("vit.encoder.layer.{}", 12, ("attention.attention.query", "intermediate.dense")), {"vit.encoder.layer": 12}),
    "BERT": (members("bert.encoder.layer.{}", 12, ("attention.self.query", "output.dense")), {"bert.encoder.layer": 12}),
    "Mixtral": (
        [
            f"model.layers.{layer}.{part}.weight"
            for layer in range(4)
            for part in ("self_attn.q_proj", *(f"block_sparse_moe.experts.{e}.w{w}" for e in range(8) for w in (1, 2, 3)))
        ],
        {"model.layers": 4},
    ),
    "Qwen2-VL": (
        [
            *members("visual.blocks.{}", 32, ("attn.qkv", "mlp.fc1")),
            *members("model.layers.{}", 28, ATTENTION),
        ],
        {"visual.blocks": 32, "model.layers": 28},
    ),
    "Whisper": (
        [
            *members("model.encoder.layers.{}", 6, ("self_attn.k_proj", "fc1")),
            *members("model.decoder.layers.{}", 6, ("self_attn.k_proj", "encoder_attn.k_proj", "fc1")),
        ],
        {"model.encoder.layers": 6, "model.decoder.layers": 6},
    ),
    "PixArt": ([*members("blocks.{}", 28, ("attn.qkv", "cross_attn.q_linear", "mlp.fc1")), "t_block.1.weight"], {"blocks": 28}),
    "Stable Cascade": (
        [
            f"{way}_blocks.{level}.{n}.{module}"
            for way in ("down", "up")
            for level, count in ((0, 24), (1, 72))
            for n in range(count)
            for module in (
                ("channelwise.0.weight", "channelwise.4.weight", "depthwise.weight"),
                ("mapper.weight", "mapper.bias"),
                ("attention.attn.in_proj_weight", "kv_mapper.1.weight"),
            )[n % 3]
        ]
        + ["clf.1.weight", "clip_txt_mapper.weight"],
        {"down_blocks.0": 24, "down_blocks.1": 72, "up_blocks.0": 24, "up_blocks.1": 72},
    ),
    "HiDream": (
        [
            *members("double_stream_blocks.{}", 16, ("block.attn1.to_q", "block.ff_i.w1")),
            *members("single_stream_blocks.{}", 32, ("block.attn1.to_q", "block.ff_i.w1")),
            "caption_projection.0.linear.weight",
            "caption_projection.1.linear.weight",
        ],
        {"double_stream_blocks": 16, "single_stream_blocks": 32},
    ),
    "Cosmos 1": (
        [f"net.blocks.block{n}.blocks.{m}.{part}.weight" for n in range(28) for m in range(3) for part in ("block.attn.to_q.0", "adaLN_modulation.1")],
        {"net.blocks.block": 28},
    ),
    "heads and projections": (["mlp.0.weight", "mlp.2.weight", "proj.0.weight", "proj.1.weight", "proj.3.weight"], {}),
    "an upscaler": (members("body.{}", 8, ("rdb1.conv1", "rdb1.conv2", "rdb2.conv1")), {"body": 8}),
    "numbers from 1": (members("layers.{}", 4, ("a", "b"))[2:], {}),
}  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lists_of_blocks(scheme):
    names, lists = SCHEMES[scheme]
    assert {one.path: one.count for one in numbered_lists(names)} == lists


@pytest.mark.parametrize("layout", UNKNOWN)
def test_blocks_of_published_models(tmp_path, layout):
    shapes = {
        name.removeprefix("model.diffusion_model."): shape for name, shape in thin(layouts()[layout]).items()
    }
    for prefix in ("", "model.diffusion_model."):
        path = write_sparse(
            tmp_path / "x.safetensors", {prefix + name: shape for name, shape in shapes.items()}
        )
        model = Model.of(open_checkpoint(path))
        family = model.anatomy.family
        assert family.name == "any"
        assert {one.path: one.count for one in family.found} == UNKNOWN[layout]
        assert len(family.blocks) == 1 + sum(UNKNOWN[layout].values())
        assert {family.block_of(name) for name in model.tensors} == set(family.blocks)
        assert any("its blocks are its numbered lists" in note for note in model.notes)


def small(seed, layers=3, extra=(), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    names = [*members("model.layers.{}", layers, ATTENTION), "model.embed_tokens.weight", *extra]
    return {name: torch.randn(6, 4, generator=generator).to(dtype) for name in names}


def test_a_merge_by_blocks(tmp_path):
    a, b = small(1), small(2)
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    weights = {"BASE": 0.25, "L00": 0.0, "L01": 0.5, "L02": 1.0}
    text = ",".join(f"{block}={weight}" for block, weight in weights.items())
    result = blockmerge.merge(
        tmp_path / "a.safetensors",
        tmp_path / "b.safetensors",
        weights=text,
        output=tmp_path / "o.safetensors",
    )
    assert result.family == "any"
    assert any("3 of model.layers" in note for note in result.notes)
    merged = load_file(tmp_path / "o.safetensors")
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        block = f"L{int(name.split('.')[2]):02}" if ".layers." in name else "BASE"
        exact = a[name].double() * (1 - weights[block]) + b[name].double() * weights[block]
        assert torch.equal(tensor, exact.float()), name
    inspected = blockmerge.inspect(tmp_path / "o.safetensors")
    assert {block: part.tensors for block, part in inspected.blocks.items()} == dict.fromkeys(
        ("L00", "L01", "L02"), 4
    ) | {"BASE": 1}
    found = blockmerge.explain(
        tmp_path / "o.safetensors", [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    )
    assert {
        block: origin.weights["b.safetensors"] for block, origin in found.blocks.items()
    } == pytest.approx(weights)
    compared = blockmerge.similarity(
        tmp_path / "a.safetensors", [tmp_path / "b.safetensors"], method="weights"
    )
    assert set(compared.references[0].blocks) == {"BASE", "L00", "L01", "L02"}


@pytest.mark.parametrize("template", ["block{}", "stage{}.inner", "Blocks.Block{}", "my-blocks.{}"])
def test_numbers_in_words_and_dashes(tmp_path, template):
    a, b = (
        {name: torch.full((2, 2), value) for name in members(template, 3, ("q", "k", "v"))}
        for value in (0.0, 1.0)
    )
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    output = tmp_path / "o.safetensors"
    result = blockmerge.merge(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", weights="L01=0.5,L02=1", output=output
    )
    assert {name: float(tensor[0, 0]) for name, tensor in load_file(output).items()} == {
        name: [0.0, 0.5, 1.0][int("".join(filter(str.isdigit, name)))] for name in a
    }
    assert blockmerge.verify(output).same
    assert result.weights["L01"] == 0.5


def test_blocks_whose_paths_hold_dashes(tmp_path):
    a, b = (
        {
            name: torch.full((2, 2), value)
            for name in [*members("Enc-a.blocks.{}", 3, ("q", "k")), *members("dec.blocks.{}", 2, ("q", "k"))]
        }
        for value in (0.0, 1.0)
    )
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    output = tmp_path / "o.safetensors"
    text = "Enc-a.blocks.00-Enc-a.blocks.01=0.5,enc-a.blocks.02=1,dec.blocks.01=0.25"
    blockmerge.merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", weights=text, output=output)
    found = {
        name.removesuffix(".q.weight"): float(tensor[0, 0])
        for name, tensor in load_file(output).items()
        if ".q." in name
    }
    assert found == {
        "Enc-a.blocks.0": 0.5,
        "Enc-a.blocks.1": 0.5,
        "Enc-a.blocks.2": 1.0,
        "dec.blocks.0": 0.0,
        "dec.blocks.1": 0.25,
    }
    assert blockmerge.verify(output).same


def test_components_beside_an_unknown_model(tmp_path):
    """Text encoders and VAE are components, whose lists are no blocks, with a prefix or without."""
    beside = [
        *members("text_encoders.umt5xxl.transformer.encoder.block.{}", 3, ("a", "b")),
        *members("vae.decoder.up.{}.block.0", 4, ("conv1", "norm1")),
    ]
    for prefix in ("", "model.diffusion_model.", "net."):
        names = [prefix + name for name in members("blocks.{}", 3, ATTENTION)] + beside
        for value, letter in ((0.0, "a"), (1.0, "b")):
            save_file({name: torch.full((2, 2), value) for name in names}, tmp_path / f"{letter}.safetensors")
        files = [tmp_path / f"{letter}.safetensors" for letter in "ab"]
        output = tmp_path / "o.safetensors"
        blockmerge.merge(*files, weights="BASE=0.25,L01=0.5", output=output, overwrite=True)
        kept = load_file(output)
        assert all(float(kept[name][0, 0]) == 0 for name in beside)
        blockmerge.merge(
            *files,
            weights="BASE=0.25,L01=0.5",
            output=output,
            overwrite=True,
            text_encoder="blend",
            vae="blend",
        )
        blended = load_file(output)
        assert all(float(blended[name][0, 0]) == 0.25 for name in beside), prefix
        for merged in (kept, blended):
            core = {name: float(tensor[0, 0]) for name, tensor in merged.items() if name not in beside}
            assert {value for name, value in core.items() if "blocks.1." in name} == {0.5}
            assert {value for name, value in core.items() if "blocks.1." not in name} == {0.0}


def test_the_same_in_memory():
    a, b = small(1), small(2)
    merged = blockmerge.merge_state_dicts(a, b, weights="L00-L02=0..1")
    for name in a:
        weight = {"0": 0.0, "1": 0.5, "2": 1.0}.get(name.split(".")[2], 0.0) if ".layers." in name else 0.0
        assert torch.equal(merged[name], torch.lerp(a[name].double(), b[name].double(), weight).float()), name


def test_other_names_or_shapes_are_refused(tmp_path):
    a = tmp_path / "a.safetensors"
    save_file(small(1), a)
    others = {
        "another tensor": (small(2, extra=["model.more.weight"]), r"a.safetensors lacks 1 model tensor of the other \(model.more.weight\)"),
        "one less": ({k: v for k, v in small(2).items() if "embed" not in k}, "lacks 1 model tensor"),
        "another shape": (small(2) | {"model.embed_tokens.weight": torch.zeros(7, 4)}, r"embed_tokens.weight \(shapes differ: \[6, 4\], \[7, 4\]"),
        "more blocks": (small(2, layers=4), "with 3 model.layers and b.safetensors is .* with 4 model.layers"),
    }  # fmt: skip
    for tensors, says in others.values():
        save_file(tensors, tmp_path / "b.safetensors")
        with pytest.raises(IncompatibleModelsError, match=says):
            blockmerge.merge(a, tmp_path / "b.safetensors", weights=0.5, output=tmp_path / "o.safetensors")
        assert not (tmp_path / "o.safetensors").exists()


QUANTISED = {
    "gptq": {f"model.layers.{n}.self_attn.q_proj.{part}": torch.zeros(4, 4, dtype=torch.int32) for n in range(3) for part in ("qweight", "qzeros")},
    "int8": {f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(6, 4, dtype=torch.int8) for n in range(3)},
    "nf4": {f"model.layers.{n}.self_attn.q_proj.weight": torch.zeros(12, 1, dtype=torch.uint8) for n in range(3)}
    | {f"model.layers.{n}.self_attn.q_proj.weight.absmax": torch.zeros(1) for n in range(3)}
    | {f"model.layers.{n}.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4": torch.zeros(9, dtype=torch.uint8) for n in range(3)},
}  # fmt: skip


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_refused(tmp_path, kind):
    for letter in "ab":
        save_file({**small(1), **QUANTISED[kind]}, tmp_path / f"{letter}.safetensors")
    with pytest.raises(BlockmergeError) as caught:
        blockmerge.merge(
            tmp_path / "a.safetensors",
            tmp_path / "b.safetensors",
            weights=0.5,
            output=tmp_path / "o.safetensors",
        )
    assert isinstance(caught.value, (CheckpointError, UnknownFamilyError))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o.safetensors").exists()


NEVER = {
    "a LoRA": [f"transformer.transformer_blocks.{n}.attn.to_q.lora_{side}.weight" for n in range(4) for side in "AB"],
    "kohya's LoRA": [f"lora_unet_double_blocks_{n}_img_attn_qkv.lora_{side}.weight" for n in range(4) for side in ("up", "down")],
    "LoKr": [f"model.layers.{n}.{part}.lokr_w{k}" for n in range(4) for part in ("q", "k") for k in (1, 2)],
    "a ControlNet of Flux": [
        *members("transformer_blocks.{}", 5, ("attn.to_q", "attn.add_q_proj", "ff.net.0.proj")),
        *members("controlnet_blocks.{}", 5, ("a", "b")),
        "controlnet_x_embedder.weight",
        "x_embedder.weight",
    ],
    "an IP-Adapter": ["image_proj.proj.weight", *members("ip_adapter.{}", 8, ("to_k_ip", "to_v_ip"))],
    "a ControlNet of Z-Image": [
        *members("control_layers.{}", 6, ("attention.to_q", "after_proj", "feed_forward.w1")),
        "control_all_x_embedder.2-1.weight",
    ],
    "PuLID": [*members("pulid_ca.{}", 4, ("to_q", "to_out")), *members("pulid_encoder.layers.{}", 4, ("a", "b"))],
    "IA3": [f"transformer.blocks.{n}.{part}.ia3_l" for n in range(4) for part in ("k", "v")],
    "a VAE in a model": [
        *members("model.decoder.up.{}.block.0", 4, ("conv1", "conv2", "norm1")),
        "model.decoder.conv_in.weight",
    ],
    "a part of SD3.5 medium": members("joint_blocks.{}.x_block", 4, ("attn2.qkv", "attn2.proj", "attn2.ln_q", "attn2.ln_k")),
    "a part of Flux under another prefix": [
        *members("unet.double_blocks.{}", 3, ("img_attn.qkv", "img_attn.proj", "txt_attn.qkv")),
        "unet.final_layer.linear.weight",
    ],
    "a VAE": [
        *members("encoder.down.{}.block.0", 4, ("conv1", "conv2", "norm1")),
        *members("decoder.up.{}.block.0", 4, ("conv1", "conv2", "norm1")),
        "decoder.conv_in.weight",
        "encoder.conv_in.weight",
    ],
    "no list": ["a.weight", "b.weight", "c.0.weight"],
}  # fmt: skip


@pytest.mark.parametrize("kind", NEVER)
def test_what_is_no_model_is_never_merged(tmp_path, kind):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save_file({name: torch.ones(2, 2) for name in NEVER[kind]}, path)
    with pytest.raises(UnknownFamilyError):
        blockmerge.merge(*paths, weights=0.5, output=tmp_path / "o.safetensors")


def test_a_lone_shard_is_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        save_file(small(1), tmp_path / folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UnknownFamilyError, match="is one of the 2 shards of a model"):
        blockmerge.merge(
            tmp_path / "a" / "model-00001-of-00002.safetensors",
            tmp_path / "b" / "model-00001-of-00002.safetensors",
            weights=0.5,
            output=tmp_path / "o.safetensors",
        )


def test_folders_of_language_models(tmp_path):
    """Shards and an index; config and tokenizer lie beside the output's weights, as A has them."""
    a, b = small(1), small(2)
    for folder, tensors in (("a", a), ("b", b)):
        home = tmp_path / folder
        home.mkdir()
        (home / "config.json").write_text(
            json.dumps({"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "of": folder})
        )
        (home / "tokenizer.json").write_text(json.dumps({"of": folder}))
        names = sorted(tensors)
        shards = {
            "model-00001-of-00002.safetensors": names[:5],
            "model-00002-of-00002.safetensors": names[5:],
        }
        for shard, held in shards.items():
            save_file({name: tensors[name] for name in held}, home / shard)
        index = {
            "metadata": {},
            "weight_map": {name: shard for shard, held in shards.items() for name in held},
        }
        (home / "model.safetensors.index.json").write_text(json.dumps(index))
    for output in ("o.safetensors", "merged"):
        blockmerge.merge(tmp_path / "a", tmp_path / "b", weights=0.5, output=tmp_path / output)
    halves = {name: torch.lerp(a[name].double(), b[name].double(), 0.5).float() for name in a}
    for path in (tmp_path / "o.safetensors", tmp_path / "merged" / "model.safetensors"):
        merged = load_file(path)
        assert merged.keys() == halves.keys()
        assert all(torch.equal(merged[name], halves[name]) for name in halves)
    for file in ("config.json", "tokenizer.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()
    again = blockmerge.merge(tmp_path / "merged", tmp_path / "b", weights=1, output=tmp_path / "again")
    assert again.family == "any"


def test_a_lone_transformers_folder_stays_one(tmp_path):
    for number, model in enumerate(make_state_dicts("lumina2")):
        save_file(model, tmp_path / f"{number}.safetensors")
        blockmerge.convert(
            tmp_path / f"{number}.safetensors", output=tmp_path / f"{number}", naming="diffusers"
        )
    a, b = (tmp_path / number / "transformer" for number in "01")
    blockmerge.merge(a, b, weights=0.25, output=tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in a.iterdir()}
    blockmerge.merge(tmp_path / "0", tmp_path / "1", weights=0.25, output=tmp_path / "whole")
    name = "diffusion_pytorch_model.safetensors"
    lone, full = (load_file(path / name) for path in (tmp_path / "out", tmp_path / "whole" / "transformer"))
    assert lone.keys() == full.keys()
    assert all(torch.equal(lone[one], full[one]) for one in full)


def test_a_components_folder_has_no_config_for_other_shapes(tmp_path):
    """The first layer of Flux Fill has more columns than A's config says."""
    family = FAMILIES["flux1"].sized((2, 2))
    a = {name: torch.ones(shape).half() for name, shape in demo_layout(family).items()}
    save_file(a, tmp_path / "a.safetensors")
    first = "model.diffusion_model.img_in.weight"
    save_file({**a, first: torch.ones(48, 384).half()}, tmp_path / "fill.safetensors")
    blockmerge.convert(tmp_path / "a.safetensors", output=tmp_path / "a", naming="diffusers")
    with pytest.raises(
        IncompatibleModelsError, match=r"config of transformer is not that of the output, .*x_embedder"
    ):
        blockmerge.merge(
            tmp_path / "a" / "transformer", tmp_path / "fill.safetensors", weights=0.5, output=tmp_path / "o"
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("folder", ["transformer", "unet", "prior"])
def test_pipelines_of_no_known_family_stay_folders(tmp_path, folder):
    """As of Wan or Qwen-Image: weights of the model are merged, all small files are A's."""
    names = members("blocks.{}", 3, ATTENTION)
    for value, letter in ((0.0, "a"), (1.0, "b")):
        home = tmp_path / letter
        for part, held in ((folder, names), ("vae", ["decoder.conv_in.weight"]), ("transformer_2", names)):
            (home / part).mkdir(parents=True)
            tensors = {name: torch.full((2, 2), value) for name in held}
            save_file(tensors, home / part / "diffusion_pytorch_model.safetensors")
            (home / part / "config.json").write_text(json.dumps({"of": letter}))
        index = {
            "_class_name": "SomePipeline",
            folder: ["x", "Y"],
            "vae": ["x", "Y"],
            "transformer_2": ["x", "Y"],
        }
        (home / "model_index.json").write_text(json.dumps(index))
    result = blockmerge.merge(
        tmp_path / "a", tmp_path / "b", weights="L01=0.5,L02=1", output=tmp_path / "out"
    )
    assert result.naming == "diffusers"
    merged = load_file(tmp_path / "out" / folder / "diffusion_pytorch_model.safetensors")
    assert {name: float(tensor[0, 0]) for name, tensor in merged.items()} == {
        name: {"0": 0.0, "1": 0.5, "2": 1.0}[name.split(".")[1]] for name in names
    }
    for path in (tmp_path / "a").rglob("*.json"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "a")).read_bytes() == path.read_bytes()
    second = load_file(tmp_path / "out" / "transformer_2" / "diffusion_pytorch_model.safetensors")
    assert all(float(tensor.sum()) == 0 for tensor in second.values())
    assert any("transformer_2" in note for note in result.notes)
