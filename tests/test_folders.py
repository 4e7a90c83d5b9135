"""diffusers folders as they are found: whole, in part, in shards, in variants, damaged.

Over 500 lines: the folders are variations of one.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from blockmerge import CheckpointError, open_checkpoint
from blockmerge.checkpoints import DiffusersFolder, is_diffusers_folder
from tests.test_bad_files import BAD

UNET = "diffusion_pytorch_model"


def tensors(seed, count=4):
    generator = torch.Generator().manual_seed(seed)
    return {f"layer.{number}": torch.randn(3, number + 1, generator=generator) for number in range(count)}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if (
        content
        and isinstance(content, dict)
        and all(isinstance(value, torch.Tensor) for value in content.values())
    ):
        save_file(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def write_shards(
    folder,
    content,
    stem=UNET,
    parts=2,
    index="{stem}.safetensors.index.json",
    shard="{stem}-{n:05}-of-{of:05}.safetensors",
):
    names = sorted(content)
    table = {}
    for number in range(parts):
        mine = names[number::parts]
        file = shard.format(stem=stem, n=number + 1, of=parts)
        write(folder / file, {name: content[name] for name in mine})
        table |= dict.fromkeys(mine, file)
    write(folder / index.format(stem=stem), {"metadata": {"total_size": 1}, "weight_map": table})
    return table


def read(checkpoint):
    """{name: tensor}, through one reader, so that it changes files between reads."""
    found = {}
    with checkpoint.reader() as reader:
        for name, info in reversed(checkpoint.tensors.items()):
            data = bytearray(info.nbytes)
            reader.read_into(info.offset, memoryview(data))
            found[name] = torch.frombuffer(data, dtype=torch.float32).view(info.shape)
    return found


def assert_holds(checkpoint, **components):
    expected = {
        f"{part}/{name}": tensor for part, content in components.items() for name, tensor in content.items()
    }
    found = read(checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert checkpoint.read(name) == tensor.numpy().tobytes()


@pytest.fixture
def pipeline(tmp_path):
    folder = tmp_path / "model"
    write(
        folder / "model_index.json",
        {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]},
    )
    write(folder / "unet" / f"{UNET}.safetensors", tensors(1))
    write(folder / "vae" / f"{UNET}.safetensors", tensors(2))
    write(folder / "text_encoder" / "model.safetensors", tensors(3))
    for part in ("unet", "vae", "text_encoder"):
        write(folder / part / "config.json", {"part": part})
    write(folder / "scheduler" / "scheduler_config.json", {})
    write(folder / "tokenizer" / "vocab.json", {})
    write(folder / "tokenizer" / "merges.txt", b"a b")
    return folder


def test_a_whole_pipeline(pipeline):
    write(pipeline / "unet" / f"{UNET}.non_ema.safetensors", tensors(9))
    write(pipeline / "unet" / "model.onnx", b"x")
    write(pipeline / "unet" / "flax_model.msgpack", b"x")
    write(pipeline / "unet" / ".DS_Store", b"x")
    write(pipeline / "unet" / "deep" / "file.json", {})
    write(pipeline / "unet" / "README.md", b"x")
    write(pipeline / "unet" / "pipeline.py", b"x")
    write(pipeline / "scheduler" / "state.pkl", b"x")
    write(pipeline / "v1-5-pruned.safetensors", tensors(9))
    write(pipeline / "pictures" / "cat.png", b"x")
    write(pipeline / "checkpoint-500" / "model.safetensors", tensors(9))
    with (pipeline / "tokenizer" / "huge.json").open("wb") as file:
        file.truncate(1 << 30)
    folder = open_checkpoint(pipeline)
    assert isinstance(folder, DiffusersFolder)
    assert (folder.name, folder.path, folder.metadata) == ("model", pipeline, {})
    assert folder.components == {"text_encoder": "model", "unet": UNET, "vae": UNET}
    assert folder.carried == (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "vae/config.json",
    )
    assert {path.relative_to(pipeline).as_posix() for path in folder.files} == {
        "text_encoder/model.safetensors",
        f"unet/{UNET}.safetensors",
        f"vae/{UNET}.safetensors",
    }
    assert_holds(folder, unet=tensors(1), vae=tensors(2), text_encoder=tensors(3))


def test_stretches_of_two_files_never_touch(pipeline):
    infos = sorted(open_checkpoint(pipeline).tensors.items(), key=lambda item: item[1].offset)
    for (name, info), (after, following) in itertools.pairwise(infos):
        end = info.offset + info.nbytes
        assert (
            end == following.offset if name.split("/")[0] == after.split("/")[0] else end < following.offset
        )


def test_a_folder_by_any_path(pipeline, monkeypatch):
    monkeypatch.chdir(pipeline)
    assert (
        open_checkpoint(".").name
        == open_checkpoint("unet/..").name
        == open_checkpoint(f"{pipeline}/").name
        == "model"
    )


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_component_by_itself(pipeline, part):
    folder = open_checkpoint(pipeline / part)
    assert list(read(folder)) == list(reversed(tensors(0)))
    assert folder.components == {"": "model" if part == "text_encoder" else UNET}
    assert folder.carried == ("config.json",)
    assert folder.name == part


def test_parts_that_are_missing_are_just_not_there(pipeline):
    shutil.rmtree(pipeline / "text_encoder")
    (pipeline / "vae" / f"{UNET}.safetensors").unlink()
    (pipeline / "model_index.json").unlink()
    folder = open_checkpoint(pipeline)
    assert folder.components == {"unet": UNET}
    assert_holds(folder, unet=tensors(1))


def test_a_part_that_only_the_model_index_names(pipeline):
    write(pipeline / "prior" / "model.safetensors", tensors(5))
    assert "prior/layer.0" not in open_checkpoint(pipeline).tensors
    write(pipeline / "model_index.json", {"prior": ["transformers", "CLIPTextModel"]})
    assert "prior/layer.0" in open_checkpoint(pipeline).tensors


@given(parts=st.integers(1, 5), count=st.integers(5, 9))
def test_shards(tmp_path_factory, parts, count):
    home = tmp_path_factory.mktemp("sharded")
    content = tensors(7, count)
    write_shards(home / "unet", content, parts=parts)
    folder = open_checkpoint(home)
    assert len(folder.files) == parts
    assert_holds(folder, unet=content)
    assert folder.components == {"unet": UNET}


SPELLINGS = {
    "now": ("{stem}.safetensors.index.fp16.json", "{stem}.fp16-{n:05}-of-{of:05}.safetensors"),
    "old": ("{stem}.safetensors.fp16.index.json", "{stem}-{n:05}-of-{of:05}.fp16.safetensors"),
    "third": ("{stem}.fp16.safetensors.index.json", "{stem}.fp16-{n:05}-of-{of:05}.safetensors"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_sharded_variants(pipeline, spelling):
    index, shard = SPELLINGS[spelling]
    write_shards(pipeline / "unet", tensors(10), index=index, shard=shard)
    assert_holds(open_checkpoint(pipeline), unet=tensors(1), vae=tensors(2), text_encoder=tensors(3))
    variant = open_checkpoint(pipeline, variant="fp16")
    assert_holds(variant, unet=tensors(10), vae=tensors(2), text_encoder=tensors(3))
    assert not [name for name in variant.carried if ".index." in name]


def test_what_diffusers_and_transformers_write(tmp_path):
    """Their own writers, single and in shards, with and without a variant."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=8)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=99, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    )
    for variant in (None, "fp16"):
        for size in ("1GB", "2KB"):
            home = tmp_path / f"{variant}-{size}"
            vae.save_pretrained(home / "vae", variant=variant, max_shard_size=size)
            options = {"variant": variant} if variant else {}
            text.save_pretrained(home / "text_encoder", max_shard_size=size, **options)
            folder = open_checkpoint(home, variant=variant)
            assert (len(folder.files) > 2) == (size == "2KB")
            found = read(folder)
            for name, tensor in vae.state_dict().items():
                assert torch.equal(found[f"vae/{name}"], tensor), name
            assert sum(name.startswith("vae/") for name in found) == len(vae.state_dict())
            assert sum(name.startswith("text_encoder/") for name in found) == len(text.state_dict())


def test_variants(pipeline):
    write(pipeline / "unet" / f"{UNET}.fp16.safetensors", tensors(11))
    write(pipeline / "text_encoder" / "model.fp16.safetensors", tensors(13))
    write(pipeline / "unet" / f"{UNET}.non_ema.safetensors", tensors(12))
    assert_holds(open_checkpoint(pipeline), unet=tensors(1), vae=tensors(2), text_encoder=tensors(3))
    assert_holds(
        open_checkpoint(pipeline, variant="fp16"), unet=tensors(11), vae=tensors(2), text_encoder=tensors(13)
    )
    assert_holds(
        open_checkpoint(pipeline, variant="non_ema"),
        unet=tensors(12),
        vae=tensors(2),
        text_encoder=tensors(3),
    )
    refused(
        pipeline,
        "no weights of the variant 'fp61': it has fp16, non_ema; did you mean 'fp16'?",
        variant="fp61",
    )
    assert open_checkpoint(pipeline).notes == ()
    assert open_checkpoint(pipeline, variant="non_ema").notes == (
        "has no variant non_ema of text_encoder, vae: the plain weights are used",
    )
    (pipeline / "unet" / f"{UNET}.safetensors").unlink()
    refused(
        pipeline,
        "model has several variants and no plain weights (unet: fp16, non_ema): "
        "choose one with variant='fp16' (--variant fp16)",
    )
    refused(
        pipeline,
        "has several variants and neither plain weights nor the variant 'fp61' (unet: fp16, non_ema): choose",
        variant="fp61",
    )
    (pipeline / "vae" / f"{UNET}.safetensors").rename(pipeline / "vae" / f"{UNET}.bf16.safetensors")
    folder = open_checkpoint(pipeline, variant="fp16")
    assert_holds(folder, unet=tensors(11), vae=tensors(2), text_encoder=tensors(13))
    assert folder.notes == ("has only the variant bf16 of vae: it is used",)


def as_variant(folder, variant):
    """Make the weights in a folder, or of one component, those of a variant alone."""
    for path in [*folder.rglob("*.safetensors"), *folder.rglob("*.bin")]:
        path.rename(path.with_suffix(f".{variant}{path.suffix}"))


def test_one_sole_variant_is_taken_and_said(pipeline):
    as_variant(pipeline, "fp16")
    for variant in (None, "fp16"):
        folder = open_checkpoint(pipeline, variant=variant)
        assert_holds(folder, unet=tensors(1), vae=tensors(2), text_encoder=tensors(3))
        assert folder.notes == (() if variant else ("has only the variant fp16: it is used",))
        assert (folder.variants, set(folder.used.values())) == (("fp16",), {"fp16"})
    assert open_checkpoint(pipeline / "vae").notes == ("has only the variant fp16: it is used",)
    assert open_checkpoint(pipeline / "vae").components == {"": UNET}
    refused(pipeline, "model has no weights of the variant 'fp32': it has fp16", variant="fp32")


def test_each_component_has_one_variant_of_its_own(pipeline):
    as_variant(pipeline / "unet", "fp16")
    as_variant(pipeline / "vae", "ema_only")
    folder = open_checkpoint(pipeline)
    assert_holds(folder, unet=tensors(1), vae=tensors(2), text_encoder=tensors(3))
    assert folder.notes == (
        "has only the variant fp16 of unet: it is used",
        "has only the variant ema_only of vae: it is used",
    )


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_sole_variant_in_shards_and_one_as_bin(pipeline, spelling):
    index, shard = SPELLINGS[spelling]
    (pipeline / "unet" / f"{UNET}.safetensors").unlink()
    write_shards(pipeline / "unet", tensors(10), index=index, shard=shard)
    (pipeline / "vae" / f"{UNET}.safetensors").unlink()
    torch.save(tensors(2), pipeline / "vae" / f"{UNET}.fp16.bin")
    folder = open_checkpoint(pipeline)
    assert_holds(folder, unet=tensors(10), vae=tensors(2), text_encoder=tensors(3))
    assert folder.notes == ("has only the variant fp16 of unet, vae: it is used",)


def test_several_variants_of_several_components_name_one_that_all_have(pipeline):
    write(pipeline / "unet" / f"{UNET}.fp32.safetensors", tensors(1))
    write(pipeline / "vae" / f"{UNET}.bf16.safetensors", tensors(2))
    for part in ("unet", "vae"):
        (pipeline / part / f"{UNET}.safetensors").rename(pipeline / part / f"{UNET}.non_ema.safetensors")
    refused(
        pipeline,
        "has several variants and no plain weights (unet: fp32, non_ema, vae: bf16, non_ema): "
        "choose one with variant='non_ema' (--variant non_ema)",
    )
    refused(pipeline / "vae", "vae has several variants and no plain weights (weights: bf16, non_ema)")
    assert open_checkpoint(pipeline, variant="non_ema").notes == (
        "has no variant non_ema of text_encoder: the plain weights are used",
    )


def test_a_variant_of_what_has_none(pipeline):
    refused(pipeline, "no weights of the variant 'fp16': it has only plain weights", variant="fp16")
    file = pipeline / "unet" / f"{UNET}.safetensors"
    refused(file, f"{UNET}.safetensors is not a diffusers folder", variant="fp16")
    refused(tensors(0), "state dict is not a diffusers folder", variant="fp16")
    refused(pipeline / "missing", "cannot open", "missing: no such file or directory", variant="fp16")


def test_safetensors_before_bin_and_plain_before_all(pipeline):
    write(pipeline / "unet" / f"{UNET}.bin", b"x")
    write(pipeline / "text_encoder" / "pytorch_model.bin", b"x")
    assert_holds(open_checkpoint(pipeline), unet=tensors(1), vae=tensors(2), text_encoder=tensors(3))


def test_symlinks_as_in_the_hubs_cache(pipeline, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for number, path in enumerate(sorted(pipeline.rglob("*.*"))):
        blob = blobs / f"{number:064x}"
        path.rename(blob)
        link = snapshot / path.relative_to(pipeline)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    folder = open_checkpoint(snapshot)
    assert_holds(folder, unet=tensors(1), vae=tensors(2), text_encoder=tensors(3))
    assert len(folder.carried) == 7


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_a_file_that_changes_meanwhile(pipeline, part):
    folder = open_checkpoint(pipeline)
    folder.check_unchanged()
    write(pipeline / part / f"{UNET}.safetensors", tensors(4))
    with pytest.raises(CheckpointError, match=f"{part}.*was changed"):
        folder.check_unchanged()


def test_a_file_cut_short_while_it_is_read_is_named_with_its_component(pipeline):
    folder = open_checkpoint(pipeline)
    with (pipeline / "vae" / f"{UNET}.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match=f"^model/vae/{UNET}.safetensors was cut short"):
        folder.read("vae/layer.3")


def refused(path, *says, variant=None):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, variant=variant)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    for word in says:
        assert word in line


@pytest.mark.parametrize("what", [what for what, (_, says) in BAD.items() if says != "no diffusion model"])
def test_bad_weights_are_refused_by_name(pipeline, what):
    data, says = BAD[what]
    write(pipeline / "vae" / f"{UNET}.safetensors", data)
    refused(pipeline, f"vae/{UNET}.safetensors is", *([says] if isinstance(says, str) else says))


BAD_INDEXES = {
    "no JSON": (b"{nope", "index.json is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "no UTF-8": (b'{"\xff": 1}', "is not valid JSON"),
    "a list": ([], "it is not an object"),
    "no map": ({"metadata": {}}, "has no weight_map"),
    "an empty map": ({"weight_map": {}}, "has no weight_map"),
    "a map to numbers": ({"weight_map": {"a": 1}}, "has no weight_map"),
    "a map that is a list": ({"weight_map": ["a"]}, "has no weight_map"),
    "a name twice": (b'{"weight_map": {"a": "x.bin", "a": "y.bin"}}', "it holds a twice"),
    "nested too deeply": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not valid JSON"),
    "another folder": ({"weight_map": {"a": "../vae/model.safetensors"}}, "not weights in its own folder: ../vae"),
    "another folder on Windows": ({"weight_map": {"a": "..\\vae\\model.safetensors"}}, "not weights in its own folder"),
    "an absolute path": ({"weight_map": {"a": "/etc/model.safetensors"}}, "not weights in its own folder"),
    "a drive": ({"weight_map": {"a": "c:model.safetensors"}}, "not weights in its own folder"),
    "no weights": ({"weight_map": {"a": "config.json"}}, "not weights in its own folder: config.json"),
    "the folder above": ({"weight_map": {"a": ".."}}, "not weights in its own folder"),
    "an overlong name": ({"weight_map": {"a": "x" * 5000 + ".safetensors"}}, "lists shards that are missing: xxx"),
    "half a surrogate pair": (b'{"weight_map": {"a": "\\ud800.safetensors"}}', "lists shards that are missing"),
    "a null character": ({"weight_map": {"a": "a\0.safetensors"}}, "not weights in its own folder"),
    "a missing shard": ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, "lists shards that are missing: one"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_INDEXES)
def test_bad_indexes_are_refused_by_name(pipeline, what):
    content, says = BAD_INDEXES[what]
    (pipeline / "unet" / f"{UNET}.safetensors").unlink()
    write(pipeline / "unet" / f"{UNET}.safetensors.index.json", content)
    refused(pipeline, f"unet/{UNET}.safetensors.index.json", says)


def test_shards_that_are_not_what_the_index_says(pipeline):
    (pipeline / "unet" / f"{UNET}.safetensors").unlink()
    table = write_shards(pipeline / "unet", tensors(1))
    first, second = sorted(set(table.values()))
    index = pipeline / "unet" / f"{UNET}.safetensors.index.json"
    write(index, {"weight_map": {**table, "layer.0": second}})
    refused(pipeline, f"{index.name} says that {second} holds layer.0: it does not")
    write(index, {"weight_map": table})
    everything = pipeline / "unet" / second
    whole = everything.read_bytes()
    save_file(tensors(1), everything)
    refused(pipeline, f"{second} holds layer.0, layer.2, which another shard holds too")
    everything.write_bytes(whole[:-5])
    refused(pipeline, f"unet/{second} is not a valid safetensors file: its data is cut short")
    everything.unlink()
    refused(pipeline, f"lists shards that are missing: {second}")
    everything.mkdir()
    refused(pipeline, f"unet/{second}", "is a folder")
    index.unlink()
    refused(pipeline, "unet holds shards", "without their index")


def test_pipes_and_dangling_links_are_refused(pipeline):
    weights = pipeline / "unet" / f"{UNET}.safetensors"
    weights.unlink()
    weights.symlink_to("nowhere")
    refused(pipeline, f"unet/{UNET}.safetensors", "no such file")
    weights.unlink()
    os.mkfifo(weights)
    refused(pipeline, "is not a regular file")
    weights.unlink()
    os.mkfifo(pipeline / "unet" / f"{UNET}.safetensors.index.json")
    refused(pipeline, "index.json is not a regular file")


def test_folders_that_are_no_model(tmp_path, pipeline):
    empty, checkpoints, configs = tmp_path / "empty", tmp_path / "checkpoints", tmp_path / "configs"
    empty.mkdir()
    write(checkpoints / "a.safetensors", tensors(1))
    write(checkpoints / "model.safetensors", tensors(1))
    write(configs / "unet" / "config.json", {})
    write(configs / "config.json", {})
    for folder in (empty, checkpoints, configs):
        refused(folder, f"{folder} is a folder without a model", "unet/")
        assert not is_diffusers_folder(folder)
    refused(tmp_path, "there are models in checkpoints, model, so give such a folder")
    write(configs / "model_index.json", {})
    refused(configs, "is a folder without a model")
    assert is_diffusers_folder(configs)
    write(pipeline / "model_index.json", b"{nope")
    refused(pipeline, "model_index.json is not valid JSON")


def test_what_is_a_diffusers_folder(pipeline, tmp_path):
    for path in (pipeline, pipeline / "unet", pipeline / "text_encoder"):
        assert is_diffusers_folder(path)
    (pipeline / "model_index.json").unlink()
    assert is_diffusers_folder(pipeline)
    for path in (
        pipeline / "tokenizer",
        pipeline / "unet" / "config.json",
        tmp_path / "missing",
        tmp_path,
        "nul\0",
    ):
        assert not is_diffusers_folder(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_bin_files(pipeline, zipped):
    """Single and in shards, beside safetensors of other components, as folders of 2022 are."""
    for part in ("unet", "text_encoder"):
        for path in (pipeline / part).glob("*.safetensors"):
            path.unlink()
    torch.save(
        tensors(20), pipeline / "text_encoder" / "pytorch_model.bin", _use_new_zipfile_serialization=zipped
    )
    shards = [
        {name: tensor for name, tensor in tensors(21).items() if name in names}
        for names in (("layer.0", "layer.3"), ("layer.1", "layer.2"))
    ]
    for number, shard in enumerate(shards):
        torch.save(
            shard,
            pipeline / "unet" / f"{UNET}-0000{number + 1}-of-00002.bin",
            _use_new_zipfile_serialization=zipped,
        )
    table = {
        name: f"{UNET}-0000{number + 1}-of-00002.bin" for number, shard in enumerate(shards) for name in shard
    }
    write(pipeline / "unet" / f"{UNET}.bin.index.json", {"weight_map": table})
    folder = open_checkpoint(pipeline)
    assert_holds(folder, unet=tensors(21), vae=tensors(2), text_encoder=tensors(20))
    assert folder.components == {"text_encoder": "model", "unet": UNET, "vae": UNET}
    assert len(folder.files) == 4
    write(pipeline / "text_encoder" / "pytorch_model.bin", b"x")
    refused(pipeline, "text_encoder/pytorch_model.bin")


def test_an_unreadable_folder(pipeline, monkeypatch):
    """Root may read everywhere, so the operating system's refusal is made by hand."""
    real = os.scandir

    def refuse(path):
        if str(path).endswith("vae"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    refused(pipeline, f"cannot open {pipeline}: permission denied")
