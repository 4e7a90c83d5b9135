"""Lists of presets in which a line is bad: the other lines are not lost, and the bad one is named."""

from __future__ import annotations

import json

import pytest

import blockmerge
from blockmerge import PresetError
from blockmerge.cli.main import run
from blockmerge.weights import WeightsRequest, find_preset, parse_weights, unreadable_presets
from blockmerge.weights.presets import user_folder
from tests import oracle
from tests.refusals import assert_refused

GOOD = f"GOOD\t{oracle.LOW_RES}"
SHORT = "SHORT\t1,2,3"
WORDS = "just words"
BAD_NUMBER = f"MINE:{oracle.LOW_RES.replace('0', 'o', 1)}"
SHIPPED = "GRAD_V\tnonsense"


@pytest.fixture
def own():
    """The user's own folder, with a list in which four of six lines are bad."""
    user_folder().mkdir(parents=True)
    path = user_folder() / "mbwpresets.txt"
    path.write_text("\n".join([GOOD, SHORT, WORDS, BAD_NUMBER, SHIPPED, f"LAST:{oracle.HIGH_RES}"]))
    return path


def test_the_others_are_there(own):
    assert blockmerge.load_preset("good") == parse_weights(oracle.LOW_RES)
    assert blockmerge.load_preset("LAST") == parse_weights(oracle.HIGH_RES)
    assert blockmerge.load_preset(f"{own}#GOOD") == parse_weights(oracle.LOW_RES)
    assert blockmerge.preset_names()[:2] == ["GOOD", "LAST"]
    assert "high_res" in blockmerge.preset_names()


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("SHORT", "line 2: 3 weights given"),
        ("just words", "line 3: expected NAME"),
        ("mine", "line 4: "),
        ("GRAD_V", "your own preset 'GRAD_V' cannot be read: .*line 5"),
        ("grad-v@0.5", "your own preset 'GRAD_V' cannot be read: .*line 5"),
    ],
)
def test_who_asks_for_a_bad_one_is_told_its_line(own, name, says):
    with pytest.raises(PresetError, match=says) as caught:
        WeightsRequest(preset=name).check()
    assert "mbwpresets.txt" in str(caught.value)
    if "@" not in name:
        with pytest.raises(PresetError, match=says.removeprefix("your own preset 'GRAD_V' cannot be read: ")):
            find_preset(f"{own}#{name}")


def test_another_presets_name_is_not_blamed_on_a_bad_line(own):
    with pytest.raises(
        PresetError, match=r"unknown preset 'nothing' \('blockmerge presets' .* read 4 of your own\)$"
    ):
        find_preset("nothing")
    with pytest.raises(PresetError, match="no preset 'nothing' in"):
        find_preset(f"{own}#nothing")


def test_the_command_names_each(own, here, capsys):
    assert run(["presets", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)) == 42
    lines = err.splitlines()
    assert [line.partition(", line ")[2][:1] for line in lines] == ["2", "3", "4", "5"]
    assert all(line.startswith("Left out: preset file ") for line in lines)
    assert len(unreadable_presets()) == 4
    assert_refused(
        capsys, here, "presets", "show", "SHORT", says=["your own preset 'SHORT' cannot be read", "line 2"]
    )


def test_a_broken_file_of_ones_own_does_not_give_way_to_a_shipped_preset():
    user_folder().mkdir(parents=True)
    (user_folder() / "high_res.toml").write_text("weights = ")
    for name in ("high_res", "high-res_replace"):
        with pytest.raises(PresetError, match=r"your own preset 'high_res' cannot be read: .*is not TOML"):
            blockmerge.load_preset(name)
    assert blockmerge.load_preset("low_res")


def test_a_list_without_a_good_line_is_refused_as_a_whole(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(f"{SHORT}\n{WORDS}\n")
    with pytest.raises(PresetError, match="line 1: 3 weights given"):
        find_preset(str(path))
    path.write_text(f"{SHORT}\n{GOOD}\n")
    with pytest.raises(PresetError, match="line 1: 3 weights given"):  # which is meant cannot be told
        find_preset(str(path))
    assert find_preset(f"{path}#GOOD").name == "GOOD"
    path.write_text(f"{GOOD}\n")
    assert find_preset(str(path)).name == "GOOD"
