"""What is not known is neither dropped, nor cast, nor blended in silence; only what is known to be dead goes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError
from blockmerge.anatomy import FAMILIES, canonical_name, component_of
from blockmerge.demo import make_state_dicts
from blockmerge.inspecting import repair
from tests.effort import many, some

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


@pytest.mark.parametrize(
    "marker", some(["edm_mean", "edm_vpred.sigma_max", "v_pred", "edm_std", "__x0__"], of=2)
)
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


@pytest.mark.parametrize("name", ["loss.w", "optimizer_states.0.exp_avg", "betas", "global_step"])
def test_what_is_dead_is_copied_by_a_merge(states, tmp_path, name):
    a, b = states("sd1")
    found, _ = merged(tmp_path, {**a, name: torch.ones(2)}, {**b, name: torch.zeros(2)}, dtype="bf16")
    assert same_bits(found[name], torch.ones(2))


def test_ema_copies_that_are_to_be_kept_are_not_pruned(states, tmp_path):
    name = "model_ema.diffusion_modelout2bias"
    state = {**states("sd1")[0], name: torch.ones(4)}
    blockmerge.convert(state, tmp_path / "out.safetensors", ema="keep", prune=True)
    assert torch.equal(load_file(tmp_path / "out.safetensors")[name], state[name])


@pytest.mark.parametrize("name", ["foo/x.y", "tokenizer/z", "scheduler/z", "../evil/x", "/x"])
def test_a_folder_has_no_place_for_folders_of_nobody(states, tmp_path, name):
    save_file({**states("sd1")[0], name: torch.ones(3)}, tmp_path / "m.safetensors")
    result = blockmerge.convert(tmp_path / "m.safetensors", tmp_path / "out", naming="diffusers")
    assert told(result.notes, name)
    assert sorted(one.name for one in (tmp_path / "out").iterdir()) == [
        "model_index.json", "scheduler", "text_encoder", "unet", "vae",
    ]  # fmt: skip
    blockmerge.convert(tmp_path / "m.safetensors", tmp_path / "out", naming="diffusers", overwrite=True)


def test_no_order_is_advised_where_none_helps(states, tmp_path):
    a, b = states("sd1")
    with pytest.raises(IncompatibleModelsError, match="both have some of their own"):
        merged(tmp_path, {**a, UNET + "foo.w": torch.ones(1)}, {**b, UNET + "bar.w": torch.ones(1)})


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
PREFIXES = (
    "", UNET, "first_stage_model.", "cond_stage_model.", "conditioner.embedders.0.", "extra.",
    "vae.", "unet.", "text_encoder.", "text_encoders.clip_l.", "module.", "zz.module.", "zz/", "tokenizer/",
)  # fmt: skip
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
MERGES = ({}, {"dtype": "fp16"}, {"vae": "b"}, {"vae": "blend"}, {"naming": "diffusers"})
CONVERSIONS = ({"prune": True, "ema": "keep"}, {"dtype": "bf16"}, {"naming": "diffusers"})


def made_of(extras, number):
    def tensor(dtype, shape):
        count = torch.Size(shape).numel()
        return (torch.arange(count).float().reshape(shape) + number).to(dtype)

    return {name: tensor(*one) for name, one in extras.items()}


def same_bits(one, other):
    raw = [tensor.reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*raw)


@settings(max_examples=many(20), phases=(Phase.explicit, Phase.generate))
@given(
    family=st.sampled_from(("sd1", "sd2", "sdxl_refiner")),
    extras=EXTRAS,
    has=st.sampled_from(("a", "b", "both", "converted")),
    data=st.data(),
)
def test_no_unknown_tensor_is_touched_in_silence(states, tmp_path_factory, family, extras, has, data):
    options = data.draw(st.sampled_from(CONVERSIONS if has == "converted" else MERGES))
    folder = tmp_path_factory.mktemp("unknown")
    a, b = (made_half(one) for one in states(family))
    of_a, of_b = made_of(extras, 1), made_of(extras, 2)
    save_file({**a, **(of_a if has != "b" else {})}, folder / "a.safetensors")
    save_file({**b, **(of_b if has in ("b", "both") else {})}, folder / "b.safetensors")
    is_folder = options.get("naming") == "diffusers"
    output = folder / ("out" if is_folder else "out.safetensors")
    try:
        if has == "converted":
            result = blockmerge.convert(folder / "a.safetensors", output, **options)
        else:
            pair = folder / "a.safetensors", folder / "b.safetensors"
            result = blockmerge.merge(*pair, output=output, weights=0.5, **options)
    except IncompatibleModelsError as error:
        assert any(name in str(error) for name in extras)
        assert not output.exists()
        return
    opened = blockmerge.open_checkpoint(output)
    found = found_in(output)
    for name in extras:
        assert (
            told(result.notes, name.replace("/", ".").removeprefix("unet."))
            or told(result.notes, name)
            or told(result.notes, canonical_name(name))
        ), (name, result.notes)
        if name in opened.tensors and not is_folder:
            of_vae = (
                of_b if options.get("vae") == "b" and component_of(name) == "vae" and has != "a" else None
            )
            wanted = of_vae or (of_b if has == "b" else of_a)
            assert same_bits(found[name], wanted[name])
        else:
            assert is_folder or component_of(name) == "vae" or "/" in name
    if not is_folder:
        assert {component_of(one) for one in opened.tensors} >= {component_of(one) for one in a}
    assert FAMILIES[result.family].name == family


def made_half(state):
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def found_in(output):
    found = {}
    for file in [output] if output.is_file() else output.rglob("*.safetensors"):
        found |= load_file(file)
    return found
