"""Every form of model that people have: the same values whatever they come as, and the models that this
project grew from.
"""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge.anatomy import is_position_ids
from blockmerge.cli.main import run
from blockmerge.demo import make_state_dicts
from blockmerge.merging.outputs import shards as shards_of_outputs
from tests.effort import some
from tests.forms import (
    FORMS,
    UNET,
    as_dtype,
    assert_same,
    ema_of,
    in_diffusers,
    is_unet,
    read,
    write,
    write_folder,
)
from tests.oracle import SD, assert_merged
from tests.small_models import small_model

CHOICES = {"weights": 0.3, "changes": "IN00-IN05=1,OUT03=0", "vae": "blend"}
VAE = "first_stage_model."


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """A function that gives the path of a small model (0: A, 1: B) in one of the FORMS, and one that gives
    their merge.
    """
    home = tmp_path_factory.mktemp("forms")
    dicts, paths, merged = {}, {}, {}

    def states(family):
        if family not in dicts:
            dtypes = torch.float16, torch.bfloat16
            dicts[family] = [
                small_model(family, dtype, seed, for_a_folder=True) for seed, dtype in enumerate(dtypes)
            ]
        return dicts[family]

    def path(side, form, family="sd1"):
        key = side, form, family
        if key not in paths:
            paths[key] = write(states(family)[side], home / f"{family} {'ab'[side]} {form}", form, family)
        return paths[key]

    def expected(family="sd1"):
        if family not in merged:
            output = home / f"{family} merged.safetensors"
            blockmerge.merge(
                path(0, "safetensors", family), path(1, "safetensors", family), output=output, **CHOICES
            )
            merged[family] = load_file(output)
        return merged[family]

    return path, expected


def naming_of(form):
    return "diffusers" if form in ("folder", "sharded") else "ldm"


def assert_merges(forms, folder, family, a, b, naming):
    path, expected = forms
    single = naming == "ldm"
    output = folder / ("out.safetensors" if single else "out")
    other = None if naming == naming_of(a) and not single else naming
    result = blockmerge.merge(path(0, a, family), path(1, b, family), output=output, naming=other, **CHOICES)
    assert result.naming == naming
    wanted = expected(family)
    if naming == "diffusers":
        wanted = in_diffusers(wanted, family)
    found = read(output)
    if {naming_of(a), naming_of(b)} == {
        "diffusers"
    } and single:  # then nobody has what a folder has no place for
        wanted = {name: tensor for name, tensor in wanted.items() if name in found}
        assert in_diffusers(wanted, family).keys() == in_diffusers(expected(family), family).keys()
    assert_same(found, wanted)


@pytest.mark.parametrize(("a", "b"), some(product(FORMS, FORMS), of=2))
def test_every_pair_of_forms_merges_to_the_same_values(forms, tmp_path, a, b):
    assert_merges(forms, tmp_path, "sd1", a, b, naming_of(a))


@pytest.mark.parametrize(
    ("family", "a", "b", "naming"),
    some([
        *(("sd1", a, b, naming) for a, b, naming in [
            ("safetensors", "zip", "diffusers"), ("legacy", "sharded", "diffusers"), ("folder", "legacy", "ldm"),
            ("sharded", "folder", "ldm"),
        ]),
        *((family, a, b, naming) for family in ("sd2", "sdxl") for a, b, naming in [
            ("zip", "folder", "diffusers"), ("sharded", "safetensors", "diffusers"), ("folder", "sharded", "ldm"),
        ]),
    ], of=2),
)  # fmt: skip
def test_into_the_other_naming(forms, tmp_path, family, a, b, naming):
    assert_merges(forms, tmp_path, family, a, b, naming)


def test_a_tensor_that_a_folder_lacks_comes_from_the_file(forms, tmp_path):
    """SD2's folders have 23 of its 24 text layers; merged with a file into a file, the last is the file's."""
    path, _ = forms
    output = tmp_path / "out.safetensors"
    result = blockmerge.merge(
        path(0, "folder", "sd2"), path(1, "zip", "sd2"), output=output, naming="ldm", weights=0.5
    )
    name = "cond_stage_model.model.transformer.resblocks.23.ln_1.weight"
    assert torch.equal(load_file(output)[name], load_file(path(1, "safetensors", "sd2"))[name])
    assert any("only in sd2 b zip.ckpt and copied from there" in note for note in result.notes)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_large_folders_come_in_shards_as_diffusers_writes_them(forms, tmp_path, monkeypatch, family):
    path, _ = forms
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    blockmerge.convert(path(0, "safetensors", family), whole, naming="diffusers")
    monkeypatch.setattr(shards_of_outputs, "SHARD_BYTES", 50_000)
    blockmerge.convert(path(0, "safetensors", family), sharded, naming="diffusers")
    assert_same(read(sharded), read(whole))
    hub = json.loads(
        (path(0, "sharded", family) / "unet/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    index = json.loads((sharded / "unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index.keys() == hub.keys()
    assert index["metadata"]["total_size"] == hub["metadata"]["total_size"]
    assert index["weight_map"].keys() == hub["weight_map"].keys()
    shards = sorted(set(index["weight_map"].values()))
    assert shards == [
        f"diffusion_pytorch_model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert {file.name for file in (sharded / "unet").glob("*.safetensors")} == set(shards)
    sizes = [
        sum(tensor.nbytes for tensor in load_file(sharded / "unet" / shard).values()) for shard in shards
    ]
    assert len(sizes) > 2
    assert max(sizes) <= 50_000
    # and it is a model like any other
    blockmerge.convert(sharded, tmp_path / "back.safetensors")
    blockmerge.convert(whole, tmp_path / "again.safetensors")
    assert_same(load_file(tmp_path / "back.safetensors"), load_file(tmp_path / "again.safetensors"))


# -- the models that this project grew from ------------------------------------------------------------------


def training(state):
    return {
        "epoch": 9,
        "global_step": 90_000,
        "state_dict": state,
        "callbacks": {},
        "optimizer_states": [{"step": 1}],
    }


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """{file name: (path, the U-Net's tensors)}, in a folder of their own; complete, if thin."""
    return made_zoo(tmp_path_factory.mktemp("zoo"), *make_state_dicts("sd1"))


@pytest.fixture(scope="module")
def small_zoo(tmp_path_factory):
    """The same of models with few tensors."""
    models = (small_model("sd1", torch.float32, seed, for_a_folder=True) for seed in (0, 1))
    return made_zoo(tmp_path_factory.mktemp("small-zoo"), *models)


def made_zoo(home, a, b):
    unet = {name: tensor for name, tensor in b.items() if is_unet(name)}
    half = {name: tensor / 2 for name, tensor in unet.items()}
    found = {}

    def add(name, tensors, action):
        action(home / name)
        found[name] = home / name, {name: tensor for name, tensor in tensors.items() if is_unet(name)}

    anime = as_dtype(a, torch.float16)
    betas = {"betas": torch.linspace(0, 1, 1000), "model_ema.decay": torch.tensor(0.9)}
    add("animediffusion.safetensors", anime, lambda path: save_file(anime, path, {"format": "pt"}))
    add("bpmodel-mk5.safetensors", b, lambda path: save_file(b, path))
    add("sygil-v0.4.ckpt", b, lambda path: torch.save(training({**b, **ema_of(b), **betas}), path))
    add(
        "ACertain.ckpt",
        b,
        lambda path: torch.save(training(b | betas), path, _use_new_zipfile_serialization=False),
    )
    add("bp_1024_e10.ckpt", unet, lambda path: torch.save({"state_dict": unet}, path))
    add("bp_1024_with_vae_te.ckpt", b, lambda path: torch.save({"state_dict": b}, path))
    add("bp_1024_e10_ema.ckpt", half, lambda path: torch.save({"state_dict": ema_of(unet)}, path))
    add("bp_1024_ema_plain.ckpt", half, lambda path: torch.save(half, path))
    add("ACertainModel", anime, lambda path: write_folder(in_diffusers(anime, "sd1"), path))
    add("Sygil", b, lambda path: write_folder(in_diffusers(b, "sd1"), path, binary=True))
    return found


NAMES = (
    "bpmodel-mk5.safetensors", "sygil-v0.4.ckpt", "ACertain.ckpt", "bp_1024_e10.ckpt", "bp_1024_with_vae_te.ckpt",
    "bp_1024_e10_ema.ckpt", "bp_1024_ema_plain.ckpt", "ACertainModel", "Sygil",
)  # fmt: skip


def unet_of(path):
    return {name: tensor for name, tensor in read(path).items() if name.startswith((UNET, "unet/"))}


@pytest.mark.parametrize("name", NAMES)
def test_each_merges_compares_and_converts(small_zoo, tmp_path, name):
    anime, of_anime = small_zoo["animediffusion.safetensors"]
    path, unet = small_zoo[name]
    both_ways = (anime, path, of_anime, unet), (path, anime, unet, of_anime)
    for one, other, first, second in some(both_ways, of=2, chosen_by=name):
        output = tmp_path / ("out" if one.is_dir() else "out.safetensors")
        result = blockmerge.merge(one, other, output=output, weights=0.25, overwrite=True)
        merged, first, second = (
            unet_of(output),
            *((in_diffusers(u, "sd1") if one.is_dir() else u) for u in (first, second)),
        )
        assert_merged(merged, first, second, dict.fromkeys(SD, 0.25), "sd1")
        assert result.family == "sd1"
        # whole, whichever of them brought it
        assert {"vae", "text_encoder", "unet"} <= blockmerge.inspect(output).components.keys()
        assert "ema" not in blockmerge.inspect(output).components
    for method in ("attention", "weights"):
        (row,) = blockmerge.similarity(anime, [path], method=method).references
        assert row.error is None
        assert row.similarity is not None
    blockmerge.convert(path, tmp_path / "single.safetensors", dtype="fp16")
    assert_same(unet_of(tmp_path / "single.safetensors"), as_dtype(unet, torch.float16))
    blockmerge.convert(path, tmp_path / "folder", naming="diffusers")
    assert_same(unet_of(tmp_path / "folder"), in_diffusers(unet, "sd1"))


def test_what_inspect_says_of_them(zoo, capsys):
    components = {name: set(blockmerge.inspect(path).components) for name, (path, _) in zoo.items()}
    whole = {"unet", "text_encoder", "vae"}
    assert components.pop("sygil-v0.4.ckpt") == {*whole, "ema", "other"}
    assert components.pop("ACertain.ckpt") == {*whole, "ema", "other"}
    assert components.pop("bp_1024_e10.ckpt") == components.pop("bp_1024_ema_plain.ckpt") == {"unet"}
    assert components.pop("bp_1024_e10_ema.ckpt") == {"ema"}
    assert set(map(frozenset, components.values())) == {frozenset(whole)}
    for name, (path, unet) in zoo.items():
        found = blockmerge.inspect(path)
        assert (found.family, found.variant) == ("sd1", "base")
        assert sum(part.tensors for part in found.blocks.values()) == len(unet), name
        assert run(["inspect", str(path)]) == 0
        assert ("EMA weights only" in capsys.readouterr().out) == (name == "bp_1024_e10_ema.ckpt")


def test_the_commands_of_the_readme(zoo, tmp_path, capsys, monkeypatch):
    """As they stand in the issue, in a folder with files of these names."""
    monkeypatch.chdir(tmp_path)
    for name, (path, _) in zoo.items():
        (tmp_path / name).symlink_to(path)
    _, b = make_state_dicts("sd1")
    save_file({n.removeprefix(VAE): t.half() for n, t in b.items() if n.startswith(VAE)}, "kl-f8.safetensors")

    def said(line):
        assert run(line.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    out = said("animediffusion.safetensors bp_1024_e10.ckpt --preset high_res")
    assert "the VAE is only in animediffusion.safetensors and copied from there" in out
    assert "the text encoder is only in animediffusion.safetensors" in out
    merged = load_file("animediffusion+bp_1024_e10-high_res.safetensors")
    anime = load_file("animediffusion.safetensors")
    assert all(torch.equal(merged[n], t) for n, t in anime.items() if not is_unet(n))
    assert torch.equal(
        merged[UNET + "input_blocks.1.0.in_layers.2.weight"],
        b[UNET + "input_blocks.1.0.in_layers.2.weight"].half(),
    )

    said("ACertainModel/ sygil-v0.4.ckpt --preset low_res")
    assert (tmp_path / "ACertainModel+sygil-v0.4-low_res" / "model_index.json").is_file()
    said("ACertainModel/ sygil-v0.4.ckpt --preset low_res -o merged/")
    assert (tmp_path / "merged" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert torch.equal(
        read("merged")["unet/mid_block.resnets.0.conv1.weight"],
        b[UNET + "middle_block.0.in_layers.2.weight"].half(),
    )

    out = said("convert bp_1024_e10_ema.ckpt bp.safetensors --dtype fp16 --vae kl-f8.safetensors")
    assert "bp_1024_e10_ema.ckpt has only EMA weights for its U-Net: they are used as the U-Net" in out
    converted = load_file("bp.safetensors")
    assert {tensor.dtype for tensor in converted.values()} == {torch.float16}
    assert_same(
        converted,
        {
            n: (t / 2 if is_unet(n) else t).half()
            for n, t in b.items()
            if n.startswith((UNET, VAE)) and not is_position_ids(n)
        },
    )
    assert all(
        f"{name}  " in said("inspect bp.safetensors --hash")
        for name in ("autov1", "autov2", "autov3", "sha256")
    )
    said("convert animediffusion.safetensors folder/ --to diffusers")
    assert_same(read("folder"), in_diffusers(anime, "sd1"))
    assert said("check animediffusion.safetensors").endswith("nothing is wrong\n")


def test_reports_do_not_depend_on_the_form(forms, tmp_path):
    """similarity (both methods) and explain: the same numbers for folders as for single files."""
    path, _ = forms
    single, other = path(0, "safetensors"), path(1, "safetensors")
    folder, sharded = path(0, "folder"), path(1, "sharded")
    for method in ("attention", "weights"):
        expected = blockmerge.similarity(single, [other], method=method).references[0]
        for base, reference in (
            (folder, sharded),
            (single, sharded),
            (path(0, "zip"), sharded),
            (folder, path(1, "legacy")),
        ):
            found = blockmerge.similarity(base, [reference], method=method).references[0]
            assert found.similarity == pytest.approx(expected.similarity, abs=1e-9)
            assert found.parts == pytest.approx(expected.parts, abs=1e-9)
    blockmerge.merge(single, other, weights=0.3, output=tmp_path / "m.safetensors")
    blockmerge.merge(folder, sharded, weights=0.3, output=tmp_path / "m")
    plain = blockmerge.explain(tmp_path / "m.safetensors", [single, other])
    found = blockmerge.explain(tmp_path / "m", [folder, sharded])
    assert found.exact == plain.exact
    for block, part in plain.blocks.items():
        ours = list(found.blocks[block].weights.values())
        assert ours == pytest.approx(list(part.weights.values()), abs=1e-6), block
