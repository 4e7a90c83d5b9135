"""What `explain` says where there are very many candidates, and of weights below nothing."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import blockmerge
from blockmerge.anatomy import FAMILIES, component_of
from blockmerge.checkpoints import StateDict
from blockmerge.cli.main import run
from blockmerge.rendering.comparison import print_explanation, value_text, weight_text
from blockmerge.rendering.html_page import explanation_html
from blockmerge.rendering.u_net import number
from tests.test_explain import SIGNS, base_of, cast, mixed, relatives, tuned

BLOCKS = FAMILIES["sd1"].blocks
FEW = re.compile(rf"{SIGNS.pattern}|input_blocks\.11\.|text_model\.encoder\.layers\.0\.|decoder\.conv_in")


def shares(**of):
    return dict.fromkeys((*BLOCKS, "VAE"), of)


@pytest.fixture(scope="module")
def crowd():
    """Forty fine-tunes of one model of few tensors: more than are looked at further."""
    return {f"m{n:02}": tuned(few_tensors(), 0.05, seed=100 + n) for n in range(40)}


def few_tensors():
    half = cast(base_of("sd1"), torch.float16)
    return {name: tensor for name, tensor in half.items() if FEW.search(name)}


def explained(merge, candidates, **options):
    named = [StateDict(model, name) for name, model in candidates.items()]
    return blockmerge.explain(StateDict(merge, "merge"), named, **options)


@pytest.mark.parametrize(
    "of", [{"m00": 0.7, "m01": 0.3}, {"m38": 0.25, "m39": 0.75}, {"m03": 0.9, "m36": 0.1}, {"m37": 1.0}]
)
def test_the_parents_are_found_among_forty(crowd, of):
    found = explained(mixed(crowd, shares(**of)), crowd)
    assert set(found.parents) == set(of)
    assert found.exact
    (note,) = [note for note in found.notes if "screened" in note]
    assert note.startswith("40 candidates are too many to try all combinations: they were screened by ")
    assert "24 looked at further, without m" in note
    assert len(found.candidates) == 24
    assert found.left_out == {}


def test_a_parent_that_is_little_like_the_merge_is_found_too(crowd):
    """All the fine-tunes are nearer to the merge than the stranger, who alone explains what they leave."""
    strange = {"stranger": tuned(few_tensors(), 1.0, seed=7)}
    for candidates in ({**crowd, **strange}, {**strange, **crowd}):
        found = explained(mixed(candidates, shares(m05=0.9, stranger=0.1)), candidates)
        assert set(found.parents) == {"m05", "stranger"}
        assert found.exact


def test_twenty_four_are_not_screened(crowd):
    few = dict(list(crowd.items())[:24])
    found = explained(mixed(few, shares(m00=0.5, m23=0.5)), few)
    assert not [note for note in found.notes if "screened" in note]
    assert set(found.parents) == {"m00", "m23"}


def test_candidates_with_nan_are_left_out_and_told_of(crowd):
    broken = {**crowd}
    for name in ("m02", "m30"):
        broken[name] = {
            n: torch.full_like(t, torch.nan) if t.is_floating_point() else t for n, t in crowd[name].items()
        }
    found = explained(mixed(crowd, shares(m00=0.5, m39=0.5)), broken)
    assert set(found.parents) == {"m00", "m39"}
    assert set(found.left_out) == {"m02", "m30"}
    assert "NaN" in found.left_out["m30"]
    assert "m02" not in " ".join(found.notes)
    nothing = dict.fromkeys(broken, broken["m02"])
    with pytest.raises(blockmerge.NonFiniteError, match="NaN"):
        explained(crowd["m00"], nothing)


def test_the_command_takes_a_folder_of_many(crowd, here, capsys):
    (here / "models").mkdir()
    for name, model in list(crowd.items())[:26]:
        save_file(model, here / "models" / f"{name}.safetensors")
    save_file(mixed(crowd, shares(m00=0.5, m25=0.5)), here / "merge.safetensors")
    assert run(["explain", "merge.safetensors", "models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parents"] == ["m00.safetensors", "m25.safetensors"]
    assert any("26 candidates" in note for note in found["notes"])


# -- weights below nothing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(-0.0, "0"), (-0.00001, "0"), (-0.00004, "0"), (-0.25, "-0.25"), (0.0, "0"), (-1, "-1")],
)
def test_no_weight_is_minus_0(value, text):
    assert weight_text(value) == text
    assert number(value) == text


def test_no_similarity_is_minus_0():
    assert value_text(-1e-9, "weights") == "0.000000"
    assert value_text(-1e-9, "attention") == "0.00"


def test_no_report_shows_minus_0():
    models = relatives(3)
    of = {block: {"a": 0.5, "b": 0.5, "c": 0.0} for block in (*BLOCKS, "VAE")}
    of["IN04"] = {"a": 0.5, "b": 0.25, "c": 0.25}
    found = explained(mixed(models, of), models)
    out = io.StringIO()
    console = Console(width=200, file=out)
    print_explanation(console, found)
    minus_0 = re.compile(r"-0(\.0*)?(?![.\d])")
    assert not minus_0.search(out.getvalue())
    assert not minus_0.search(re.sub("<style.*?</style>", "", explanation_html(found), flags=re.DOTALL))
    assert "-0.0" not in json.dumps(found.to_dict()["blocks"]).replace("-0.0000", "")
    for origin in found.blocks.values():
        assert all(str(weight) != "-0.0" for weight in origin.weights.values())


def test_weights_of_minus_1_are_no_average():
    models = relatives(5)
    of = {"a": 1.0, "b": 1.0, "c": -1.0, "d": 0.5, "e": -0.5}
    found = explained(mixed(models, shares(**of)), models)
    assert found.method == "linear"
    assert " is a linear combination of " in found.verdict
    assert "average" not in found.verdict
    average = explained(mixed(models, shares(**dict.fromkeys("abcde", 0.2))), models)
    assert " is a weighted average of " in average.verdict


# -- what is told of every candidate -------------------------------------------------------------------------


def test_the_difference_of_every_candidate_from_the_merge():
    models = relatives(3)
    merge = mixed(models, shares(a=0.75, b=0.25))
    found = explained(merge, models)
    unet = [name for name in merge if component_of(name) == "unet"]
    square = sum(merge[name].double().square().sum() for name in unet)
    for name, model in models.items():
        apart = sum((model[n].double() - merge[n].double()).square().sum() for n in unet)
        assert found.differences[name] == pytest.approx(float((apart / square).sqrt()))
    assert found.to_dict()["differences"] == found.differences


def test_every_candidate_is_either_looked_at_or_screened_or_left_out(crowd):
    broken = {**crowd, "m30": {name: t * torch.nan for name, t in crowd["m30"].items()}}
    found = explained(mixed(crowd, shares(m00=0.5, m39=0.5)), broken)
    assert len(found.screened) == 40 - 24 - 1
    assert sorted((*found.candidates, *found.screened, *found.left_out)) == sorted(crowd)
    assert found.differences.keys() == set(found.candidates)
