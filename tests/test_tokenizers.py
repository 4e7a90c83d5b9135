"""A folder made from a single file: it says which tokenizers it lacks, and takes them from wherever they are."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import blockmerge
from blockmerge import CheckpointError, IncompatibleModelsError
from tests.commands import ok
from tests.small_models import small_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

WHOSE = {
    "sd1": {"tokenizer": "openai/clip-vit-large-patch14"},
    "sd2": {"tokenizer": "stabilityai/stable-diffusion-2"},
    "sdxl": {
        "tokenizer": "openai/clip-vit-large-patch14",
        "tokenizer_2": "stabilityai/stable-diffusion-xl-base-1.0",
    },
    "sdxl_refiner": {"tokenizer_2": "stabilityai/stable-diffusion-xl-refiner-1.0"},
}


def write_tokenizer(folder):
    """A tokenizer of CLIP's kind, as transformers itself saves it, and as it was published."""
    folder.mkdir(parents=True)
    words = ["a</w>", "b</w>", "<|startoftext|>", "<|endoftext|>", "a", "b"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    (folder / "special_tokens_map.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Thin single files of each family, and folders of tokenizers."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for family in WHOSE:
        save_file(small_model(family, torch.float32, for_a_folder=True), folder / f"{family}.safetensors")
    one = write_tokenizer(folder / "clip")
    (one / "config.json").write_text("{}")
    (one / "README.md").write_text("as published: with all that surrounds it")
    for part in ("tokenizer", "tokenizer_2"):
        write_tokenizer(folder / "both" / part)
    return folder


def converted(home, tmp_path, family, configs=None, name="out"):
    source = home / f"{family}.safetensors"
    result = blockmerge.convert(source, tmp_path / name, naming="diffusers", configs=configs)
    index = json.loads((tmp_path / name / "model_index.json").read_text())
    return [note for note in result.notes if "tokenizer" in note], index


@pytest.mark.parametrize("family", WHOSE)
def test_without_one_it_is_said_what_will_fail_and_what_is_needed(home, tmp_path, family):
    (note,), index = converted(home, tmp_path, family)
    assert note.startswith("warning: the new folder lacks ")
    assert "loading it as a pipeline will fail" in note
    assert "--configs FOLDER" in note
    for part, whose in WHOSE[family].items():
        assert f"{part} (that of {whose})" in note
        assert index[part] == [None, None]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl_refiner"])
def test_a_tokenizers_folder_alone(home, tmp_path, family):
    notes, index = converted(home, tmp_path, family, home / "clip")
    assert notes == []
    (part,) = WHOSE[family]
    assert index[part] == ["transformers", "CLIPTokenizer"]
    assert {path.name for path in (tmp_path / "out" / part).iterdir()} == {
        "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
    }  # fmt: skip
    for file in (tmp_path / "out" / part).iterdir():
        assert file.read_bytes() == (home / "clip" / file.name).read_bytes()


def test_transformers_loads_it(home, tmp_path):
    """The pipeline's own loading asks just for this class in just this folder."""
    import transformers

    notes, index = converted(home, tmp_path, "sd1", home / "clip")
    assert notes == []
    loaded = getattr(transformers, index["tokenizer"][1]).from_pretrained(tmp_path / "out" / "tokenizer")
    assert loaded.convert_tokens_to_ids("<|endoftext|>") == 3


def test_the_pipeline_loads_with_it_and_not_without(home, tmp_path):
    import diffusers

    from blockmerge.demo import write_pair

    write_pair(tmp_path / "sd1.safetensors", tmp_path / "b.safetensors", "sd1")
    notes, _ = converted(tmp_path, tmp_path, "sd1", name="without")
    assert notes
    with pytest.raises((ValueError, OSError, TypeError)):
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "without")
    notes, _ = converted(tmp_path, tmp_path, "sd1", home / "clip", name="with")
    assert notes == []
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "with")
    assert pipe.tokenizer.convert_tokens_to_ids("<|startoftext|>") == 2


def test_one_that_is_a_single_file(home, tmp_path):
    import transformers

    fast = tmp_path / "fast"
    tokenizer = transformers.CLIPTokenizerFast.from_pretrained(home / "clip")
    tokenizer.save_pretrained(fast)
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (fast / name).unlink(missing_ok=True)
    notes, index = converted(home, tmp_path, "sd1", fast)
    assert notes == []
    loaded = getattr(transformers, index["tokenizer"][1]).from_pretrained(tmp_path / "out" / "tokenizer")
    assert loaded.convert_tokens_to_ids("<|endoftext|>") == 3


def test_a_family_with_two_says_which_folder_is_which(home, tmp_path):
    with pytest.raises(IncompatibleModelsError) as caught:
        converted(home, tmp_path, "sdxl", home / "clip")
    said = str(caught.value)
    assert said.startswith("clip is the folder of one tokenizer, and this Stable Diffusion XL output needs 2")
    for part, whose in WHOSE["sdxl"].items():
        assert f"{part} (that of {whose})" in said
    assert not (tmp_path / "out").exists()
    notes, index = converted(home, tmp_path, "sdxl", home / "both")
    assert notes == []
    for part in ("tokenizer", "tokenizer_2"):
        assert index[part] == ["transformers", "CLIPTokenizer"]
        assert (tmp_path / "out" / part / "merges.txt").is_file()


def test_one_of_two_is_still_told_of(home, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(home / "both" / "tokenizer", half / "tokenizer")
    (note,), index = converted(home, tmp_path, "sdxl", half)
    assert "lacks tokenizer_2 (that of" in note
    assert (index["tokenizer"][1], index["tokenizer_2"]) == ("CLIPTokenizer", [None, None])


def test_a_folder_of_configs_without_weights(home, tmp_path):
    """As it is when only the small files of a repository have been fetched."""
    converted(home, tmp_path, "sd1", home / "clip", name="whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "small", ignore=shutil.ignore_patterns("*.safetensors"))
    scheduler = tmp_path / "small" / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "beta_end": 0.0125}))
    (tmp_path / "small" / "safety_checker").mkdir()
    (tmp_path / "small" / "safety_checker" / "config.json").write_text("{}")  # whose weights are not here
    notes, index = converted(home, tmp_path, "sd1", tmp_path / "small")
    assert notes == []
    assert index["tokenizer"] == ["transformers", "CLIPTokenizer"]
    made = json.loads((tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text())
    assert made["beta_end"] == 0.0125
    assert not (tmp_path / "out" / "safety_checker").exists()


def test_what_is_neither_is_refused(home, tmp_path):
    (tmp_path / "empty").mkdir()
    for configs, says in (
        (tmp_path / "empty", "is a folder without a model"),
        (home / "sd1.safetensors", "is neither a diffusers folder nor a tokenizer's"),
        (tmp_path / "missing", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=says):
            converted(home, tmp_path, "sd1", configs)


def test_a_unet_alone_needs_none(home, tmp_path):
    model = small_model("sd1", torch.float32, for_a_folder=True)
    unet = {name: one for name, one in model.items() if name.startswith("model.diffusion_model.")}
    save_file(unet, tmp_path / "unet.safetensors")
    assert converted(tmp_path, tmp_path, "unet")[0] == []
    with pytest.raises(IncompatibleModelsError, match="has no text encoder to use it"):
        converted(tmp_path, tmp_path, "unet", home / "clip", name="other")


def test_merging_and_the_command(home, tmp_path, capsys):
    a = home / "sd1.safetensors"
    blockmerge.merge(a, a, weights=0.5, output=tmp_path / "m", naming="diffusers", configs=home / "clip")
    assert (tmp_path / "m" / "tokenizer" / "vocab.json").is_file()
    out = ok(capsys, "convert", a, tmp_path / "c", "--to", "diffusers", "--configs", home / "clip")
    assert "tokenizer" not in out
    out = ok(capsys, "convert", a, tmp_path / "d", "--to", "diffusers")
    assert "- warning: the new folder lacks tokenizer (that of openai/clip-vit-large-patch14)" in out
