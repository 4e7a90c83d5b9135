"""What may be baked into what: blocks, modules that meet nothing, what an output says, and what is refused.

Over 500 lines: all of it is about the same few small files.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError, Lora, NonFiniteError, Recipe, RecipeError
from tests import attacks, oracle
from tests.commands import ok
from tests.forms import assert_same, ema_of, is_unet
from tests.lora_oracle import Factors, assert_baked, place, written
from tests.refusals import assert_refused, snapshot
from tests.small_models import small_model
from tests.test_bake import FAMILIES, SDXL, UNET, lora_for, model_of

PLACES = FAMILIES["sd1"]


@pytest.fixture(scope="module")
def model():
    return small_model("sd1")


@pytest.fixture(scope="module")
def lora(model):
    return lora_for(PLACES, model)


@pytest.fixture
def files(here, model, lora):
    """a.safetensors, and lora.safetensors for it, in the current folder."""
    save_file(model, "a.safetensors")
    write("lora.safetensors", written(lora))
    return here


def write(path, tensors, metadata=None):
    """A file of tensors that may share memory."""
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path, metadata)


def bake(*loras, model="a.safetensors", **options):
    """What `out.safetensors` then has, and the result."""
    result = blockmerge.bake(model, loras, output="out.safetensors", overwrite=True, **options)
    return load_file("out.safetensors"), result


# -- blocks --------------------------------------------------------------------------------------------------


def convolutions(family):
    """A convolution in each block of the U-Net, and one of the text encoder's layers."""
    inputs, outputs, resnets = (12, 12, 3) if family == "sd1" else (9, 9, 3)
    yield FAMILIES["sd1"][2] if family == "sd1" else SDXL["wide"]
    yield place("lora_unet_conv_in", f"{UNET}input_blocks.0.0", "IN00")
    for number in range(1, inputs):
        level, unit = divmod(number - 1, resnets)
        if unit == 2:
            name, stem = "downsamplers_0_conv", f"{number}.0.op"
        else:
            name, stem = f"resnets_{unit}_conv1", f"{number}.0.in_layers.2"
        yield place(f"lora_unet_down_blocks_{level}_{name}", f"{UNET}input_blocks.{stem}", f"IN{number:02}")
    yield place("lora_unet_mid_block_resnets_1_conv2", f"{UNET}middle_block.2.out_layers.3", "M00")
    for number in range(outputs):
        level, unit = divmod(number, 3)
        stem = f"{UNET}output_blocks.{number}.0.out_layers.3"
        yield place(f"lora_unet_up_blocks_{level}_resnets_{unit}_conv2", stem, f"OUT{number:02}")


PLAIN = {
    "sd1": ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00", "OUT03", "OUT04", "OUT05", "OUT06", "OUT07", "OUT08", "OUT09", "OUT10", "OUT11"],
    "sdxl": ["BASE", "IN04", "IN05", "IN07", "IN08", "M00", "OUT00", "OUT01", "OUT02", "OUT03", "OUT04", "OUT05"],
}  # fmt: skip
"""The blocks that plain LoRAs meet, for which lists of 17 and of 12 numbers are."""

ALL = {"sd1": oracle.SD, "sdxl": oracle.SDXL}


def numbered(names):
    return {name: round(0.1 * number - 0.3, 1) for number, name in enumerate(names)}


def as_list(weights):
    return ",".join(map(str, weights.values()))


OUTPUTS = {"sd1": [f"OUT{n:02}" for n in range(3, 12)], "sdxl": [f"OUT{n:02}" for n in range(6)]}
BLOCKS = [
    (family, *case)
    for family in ALL
    for case in (
        (None, dict.fromkeys(ALL[family], 1)),
        (as_list(numbered(PLAIN[family])), numbered(PLAIN[family])),
        (list(numbered(PLAIN[family]).values()), numbered(PLAIN[family])),
        (as_list(numbered(ALL[family])), numbered(ALL[family])),
        ("OUTALL", dict.fromkeys(["BASE", *OUTPUTS[family]], 1)),
        ("outall", dict.fromkeys(["BASE", *OUTPUTS[family]], 1)),
        ("ALL", dict.fromkeys(PLAIN[family], 1)),
        ("NONE", {}),
        ("IN04-IN05=0.5,M00=-1", {"IN04": 0.5, "IN05": 0.5, "M00": -1}),
        ({"OUT03": 2, "BASE": 0.25}, {"OUT03": 2, "BASE": 0.25}),
        ("0.5", dict.fromkeys(ALL[family], 0.5)),
    )
]


@pytest.fixture(scope="module")
def of_all_blocks():
    """{family: a model and a LoRA with a module in each block}."""
    found = {}
    for family in ALL:
        places = list(convolutions(family))
        assert [one.block for one in places] == ["BASE", *(block for block in ALL[family] if block != "BASE")]
        model = model_of(family, places)
        found[family] = model, lora_for(places, model)
    return found


@pytest.mark.parametrize(("family", "blocks", "weights"), BLOCKS)
def test_blocks_multiply_the_strength_and_those_not_named_are_0(here, of_all_blocks, family, blocks, weights):
    model, lora = of_all_blocks[family]
    strengths = {block: -0.8 * weights.get(block, 0) for block in ALL[family]}
    out, result = bake((written(lora), -0.8, blocks), model=model)
    changed = assert_baked(out, model, [(lora, strengths)])
    assert changed == {one.weight for one in lora if strengths[one.block]}
    said = result.loras[0]
    assert said["blocks"] == {block: weights.get(block, 0) for block in ALL[family]}
    assert (said["strength"], said["modules"], said["met"], said["unmet"]) == (-0.8, len(lora), len(lora), [])
    assert any("changes nothing" in note for note in result.notes) == (not changed)


def test_a_text_as_on_the_command_line(files, model, lora):
    strengths = {block: 0.5 if block in OUTPUTS["sd1"] else 0 for block in ALL["sd1"]}
    out, _ = bake("lora.safetensors:0.5:BASE=0,OUT03-OUT11=1")
    assert_baked(out, model, [(lora, strengths)])


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ("OUTAL", "unknown LoRA preset 'OUTAL'; did you mean 'OUTALL'"),
        ("1,2,3", "3 numbers given for the blocks of a LoRA"),
        ("D00=1", "unknown block 'D00'"),
        (
            as_list(numbered(PLAIN["sdxl"])),
            "12 numbers given for the blocks of a LoRA, which are for Stable Diffusion XL",
        ),
    ],
)
def test_blocks_that_there_are_not(files, capsys, blocks, says):
    assert_refused(
        capsys,
        files,
        "bake",
        "a.safetensors",
        f"lora.safetensors:1:{blocks}",
        "-o",
        "o.safetensors",
        says=says,
    )


# -- modules that meet nothing -------------------------------------------------------------------------------

BOGUS = "lora_unet_mid_block_bogus"


def test_a_module_that_meets_no_tensor_is_named_and_may_be_left_out(files, model, lora):
    more = {
        **written(lora),
        f"{BOGUS}.lora_up.weight": torch.ones(3, 2),
        f"{BOGUS}.lora_down.weight": torch.ones(2, 3),
    }
    write("more.safetensors", more)
    with pytest.raises(
        IncompatibleModelsError,
        match=rf"1 of the 5 modules of more\.safetensors matched no tensor of .* \({BOGUS}\): partial",
    ):
        bake("more.safetensors")
    assert not os.path.exists("out.safetensors")
    out, result = bake("more.safetensors", partial=True)
    assert_baked(out, model, [(lora, 1)])
    assert (result.loras[0]["met"], result.loras[0]["unmet"]) == (4, [BOGUS])
    assert any("left out" in note and BOGUS in note for note in result.notes)
    found = blockmerge.merge_state_dicts(model, model, weights=0, loras=[more], partial=True)
    assert_same(found, out)
    with pytest.raises(IncompatibleModelsError, match=BOGUS):
        blockmerge.merge_state_dicts(model, model, weights=0, loras=[more])


def test_partial_without_a_lora_is_noted(files, model):
    for partial in (True, False):
        result = blockmerge.merge(
            model, model, weights=0.5, partial=partial, output="o.safetensors", overwrite=True
        )
        assert (
            any("partial (--partial, of merge and bake) has no effect" in note for note in result.notes)
            == partial
        )


def test_a_lora_of_which_no_module_meets_anything_is_always_an_error(files, model):
    for lora in (
        {f"{BOGUS}.lora_up.weight": torch.ones(3, 2), f"{BOGUS}.lora_down.weight": torch.ones(2, 3)},
        written(lora_for(PLACES[2:3], model)),
    ):
        unet = {name: tensor for name, tensor in model.items() if is_unet(name)}
        with pytest.raises(
            IncompatibleModelsError, match=r"none of the 1 module |no module that Stable Diffusion 1"
        ):
            bake(lora, model=unet, partial=True)
    assert not os.path.exists("out.safetensors")


def test_a_unet_alone_and_a_lora_with_a_text_encoder(files, model, lora):
    unet = {name.removeprefix(UNET): tensor for name, tensor in model.items() if name.startswith(UNET)}
    text = PLACES[2].module
    with pytest.raises(
        IncompatibleModelsError,
        match=rf"1 of the 4 modules of lora\.safetensors matched no tensor of .* \({text}\): partial",
    ):
        bake("lora.safetensors", model=unet)
    out, result = bake("lora.safetensors", model=unet, partial=True)
    assert result.loras[0]["unmet"] == [text]
    in_unet = {one: parts for one, parts in lora.items() if one.module != text}
    assert_baked(
        {UNET + name: out[name] for name in out}, {UNET + name: unet[name] for name in unet}, [(in_unet, 1)]
    )


REAL = {  # one module at its real size: [rows, inputs]
    "sd1": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", (640, 768)),
    "sd2": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k", (640, 1024)),
    "sdxl": ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", (640, 2048)),
}
TITLES = {"sd1": "Stable Diffusion 1.x", "sd2": "Stable Diffusion 2.x", "sdxl": "Stable Diffusion XL"}


@pytest.mark.parametrize(("family", "other"), [*itertools.permutations(REAL, 2)])
def test_a_lora_of_another_family(here, family, other):
    module, (rows, inputs) = REAL[other]
    lora = {
        f"{module}.lora_up.weight": torch.ones(rows, 1),
        f"{module}.lora_down.weight": torch.ones(1, inputs),
    }
    write("style.safetensors", lora)
    stem = f"{UNET}input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    save_file(model_of(family, [place(module, stem, "IN04", bias="")]), "a.safetensors")
    for partial in (False, True):
        with pytest.raises(IncompatibleModelsError) as caught:
            bake("style.safetensors", partial=partial)
        said = str(caught.value)
        assert said.startswith("style.safetensors is a LoRA for ")
        assert TITLES[other] in said
        assert f"not for {TITLES[family]}" in said


# -- what stays, and what goes -------------------------------------------------------------------------------


def test_the_vae_stays_bit_for_bit_or_is_the_given_one(files, model, lora):
    whole = {**small_model("sd1", seed=7, for_a_folder=True), **model}
    other = small_model("sd1", seed=8, for_a_folder=True)
    vae = {name: tensor for name, tensor in other.items() if name.startswith("first_stage_model.")}
    assert vae
    save_file(vae, "other.vae.safetensors")
    out, _ = bake(("lora.safetensors", 1.5), model=whole)
    assert_same({name: out[name] for name in vae}, {name: whole[name] for name in vae})
    out, result = bake(("lora.safetensors", 1.5), model=whole, vae="other.vae.safetensors")
    assert_same({name: out[name] for name in vae}, vae)
    assert result.tensors.from_vae == len(vae)


def test_ema_copies_go_or_are_used(files, model, lora):
    copies = ema_of(model)
    save_file({**model, **copies}, "ema.safetensors")
    out, result = bake("lora.safetensors", model="ema.safetensors")
    assert_baked(out, model, [(lora, 1)])
    assert result.tensors.dropped == len(copies)
    used = {name: tensor / 2 if is_unet(name) else tensor for name, tensor in model.items()}
    out, _ = bake("lora.safetensors", model="ema.safetensors", ema="use")
    assert_baked(out, used, [(lora, 1)])
    with pytest.raises(RecipeError, match="EMA copies would lack the LoRAs"):
        bake("lora.safetensors", model="ema.safetensors", ema="keep")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        ("keep", None),
        ("fp16", None),
        ("fp32", None),
        ("bf16", "BF16"),
        ("fp8_e4m3fn", "F8_E4M3"),
        ("fp8_e5m2", "F8_E5M2"),
    ],
)
def test_dtypes_that_take_small_changes_are_told(files, model, lora, dtype, name):
    out, result = bake(("lora.safetensors", 0.8), dtype=dtype)
    told = [note for note in result.notes if "as small as 0.1 %" in note]
    assert len(told) == (name is not None)
    assert name is None or (f"rounding to {name} " in told[0] and "dtype fp32" in told[0])
    if name and name.startswith("F8"):
        sums, _ = bake(("lora.safetensors", 0.8), dtype="fp32")
        for one in lora:
            wanted = sums[one.weight].to(out[one.weight].dtype)
            assert torch.equal(out[one.weight].float(), wanted.float())


# -- recipes -------------------------------------------------------------------------------------------------


def of_file(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["blockmerge.recipe"])


@pytest.mark.parametrize(
    "blocks", [None, "OUTALL", "random(0,2)", {"M00": 0.3, "IN00": None}, [0.5] * 17, 0.25]
)
@pytest.mark.parametrize("is_merge", [False, True])
def test_the_recipe_in_a_file_makes_the_same_file(files, model, blocks, is_merge):
    save_file(small_model("sd1", seed=1), "b.safetensors")
    os.link("lora.safetensors", "other.safetensors")
    models = ["a.safetensors", "b.safetensors"] if is_merge else ["a.safetensors"]
    options = {"weights": 0.3, "seed": 5, "adjust": "1"} if is_merge else {"method": "bake"}
    loras = [("lora.safetensors", 0.5, blocks), Lora("other.safetensors", -0.25, name="mine")]
    Recipe(*models, loras=loras, dtype="bf16", **options).run("1.safetensors")
    found = of_file("1.safetensors")
    assert [(one["name"], one["strength"]) for one in found["loras"]] == [("lora", 0.5), ("mine", -0.25)]
    with pytest.raises(RecipeError, match=r"its models, .*its loras, lora, mine"):
        Recipe.from_dict(found)
    with pytest.raises(RecipeError, match="2 LoRAs; 1 given"):
        Recipe.from_dict(found, models=models, loras=["lora.safetensors"])
    again = Recipe.from_dict(found, models=models, loras=["lora.safetensors", "other.safetensors"])
    again.run("2.safetensors")
    assert Path("1.safetensors").read_bytes() == Path("2.safetensors").read_bytes()
    again.dump("again.json")
    assert Recipe.load("again.json") == again
    Recipe.load("again.json").run("3.safetensors")
    assert Path("1.safetensors").read_bytes() == Path("3.safetensors").read_bytes()


def test_to_dict_is_as_on_the_command_line(files):
    recipe = Recipe(
        "a.safetensors",
        method="bake",
        loras=[
            "lora.safetensors",
            ("lora.safetensors", -0.5, "OUTALL"),
            Lora("lora.safetensors", 1, {"M00": 1}, "mine"),
        ],
        partial=True,
    )
    said = recipe.to_dict()
    assert said == {
        "models": ["a.safetensors"],
        "method": "bake",
        "loras": [
            "lora.safetensors:1.0",
            "lora.safetensors:-0.5:OUTALL",
            {"file": "lora.safetensors", "strength": 1.0, "blocks": {"M00": 1}, "name": "mine"},
        ],
        "partial": True,
    }
    assert Recipe.from_dict(json.loads(json.dumps(said))) == recipe
    with pytest.raises(RecipeError, match="a LoRA is in memory"):
        Recipe("a.safetensors", method="bake", loras=[load_file("lora.safetensors")]).to_dict()


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_writes_what_the_function_does(files, capsys):
    blockmerge.bake(
        "a.safetensors", [("lora.safetensors", 0.5, "OUTALL"), "lora.safetensors"], output="1.safetensors"
    )
    arguments = ["bake", "a.safetensors", "lora.safetensors:0.5:OUTALL", "lora.safetensors"]
    before = snapshot(files)
    planned = json.loads(ok(capsys, *arguments, "-o", "2.safetensors", "--json", "--dry-run"))
    assert snapshot(files) == before
    text = ok(capsys, *arguments, "-o", "2.safetensors")
    assert "bake of a.safetensors (Stable Diffusion 1.x)" in text
    assert "lora.safetensors: 4 modules matched" in text
    done = json.loads(ok(capsys, *arguments, "-o", "3.safetensors", "--json"))
    assert ok(capsys, *arguments, "-o", "4.safetensors", "-q", "--threads", "1") == ""
    assert len({Path(f"{number}.safetensors").read_bytes() for number in range(1, 5)}) == 1
    assert (planned["dry_run"], done["dry_run"]) == (True, False)
    assert done["change"]
    assert planned["change"] == {}
    assert all(one.pop("change") for one in done["loras"])
    assert not any(one.pop("change") for one in planned["loras"])
    changing = ("dry_run", "seconds", "output", "change")
    assert {key: done[key] for key in done if key not in changing} == {
        **{key: planned[key] for key in planned if key not in changing},
    }
    assert done["method"] == "bake"
    assert [(one["name"], one["kind"], one["strength"], one["met"]) for one in done["loras"]] == [
        ("lora", "locon+lora", 0.5, 4),
        ("lora", "locon+lora", 1.0, 4),
    ]


def test_merging_with_loras_on_the_command_line(files, model, capsys):
    b = small_model("sd1", seed=1)
    save_file(b, "b.safetensors")
    loras = ["lora.safetensors:0.5", "lora.safetensors:-1:M00=1"]
    options = [part for one in loras for part in ("--lora", one)]
    done = json.loads(
        ok(capsys, "a.safetensors", "b.safetensors", "-w", "0.3", *options, "-o", "o.safetensors", "--json")
    )
    assert [one["strength"] for one in done["loras"]] == [0.5, -1]
    assert_same(load_file("o.safetensors"), blockmerge.merge_state_dicts(model, b, weights=0.3, loras=loras))
    says = "blockmerge bake a.safetensors lora.safetensors"
    assert_refused(capsys, files, "a.safetensors", *options, "-o", "p.safetensors", says=says)
    ok(capsys, "a.safetensors", "b.safetensors", "-w", "0.3", *options, "-q")
    ok(capsys, "a.safetensors", "b.safetensors", "-w", "0.3", "--lora", "lora.safetensors:0.5:OUTALL", "-q")
    assert len(list(files.glob("a+b-*lora*"))) == 2


def test_ctrl_c_leaves_nothing(big_pair, here):
    write("lora.safetensors", written(lora_for(PLACES[3:], small_model("sd1"))))
    before = snapshot(here)
    arguments = [
        sys.executable,
        "-m",
        "blockmerge",
        "bake",
        str(big_pair[0]),
        "lora.safetensors",
        "-o",
        "out.safetensors",
    ]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(here.glob(".blockmerge-*")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "Interrupted: no unfinished file is left")
    assert snapshot(here) == before


def test_a_full_disk_leaves_nothing(files, capsys):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        arguments = ["bake", "a.safetensors", "lora.safetensors", "-o", "out.safetensors"]
        assert_refused(capsys, files, *arguments, says="file too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# -- bad input -----------------------------------------------------------------------------------------------


def of_rank_0(lora):
    return {
        name: tensor[:, :0] if "up" in part else tensor[:0] if "down" in part else tensor
        for name, tensor in written(lora).items()
        for part in [name.partition(".lora_")[2]]
    }


def with_others(lora, part, new):
    """A LoRA's tensors with others of one part."""
    return {name: new(tensor) if name.endswith(part) else tensor for name, tensor in written(lora).items()}


def twice(lora):
    first = PLACES[3].module
    again = {
        name.replace(first, "unet.conv_in"): tensor
        for name, tensor in written(lora).items()
        if name.startswith(first)
    }
    return {**written(lora), **again}


BAD = {
    "rank 0": (of_rank_0, "rank 0"),
    "rows": (lambda lora: with_others(lora, "up.weight", lambda one: one[:-1]), "is for a Stable Diffusion 1.x model of other widths than this one"),
    "alpha": (lambda lora: with_others(lora, "alpha", lambda one: one * float("nan")), "has alpha nan"),
    "twice": (twice, "twice, under two names (lora_unet_conv_in and unet.conv_in)"),
    "a model": (lambda _: small_model("sd1", seed=1), "bad.safetensors is a model (a checkpoint), not a LoRA"),
    "empty": (lambda _: {}, "bad.safetensors"),
    "whole numbers": (lambda lora: with_others(lora, "up.weight", lambda one: one.to(torch.int8)), "expected floats"),
    "half": (lambda lora: {name: one for name, one in written(lora).items() if "up" not in name.partition(".lora_")[2]}, "without"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_loras(files, capsys, lora, case):
    make, says = BAD[case]
    write("bad.safetensors", make(lora))
    arguments = ["a.safetensors", "bad.safetensors", "--partial", "-o", "o.safetensors"]
    assert_refused(capsys, files, "bake", *arguments, says=says)
    save_file(small_model("sd1", seed=1), "b.safetensors")
    arguments = [
        "a.safetensors",
        "b.safetensors",
        "-w",
        "0.3",
        "--lora",
        "bad.safetensors",
        "-o",
        "o.safetensors",
    ]
    assert_refused(capsys, files, *arguments, says=says)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_lora_cut_short(files, capsys, kept):
    os.truncate("lora.safetensors", int(kept * os.path.getsize("lora.safetensors")))
    says = "lora.safetensors"
    assert_refused(
        capsys, files, "bake", "a.safetensors", "lora.safetensors", "-o", "o.safetensors", says=says
    )


def test_settings_nested_too_deep(files, capsys, lora):
    write("deep.safetensors", written(lora), {"lora_adapter_metadata": "[" * 100_000})
    says = "deep.safetensors: lora_adapter_metadata"
    assert_refused(
        capsys, files, "bake", "a.safetensors", "deep.safetensors", "-o", "o.safetensors", says=says
    )


@pytest.mark.parametrize(
    ("value", "kind"), [(float("nan"), "lora"), (float("inf"), "lokr whole, product"), (float("nan"), "dora")]
)
def test_what_is_not_finite_names_the_lora(files, capsys, model, value, kind):
    where = PLACES[0]
    bad = written(lora_for([where], model, kind))
    part, tensor = next((name, tensor) for name, tensor in bad.items() if "alpha" not in name)
    tensor.view(-1)[-1] = value
    write("bad.safetensors", bad)
    arguments = ["bake", "a.safetensors", "lora.safetensors", "bad.safetensors:0.5", "-o", "o.safetensors"]
    assert_refused(
        capsys,
        files,
        *arguments,
        says=[f"{where.weight} (NaN or infinity in bad.safetensors: {part})", "nothing was written"],
    )
    with pytest.raises(NonFiniteError, match=rf"{re.escape(where.weight)}.*bad\.safetensors"):
        bake("bad.safetensors")
    out, _ = bake("bad.safetensors", allow_nonfinite=True)
    assert not out[where.weight].isfinite().all()
    bake(("bad.safetensors", 0))


def test_a_result_that_overflows(files, model):
    where = PLACES[0]
    huge = {where: {"diff": Factors(model[where.weight].shape).full()["diff"].float() * 1e6}}
    write("huge.safetensors", written(huge))
    cause = re.escape(f"{where.weight} (values too large for F16, with what huge.safetensors adds)")
    with pytest.raises(NonFiniteError, match=cause):
        bake("huge.safetensors")
    out, _ = bake("huge.safetensors", dtype="fp32")
    assert_baked(out, model, [(huge, 1)], torch.float32)


def test_a_lora_given_as_a_model(files, capsys):
    says = ["lora.safetensors is a LoRA (kohya's names), not a model", "bake"]
    assert_refused(
        capsys, files, "bake", "lora.safetensors", "lora.safetensors", "-o", "o.safetensors", says=says
    )
    arguments = ["a.safetensors", "lora.safetensors", "-w", "0.3", "-o", "o.safetensors"]
    assert_refused(capsys, files, *arguments, says=says)


def test_a_lora_given_twice_counts_twice_and_is_noted_once(files, model, lora):
    out, result = bake("lora.safetensors", ("lora.safetensors", 0.5))
    assert_baked(out, model, [(lora, 1.5)])
    assert len(result.notes) == len({*result.notes})
    assert sum(" matched" in note for note in result.notes) == 1


@pytest.mark.parametrize("output", ["a.safetensors", "lora.safetensors"])
def test_no_input_is_replaced(files, capsys, output):
    arguments = ["bake", "a.safetensors", "lora.safetensors", "-o", output, "--overwrite"]
    assert_refused(capsys, files, *arguments, says=f"the output {output} is the input {output}")


def test_words_that_are_not_loras(files, capsys):
    for given, says in (
        ("nope.safetensors:0.5", "cannot open nope.safetensors"),
        ("lora.safetensors:nan", "'nan' in 'lora.safetensors:nan' is not a strength"),
        (":0.5", "no file in ':0.5'"),
    ):
        assert_refused(capsys, files, "bake", "a.safetensors", given, "-o", "o.safetensors", says=says)
    with pytest.raises(RecipeError, match="no LoRA to bake in"):
        bake()
    with pytest.raises(RecipeError):
        bake(3)


def test_loras_of_any_file_format(files, model, lora):
    """What torch has saved is read as well, and nothing in it is run."""
    torch.save(written(lora), "lora.pt")
    out, _ = bake("lora.pt")
    assert_baked(out, model, [(lora, 1)])


@pytest.mark.parametrize("name", attacks.RUNNING)
def test_hostile_loras(files, capsys, monkeypatch, name):
    monkeypatch.syspath_prepend(files)
    Path("evil.pt").write_bytes(attacks.zipped(attacks.RUNNING[name](files / "canary")))
    assert_refused(capsys, files, "bake", "a.safetensors", "evil.pt", "-o", "o.safetensors", says="evil.pt")
    assert not os.path.exists("canary")


@pytest.mark.parametrize("name", ["zip_bomb", "stream_with_a_large_pickle", "zip_that_claims_millions"])
def test_hostile_files(files, capsys, name):
    Path("evil.pt").write_bytes(attacks.FILES[name][0]())
    assert_refused(capsys, files, "bake", "a.safetensors", "evil.pt", "-o", "o.safetensors", says="evil.pt")
