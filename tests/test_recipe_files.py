"""Recipes as files, and what merged files record: read, changed, run, made again, verified.

Over 500 lines: what is read, recorded, made again and verified is the same few recipes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import Merge, Recipe
from blockmerge.checkpoints import identity_of
from blockmerge.cli.main import run
from blockmerge.errors import RecipeError
from blockmerge.merging.again import Recorded, Searched
from blockmerge.rendering.recipes import recipe_text
from tests.commands import ok
from tests.effort import some
from tests.refusals import assert_refused
from tests.small_models import small_model, write_folder
from tests.thin_loras import make_lora

MIX = """
output = "final.safetensors"
dtype = "fp16"
[X]
models = ["a.safetensors", "b.safetensors"]
preset = "high_res"
[Y]
models = ["X", "c.safetensors", "d.safetensors"]
method = "add_difference"
weights = 1
[final]
models = ["Y", "e.safetensors"]
preset = "low_res"
"""


@pytest.fixture
def mix(tmp_path):
    """A folder with mix.toml and the models that it names."""
    for number, name in enumerate("abcde"):
        save_file(small_model("sd1", seed=number), tmp_path / f"{name}.safetensors")
    (tmp_path / "mix.toml").write_text(MIX)
    return tmp_path


@pytest.fixture
def cli(capsys):
    return lambda *arguments: ok(capsys, *arguments)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def says(folder, text, *, match):
    (folder / "bad.toml").write_text(text)
    with pytest.raises(RecipeError, match=match) as caught:
        Recipe.load(folder / "bad.toml").run()
    assert "\n" not in str(caught.value)
    assert not (folder / "final.safetensors").exists()


def test_a_recipe_file_is_the_recipe_that_it_says(mix, monkeypatch):
    monkeypatch.chdir(os.sep)  # files are looked for beside the recipe
    result = Recipe.load(mix / "mix.toml").run()
    x = Merge(mix / "a.safetensors", mix / "b.safetensors", preset="high_res")
    y = Merge(x, mix / "c.safetensors", mix / "d.safetensors", method="add_difference", weights=1)
    Merge(y, mix / "e.safetensors", preset="low_res", dtype="fp16").run(mix / "expected.safetensors")
    assert result.output == mix / "final.safetensors"
    got, expected = load_file(result.output), load_file(mix / "expected.safetensors")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert result.recipe["stages"].keys() == {"X", "Y"}
    assert result.models == ("Y", "e.safetensors")


@pytest.mark.parametrize("ending", ["toml", "json"])
def test_what_is_dumped_is_loaded(mix, ending):
    recipe = Recipe.load(mix / "mix.toml")
    (mix / "sub").mkdir()
    for path in (mix / f"copy.{ending}", mix / "sub" / f"copy.{ending}"):
        recipe.dump(path)
        again = Recipe.load(path)
        again.run(mix / "again.safetensors", overwrite=True)
        recipe.run(mix / "first.safetensors", overwrite=True)
        assert sha256(mix / "again.safetensors") == sha256(mix / "first.safetensors")
    written = json.loads(path.read_text()) if ending == "json" else tomllib.loads(path.read_text())
    assert written["X"]["models"] == [str(mix / "a.safetensors"), str(mix / "b.safetensors")]
    assert '"a.safetensors"' in (mix / f"copy.{ending}").read_text()
    assert "\\" not in path.read_text()


def test_a_recipe_of_one_merge_needs_no_tables(mix):
    (mix / "one.toml").write_text(
        'models = ["a.safetensors", "b.safetensors"]\n'
        'method = "dare"\nweights = 0.5\ndrop_rate = 0.25\nseed = 7\nrules = ["BASE:attn:0.75"]\n'
    )
    Recipe.load(mix / "one.toml").run(mix / "one.safetensors")
    blockmerge.merge(
        *(mix / f"{name}.safetensors" for name in "ab"),
        method="dare", weights=0.5, drop_rate=0.25, seed=7, rules="BASE:attn:0.75", output=mix / "two.safetensors",
    )  # fmt: skip
    assert sha256(mix / "one.safetensors") == sha256(mix / "two.safetensors")


def test_a_recipe_is_a_model_where_one_can_stand(mix):
    stage = mix / "x.toml"
    stage.write_text('dtype = "fp32"\nmodels = ["a.safetensors", "b.safetensors"]\nweights = 0.5\n')
    blockmerge.merge(stage, mix / "c.safetensors", weights=0.25, output=mix / "one.safetensors")
    inner = Merge(mix / "a.safetensors", mix / "b.safetensors", weights=0.5)
    blockmerge.merge(inner, mix / "c.safetensors", weights=0.25, output=mix / "two.safetensors")
    one, two = load_file(mix / "one.safetensors"), load_file(mix / "two.safetensors")
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in two)
    (mix / "self.toml").write_text('models = ["self.toml", "b.safetensors"]\nweights = 0.5\n')
    with pytest.raises(RecipeError, match=r"self.toml is made of itself"):
        Recipe.load(mix / "self.toml").run(mix / "three.safetensors")


@pytest.mark.parametrize(
    ("changes", "same_as"),
    [
        (["final.weights=0.4"], {"preset": None, "weights": 0.4}),
        (["OUT05=0.7"], {"preset": "low_res", "changes": "OUT05=0.7"}),
        (["OUT05=0.7", "BASE=0.5,IN00=1"], {"preset": "low_res", "changes": "OUT05=0.7,BASE=0.5,IN00=1"}),
        (["dtype=fp32"], {"preset": "low_res", "dtype": "fp32"}),
        (['final.rules=["BASE:attn:0.75"]'], {"preset": "low_res", "rules": "BASE:attn:0.75"}),
    ],
)
def test_set_changes_a_stage_or_the_result(mix, changes, same_as):
    Recipe.load(mix / "mix.toml", changes=changes).run(mix / "changed.safetensors")
    x = Merge(mix / "a.safetensors", mix / "b.safetensors", preset="high_res")
    y = Merge(x, mix / "c.safetensors", mix / "d.safetensors", method="add_difference", weights=1)
    Merge(y, mix / "e.safetensors", **{"dtype": "fp16", **same_as}).run(mix / "expected.safetensors")
    one, two = load_file(mix / "changed.safetensors"), load_file(mix / "expected.safetensors")
    assert all(torch.equal(one[name], two[name]) and one[name].dtype == two[name].dtype for name in two)


def test_a_variant_of_a_bake_has_another_strength(pairs, tmp_path):
    a, _ = pairs()
    style = make_lora(tmp_path / "style.safetensors", "sd1")
    baked, variant = tmp_path / "baked.safetensors", tmp_path / "variant.safetensors"
    blockmerge.bake(a, [(style, 0.8)], output=baked)
    blockmerge.bake(a, [(style, 0.6)], output=tmp_path / "expected.safetensors")
    for change in ("loras=style.safetensors:0.6", 'loras=["style.safetensors:0.6"]'):
        blockmerge.again(baked, models=[a.parent], changes=[change], output=variant, overwrite=True)
        assert sha256(variant) == sha256(tmp_path / "expected.safetensors")
    for change in ("OUT05=0.5", "weights=0.5", "preset=high_res"):
        with pytest.raises(RecipeError, match=r"bake has no weights; .* --set 'loras=\[\"style.safetensors:"):
            blockmerge.again(baked, models=[a.parent], changes=[change], output=tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[X]\nmodels = [", r"bad.toml is not a recipe: .*\(TOML\)"),
        ('[X]\nmodels = ["C:\\models\\a", "b"]', "paths with .* stand in single quotes"),
        (MIX.replace('["Y",', '["Z",'), "Z is neither a stage nor a file.*stages are"),
        (MIX.replace("weights = 1", "wieghts = 1"), "stage Y: unknown argument 'wieghts'.*did you mean 'weights'"),
        (MIX.replace("low_res", "low_rse"), "unknown preset"),
        (MIX + '[spare]\nmodels = ["a.safetensors", "b.safetensors"]\n', "no stage uses final, spare"),
        (MIX.replace('["a.s', '["final", "a.s'), "every stage is used by another"),
        (MIX.replace('["a.s', '["Y", "a.s'), "stages are made of one another: Y → X → Y"),
        (MIX.replace('"final.saf', '"../final.saf'), "outside the recipe's folder"),
        (MIX.replace('"final.saf', '"/tmp/final.saf'), "outside the recipe's folder"),
        (MIX.replace('output', 'overwrite = true\noutput'), "overwrite at the top, where only"),
        (MIX.replace('dtype = "fp16"', 'preset = "high_res"'), "preset at the top, where only"),
        (MIX.replace("weights = 1", 'weights = 1\ndtype = "fp16"'), "stage Y: dtype of a stage: only the result"),
        ('output = "final.safetensors"\n', "models are a list of files, A first"),
        ('output = "final.safetensors"\nmodels = 3\n', "models are a list of files, A first"),
        ("[X]\nmodels = [3, 4]\n", "stage X: a model is a file; int given"),
        ("[set]\nmodels = ['a', 'b']\n", "set at the top"),
        ('["a b"]\nmodels = ["a", "b"]\n', "a stage's name is letters, digits, _ and -: a b"),
        (MIX.replace("weights = 1", "weights = 1e999"), "inf"),
        (MIX.replace("weights = 1", "weights = " + "9" * 5000), "bad.toml"),
        ("a = " + "[" * 5000, "bad.toml is not a recipe"),
        ("".join(f'[S{n}]\nmodels = ["S{n + 1}", "a"]\nweights = 0.5\n' for n in range(10_000)), "bad.toml"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(mix, text, match):
    says(mix, text, match=match)


def test_a_stage_that_is_a_file_too_is_ambiguous(mix):
    (mix / "X").write_text("")
    says(mix, MIX, match="X is a stage and a file, too")


def test_models_are_found_in_folders_by_name(mix, tmp_path_factory):
    elsewhere, models = tmp_path_factory.mktemp("recipes"), tmp_path_factory.mktemp("models")
    (models / "deep").mkdir()
    for path in mix.glob("*.safetensors"):
        (models / "deep" / path.name).symlink_to(path)
    (elsewhere / "mix.toml").write_text(MIX)
    Recipe.load(mix / "mix.toml").run(mix / "here.safetensors")
    Recipe.load(elsewhere / "mix.toml", models=[models]).run(elsewhere / "there.safetensors")
    assert sha256(elsewhere / "there.safetensors") == sha256(mix / "here.safetensors")
    (elsewhere / "mix.toml").write_text(f"models_folder = '{mix}'\n{MIX}")
    Recipe.load(elsewhere / "mix.toml").run(elsewhere / "again.safetensors")
    assert sha256(elsewhere / "again.safetensors") == sha256(mix / "here.safetensors")


def test_loras_are_found_beside_the_recipe_and_nowhere_else(mix, monkeypatch):
    make_lora(mix / "style.safetensors", "sd1", rank=2)
    (mix / "sub").mkdir()
    text = 'models = ["a.safetensors", "b.safetensors"]\nweights = 0.5\npartial = true\nloras = ["style.safetensors:0.8"]\n'
    (mix / "m.toml").write_text(text)
    wanted = Merge(
        mix / "a.safetensors",
        mix / "b.safetensors",
        weights=0.5,
        partial=True,
        loras=[(mix / "style.safetensors", 0.8)],
    )
    wanted.run(mix / "wanted.safetensors")
    monkeypatch.chdir(mix.parent)
    name = os.path.join(mix.name, "m.toml")
    Recipe.load(name).run(mix / "one.safetensors")
    assert sha256(mix / "one.safetensors") == sha256(mix / "wanted.safetensors")
    Recipe.load(name).dump(mix / "sub" / "copy.toml")
    Recipe.load(mix / "sub" / "copy.toml").run(mix / "two.safetensors")
    assert sha256(mix / "two.safetensors") == sha256(mix / "wanted.safetensors")
    (mix / "sub" / "elsewhere.toml").write_text(text)
    Recipe.load(mix / "sub" / "elsewhere.toml", models=[mix]).run(mix / "three.safetensors")
    assert sha256(mix / "three.safetensors") == sha256(mix / "wanted.safetensors")
    found = blockmerge.explain(mix / "wanted.safetensors", [mix / "a.safetensors", mix / "b.safetensors"])
    assert found.exact  # the LoRA lies beside the merge


def test_an_output_does_not_leave_the_folder_through_a_link(mix, tmp_path_factory):
    (mix / "link").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    says(mix, MIX.replace("final.safetensors", "link/final.safetensors"), match="outside the recipe's folder")


def test_what_is_in_json_twice_is_refused(mix):
    (mix / "twice.json").write_text(
        '{"models": ["a.safetensors", "b.safetensors"], "weights": 1, "weights": 0}'
    )
    with pytest.raises(RecipeError, match="a name is in it twice"):
        Recipe.load(mix / "twice.json")
    (mix / "half.json").write_text(
        '{"models": ["a.safetensors", "b.safetensors"], "weights": 1, "title": "\\ud800"}'
    )
    with pytest.raises(RecipeError, match=r"half\.json is not a recipe"):
        Recipe.load(mix / "half.json")


def test_what_changes_nothing_of_the_weights_keeps_those_that_were_found(mix):
    (mix / "own.toml").write_text('name = "high_res"\nweights = [' + ", ".join(["0.9"] * 26) + "]\n")
    a, b = mix / "a.safetensors", mix / "b.safetensors"
    result = Merge(a, b, preset=str(mix / "own.toml")).run(mix / "made.safetensors")
    variant = blockmerge.again(
        mix / "made.safetensors", changes=["title=My mix"], output=mix / "titled.safetensors"
    )
    assert variant.weights == result.weights
    (mix / "shown.toml").write_text(recipe_text(Recorded.of(mix / "made.safetensors")))
    assert Recipe.load(mix / "shown.toml").run(mix / "run.safetensors").weights == result.weights


def test_files_of_one_identity_are_told_apart_or_refused(mix):
    tensors = load_file(mix / "a.safetensors")
    name = max(tensors, key=lambda name: tensors[name].numel())
    (mix / "models").mkdir()
    identity = None
    for number in range(50):  # a value that no sample looks at
        other = tensors[name].clone()
        other.view(-1)[100 + number * 40] += 1
        save_file({**tensors, name: other}, mix / "models" / "twin.safetensors")
        twin = identity_of(blockmerge.open_checkpoint(mix / "models" / "twin.safetensors"))
        identity = identity_of(blockmerge.open_checkpoint(mix / "a.safetensors"))
        if twin == identity:
            break
    assert twin == identity
    Merge(mix / "a.safetensors", mix / "b.safetensors", weights=0.5).run(mix / "made.safetensors")
    with pytest.raises(RecipeError, match=r"a.safetensors may be each of .*twin.safetensors"):
        blockmerge.verify(mix / "made.safetensors", models=[mix / "models"])
    (mix / "models" / "twin.safetensors").unlink()
    shutil.copy(mix / "a.safetensors", mix / "models" / "copy.safetensors")
    assert blockmerge.verify(mix / "made.safetensors", models=[mix / "models"]).same


def test_a_merge_does_not_replace_the_file_whose_recipe_it_is(mix):
    final = Recipe.load(mix / "mix.toml").run().output
    before = sha256(final)
    with pytest.raises(blockmerge.OutputError, match="is the file whose recipe it is"):
        blockmerge.again(final, output=final, overwrite=True)
    assert sha256(final) == before


def test_metadata_that_a_stranger_added_are_not_carried_along(mix):
    final = Recipe.load(mix / "mix.toml").run().output
    with safe_open(final, "pt") as file:
        metadata = file.metadata()
    forged = {**metadata, "modelspec.hash_sha256": "0" * 64, "note": "x"}
    save_file(load_file(final), mix / "forged.safetensors", forged)
    blockmerge.again(mix / "forged.safetensors", output=mix / "again.safetensors")
    assert sha256(mix / "again.safetensors") == sha256(final)


WRONG = [None, True, -1, 1e308, "x", [], [1], {}, {"x": 1}, [None], 10**400]


@pytest.mark.parametrize(
    "key",
    [
        "models",
        "weights",
        "numbers",
        "rules",
        "asked",
        "files",
        "stages",
        "loras",
        "about",
        "preset",
        "method",
        "vae_file",
        "dtype",
    ],
)
def test_any_kind_of_thing_in_a_recipe_is_taken_or_refused_in_one_line(mix, key, capsys):
    final = Recipe.load(mix / "mix.toml").run().output
    with safe_open(final, "pt") as file:
        metadata = file.metadata()
    tensors, written = load_file(final), json.loads(metadata["blockmerge.recipe"])
    places = [written, written["stages"]["X"], written["files"]["models"][1]]
    for place in places:
        before = dict(place)
        for value in some(WRONG, of=3, chosen_by=f"{key} {places.index(place)}"):
            place[key] = value
            if place is places[2]:
                place |= {"size": value, "name": value} if key == "models" else {"recipe": {key: value}}
            save_file(
                tensors, mix / "evil.safetensors", {**metadata, "blockmerge.recipe": json.dumps(written)}
            )
            for words in (["recipe"], ["recipe", "--tree"], ["recipe", "--json"], ["verify", "-q"]):
                code = run([words[0], str(mix / "evil.safetensors"), *words[1:]])
                out, err = capsys.readouterr()
                assert code in (0, 1)
                assert "Traceback" not in out + err
                assert err.count("\n") <= 1
            place.clear()
            place.update(before)


def test_a_recipe_is_shown_without_what_a_terminal_obeys(mix, cli):
    final = Recipe.load(mix / "mix.toml").run().output
    with safe_open(final, "pt") as file:
        metadata = file.metadata()
    written = json.loads(metadata["blockmerge.recipe"])
    del written["stages"]
    written["models"] = [
        "--overwrite",
        'b\nmodels_folder = "etc" #',
    ]
    written["files"]["models"] = [
        {"name": name, "size": 1, "identity": str(number)}
        for number, name in enumerate(("/etc/--overwrite", written["models"][1]))
    ]
    save_file(
        load_file(final), mix / "evil.safetensors", {**metadata, "blockmerge.recipe": json.dumps(written)}
    )
    shown = cli("recipe", mix / "evil.safetensors")
    assert "models_folder" not in tomllib.loads(shown)
    assert not any(line.startswith("# blockmerge ") for line in shown.splitlines())
    written["stages"] = {"X": {**written, "models": ["X"] * 4, "files": {"models": [None] * 4}}}
    written["models"], written["files"] = ["X"] * 4, {"models": [None] * 4}
    save_file(
        load_file(final), mix / "evil.safetensors", {**metadata, "blockmerge.recipe": json.dumps(written)}
    )
    assert len(cli("recipe", mix / "evil.safetensors", "--tree").splitlines()) < 20


# -- recorded ------------------------------------------------------------------------------------------------


def merges(folder):
    """Merges of all kinds, each with its file: (name, recipe)."""
    a, b, c = (folder / f"{name}.safetensors" for name in "abc")
    yield "preset", Merge(a, b, preset="high_res")
    yield "mixed presets", Merge(a, b, preset=["high_res@0.6", "GRAD_A@0.4"], changes="OUT05=0.5")
    yield "weights", Merge(a, b, weights="BASE=0.25,IN00-IN05=skip,OUT01=0.3", vae="b")
    yield "random", Merge(a, b, weights="R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R,R", seed=5)
    yield "chance", Merge(a, b, method="dare", weights=0.5, drop_rate=0.25, seed=3, rules="BASE:attn:0.75")
    yield "beta", Merge(a, b, c, method="triple_sum", preset="high_res", weights_beta=0.125)
    yield "adjusted", Merge(a, b, weights=0.5, adjust="0,0,0,1", clip=True, dtype="bf16", prune=True)
    yield "staged", Merge(Merge(a, b, preset="low_res"), c, weights=0.5, rounding="each")


@pytest.mark.parametrize("number", range(8))
def test_a_merge_is_made_again_and_verified(mix, tmp_path_factory, number):
    name, recipe = list(merges(mix))[number]
    output = tmp_path_factory.mktemp("out") / f"{name}.safetensors"
    recipe.run(output)
    for model in "abc":  # whatever they are called now
        (mix / f"{model}.safetensors").rename(mix / f"{model}-renamed.safetensors")
    recorded = Recorded.of(output)
    again = recorded.recipe(Searched([mix]))
    again.run(output.parent / "again.safetensors", metadata=recorded.metadata)
    assert sha256(output.parent / "again.safetensors") == sha256(output)
    found = blockmerge.verify(output, models=[mix])
    assert found.same, name
    assert {*found.models} <= {"a-renamed.safetensors", "b-renamed.safetensors", "c-renamed.safetensors"}


@pytest.mark.parametrize("number", range(8))
def test_the_recipe_that_is_shown_makes_the_same_file(mix, number, cli):
    name, recipe = list(merges(mix))[number]
    recipe.run(mix / "made.safetensors")
    (mix / "shown.toml").write_text(cli("recipe", mix / "made.safetensors"))
    Recipe.load(mix / "shown.toml").run(mix / "again.safetensors")
    assert sha256(mix / "again.safetensors") == sha256(mix / "made.safetensors"), name


@pytest.mark.parametrize("form", [(), ("--json",), ("--pin",)])
def test_a_recipe_is_written_to_a_file_whole_and_over_nothing(mix, cli, capsys, form):
    made = Recipe.load(mix / "mix.toml").run().output
    shown = cli("recipe", made, *form)
    ending, other = (".json", ".toml") if form else (".toml", ".json")
    out = mix / f"shown{ending}"
    for more in ((), ("--overwrite",)):
        assert run(["recipe", str(made), *form, "-o", str(out), *more]) == 0
        assert capsys.readouterr() == ("", f"wrote {out}\n")
    assert out.read_text() == shown
    for output, says in (
        (out, "exists"),
        (made, f"end its name with {ending}"),
        (mix / f"x{other}", f"end its name with {ending}"),
        (mix / "x", f"end its name with {ending}"),
        (mix / "no" / f"x{ending}", "does not exist"),
    ):
        assert_refused(capsys, mix, "recipe", made, *form, "-o", output, says=says)
    assert_refused(capsys, mix, "recipe", made, "--tree", "-o", mix / "tree.toml", says="leave out -o")


def test_every_stage_has_a_line(mix, cli):
    first, second, *_ = cli("run", mix / "mix.toml").splitlines()
    assert first == "X: weighted_sum high_res of a.safetensors and b.safetensors"
    assert second.startswith("Y: add_difference 1 of X")


def test_a_recipe_without_an_output_makes_a_file_of_its_name_beside_it(mix, cli, capsys, monkeypatch):
    made = Recipe.load(mix / "mix.toml").run().output
    monkeypatch.chdir(os.sep)
    assert run(["recipe", str(made), "-o", str(mix / "again.toml")]) == 0
    capsys.readouterr()
    cli("run", mix / "again.toml", "-q")
    assert sha256(mix / "again.safetensors") == sha256(made)
    assert_refused(capsys, mix, "run", mix / "again.toml", says=["again.safetensors exists", "--overwrite"])
    (mix / "a.toml").write_text('models = ["a.safetensors", "b.safetensors"]\nweights = 0.5\n')
    assert_refused(capsys, mix, "run", mix / "a.toml", "--overwrite", says="is the input")
    save_file(small_model(for_a_folder=True), mix / "whole.safetensors")
    (mix / "folder.toml").write_text(
        'models = ["whole.safetensors", "whole.safetensors"]\nweights = 0.5\nto = "diffusers"'
    )
    cli("run", mix / "folder.toml", "-q")
    assert (mix / "folder" / "model_index.json").is_file()


def test_models_are_found_in_the_current_folder_too(mix, cli, capsys, monkeypatch):
    """As when the output goes to a folder of its own."""
    monkeypatch.chdir(mix)
    (mix / "made").mkdir()
    blockmerge.merge("a.safetensors", "b.safetensors", weights=0.5, output="made/x.safetensors")
    assert blockmerge.verify("made/x.safetensors").same
    cli("again", "made/x.safetensors", "-o", "made/y.safetensors", "-q")
    assert run(["recipe", "made/x.safetensors", "-o", "made/z.toml"]) == 0
    capsys.readouterr()
    cli("run", "made/z.toml", "-q")
    assert sha256(mix / "made/z.safetensors") == sha256(mix / "made/y.safetensors")
    assert sha256(mix / "made/z.safetensors") == sha256(mix / "made/x.safetensors")
    # What lies beside the recipe goes before.
    shutil.copy(mix / "c.safetensors", mix / "made/b.safetensors")
    cli("run", "made/z.toml", "-q", "-o", "other.safetensors")
    blockmerge.merge("a.safetensors", "c.safetensors", weights=0.5, output="wanted.safetensors")
    wanted = load_file(mix / "wanted.safetensors")
    assert all(torch.equal(one, wanted[name]) for name, one in load_file(mix / "other.safetensors").items())
    (mix / "else").mkdir()
    assert_refused(capsys, mix / "else", "verify", mix / "made/x.safetensors", says="--models FOLDER")


def test_the_result_keeps_its_name(mix, cli):
    Recipe.load(mix / "mix.toml").run()
    assert list(tomllib.loads(cli("recipe", mix / "final.safetensors"))) == ["dtype", "X", "Y", "final"]
    assert json.loads(cli("recipe", mix / "final.safetensors", "--json"))["result"] == "final"
    changes = ["final.weights=0.4", "X.weights=0.25"]
    blockmerge.again(mix / "final.safetensors", changes=changes, output=mix / "variant.safetensors")
    Recipe.load(mix / "mix.toml", changes=changes).run(mix / "changed.safetensors")
    assert sha256(mix / "variant.safetensors") == sha256(mix / "changed.safetensors")
    blockmerge.again(mix / "final.safetensors", output=mix / "same.safetensors")
    assert sha256(mix / "same.safetensors") == sha256(mix / "final.safetensors")


@pytest.mark.parametrize(("name", "shown"), [("a b\n[x]", "result"), ("X", "X_"), ("weights", "result")])
def test_a_name_that_no_result_can_have_is_not_taken_from_metadata(mix, name, shown):
    Recipe.load(mix / "mix.toml").run()
    with safe_open(mix / "final.safetensors", "pt") as file:
        run = json.loads(file.metadata()["blockmerge.recipe"])
    metadata = {"blockmerge.recipe": json.dumps({**run, "result": name})}
    save_file(load_file(mix / "final.safetensors"), mix / "evil.safetensors", metadata)
    assert list(tomllib.loads(recipe_text(Recorded.of(mix / "evil.safetensors"))))[-1] == shown
    assert blockmerge.verify(mix / "evil.safetensors").same


def test_one_bit_a_swapped_model_and_a_false_recipe_are_told(mix):
    output = mix / "made.safetensors"
    Merge(mix / "a.safetensors", mix / "b.safetensors", preset="high_res").run(output)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(output)
    name = "model.diffusion_model.out.2.weight"

    def verified(tensors, metadata):
        save_file(tensors, mix / "other.safetensors", metadata)
        return blockmerge.verify(mix / "other.safetensors")

    assert verified(tensors, metadata).same  # as another program has saved it
    changed = tensors[name].clone()
    changed.view(torch.int16).view(-1)[3] ^= 1
    assert verified({**tensors, name: changed}, metadata).to_dict()["different"] == {name: 1}
    assert verified({n: t for n, t in tensors.items() if n != name}, metadata).missing == (name,)
    assert verified({**tensors, "more": changed}, metadata).added == ("more",)
    assert verified({**tensors, name: tensors[name].float()}, metadata).added == (name,)
    false = json.loads(metadata["blockmerge.recipe"])
    false["weights"] = {**false["weights"], "OUT11": 0.25}
    false["asked"] = {}
    found = verified(tensors, {**metadata, "blockmerge.recipe": json.dumps(false)})
    assert name in found.different
    swapped = json.loads(metadata["blockmerge.recipe"])
    swapped["files"]["models"].reverse()
    assert not verified(tensors, {**metadata, "blockmerge.recipe": json.dumps(swapped)}).same


def test_models_that_are_gone_are_named(mix):
    output = mix / "made.safetensors"
    Merge(mix / "a.safetensors", mix / "b.safetensors", weights=0.5).run(output)
    save_file(small_model("sd1", seed=77), mix / "b.safetensors")
    with pytest.raises(
        RecipeError, match=r"b.safetensors \([\d,]+ bytes, identity .*called so, but not the same"
    ):
        blockmerge.verify(output)


def test_a_pinned_recipe_makes_the_same_file_elsewhere_or_none(mix, tmp_path_factory, cli, capsys):
    final = Recipe.load(mix / "mix.toml").run().output
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    pin = elsewhere / "release.json"
    pin.write_text(cli("recipe", final, "--pin"))
    assert len(pin.read_bytes()) < 20_000
    assert json.loads(pin.read_text())["sha256"] == sha256(final)
    for name in "abcde":
        (mix / f"{name}.safetensors").rename(mix / f"{name}-moved.safetensors")
    cli("again", pin, "--models", mix, "-o", elsewhere / "same.safetensors", "-q")
    assert sha256(elsewhere / "same.safetensors") == sha256(final)
    blockmerge.again(pin, models=[mix], output=elsewhere / "same.safetensors", overwrite=True)
    cli("run", pin, "--models", mix, "-o", elsewhere / "run.safetensors", "-q")
    assert sha256(elsewhere / "run.safetensors") == sha256(final)
    wrong = json.loads(pin.read_text())
    wrong["sha256"] = "0" * 64
    (elsewhere / "wrong.json").write_text(json.dumps(wrong))
    words = ["again", elsewhere / "wrong.json", "--models", mix, "-q", "-o"]
    assert run([str(one) for one in (*words, elsewhere / "other.safetensors")]) == 1
    assert "is pinned: nothing was written" in capsys.readouterr().err
    assert not (elsewhere / "other.safetensors").exists()
    cli(*words, elsewhere / "variant.safetensors", "--set", "OUT05=1")
    for text in (
        "{}",
        "[]",
        '{"sha256": 3, "metadata": {}}',
        '{"sha256": "x", "metadata": {"blockmerge.recipe": 3}}',
    ):
        (elsewhere / "bad.json").write_text(text)
        with pytest.raises(RecipeError, match=r"bad\.json"):
            blockmerge.again(elsewhere / "bad.json", output=elsewhere / "bad.safetensors")


def test_names_in_metadata_are_no_paths(mix):
    output = mix / "made.safetensors"
    Merge(mix / "a.safetensors", mix / "b.safetensors", weights=0.5).run(output)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    written = json.loads(metadata["blockmerge.recipe"])
    written["models"][1] = str(mix / "c.safetensors")
    written["files"]["models"][1] = None
    save_file(load_file(output), mix / "evil.safetensors", {"blockmerge.recipe": json.dumps(written)})
    with pytest.raises(RecipeError, match="is not recorded by what is in it"):
        blockmerge.verify(mix / "evil.safetensors")


@pytest.mark.parametrize(
    "recipe",
    ["", "[]", "{}", '{"version": 1}', '{"version": "1", "models": ["a"]}', "[" * 50_000,
     '{"version": "1", "models": ["X", "X"], "files": {"models": [null, null]}, "stages": {"X": {"models": ["X"], '
     '"files": {"models": [null]}, "version": "1"}}}',
     '{"version": "1", "models": ["a", "b"], "files": {"models": [{"identity": 3}, {"identity": "x"}]}}'],
)  # fmt: skip
def test_hostile_recipes_in_metadata_are_one_line(mix, recipe):
    save_file(load_file(mix / "a.safetensors"), mix / "evil.safetensors", {"blockmerge.recipe": recipe})
    with pytest.raises(blockmerge.BlockmergeError) as caught:
        blockmerge.verify(mix / "evil.safetensors")
    assert "\n" not in str(caught.value)
    assert "evil.safetensors" in str(caught.value)


def test_folders_are_made_again_and_verified(tmp_path):
    models = [
        write_folder(tmp_path / f"m{n}", small_model("sd1", seed=n, for_a_folder=True), "sd1") for n in (1, 2)
    ]
    Merge(*models, preset="high_res").run(tmp_path / "merged")
    assert blockmerge.verify(tmp_path / "merged").same
    recorded = Recorded.of(tmp_path / "merged")
    recorded.recipe(Searched.beside_file(recorded, ())).run(tmp_path / "again", metadata=recorded.metadata)
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert sha256(tmp_path / "again" / weights) == sha256(tmp_path / "merged" / weights)
    tensors = load_file(tmp_path / "again" / weights)
    with safe_open(tmp_path / "again" / weights, "pt") as file:
        metadata = file.metadata()
    tensors["conv_in.bias"] += 1
    save_file(tensors, tmp_path / "again" / weights, metadata)
    assert set(blockmerge.verify(tmp_path / "again").different) == {"unet/conv_in.bias"}


def test_where_a_folder_comes_from_is_carried_along(pairs, here, cli):
    a, b = pairs()
    blockmerge.merge(a, b, preset="low_res", output="low.safetensors")
    merged = blockmerge.inspect("low.safetensors").metadata["blockmerge.recipe"]
    blockmerge.convert("low.safetensors", "folder", naming="diffusers")
    blockmerge.convert("folder", "back.safetensors")
    tree = cli("recipe", "back.safetensors", "--tree")
    assert [line.strip("│├└─ ") for line in tree.splitlines()] == [
        "back.safetensors: convert", "folder: convert", "low.safetensors: weighted_sum low_res",
        "a.safetensors", "b.safetensors",
    ]  # fmt: skip
    assert blockmerge.inspect("back.safetensors").metadata["blockmerge.source_recipe"] == merged
    assert blockmerge.verify("back.safetensors").same
    vae = here / "folder/vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(vae), vae)  # as somebody puts another VAE there
    blockmerge.convert("folder", "other.safetensors")
    assert len(cli("recipe", "other.safetensors", "--tree").splitlines()) == 2
    assert "blockmerge.source_recipe" not in blockmerge.inspect("other.safetensors").metadata


def test_a_recipe_is_compared_as_its_file_is(mix, cli):
    final = Recipe.load(mix / "mix.toml").run().output
    recipe = Recipe.load(mix / "mix.toml")
    found = blockmerge.similarity(recipe, [final, mix / "a.safetensors"], method="weights")
    as_file = blockmerge.similarity(final, [final, mix / "a.safetensors"], method="weights")
    assert [one.similarity for one in found.references] == [one.similarity for one in as_file.references]
    checkpoint = blockmerge.open_checkpoint(recipe)
    tensors = load_file(final)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.read(name) == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), name
    shown = cli("similarity", mix / "mix.toml", final, mix / "a.safetensors", "--method", "weights", "--json")
    assert json.loads(shown)["base"]["name"] == "mix.toml"
    cli("explain", mix / "mix.toml", mix / "a.safetensors", mix / "e.safetensors")


def test_methods_that_see_whole_tensors_and_models_are_read_in_parts(mix):
    recipe = Merge(
        Merge(mix / "a.safetensors", mix / "b.safetensors", method="cosine_a", weights=0.5),
        mix / "c.safetensors",
        method="slerp",
        weights=0.25,
    )
    recipe.run(mix / "made.safetensors")
    checkpoint = recipe.as_checkpoint()
    name = "model.diffusion_model.input_blocks.0.0.weight"
    whole = (
        load_file(mix / "made.safetensors")[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    )
    with checkpoint.reader() as reader:
        part = bytearray(7)
        reader.read_into(checkpoint.tensors[name].offset + 11, memoryview(part))
    assert bytes(part) == whole[11:18]


def test_what_is_said_of_a_release(mix, cli):
    about = {"title": "Mix", "author": "me", "license": "CC0", "description": "a mix"}
    words = [word for key, text in about.items() for word in (f"--{key}", text)]
    a, b, output = (mix / f"{name}.safetensors" for name in ("a", "b", "made"))
    cli("merge", a, b, "-w", "0.5", *words, "-o", output, "-q")
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    assert {key: metadata[f"modelspec.{key}"] for key in about} == about
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1"
    assert metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert len(metadata["modelspec.date"]) == 10
    assert blockmerge.verify(output).same
    assert tomllib.loads(cli("recipe", output))["title"] == "Mix"
    (mix / "about.toml").write_text('title = "Other"\n' + MIX)
    Recipe.load(mix / "about.toml").run(mix / "other.safetensors")
    with safe_open(mix / "other.safetensors", "pt") as file:
        assert file.metadata()["modelspec.title"] == "Other"
    blockmerge.merge(a, b, weights=0.5, output=mix / "plain.safetensors")
    with safe_open(mix / "plain.safetensors", "pt") as file:
        assert not [key for key in file.metadata() if key.startswith("modelspec")]
    with pytest.raises(RecipeError, match="title"):
        Merge(a, b, weights=0.5, about={"title": ""})


@pytest.fixture
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "blockmerge" / "hashes.json"


def test_hashes_are_recorded_where_they_are_asked_for(mix, cli, cache):
    a, b, c = (mix / f"{name}.safetensors" for name in "abc")
    cli("merge", a, b, "-p", "high_res", "--hash", "-o", mix / "one.safetensors", "-q")
    assert len(json.loads(cache.read_text())) == 2
    cli("merge", mix / "one.safetensors", c, "-w", "0.25", "--hash", "-o", mix / "two.safetensors", "-q")
    with safe_open(mix / "two.safetensors", "pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["sd_merge_recipe"])
    assert recipe["primary_model_hash"] == sha256(mix / "one.safetensors")
    assert recipe["secondary_model_hash"] == sha256(c)
    assert (recipe["interp_method"], recipe["multiplier"]) == ("weighted_sum", 0.25)
    models = json.loads(metadata["sd_merge_models"])
    assert models.keys() == {sha256(path) for path in (mix / "one.safetensors", a, b, c)}
    assert models[sha256(mix / "one.safetensors")]["sd_merge_recipe"]["interp_method"] == "weighted_sum"
    assert blockmerge.verify(mix / "two.safetensors").same
    cli("merge", a, b, "-w", "0.5", "-o", mix / "plain.safetensors", "-q")
    with safe_open(mix / "plain.safetensors", "pt") as file:
        assert not file.metadata().keys() & {"sd_merge_recipe", "sd_merge_models"}


@pytest.mark.parametrize("content", ["", "[]", "{", '{"x": 3}', "[" * 100_000, "\xff"])
def test_a_broken_cache_is_ignored_and_a_changed_file_hashed_anew(mix, cache, content):
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(content)
    for seed in (50, 51):
        save_file(small_model("sd1", seed=seed), mix / "a.safetensors")
        blockmerge.merge(
            mix / "a.safetensors",
            mix / "b.safetensors",
            weights=0.5,
            hash=True,
            output=mix / f"{seed}.safetensors",
        )
        recorded = Recorded.of(mix / f"{seed}.safetensors").run["files"]["models"]
        assert [one["sha256"] for one in recorded] == [sha256(mix / f"{name}.safetensors") for name in "ab"]


# -- commands ------------------------------------------------------------------------------------------------


def test_the_commands(mix, cli, capsys):
    assert json.loads(cli("run", mix / "mix.toml", "--json"))["models"] == ["Y", "e.safetensors"]
    final = mix / "final.safetensors"
    assert json.loads(cli("verify", final, "--json"))["same"] is True
    assert "the same bits" in cli("verify", final)
    cli("again", final, "-o", mix / "again.safetensors", "-q")
    assert sha256(mix / "again.safetensors") == sha256(final)
    cli(
        "again",
        final,
        "--set",
        "OUT05=0.7",
        "--set",
        "X.weights=0.5",
        "-o",
        mix / "variant.safetensors",
        "-q",
    )
    assert json.loads(cli("verify", mix / "variant.safetensors", "--json"))["same"] is True
    assert json.loads(cli("recipe", final, "--json"))["stages"].keys() == {"X", "Y"}
    assert "X: weighted_sum high_res" in cli("recipe", final, "--tree")
    tensors = load_file(final)
    tensors["model.diffusion_model.out.2.bias"] += 1
    with safe_open(final, "pt") as file:
        save_file(tensors, mix / "bad.safetensors", file.metadata())
    assert run(["verify", str(mix / "bad.safetensors")]) == 1
    out, err = capsys.readouterr()
    assert "differs by up to" in out
    assert err == "Error: bad.safetensors is not what its recipe makes: 1 of its tensors differs\n"
    assert run(["run", str(final)]) == 1
    assert "recipe" in capsys.readouterr().err
