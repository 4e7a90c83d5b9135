"""What is not known is neither dropped, nor cast, nor blended in silence; only what is known to be dead goes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError
from blockmerge.anatomy import FAMILIES, component_of
from blockmerge.demo import make_state_dicts
from blockmerge.inspecting import repair

UNET = "model.diffusion_model."
PLAYGROUND = {"edm_mean": torch.arange(4.0), "edm_std": torch.ones(4) * 2}
COSXL = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
UNCLIP = {
    "embedder.model.visual.conv1.weight": torch.ones(4, 3, 2, 2),
    "noise_augmentor.data_mean": torch.zeros(1, 8),
    UNET + "label_emb.0.0.weight": torch.ones(32, 64),
    UNET + "label_emb.0.0.bias": torch.ones(32),
}
ALIVE = {
    "playground": ("sdxl", PLAYGROUND),
    "cosxl": ("sdxl", COSXL),
    "unclip": ("sd2", UNCLIP),
    "a component nobody knows": ("sd1", {"image_proj.proj.weight": torch.ones(4, 3)}),
    "in a VAE": ("sd1", {"first_stage_model.temporal.weight": torch.ones(2)}),
    "in a text encoder": ("sd1", {"cond_stage_model.adapter.weight": torch.ones(2)}),
    "depth estimator": ("sd1", {"depth_model.model.pretrained.weight": torch.ones(2)}),
}
DEAD = {
    "betas": torch.ones(5),
    "model_ema.decay": torch.tensor(0.5),
    "first_stage_model.loss.logvar": torch.zeros(()),
    "loss.discriminator.main.0.weight": torch.ones(2),
    "optimizer_states.0.exp_avg": torch.ones(2),
    "model.model_sampling.sigmas": torch.ones(1000),
    "global_step": torch.tensor(7),
}


@pytest.fixture(scope="module")
def states():
    known = {}

    def of(family="sd1", seed=0):
        if (family, seed) not in known:
            known[family, seed] = make_state_dicts(family, seed=seed)
        return tuple(dict(one) for one in known[family, seed])

    return of


def told(notes, name):
    """Whether notes name a tensor; at least among those of which the first few are shown."""
    return any(name in note for note in notes)


@pytest.mark.parametrize("kind", ALIVE)
def test_pruning_and_repairing_keep_what_is_alive(states, tmp_path, kind):
    family, extra = ALIVE[kind]
    model = {**states(family)[0], **extra, **DEAD}
    save_file(model, tmp_path / "model.safetensors")
    blockmerge.convert(tmp_path / "model.safetensors", tmp_path / "pruned.safetensors", prune=True)
    repair(tmp_path / "model.safetensors", tmp_path / "fixed.safetensors")
    for name in ("pruned", "fixed"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == {**states(family)[0], **extra}.keys()
        assert all(torch.equal(found[one], tensor) for one, tensor in extra.items())
    leftovers = {
        name
        for problem in blockmerge.check(tmp_path / "model.safetensors").problems
        if problem.code in ("leftovers", "leftover_nan", "ema")
        for name in problem.tensors
    }
    assert leftovers == DEAD.keys()


def test_diffusers_still_knows_playground(states, tmp_path):
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    save_file({**states("sdxl")[0], **PLAYGROUND, **DEAD}, tmp_path / "model.safetensors")
    blockmerge.convert(tmp_path / "model.safetensors", tmp_path / "out.safetensors", prune=True)
    assert infer_diffusers_model_type(load_file(tmp_path / "out.safetensors")) == "playground-v2-5"


@pytest.mark.parametrize("marker", ["edm_mean", "edm_std", "edm_vpred.sigma_max", "v_pred", "__x0__"])
def test_markers_are_those_of_the_first_model_only(states, tmp_path, marker):
    a, b = states("sdxl")
    value = torch.ones(4)
    result, notes = merged(tmp_path, a, {**b, marker: value})
    assert marker not in result
    assert any(note.startswith("warning: prediction markers differ") and marker in note for note in notes)
    result, notes = merged(tmp_path, {**a, marker: value}, b, dtype="fp16")
    assert torch.equal(result[marker], value)
    assert result[marker].dtype == torch.float32
    assert told(notes, marker)
    result, notes = merged(tmp_path, {**a, marker: value}, {**b, marker: value * 2})
    assert torch.equal(result[marker], value)
    assert any("markers differ" in note and "of other values" in note for note in notes)


@pytest.mark.parametrize("kind", ["playground", "cosxl", "unclip"])
def test_a_folder_is_refused_where_it_could_not_say_how_the_model_runs(states, tmp_path, kind):
    family, extra = ALIVE[kind]
    save_file({**states(family)[0], **extra}, tmp_path / "model.safetensors")
    with pytest.raises(IncompatibleModelsError, match=r"model\.safetensors (is marked|.*unCLIP)"):
        blockmerge.convert(tmp_path / "model.safetensors", tmp_path / "folder", naming="diffusers")
    assert not (tmp_path / "folder").exists()


def test_a_folder_with_fitting_configs_takes_markers(states, tmp_path):
    a, _ = states("sdxl")
    save_file(a, tmp_path / "plain.safetensors")
    blockmerge.convert(tmp_path / "plain.safetensors", tmp_path / "like", naming="diffusers")
    scheduler = tmp_path / "like" / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"_class_name": "EDMDPMSolverMultistepScheduler", "sigma_data": 0.5}')
    save_file({**a, **PLAYGROUND}, tmp_path / "model.safetensors")
    result = blockmerge.convert(
        tmp_path / "model.safetensors", tmp_path / "out", naming="diffusers", configs=tmp_path / "like"
    )
    assert told(result.notes, "edm_mean")
    assert "EDMDPM" in (tmp_path / "out" / "scheduler" / "scheduler_config.json").read_text()


def merged(folder, a, b, **options):
    save_file(a, folder / "a.safetensors")
    save_file(b, folder / "b.safetensors")
    result = blockmerge.merge(
        folder / "a.safetensors",
        folder / "b.safetensors",
        output=folder / "out.safetensors",
        overwrite=True,
        **{"weights": 0.5, **options},
    )
    return load_file(folder / "out.safetensors"), result.notes


WORD = st.text("abcdefgh_0123456789", min_size=1, max_size=6)
PREFIXES = ("", UNET, "first_stage_model.", "cond_stage_model.", "conditioner.embedders.0.", "extra.")
EXTRAS = st.dictionaries(
    st.tuples(st.sampled_from(PREFIXES), st.lists(WORD, min_size=1, max_size=3)).map(
        lambda parts: f"{parts[0]}zz{'.'.join(parts[1])}"
    ),
    st.tuples(
        st.sampled_from((torch.float16, torch.float32, torch.bfloat16, torch.int32, torch.float8_e4m3fn)),
        st.sampled_from(((), (3,), (2, 3))),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(
    family=st.sampled_from(("sd1", "sd2", "sdxl", "sdxl_refiner")),
    extras=EXTRAS,
    has=st.sampled_from(("a", "b", "both")),
    options=st.sampled_from(({}, {"dtype": "fp16"}, {"vae": "b"}, {"vae": "blend"}, {"naming": "diffusers"})),
)
def test_no_unknown_tensor_is_touched_in_silence(states, tmp_path_factory, family, extras, has, options):
    folder = tmp_path_factory.mktemp("unknown")
    a, b = (
        {name: tensor.half() for name, tensor in one.items() if component_of(name) != "text_encoder_2"}
        for one in states(family)
    )
    of_a, of_b = (
        {
            name: (torch.arange(6).float()[: max(1, torch.Size(shape).numel())].reshape(shape) + n).to(dtype)
            for name, (dtype, shape) in extras.items()
        }
        for n in (1, 2)
    )
    if has != "b":
        a |= of_a
    if has != "a":
        b |= of_b
    mine = of_a if has != "b" else of_b
    folder_output = options.get("naming") == "diffusers"
    save_file(a, folder / "a.safetensors")
    save_file(b, folder / "b.safetensors")
    output = folder / ("out" if folder_output else "out.safetensors")
    try:
        result = blockmerge.merge(
            folder / "a.safetensors", folder / "b.safetensors", output=output, weights=0.5, **options
        )
    except IncompatibleModelsError as error:
        assert any(name in str(error) for name in extras)
        return
    found = {}
    for file in [output] if output.is_file() else output.rglob("*.safetensors"):
        found |= load_file(file)
    for name in extras:
        assert told(result.notes, name), (name, result.notes)
        kept = found.get(name)
        if kept is not None:
            taken = of_b if options.get("vae") == "b" and component_of(name) == "vae" and has != "a" else mine
            assert kept.dtype == taken[name].dtype
            assert torch.equal(kept.view(torch.uint8), taken[name].view(torch.uint8)) if kept.dim() else True
        else:
            assert folder_output or component_of(name) == "vae"
    held = {component_of(name) for name in (*a, *b)} - {"other"}
    if not folder_output:
        assert {component_of(name) for name in found} >= held
    assert FAMILIES[result.family].name == family
