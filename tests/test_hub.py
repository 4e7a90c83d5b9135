"""Models in Hugging Face's cache: found by their repository's folder, called by its name, and left alone."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import blockmerge
from blockmerge import CheckpointError, OutputError, Recipe, open_checkpoint
from blockmerge.checkpoints import name_of
from blockmerge.checkpoints.hub import shown_path
from blockmerge.checkpoints.open import told_apart
from blockmerge.merging.default_name import default_output
from tests.commands import ok
from tests.refusals import assert_refused, snapshot
from tests.small_models import small_model, write_folder

REVISION, OTHER = "451f4fe16113bff5a5d2269ed5ad43b0592e9a14", "39593d5650112b4cc580433f6b0435385882d819"


def cached(hub, repository, source, revision=REVISION, ref="main"):
    """Put a file or a folder into a cache as huggingface_hub does: blobs, links to them, and a ref. Returns the
    repository's folder.
    """
    home = hub / f"models--{repository.replace('/', '--')}"
    files = [path for path in source.rglob("*") if path.is_file()] if source.is_dir() else [source]
    for path in files:
        inside = path.relative_to(source) if source.is_dir() else path.name
        blob = home / "blobs" / f"{len(list(home.glob('blobs/*'))):064x}"
        link = home / "snapshots" / revision / inside
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if ref:
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / ref).write_text(revision)
    return home


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of two models of few tensors."""
    home = tmp_path_factory.mktemp("folders")
    for seed, name in enumerate("ab"):
        write_folder(home / name, small_model(seed=seed, for_a_folder=True), "sd1")
        (home / name / "unet" / "config.json").write_text("{}")
    return home


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A whole thin model as a folder with configs, as blockmerge makes it."""
    from blockmerge.demo import write_pair

    home = tmp_path_factory.mktemp("whole")
    write_pair(home / "a.safetensors", home / "b.safetensors", "sd1")
    blockmerge.convert(home / "a.safetensors", home / "folder", naming="diffusers")
    return home


@pytest.fixture
def hub(tmp_path):
    return tmp_path / "hub"


@pytest.mark.parametrize("given", [".", "snapshots", f"snapshots/{REVISION}"])
def test_a_repository_is_followed_to_its_snapshot(hub, folders, given):
    home = cached(hub, "org/my-name", folders / "a")
    found = open_checkpoint(home / given)
    assert found.name == "org/my-name"
    assert found.path == home / "snapshots" / REVISION
    assert found.tensors.keys() == open_checkpoint(folders / "a").tensors.keys()
    assert found.read("unet/conv_in.weight") == open_checkpoint(folders / "a").read("unet/conv_in.weight")


def test_names_in_the_cache(hub, monkeypatch):
    inside = hub / "models--org--name" / "snapshots" / REVISION
    for path, name in {
        inside: "org/name",
        inside.parent: "org/name",
        inside.parent.parent: "org/name",
        inside / "unet": "org/name/unet",
        inside / "v1-5.safetensors": "org/name/v1-5.safetensors",
        inside.parent.parent / "blobs" / "abc": "org/name/blobs/abc",
        hub / "models--gpt2" / "snapshots" / REVISION: "gpt2",
        hub / "renamed" / "snapshots" / REVISION / "vae": "renamed/vae",
        hub / "run" / "snapshots" / "step-500": "step-500",
        hub / "run" / "a.safetensors": "a.safetensors",
        hub / "models" / "x": "x",
    }.items():
        assert name_of(path) == name_of(f"{path}/") == name, path
        in_the_cache = name != path.name
        assert shown_path(path) == (name if in_the_cache else str(path))
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    assert (name_of("."), name_of("unet"), name_of("./vae/..")) == ("org/name", "org/name/unet", "org/name")


def test_which_snapshot(hub, folders, tmp_path, capsys):
    """That of refs/main; without it the only one; of several none."""
    home = cached(hub, "org/name", folders / "a", ref=None)
    assert open_checkpoint(home).path.name == REVISION
    cached(hub, "org/name", folders / "b", OTHER, ref="fp16")
    with pytest.raises(
        CheckpointError, match="has 2 snapshots, and no refs/main says which: give the path"
    ) as caught:
        open_checkpoint(home)
    assert f"(snapshots/{OTHER}, snapshots/{REVISION})" in str(caught.value)
    for says in (b"", b"0" * 40, b"../../elsewhere", b"\xff" * 5000):
        (home / "refs" / "main").write_bytes(says)
        with pytest.raises(CheckpointError, match="has 2 snapshots"):
            open_checkpoint(home)
    for revision in (REVISION, OTHER):
        (home / "refs" / "main").write_text(f"{revision}\n")
        assert open_checkpoint(home).path.name == revision
    shutil.rmtree(home / "snapshots")
    (home / "snapshots").mkdir()
    line = assert_refused(
        capsys, tmp_path, "inspect", home, says="cache without any snapshot: download it first"
    )
    assert "models--org--name" in line


def test_a_training_run_with_snapshots_is_no_repository(tmp_path, folders):
    shutil.copytree(folders / "a", tmp_path / "run")
    (tmp_path / "run" / "snapshots" / REVISION).mkdir(parents=True)
    assert open_checkpoint(tmp_path / "run").path == tmp_path / "run"


def test_every_command_says_the_repository(hub, folders, here, capsys):
    a, b = (cached(hub, f"org/{letter}", folders / letter) for letter in "ab")
    snapshot_of_b = b / "snapshots" / REVISION
    said = {
        "inspect": ok(capsys, "inspect", a),
        "similarity": ok(capsys, "similarity", a, snapshot_of_b, "--blocks"),
        "matrix": ok(capsys, "similarity", "--matrix", "--method", "weights", a, snapshot_of_b),
        "explain": ok(capsys, "explain", a, a / "snapshots" / REVISION / "unet", snapshot_of_b, "--json"),
        "merge": ok(capsys, a, snapshot_of_b, "-w", "0.5", "-o", "m.safetensors", "--to", "ldm"),
        "convert": ok(capsys, "convert", a, "c.safetensors"),
    }
    blockmerge.cli.main.run(["check", str(a)])
    said["check"] = "".join(capsys.readouterr())
    for command, text in said.items():
        assert "org/a" in text, command
        assert REVISION not in text, command
        assert "models--" not in text, command
    assert "of org/a and org/b" in said["merge"]
    with safe_open("m.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["blockmerge.recipe"])["models"] == ["org/a", "org/b"]
    for leaked in (REVISION, "models--", str(hub), "/tmp", "snapshots"):
        assert leaked not in json.dumps(metadata)


def test_default_names(hub, whole, here):
    a = cached(hub, "org/some-model", whole / "folder")
    file = cached(hub, "org/files", whole / "b.safetensors") / "snapshots" / REVISION / "b.safetensors"
    vae = cached(hub, "org/my-vae", whole / "folder" / "vae")
    inside = a / "snapshots" / REVISION
    for path in (a, inside, a / "snapshots", f"{inside}/"):
        assert str(default_output(Recipe(path, file, weights=0.5))) == "some-model+b-0.5"
    recipe = Recipe(file, inside / "unet", weights=0.5, vae=vae)
    assert str(default_output(recipe)) == "b+unet-0.5-vae_my-vae.safetensors"


def test_vae_and_configs_from_the_cache(hub, whole, here):
    pipeline = cached(hub, "org/pipeline", whole / "folder")
    vae = cached(hub, "org/vae-only", whole / "folder" / "vae")
    no_owner = cached(hub, "lone-vae", whole / "folder" / "vae")
    models = whole / "a.safetensors", whole / "b.safetensors"
    expected = blockmerge.merge(*models, weights=0.5, vae=whole / "folder" / "vae", output="0.safetensors")
    for number, (path, called) in enumerate(
        {
            vae: "org/vae-only",
            vae / "snapshots" / REVISION: "org/vae-only",
            no_owner: "lone-vae",
            pipeline: "org/pipeline",
            pipeline / "snapshots" / REVISION / "vae": "org/pipeline/vae",
        }.items(),
        start=1,
    ):
        result = blockmerge.merge(*models, weights=0.5, vae=path, output=f"{number}.safetensors")
        assert f"the VAE is {called}" in result.notes
        assert result.recipe["vae"] == result.recipe["vae_file"] == called
        with safe_open(result.output, "pt") as file, safe_open(expected.output, "pt") as other:
            names = [name for name in other.keys() if name.startswith("first_stage_model.")]  # noqa: SIM118
            assert names
            assert all(torch.equal(file.get_tensor(name), other.get_tensor(name)) for name in names)
    made = blockmerge.merge(*models, weights=0.5, output="made", naming="diffusers", configs=pipeline)
    assert made.recipe["configs"] == "org/pipeline"
    again = Recipe.from_dict(made.recipe, models=models, configs=pipeline).run("again")
    assert snapshot_bytes(made.output) == snapshot_bytes(again.output)


def snapshot_bytes(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_no_output_is_an_input(hub, whole, folders, tmp_path):
    """By whatever name: the snapshot's, a link's, the blob's, the repository's; of models, VAE and configs."""
    a = cached(hub, "org/a", folders / "a")
    file = cached(hub, "org/file", whole / "a.safetensors") / "snapshots" / REVISION / "a.safetensors"
    vae = cached(hub, "org/vae", whole / "folder" / "vae")
    pipeline = cached(hub, "org/pipeline", whole / "folder")
    link = tmp_path / "link.safetensors"
    link.symlink_to(file)
    blob = Path(os.path.realpath(file))
    before = snapshot(tmp_path)
    plain = whole / "b.safetensors"
    for models, output, options in [
        ([a, folders / "b"], a / "snapshots" / REVISION, {}),
        ([a, folders / "b"], a, {}),
        (
            [a / "snapshots" / REVISION / "unet", folders / "b"],
            a / "snapshots" / REVISION / "unet",
            {"naming": "diffusers"},
        ),
        ([file, plain], file, {}),
        ([file, plain], link, {}),
        ([file, plain], blob, {"naming": "diffusers"}),
        ([plain, whole / "a.safetensors"], vae / "snapshots" / REVISION, {"vae": vae, "naming": "diffusers"}),
        ([plain, whole / "a.safetensors"], vae, {"vae": vae, "naming": "diffusers"}),
        ([plain, file], pipeline / "snapshots" / REVISION, {"configs": pipeline, "naming": "diffusers"}),
    ]:
        with pytest.raises(OutputError):
            blockmerge.merge(*models, weights=0.5, output=output, overwrite=True, **options)
        assert snapshot(tmp_path) == before


def test_no_report_replaces_what_is_in_a_folder(hub, folders, capsys, tmp_path):
    a = cached(hub, "org/a", folders / "a")
    file = next((a / "blobs").iterdir())
    arguments = ["similarity", a, folders / "b", "-o", file, "--overwrite"]
    assert_refused(capsys, tmp_path, *arguments, says="is the input")


def test_two_revisions_are_told_apart(hub, folders):
    one = cached(hub, "org/name", folders / "a")
    cached(hub, "org/name", folders / "b", OTHER, ref=None)
    elsewhere = cached(hub / "deeper", "org/name", folders / "a")
    places = [one / "snapshots" / REVISION, one / "snapshots" / OTHER, folders / "b"]
    assert told_apart([open_checkpoint(path) for path in places]) == [
        f"org/name@{REVISION[:7]}",
        f"org/name@{OTHER[:7]}",
        "b",
    ]
    labels = told_apart([open_checkpoint(path) for path in (one, elsewhere)])
    assert labels == [f"hub/org/name@{REVISION[:7]}", f"deeper/org/name@{REVISION[:7]}"]
    assert told_apart([open_checkpoint(path) for path in (one, one / "snapshots")]) == ["org/name"] * 2


def test_what_is_wrong_in_the_cache_is_said_by_its_repository(hub, folders, capsys, tmp_path):
    home = cached(hub, "a-long-organisation/a-rather-long-name-of-a-model", folders / "a")
    inside = home / "snapshots" / REVISION
    weights = inside / "unet" / "diffusion_pytorch_model.safetensors"
    Path(os.path.realpath(weights)).write_bytes(b"\x05" + b"\0" * 30)
    called = "a-long-organisation/a-rather-long-name-of-a-model/unet/diffusion_pytorch_model.safetensors"
    for line in (["inspect", home], ["inspect", weights], ["convert", inside, "o.safetensors"]):
        said = assert_refused(capsys, tmp_path, *line, says=f"Error: {called} ")
        assert REVISION not in said
    os.unlink(os.path.realpath(weights))  # as a download that was broken off leaves it
    assert_refused(capsys, tmp_path, "check", home, says=f"cannot open {called}: no such file")
    (home / "refs" / "main").unlink()
    cached(hub, "a-long-organisation/a-rather-long-name-of-a-model", folders / "b", OTHER, ref=None)
    found = blockmerge.similarity(folders / "a", [home, folders / "b"])
    assert [one.error is None for one in found.references] == [True, False]
    assert "has 2 snapshots" in found.references[1].error
    assert str(hub) not in found.references[1].error


def test_candidates_of_a_repository_of_files(hub, whole, capsys):
    """A repository that holds files, as many do, is a folder of models where these are taken."""
    home = cached(hub, "org/files", whole / "a.safetensors")
    cached(hub, "org/files", whole / "b.safetensors")
    found = blockmerge.explain(whole / "b.safetensors", home)
    assert found.candidates == ("org/files/a.safetensors", "org/files/b.safetensors")
    assert (found.base, found.method) == ("org/files/b.safetensors", "copy")


@pytest.mark.parametrize("inside", [".", "checkpoints"])
def test_a_repository_of_one_file_is_that_file(hub, whole, here, capsys, inside):
    a, b = whole / "a.safetensors", whole / "b.safetensors"
    home = cached(hub, "org/one", a)
    snapshot_of_a = home / "snapshots" / REVISION
    (snapshot_of_a / inside).mkdir(exist_ok=True)
    (snapshot_of_a / "a.safetensors").rename(snapshot_of_a / inside / "a.safetensors")
    (snapshot_of_a / inside / "a.safetensors").unlink()
    (snapshot_of_a / inside / "a.safetensors").symlink_to(next((home / "blobs").iterdir()))
    (snapshot_of_a / "README.md").write_text("about")
    (snapshot_of_a / "config.json").write_text("{}")
    called = "org/one/a.safetensors" if inside == "." else "org/one/checkpoints/a.safetensors"
    for given in (home, home / "snapshots", snapshot_of_a):
        assert open_checkpoint(given).name == called
    expected = blockmerge.merge(a, b, weights=0.5, vae="b", output="expected.safetensors")
    for number, (models, vae) in enumerate([((home, b), "b"), ((a, b), "b"), ((b, home), "a")]):
        result = blockmerge.merge(*models, weights=0.5, vae=vae, output=f"{number}.safetensors")
        with safe_open(result.output, "pt") as file, safe_open(expected.output, "pt") as other:
            assert all(torch.equal(file.get_tensor(name), other.get_tensor(name)) for name in other.keys())  # noqa: SIM118
    blockmerge.merge(a, b, weights=0.5, vae=home, output="vae.safetensors")
    said = {
        "inspect": ok(capsys, "inspect", home),
        "similarity": ok(capsys, "similarity", home, b),
        "explain": ok(capsys, "explain", b, home, "--json"),
        "merge": ok(capsys, home, b, "-w", "0.5"),
        "convert": ok(capsys, "convert", home, "c.safetensors"),
    }
    blockmerge.cli.main.run(["check", str(home)])
    said["check"] = "".join(capsys.readouterr())
    for command, text in said.items():
        assert called in text, command
        assert REVISION not in text, command


def test_a_repository_of_several_files_lists_them(hub, whole, tmp_path, capsys):
    home = cached(hub, "org/two", whole / "a.safetensors")
    cached(hub, "org/two", whole / "b.safetensors")
    for command in (
        ["convert", home, "o.safetensors"],
        [home, home, "-w", "1"],
    ):
        line = assert_refused(
            capsys, tmp_path, *command, says="with 2 model files in it: give the path of one "
        )
        for name in "ab":
            assert f"{REVISION}/{name}.safetensors" in line
    for command in ("inspect", "check"):
        lines = ok(capsys, command, home).splitlines()
        assert [one.split()[0] for one in lines] == ["org/two/a.safetensors", "org/two/b.safetensors"]


def test_no_output_is_the_repository_of_the_input(hub, whole, tmp_path):
    home = cached(hub, "org/one", whole / "a.safetensors")
    before = snapshot(tmp_path)
    for output in (home, home / "snapshots" / REVISION, home / "snapshots" / REVISION / "a.safetensors"):
        with pytest.raises(OutputError):
            blockmerge.convert(home, output, naming=None if output.suffix else "diffusers", overwrite=True)
        assert snapshot(tmp_path) == before
