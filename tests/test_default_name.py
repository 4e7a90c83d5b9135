"""Where a merge goes when nobody says: names that tell what was done, and that any file system takes."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from blockmerge.merging.default_name import default_output
from blockmerge.merging.recipe import Recipe
from tests.commands import ok


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("-p", "low-res_replace"), "a+b-low_res.safetensors"),
        (("-w", "0.5"), "a+b-0.5.safetensors"),
        (("-w", ".50"), "a+b-0.5.safetensors"),
        (("-w", "IN00=1,M00=2"), "a+b-IN00_1_M00_2.safetensors"),
        (("-p", "GRAD_V@0.5", "-p", "high_res@0.5"), "a+b-GRAD_V@0.5+high_res@0.5.safetensors"),
        (("-m", "average"), "a+b-average.safetensors"),
        (("-m", "average", "-w", "0.5", "--ratios", "2,1"), "a+b-average-0.5-ratios_2_1.safetensors"),
        (
            ("-m", "tensor_sum", "-w", "0.5", "--weights-beta", "0.2"),
            "a+b-tensor_sum-0.5-beta_0.2.safetensors",
        ),
        (("-w", "0.5", "--adjust", "0,0,0,1", "--clip"), "a+b-0.5-adjust_0_0_0_1_0_0_0_0-clip.safetensors"),
        (("-w", "random", "--seed", "7", "--set", "BASE=0"), "a+b-random-set_BASE_0-seed_7.safetensors"),
        (
            ("-m", "dare", "-w", "1", "--drop-rate", "0.3", "--seed", "7"),
            "a+b-dare-1-seed_7-drop_rate_0.3.safetensors",
        ),
        (("-w", "0.5", "--rules", "OUT05:attn2:0.8"), "a+b-0.5-rules_OUT05_attn2_0.8.safetensors"),
        (("-w", "0.5", "--vae", "b", "--dtype", "bf16"), "a+b-0.5-vae_b-bf16.safetensors"),
    ],
)
def test_default_output_names(pairs, here, capsys, arguments, name):
    ok(capsys, *pairs(), *arguments, "-q")
    assert [path.name for path in here.iterdir()] == [name]


def test_the_default_name_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "model" / "unet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "model" / "unet")
    first, second = Recipe(".", "../b.safetensors", weights=0.5), Recipe("..", ".", weights=0.5)
    assert str(default_output(first)) == "unet+b-0.5.safetensors"
    assert str(default_output(second)) == "model+unet-0.5.safetensors"


def test_default_output_names_that_would_be_long(pairs, here, capsys):
    a, b = pairs()
    long = [here / f"{'x' * 60}{letter}:?.safetensors" for letter in "ab"]
    wide = [here / f"{char * 80}.safetensors" for char in "模型"]
    for path, copy in zip((a, b, a, b), (*long, *wide), strict=True):
        shutil.copy(path, copy)
    rules, other_rules = (
        f"OUT03-OUT05:attn2 norm ff proj_in:{ratio}, NOT BASE:norm:0" for ratio in (0.8, 0.9)
    )
    lists = [f"{'0.25,' * 25}{last}" for last in (0, 1)]
    changes = "IN00=0.125,IN01=0.125,IN02=0.125"
    names = []
    for arguments in (
        [a, b, "-w", lists[0]],
        [a, b, "-w", lists[1]],
        [
            a,
            b,
            *(
                word
                for name in ("high_res", "low_res", "GRAD_V", "GRAD_A", "COSINE")
                for word in ("-p", f"{name}@0.2")
            ),
        ],
        [a, b, "-w", "0.5", "--rules", rules],
        [a, b, "-w", "0.5", "--rules", other_rules],
        [a, b, "-w", lists[0], "-m", "dare", "--rules", rules, "--set", changes, "--adjust", "1,2,3,4"],
        [*long, "-p", "high_res"],
        *([a, b, "-p", f"SMOOTHSTEP{times}2"] for times in "*/"),
        [*wide, "-w", "0.5"],
        [long[0], long[0], "-p", "high_res"],
    ):
        found = json.loads(ok(capsys, *arguments, "--dry-run", "--json"))
        names.append(os.path.basename(found["output"]))
    assert len(set(names)) == len(names)
    assert all(
        re.fullmatch(r"[\w.+@-]+\.safetensors", name) and len(name.encode()) <= 100 for name in names
    ), names
    assert re.fullmatch(r"a\+b-weights_[0-9a-f]{6}\.safetensors", names[0])
    assert re.fullmatch(r"a\+b-presets_[0-9a-f]{6}\.safetensors", names[2])
    assert re.fullmatch(r"a\+b-0\.5-rules_[0-9a-f]{6}\.safetensors", names[3])
    assert names[6].startswith("x" * 60)
    assert names[6].endswith("-high_res.safetensors")
