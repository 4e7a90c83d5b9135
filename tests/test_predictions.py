"""What models predict, where their metadata or their folders' schedulers say it, and no marker does."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError
from tests.small_models import small_model

SCHEDULER = "scheduler/scheduler_config.json"
EULER = "EulerDiscreteScheduler"
# diffusers with the newest numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small model, and a folder of it."""
    folder = tmp_path_factory.mktemp("models")
    save_file(small_model("sdxl", for_a_folder=True), folder / "a.safetensors")
    blockmerge.convert(folder / "a.safetensors", folder / "folder", naming="diffusers")
    return folder


def saying(home, path, said):
    """A model that says what it predicts: in its metadata, in its scheduler's config, or nowhere."""
    if isinstance(said, tuple):
        scheduler, prediction = said
        blockmerge.convert(home / "folder", path)
        config = {"_class_name": scheduler, "prediction_type": prediction}
        (path / SCHEDULER).write_text(json.dumps({key: value for key, value in config.items() if value}))
        return path
    save_file(load_file(home / "a.safetensors"), path.with_suffix(".safetensors"), said)
    return path.with_suffix(".safetensors")


def differ(notes):
    return [note for note in notes if note.startswith("warning: prediction types differ")]


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [
        ({"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"},
         "a.safetensors predicts v_prediction by its modelspec.prediction_type; b.safetensors predicts epsilon "),
        ({"ss_v_parameterization": "True"}, (EULER, "epsilon"),
         "a.safetensors predicts v_prediction by its ss_v_parameterization; b predicts epsilon "),
        ((EULER, None), (EULER, "v_prediction"), "a predicts epsilon by its scheduler_config.json; b predicts v_"),
        ((EULER, "epsilon"), ("FlowMatchEulerDiscreteScheduler", None),
         "b predicts flow by its scheduler_config.json (FlowMatchEulerDiscreteScheduler)"),
        (("EDMDPMSolverMultistepScheduler", "epsilon"), {"modelspec.prediction_type": "epsilon"},
         "a predicts EDM by its scheduler_config.json (EDMDPMSolverMultistepScheduler)"),
    ],
)  # fmt: skip
def test_models_that_say_otherwise_are_warned_of(home, tmp_path, a, b, says):
    paths = saying(home, tmp_path / "a", a), saying(home, tmp_path / "b", b)
    result = blockmerge.Recipe(*paths, weights=0.5, naming="ldm").plan(tmp_path / "o.safetensors").summary()
    (note,) = differ(result.notes)
    assert says in note
    assert note.endswith("U-Nets of different prediction types do not blend")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"modelspec.prediction_type": "v"}, {}),
        ({"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "who knows"}),
        ({"modelspec.prediction_type": "v"}, {"ss_v_parameterization": "True"}),
        ({"modelspec.prediction_type": "v"}, (EULER, "v_prediction")),
        ((EULER, "epsilon"), ("DDIMScheduler", None)),
        (("FlowMatchEulerDiscreteScheduler", None), {}),
    ],
)
def test_nothing_is_said_without_a_contradiction(home, tmp_path, a, b):
    paths = saying(home, tmp_path / "a", a), saying(home, tmp_path / "b", b)
    result = blockmerge.Recipe(*paths, weights=0.5, naming="ldm").plan(tmp_path / "o.safetensors").summary()
    assert not any("differ" in note for note in result.notes)


def test_a_live_merge_warns_too(home, tmp_path):
    a, b = (
        saying(home, tmp_path / letter, {"modelspec.prediction_type": said})
        for letter, said in (("a", "v"), ("b", "epsilon"))
    )
    prefix = "model.diffusion_model."
    module = torch.nn.Module()
    for name, tensor in load_file(a).items():
        if name.startswith(prefix):
            *path, last = name.removeprefix(prefix).split(".")
            owner = module
            for part in path:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
            owner.register_parameter(last, torch.nn.Parameter(tensor))
    with blockmerge.LiveMerge(module, a, b) as live:
        assert len(differ(live.notes)) == 1


@pytest.mark.parametrize(
    ("said", "predicts"),
    [
        ((EULER, "v_prediction"), "v_prediction, as its scheduler_config.json says"),
        (("FlowMatchEulerDiscreteScheduler", None),
         "flow, as its scheduler_config.json (FlowMatchEulerDiscreteScheduler) says"),
        (("UniPCMultistepScheduler", "flow_prediction"), "flow, as its scheduler_config.json "),
        (("EDMEulerScheduler", None), "EDM, as its scheduler_config.json (EDMEulerScheduler) says"),
    ],
)  # fmt: skip
def test_a_single_file_does_not_tell_what_the_scheduler_did(home, tmp_path, said, predicts):
    a = saying(home, tmp_path / "a", said)
    b = home / "a.safetensors"
    for result in (
        blockmerge.convert(a, tmp_path / "one.safetensors"),
        blockmerge.merge(a, b, weights=0.5, naming="ldm", output=tmp_path / "two.safetensors"),
    ):
        (note,) = [note for note in result.notes if "scheduler_config.json" in note]
        assert note.startswith(f"warning: a predicts {predicts}")
        assert note.endswith("set that prediction type in the program that loads it")


@pytest.mark.parametrize("metadata", [{"modelspec.prediction_type": "v"}, {"ss_v_parameterization": "True"}])
def test_a_new_folder_says_what_metadata_did(home, tmp_path, metadata):
    import diffusers

    a = saying(home, tmp_path / "a", metadata)
    blockmerge.convert(a, tmp_path / "made", naming="diffusers")
    blockmerge.convert(a, tmp_path / "given", naming="diffusers", configs=home / "folder")
    for name in ("made", "given"):
        loaded = diffusers.EulerDiscreteScheduler.from_pretrained(tmp_path / name / "scheduler")
        assert loaded.config.prediction_type == "v_prediction"


def test_a_folder_that_cannot_say_what_metadata_do_is_refused(home, tmp_path):
    a = saying(home, tmp_path / "a", {"modelspec.prediction_type": "flow"})
    with pytest.raises(IncompatibleModelsError, match=r"a\.safetensors is marked flow by its modelspec"):
        blockmerge.convert(a, tmp_path / "out", naming="diffusers")
    like = saying(home, tmp_path / "like", ("FlowMatchEulerDiscreteScheduler", None))
    blockmerge.convert(a, tmp_path / "out", naming="diffusers", configs=like)
    assert "FlowMatch" in (tmp_path / "out" / SCHEDULER).read_text()


def test_an_unfit_scheduler_is_made_anew(home, tmp_path):
    a = saying(home, tmp_path / "a", {"modelspec.prediction_type": "v"})
    like = saying(home, tmp_path / "like", ("FlowMatchEulerDiscreteScheduler", None))
    blockmerge.convert(a, tmp_path / "out", naming="diffusers", configs=like)
    config = json.loads((tmp_path / "out" / SCHEDULER).read_text())
    assert (config["_class_name"], config["prediction_type"]) == (EULER, "v_prediction")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", EULER]


def test_other_configs_that_say_otherwise_are_warned_of(home, tmp_path):
    a = saying(home, tmp_path / "a", (EULER, "v_prediction"))
    result = blockmerge.convert(a, tmp_path / "out", configs=home / "folder")
    assert any("says epsilon, as that of the given configs does; a predicts v_prediction" in note
               for note in result.notes)  # fmt: skip
