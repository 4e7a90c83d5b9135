"""What a new folder takes from another: configs that fit its tensors, and a scheduler of the model's own
prediction.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import CheckpointError, IncompatibleModelsError
from blockmerge.merging.outputs import folder_files
from tests.refusals import assert_refused
from tests.small_models import small_model

SCHEDULER = "scheduler/scheduler_config.json"
UNET = "unet/config.json"
MARKERS = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
# diffusers with the newest numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two small models of each family as files, and the second as a folder that predicts noise."""
    folder = tmp_path_factory.mktemp("models")
    for family in ("sd1", "sd2", "sdxl"):
        for seed, name in enumerate("ab"):
            state = small_model(family, torch.float32, seed, for_a_folder=True)
            save_file(state, folder / f"{family}-{name}.safetensors")
        metadata = {"modelspec.architecture": "stable-diffusion-v2-512"} if family == "sd2" else None
        save_file(state, folder / "epsilon.safetensors", metadata)
        blockmerge.convert(folder / "epsilon.safetensors", folder / family, naming="diffusers")
        edit(folder / family / SCHEDULER, beta_end=0.0125)  # to be known again
    return folder


def edit(path, **changes):
    path.write_text(json.dumps({**parsed(path), **changes}))


def parsed(path):
    return json.loads(path.read_text())


def noted(result):
    return [note for note in result.notes if "scheduler_config.json" in note and "differ" not in note]


def marked(home, tmp_path, family, markers=MARKERS):
    save_file({**load_file(home / f"{family}-a.safetensors"), **markers}, tmp_path / "marked.safetensors")
    return tmp_path / "marked.safetensors"


def converted(home, tmp_path, model, family):
    return blockmerge.convert(model, tmp_path / "out", naming="diffusers", configs=home / family)


def merged(home, tmp_path, model, family):
    return blockmerge.merge(model, home / family, weights=0.5, output=tmp_path / "out", naming="diffusers")


@pytest.mark.parametrize("make", [converted, merged])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_marked_model_keeps_its_prediction(home, tmp_path, family, make):
    import diffusers

    result = make(home, tmp_path, marked(home, tmp_path, family), family)
    (note,) = noted(result)
    assert note.startswith("scheduler_config.json says v_prediction, as marked.safetensors is marked")
    config, index = parsed(tmp_path / "out" / SCHEDULER), parsed(tmp_path / "out" / "model_index.json")
    assert config["_class_name"] == index["scheduler"][1]
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(tmp_path / "out" / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.alphas_cumprod[-1] < 1e-7
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999
    # PNDM, which SD1 has, can do no such schedule.
    assert (config["beta_end"] == 0.0125) == (family == "sdxl")


def test_only_the_prediction_where_only_that_is_marked(home, tmp_path):
    converted(home, tmp_path, marked(home, tmp_path, "sd1", {"v_pred": torch.zeros(0)}), "sd1")
    assert parsed(tmp_path / "out" / SCHEDULER) == {
        **parsed(home / "sd1" / SCHEDULER),
        "prediction_type": "v_prediction",
    }


def test_metadata_of_sd2_tell_its_prediction(home, tmp_path):
    path = tmp_path / "m.safetensors"
    for architecture, prediction in (
        ("stable-diffusion-v2-768-v", "v_prediction"),
        ("stable-diffusion-v2-512", "epsilon"),
    ):
        save_file(load_file(home / "sd2-a.safetensors"), path, {"modelspec.architecture": architecture})
        result = blockmerge.convert(path, tmp_path / prediction, naming="diffusers", configs=home / "sd2")
        assert parsed(tmp_path / prediction / SCHEDULER)["prediction_type"] == prediction
        assert len(noted(result)) == (prediction == "v_prediction")


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_where_nothing_is_known_the_scheduler_stays(home, tmp_path, family):
    result = converted(home, tmp_path, home / f"{family}-a.safetensors", family)
    assert (tmp_path / "out" / SCHEDULER).read_bytes() == (home / family / SCHEDULER).read_bytes()
    assert noted(result) == []
    made = blockmerge.convert(home / f"{family}-a.safetensors", tmp_path / "made", naming="diffusers")
    assert len(noted(made)) == (family == "sd2")


@pytest.fixture
def folder(home, tmp_path):
    """A folder of SD1 that may be changed."""
    blockmerge.convert(home / "sd1", tmp_path / "folder")
    return tmp_path / "folder"


def test_a_folder_keeps_its_scheduler_and_a_file_is_warned_of(home, folder, tmp_path):
    assert noted(blockmerge.convert(folder, tmp_path / "plain.safetensors")) == []
    edit(folder / SCHEDULER, prediction_type="v_prediction")
    blockmerge.convert(folder, tmp_path / "again")
    assert (tmp_path / "again" / SCHEDULER).read_bytes() == (folder / SCHEDULER).read_bytes()
    for result in (
        blockmerge.convert(folder, tmp_path / "one.safetensors"),
        blockmerge.merge(
            folder, home / "sd1-b.safetensors", weights=0.5, output=tmp_path / "two.safetensors"
        ),
    ):
        (note,) = noted(result)
        assert note.startswith("warning: folder predicts v_prediction, ")
    (folder / SCHEDULER).write_bytes(b"{nope")
    assert noted(blockmerge.convert(folder, tmp_path / "three.safetensors")) == []


@pytest.mark.parametrize(("family", "other"), [("sd1", "sdxl"), ("sd1", "sd2"), ("sdxl", "sd1")])
def test_configs_of_another_family_are_refused(home, tmp_path, capsys, family, other):
    line = assert_refused(
        capsys, home, "convert", f"{family}-a.safetensors", tmp_path / "out", "--to", "diffusers", "--configs", other,
        says=[f"{other} has configs of another kind of model than {family}-a.safetensors (", "unet/config.json says cross_attention_dim "],
    )  # fmt: skip
    assert (str(parsed(home / other / UNET)["cross_attention_dim"]) + ", not ") in line
    assert not (tmp_path / "out").exists()


def test_configs_that_do_not_fit(home, folder, tmp_path):
    """Of the model's own folder they are made anew; of a folder that was named they are refused, but for
    another variant's.
    """
    before = parsed(folder / UNET), parsed(folder / "text_encoder/config.json")
    edit(folder / UNET, block_out_channels=[1, 2, 3, 4])
    edit(folder / "text_encoder/config.json", num_hidden_layers=3)
    blockmerge.convert(folder, tmp_path / "out")
    assert (parsed(tmp_path / "out" / UNET), parsed(tmp_path / "out" / "text_encoder/config.json")) == before
    with pytest.raises(
        IncompatibleModelsError, match=r"text_encoder/config.json says num_hidden_layers 3, not 12"
    ):
        blockmerge.convert(home / "sd1-a.safetensors", tmp_path / "no", naming="diffusers", configs=folder)
    edit(folder / UNET, in_channels=9, block_out_channels=before[0]["block_out_channels"])
    edit(folder / "text_encoder/config.json", num_hidden_layers=12)
    blockmerge.convert(home / "sd1-a.safetensors", tmp_path / "yes", naming="diffusers", configs=folder)
    assert parsed(tmp_path / "yes" / UNET) == before[0]


def test_the_folder_of_the_configs_is_an_input(home, folder, capsys):
    options = ["--to", "diffusers", "--configs", "folder", "--overwrite"]
    says = "is, holds or lies in the input folder"
    assert_refused(
        capsys, folder.parent, "convert", home / "sd1-a.safetensors", "folder", *options, says=says
    )
    with pytest.raises(blockmerge.OutputError, match="lies in the input"):
        blockmerge.convert(
            home / "sd1-a.safetensors",
            folder,
            naming="diffusers",
            overwrite=True,
            configs=blockmerge.open_checkpoint(folder),
        )


def test_only_configs_and_tokenizers_are_carried(folder, tmp_path, monkeypatch):
    """What else lies in a folder would be in the way of its own replacement."""
    for name in (
        "unet/README.md",
        "unet/run.py",
        "scheduler/state.pkl",
        "tokenizer/vocab.json",
        "tokenizer/merges.txt",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    for _ in range(2):
        blockmerge.convert(folder, tmp_path / "out", overwrite=True)
        assert {path.name for path in (tmp_path / "out").glob("*/*")} == {
            "config.json", "scheduler_config.json", "vocab.json", "merges.txt", "model.safetensors",
            "diffusion_pytorch_model.safetensors",
        }  # fmt: skip
    monkeypatch.setattr(folder_files, "LARGEST_CARRIED", 1000)
    with pytest.raises(CheckpointError, match="its configs and tokenizers have more than 0 MB"):
        blockmerge.convert(folder, tmp_path / "other")


def test_configs_do_not_say_that_plain_weights_are_quantised(home, folder, tmp_path):
    """Loaders would unpack them, or refuse; what is still packed, in a component of others, stays so."""
    said = {"quantization_config": {"quant_method": "fp8"}}
    (folder / "prior").mkdir()
    packed = {"layer.weight": torch.ones(4, dtype=torch.uint8)}
    save_file(packed, folder / "prior" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (folder / "prior" / "config.json").write_text("{}")
    edit(folder / "model_index.json", prior=["diffusers", "PriorTransformer"])
    parts = ("unet", "text_encoder", "prior")
    for part in parts:
        edit(folder / part / "config.json", **said)
    a, b = folder, home / "sd1-b.safetensors"
    for result, out in (
        (blockmerge.convert(a, tmp_path / "same"), "same"),
        (blockmerge.merge(a, b, weights=0.5, output=tmp_path / "merged"), "merged"),
    ):
        for part in parts:
            expected = parsed(folder / part / "config.json")
            if part != "prior":
                del expected["quantization_config"]
            assert parsed(tmp_path / out / part / "config.json") == expected, part
        notes = [note for note in result.notes if "quantization_config" in note]
        assert [note.partition(":")[0] for note in notes] == ["text_encoder/config.json", "unet/config.json"]
    result = blockmerge.convert(b, tmp_path / "borrowed", naming="diffusers", configs=folder)
    assert "quantization_config" not in parsed(tmp_path / "borrowed" / UNET)
