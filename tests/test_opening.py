"""How models are opened is the same in every command and function: a folder's variants, EMA copies."""

from __future__ import annotations

import inspect as python_inspect
import json
import shutil
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import CheckpointError, IncompatibleModelsError, LiveMerge, RecipeError
from blockmerge.cli.main import cli, run
from blockmerge.demo import write_pair
from blockmerge.inspecting import repair
from tests.commands import ok
from tests.forms import assert_same, ema_of, read
from tests.refusals import assert_refused
from tests.small_models import small_model
from tests.test_configs import classes

# diffusers with the newest numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ONLY = "has only the variant fp16: it is used"


def pipeline_of(folder, home, **variants):
    """Have diffusers and transformers load a folder's components and write them anew, each as its variants."""
    for component, names in variants.items():
        loaded = classes()[component].from_pretrained(folder / component)
        for variant in names:
            told = {} if variant is None else {"variant": variant}
            loaded.save_pretrained(home / component, **told)
    (home / "model_index.json").write_bytes((folder / "model_index.json").read_bytes())
    return home


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """a and b: files, plain folders, folders that diffusers wrote with fp16 only (`a-fp16`) and with two kinds but
    no plain ones (`a-two`).
    """
    home = tmp_path_factory.mktemp("home")
    write_pair(home / "a.safetensors", home / "b.safetensors", "sd1", dtypes=("F32", "F32"))
    every = ("unet", "vae", "text_encoder")
    for letter in "ab":
        blockmerge.convert(home / f"{letter}.safetensors", home / letter, naming="diffusers")
        pipeline_of(home / letter, home / f"{letter}-fp16", **{part: ["fp16"] for part in every})
    two = {"unet": ["fp16", "non_ema"], "vae": ["fp16"], "text_encoder": [None]}
    pipeline_of(home / "a", home / "a-two", **two)
    return home


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A folder in which the models are seen by their names alone."""
    for path in home.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def notes_of(text):
    """All notes in a JSON report, wherever they stand."""
    found = json.loads(text)
    return [*found["notes"], *(note for one in found.get("references", ()) for note in one["notes"])]


def remove_outputs(here):
    shutil.rmtree(here / "out", ignore_errors=True)
    (here / "out.safetensors").unlink(missing_ok=True)


ONE = {
    "inspect": "inspect a-fp16 --json",
    "check": "check a-fp16 --json",
    "check --fix": "check a-fp16 --fix out --json",
    "similarity": "similarity a-fp16 b-fp16 --json",
    "similarity --method weights": "similarity b.safetensors a-fp16 b-fp16 --json --method weights",
    "similarity --common-base": "similarity b a --json --method weights --common-base a-fp16",
    "similarity --matrix": "similarity --matrix a-fp16 b.safetensors --json",
    "explain": "explain a-fp16 a b --json",
    "a candidate": "explain a.safetensors a-fp16 b --json",
    "merge": "a-fp16 b -w 0.5 -o out --json",
    "merge --dry-run": "b a-fp16 -w 0.5 -o out --dry-run --json",
    "merge --vae": "a b -w 0.5 -o out.safetensors --vae a-fp16 --json",
    "a VAE alone": "a b -w 0.5 -o out.safetensors --vae a-fp16/vae --json",
    "convert": "convert a-fp16 out.safetensors --json",
    "convert --vae": "convert b.safetensors out.safetensors --vae a-fp16 --json",
}


@pytest.mark.parametrize("what", ONE)
def test_one_sole_variant_is_taken_and_said(here, capsys, what):
    words = ONE[what].split()
    assert run(words) in (0, 1)
    name = "a-fp16/vae" if what == "a VAE alone" else "a-fp16"
    assert f"{name} {ONLY}" in notes_of(capsys.readouterr().out)
    remove_outputs(here)
    words.remove("--json")
    assert run(words) in (0, 1)
    assert f"\n- {name} {ONLY}\n" in capsys.readouterr().out


def without_positions(tensors):
    """transformers writes no position_ids."""
    return {name: tensor for name, tensor in tensors.items() if "position_ids" not in name}


def test_the_sole_variant_is_what_is_computed_with(here, home):
    """Merged, converted, compared: the values are those that diffusers wrote."""
    plain = blockmerge.merge("a", "b", weights=0.5, output="plain.safetensors")
    for number, models in enumerate((("a-fp16", "b-fp16"), ("a-fp16", "b.safetensors"))):
        merged = blockmerge.merge(*models, weights=0.5, output=f"{number}.safetensors")
        assert_same(without_positions(load_file(merged.output)), without_positions(load_file(plain.output)))
    assert_same(
        read(blockmerge.convert("a-fp16", "again", configs="a-two").output),
        without_positions(read(home / "a")),
    )
    vae = blockmerge.merge("a", "b", weights=0.5, output="vae.safetensors", vae="b-fp16")
    of_b = load_file(home / "b.safetensors")
    for name, tensor in load_file(vae.output).items():
        if name.startswith("first_stage_model."):
            assert torch.equal(tensor, of_b[name]), name
    assert blockmerge.similarity("a", "a-fp16", "weights").references[0].similarity == 1.0


SEVERAL = {
    "inspect": "inspect a-two",
    "check": "check a-two",
    "check --fix": "check a-two --fix out",
    "similarity": "similarity a-two b",
    "explain": "explain a-two a b",
    "merge": "b a-two -w 0.5 -o out",
    "merge --vae": "a b -w 0.5 -o out --vae a-two",
    "convert": "convert a-two out.safetensors",
}


@pytest.mark.parametrize("what", SEVERAL)
def test_several_variants_are_listed_and_the_advice_works(here, capsys, what):
    line = SEVERAL[what].split()
    says = (
        "a-two has several variants and no plain weights (unet: fp16, non_ema): "
        "choose one with variant='fp16' (--variant fp16)"
    )
    assert_refused(capsys, here, *line, says=says)
    for variant in ("fp16", "non_ema"):
        assert run([*line, "--variant", variant]) in (0, 1)
        out, err = capsys.readouterr()
        assert "a-two" in out
        assert "variant" not in err
        remove_outputs(here)


def test_of_configs_no_weights_are_read(here, capsys):
    ok(capsys, "convert", "a.safetensors", "out", "--to", "diffusers", "--configs", "a-two")
    assert '"sample_size"' in (here / "out" / "unet" / "config.json").read_text()


def test_a_variant_counts_where_it_is(here, home):
    """A folder that lacks it gives plain weights and says so; a file has none; nobody having it is an error."""
    result = blockmerge.merge("b", "a-two", weights=1, vae=Path("b"), output="1.safetensors", variant="fp16")
    assert [note for note in result.notes if "variant" in note] == [
        "b has no variant fp16: the plain weights are used",
        "a-two has no variant fp16 of text_encoder: the plain weights are used",
    ]
    result = blockmerge.merge(
        "a.safetensors", "b.safetensors", weights=1, vae="a-two", output="2.safetensors", variant="fp16"
    )
    assert "a-two has no variant fp16 of text_encoder: the plain weights are used" in result.notes
    for call in (
        lambda **options: blockmerge.merge("a", "b-fp16", weights=0.5, output="3.safetensors", **options),
        lambda **options: blockmerge.similarity("a", "b-fp16", **options),
        lambda **options: blockmerge.similarity_matrix(["a", "b-fp16"], **options),
        lambda **options: blockmerge.explain("a", "b-fp16", **options),
    ):
        with pytest.raises(CheckpointError) as caught:
            call(variant="fp61")
        assert str(caught.value) == (
            "a, b-fp16 have no weights of the variant 'fp61': they have fp16; did you mean 'fp16'?"
        )
    for call in (
        lambda path: blockmerge.inspect(path, variant="fp16"),
        lambda path: blockmerge.check(path, variant="fp16"),
        lambda path: blockmerge.convert(path, "4.safetensors", variant="fp16"),
    ):
        with pytest.raises(
            CheckpointError, match=r"^a has no weights of the variant 'fp16': it has only plain"
        ):
            call("a")
        with pytest.raises(
            CheckpointError, match=r"^a\.safetensors is not a diffusers folder, and only these"
        ):
            call("a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors are not diffusers folders"):
        blockmerge.similarity("a.safetensors", "b.safetensors", variant="fp16")
    opened = blockmerge.open_checkpoint("a-two", variant="fp16")
    assert blockmerge.inspect(opened, variant="fp16").family == "sd1"
    with pytest.raises(CheckpointError, match="of the variant 'non_ema': open it so, or give its path"):
        blockmerge.inspect(opened, variant="non_ema")
    for wrong in ("", 16):
        with pytest.raises(RecipeError, match=r"variant \(--variant\) is a name, as in 'fp16'"):
            blockmerge.merge("a", "b", weights=0.5, output="5.safetensors", variant=wrong)


def test_a_repaired_copy_of_a_variant(here):
    found = repair("a-two", "fixed", variant="non_ema")
    assert found.notes == (
        "a-two has no variant non_ema of text_encoder: the plain weights are used",
        "a-two has only the variant fp16 of vae: it is used",
    )


def test_live_merges_open_alike(here):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained("a/unet")
    with LiveMerge(unet, "a-two", "b-fp16", variant="non_ema") as live:
        assert live.notes == (
            "a-two has no variant non_ema of text_encoder: the plain weights are used",
            "a-two has only the variant fp16 of vae: it is used",
            "b-fp16 has only the variant fp16: it is used",
        )
        live.apply(weights=1)
        of_b = UNet2DConditionModel.from_pretrained("b/unet").state_dict()
        assert all(torch.equal(tensor, of_b[name]) for name, tensor in unet.state_dict().items())
    with pytest.raises(CheckpointError, match="have no weights of the variant 'fp61'"):
        LiveMerge(unet, "a", "b", variant="fp61")
    with pytest.raises(IncompatibleModelsError, match="no EMA copies to use in a and b"):
        LiveMerge(unet, "a", "b", ema="use")


# -- EMA copies ----------------------------------------------------------------------------------------------


def test_models_are_compared_by_their_ema_copies_where_asked(tmp_path, capsys):
    model, other = small_model(for_a_folder=True), small_model(seed=1, for_a_folder=True)
    copies = ema_of(model)
    save_file({**other, **copies}, tmp_path / "trained.safetensors")
    # As `ema_of` makes them.
    halved = {n: t / 2 if n.startswith("model.diffusion_model.") else other[n] for n, t in model.items()}
    save_file(halved, tmp_path / "plain.safetensors")
    paths = tmp_path / "trained.safetensors", tmp_path / "plain.safetensors"
    for method, best in (("attention", 100), ("weights", 1)):
        by_default, used = (
            blockmerge.similarity(*paths, method, ema=ema).references[0] for ema in ("drop", "use")
        )
        assert used.similarity == pytest.approx(best)
        if method == "weights":
            by_default, used = by_default.components["unet"], used.components["unet"]
            assert used.cosine == pytest.approx(1)
            assert by_default.cosine < 0.9
        else:
            assert by_default.similarity < 99
        its_copy = f"the U-Net of trained.safetensors is its EMA copy ({len(copies) - 2} tensors)"
        assert its_copy in blockmerge.similarity(*paths, method, ema="use").notes
    found = blockmerge.explain(paths[1], [paths[0]], ema="use")
    assert (found.method, found.exact) == ("copy", True)
    assert blockmerge.explain(paths[1], [paths[0]]).method is None
    for command in ("similarity", "explain"):
        lines = [command, paths[1], paths[1], "--ema", "use"]
        if command == "similarity":
            assert_refused(
                capsys, tmp_path, *lines, says="no EMA copies to use in plain.safetensors and plain"
            )
        lines = [command, *paths, "--ema"]
        assert_refused(capsys, tmp_path, *lines, "keep", says="ema (--ema) is drop or use")
        assert_refused(
            capsys, tmp_path, *lines, "usw", says="unknown choice 'usw' for EMA copies: drop, keep, use"
        )


# -- all of them ---------------------------------------------------------------------------------------------


OPENING = {"merge": {"--variant", "--ema"}, "bake": {"--variant", "--ema"}, "convert": {"--variant", "--ema"}, "similarity": {"--variant", "--ema"},
           "explain": {"--variant", "--ema"}, "inspect": {"--variant"}, "check": {"--variant"}}  # fmt: skip


def test_every_command_that_opens_models_has_the_options_for_it():
    """Those of no models are named here, so that a new command is one or the other."""
    without = {"presets", "methods", "demo", "completion", "help", "lora"}  # LoRAs are taken in any variant
    without |= {"run", "again", "recipe", "verify"}  # recipes say how their models are opened
    assert OPENING.keys() | without == cli.commands.keys()
    described = set()
    for name, command in cli.commands.items():
        options = {option: one for one in command.params for option in one.opts}
        assert {"--variant", "--ema"} & options.keys() == OPENING.get(name, set()), name
        described |= {
            options["--variant"].help for _ in [0] if isinstance(options.get("--variant"), click.Option)
        }
    assert len(described) == 1


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (blockmerge.merge, {"variant", "ema"}),
        (blockmerge.Merge, {"variant", "ema"}),
        (blockmerge.convert, {"variant", "ema"}),
        (blockmerge.bake, {"variant", "ema"}),
        (blockmerge.similarity, {"variant", "ema"}),
        (blockmerge.similarity_matrix, {"variant", "ema"}),
        (blockmerge.explain, {"variant", "ema"}),
        (blockmerge.LiveMerge, {"variant", "ema"}),
        (blockmerge.inspect, {"variant"}),
        (blockmerge.check, {"variant"}),
        (blockmerge.open_checkpoint, {"variant"}),
    ],
)
def test_every_function_that_opens_models_has_the_arguments_for_it(function, names):
    parameters = python_inspect.signature(function).parameters
    defaults = {"variant": None, "ema": "drop"}
    assert {name: parameters[name].default for name in names} == {name: defaults[name] for name in names}
