"""Names as training and other programs write them: recognised, said, and written as every loader takes them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import FAMILIES, canonical_name, component_of, unwrapped_name
from blockmerge.demo import make_state_dicts
from blockmerge.inspecting import repair
from tests.effort import some

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP_L = {
    "sd1": "cond_stage_model.transformer.",
    "sdxl": "conditioner.embedders.0.transformer.",
}
CLIP_G = "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def states():
    return {
        family: [
            {n: t.half() if t.is_floating_point() else t for n, t in one.items()}
            for one in make_state_dicts(family)
        ]
        for family in ("sd1", "sdxl")
    }


def in_huggingface(state, prefix):
    """The names and values that transformers has for an OpenCLIP encoder, {name: tensor}."""
    found = {}
    for name, origin in (
        FAMILIES["sdxl"].origins([n for n in state if n.startswith(prefix)], "ldm", "diffusers").items()
    ):
        (rows,) = origin.rows
        whole = state[rows.name]
        unit = len(whole) // rows.of
        part = whole[rows.start * unit : rows.stop * unit]
        found[name.partition("/")[2]] = (part.T if origin.transposed else part).contiguous()
    return found


def as_forge_saves(family, state, *, openclip_names=False):
    found = {}
    for name, tensor in state.items():
        if name.startswith(VAE):
            found["vae." + name.removeprefix(VAE)] = tensor
        elif name.startswith(CLIP_L[family]):
            found["text_encoders.clip_l.transformer." + name.removeprefix(CLIP_L[family])] = tensor
        elif name.startswith(CLIP_G):
            if openclip_names:
                found["text_encoders.clip_g." + name.removeprefix(CLIP_G)] = tensor
        else:
            found[name] = tensor
    if family == "sdxl" and not openclip_names:
        for name, tensor in in_huggingface(state, CLIP_G).items():
            found[f"text_encoders.clip_g.transformer.{name}"] = tensor
        # As ComfyUI does.
        found["text_encoders.clip_g.logit_scale"] = state[CLIP_G + "logit_scale"]
    return found


def with_prefix(prefix):
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


WRAPPED = {
    "DataParallel": with_prefix("module."),
    "compiled": with_prefix("_orig_mod."),
    "deepspeed": with_prefix("_forward_module.module."),
    "a Lightning module": with_prefix("model."),
    "a nested state dict": with_prefix("state_dict."),
    "FSDP inside": lambda state: {
        name.replace(UNET, UNET + "_fsdp_wrapped_module.") if name.startswith(UNET) else name: tensor
        for name, tensor in state.items()
    },
    "a compiled U-Net": lambda state: {
        name.replace(UNET, UNET + "_orig_mod."): tensor for name, tensor in state.items()
    },
    "without model.": lambda state: {
        name.replace(UNET, "diffusion_model."): tensor for name, tensor in state.items()
    },
    "unet. and LDM names": lambda state: {
        name.replace(UNET, "unet."): tensor for name, tensor in state.items()
    },
    "Forge": lambda state: as_forge_saves("sd1", state),
    "Forge, wrapped": lambda state: with_prefix("module.")(as_forge_saves("sd1", state)),
}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())


@pytest.mark.parametrize("kind", WRAPPED)
def test_every_command_sees_through_wrappers(states, tmp_path, kind):
    a, b = states["sd1"]
    wrapped = WRAPPED[kind](a)
    assert set(map(canonical_name, wrapped)) != wrapped.keys()
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    model = tmp_path / "wrapped.safetensors"
    assert blockmerge.inspect(model).family == "sd1"
    assert {"unet", "vae", "text_encoder"} <= blockmerge.inspect(model).components.keys()
    problems = {problem.code: problem for problem in blockmerge.check(model).problems}
    assert not {"no_unet", "missing_component", "missing_tensors", "unknown_tensors"} & problems.keys()
    if any(unwrapped_name(name) != name for name in wrapped):
        assert problems["wrapped_names"].fixable
        assert any(
            "wrapped.safetensors" in note and "around" in note for note in convert(model, tmp_path).notes
        )
    repair(model, tmp_path / "fixed.safetensors")
    same(load_file(tmp_path / "fixed.safetensors"), a)
    assert blockmerge.check(tmp_path / "fixed.safetensors").problems == ()
    plain = blockmerge.merge_state_dicts(a, b, weights=0.3, vae="blend")
    for first, second in some([(model, tmp_path / "b.safetensors"), (wrapped, b)], of=2, chosen_by=kind):
        blockmerge.merge(
            first, second, weights=0.3, vae="blend", output=tmp_path / "out.safetensors", overwrite=True
        )
        same(load_file(tmp_path / "out.safetensors"), plain)
    same(
        {
            canonical_name(name): tensor
            for name, tensor in blockmerge.merge_state_dicts(b, wrapped, weights=1.0, vae="b").items()
        },
        a,
    )


def convert(model, folder, **options):
    return blockmerge.convert(model, folder / "converted.safetensors", overwrite=True, **options)


@pytest.mark.parametrize("openclip_names", [False, True])
def test_both_text_encoders_of_forge_are_found(states, tmp_path, openclip_names):
    a, _ = states["sdxl"]
    save_file(as_forge_saves("sdxl", a, openclip_names=openclip_names), tmp_path / "forge.safetensors")
    convert(tmp_path / "forge.safetensors", tmp_path)
    found = load_file(tmp_path / "converted.safetensors")
    same(found, a)
    # Pruned, it still has all components.
    convert(tmp_path / "forge.safetensors", tmp_path, prune=True)
    held = {component_of(name) for name in load_file(tmp_path / "converted.safetensors")}
    assert held == {"unet", "vae", "text_encoder", "text_encoder_2"}


def test_a_folder_of_a_forge_file_has_the_same_weights(states, tmp_path):
    a, _ = states["sdxl"]
    for name, state in (("forge", as_forge_saves("sdxl", a)), ("plain", a)):
        save_file(state, tmp_path / f"{name}.safetensors")
        blockmerge.convert(tmp_path / f"{name}.safetensors", tmp_path / name, naming="diffusers")
    for file in sorted((tmp_path / "plain").rglob("*.safetensors")):
        same(load_file(tmp_path / "forge" / file.relative_to(tmp_path / "plain")), load_file(file))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("module.model.diffusion_model._orig_mod.out.2.bias", UNET + "out.2.bias"),
        ("model.model.diffusion_model.out.2.bias", UNET + "out.2.bias"),
        ("model.conv_in.weight", "unet/conv_in.weight"),
        ("module.unet.conv_in.weight", "unet/conv_in.weight"),
        ("vae.decoder.up.0.block.0.conv1.weight", "vae/decoder.up.0.block.0.conv1.weight"),
        ("pipe.text_encoder.encoder.layers.x", "text_encoder/text_model.encoder.layers.x"),
        ("pipe.text_encoder.encoder.block.x", "text_encoder/encoder.block.x"),  # T5's
        ("some.module_list.weight", "some.module_list.weight"),
    ],
)
def test_a_name_is_unwrapped(name, wanted):
    assert canonical_name(name) == wanted


def test_no_family_has_names_that_look_wrapped():
    for family in FAMILIES.values():
        for name in family.listed:
            assert unwrapped_name(name) == name == canonical_name(name)


def test_one_tensor_under_two_namings_is_used_once(states, tmp_path):
    a, b = states["sd1"]
    double = {**a, **{f"vae.{name.removeprefix(VAE)}": b[name] for name in a if name.startswith(VAE)}}
    save_file(double, tmp_path / "double.safetensors")
    notes = convert(tmp_path / "double.safetensors", tmp_path).notes
    same(load_file(tmp_path / "converted.safetensors"), a)
    assert any("double.safetensors holds" in note and "under two names" in note for note in notes)


def in_folder_names(states, folder, component):
    """What a folder of sd1's A has in a component, {name there: tensor}."""
    save_file(states["sd1"][0], folder / "plain.safetensors")
    blockmerge.convert(folder / "plain.safetensors", folder / "plain", naming="diffusers", overwrite=True)
    (file,) = (folder / "plain" / component).glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize(
    ("family", "usual", "other"),
    [
        ("sd1", "cond_stage_model.", "conditioner.embedders.0."),
        ("sd1", "cond_stage_model.", "cond_stage_model.wrapped."),
        ("sd1", "cond_stage_model.transformer.", "te."),
        ("sd1", VAE, VAE + "model."),
        ("sdxl", CLIP_L["sdxl"], "te1."),
        ("sdxl", CLIP_L["sdxl"], "text_encoder_1."),
    ],
)
def test_other_prefixes_stand_for_the_usual_ones(states, tmp_path, family, usual, other):
    a, b = states[family]
    odd = {
        name.replace(usual, other) if name.startswith(usual) else name: tensor for name, tensor in a.items()
    }
    save_file(odd, tmp_path / "odd.safetensors")
    convert(tmp_path / "odd.safetensors", tmp_path)
    same(load_file(tmp_path / "converted.safetensors"), a)
    # BASE counts for it, as it would under the usual names.
    same(
        blockmerge.merge_state_dicts(odd, b, weights="BASE=0.3,IN00=0.5", vae="blend"),
        blockmerge.merge_state_dicts(a, b, weights="BASE=0.3,IN00=0.5", vae="blend"),
    )


def test_a_folders_names_under_ldms_prefix(states, tmp_path):
    a, _ = states["sd1"]
    vae = {VAE + name: tensor for name, tensor in in_folder_names(states, tmp_path, "vae").items()}
    odd = {name: tensor for name, tensor in a.items() if not name.startswith(VAE)} | vae
    save_file(odd, tmp_path / "odd.safetensors")
    convert(tmp_path / "odd.safetensors", tmp_path)
    same(load_file(tmp_path / "converted.safetensors"), a)


@pytest.mark.parametrize("first", ["folder", "file"])
def test_a_unet_of_diffusers_merged_with_a_whole_model_is_a_file_that_loaders_know(states, tmp_path, first):
    a, b = states["sd1"]
    unet = in_folder_names(states, tmp_path, "unet")
    save_file(unet, tmp_path / "unet.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    model = tmp_path / "plain" / "unet" if first == "folder" else tmp_path / "unet.safetensors"
    out = tmp_path / "out.safetensors"
    blockmerge.merge(model, tmp_path / "b.safetensors", weights=0.0, output=out)
    wanted = {name: tensor for name, tensor in a.items() if name.startswith(UNET)}
    same(load_file(out), {**b, **wanted})


def test_wrapped_ema_copies_are_ema_copies(states, tmp_path):
    a, _ = states["sd1"]
    ema = {
        f"module.model_ema.diffusion_model{name.removeprefix(UNET).replace('.', '')}": tensor
        for name, tensor in a.items()
        if name.startswith(UNET)
    }
    save_file({**ema, **{n: t for n, t in a.items() if not n.startswith(UNET)}}, tmp_path / "ema.safetensors")
    convert(tmp_path / "ema.safetensors", tmp_path)
    same(load_file(tmp_path / "converted.safetensors"), a)
