"""Files of new LoRAs: hashes, readers of other programs, what is refused, what is never left behind; and the
commands that write them.
"""

from __future__ import annotations

import hashlib
import json
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import product

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import extract_lora, merge_loras, resize_lora
from blockmerge.checkpoints import open_checkpoint
from blockmerge.checkpoints.writing import disk
from blockmerge.cli.main import run
from tests.commands import ok
from tests.conftest import unchanged
from tests.effort import some
from tests.lora_oracle import Factors
from tests.refusals import assert_refused
from tests.thin_loras import changes, make_lora, metadata_of, own_shapes, parts_in

FAMILIES = ("sd1", "sd2", "sdxl")
MADE = some(product(["merge", "resize", "extract"], FAMILIES), of=2)
LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function that gives a LoRA of a family, of every command; each is made once."""
    from blockmerge.demo import write_pair

    folder = tmp_path_factory.mktemp("made")

    def make(how, family):
        path = folder / f"{how}-{family}.safetensors"
        if path.exists():
            return path
        lora = make_lora(folder / f"{family}.safetensors", family, rank=5, alpha=2)
        if how == "merge":
            merge_loras([(lora, 0.3), (lora, -1)], output=path)
        elif how == "resize":
            resize_lora(lora, output=path, energy=0.7)
        else:
            pair = folder / f"{family}-a.safetensors", folder / f"{family}-b.safetensors"
            write_pair(*pair, family)
            extract_lora(pair[1], pair[0], output=path, rank=4, conv_rank=2)
        return path

    return make


# -- hashes and readers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "family"), MADE)
def test_hashes_are_those_that_sd_scripts_would_write(how, family, made):
    """By its own way: the file is saved again, in memory, with its training metadata alone."""
    path = made(how, family)
    metadata = metadata_of(path)
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    again = safetensors.torch.save(load_file(path), trained)
    length = int.from_bytes(again[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(again[8 + length :]).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(again[0x100000:0x110000]).hexdigest()[:8]
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    assert hashlib.sha256(whole[8 + length :]).hexdigest() == metadata["sshs_model_hash"]


@pytest.mark.parametrize("size", [0, 1 << 18, 1 << 20])
def test_the_old_hash_of_files_of_any_size(size, tmp_path):
    tensors = {
        f"{LINEAR}.lora_down.weight": torch.ones(1, size + 9),
        f"{LINEAR}.lora_up.weight": torch.randn(8, 1),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    metadata = metadata_of(
        merge_loras([tmp_path / "a.safetensors"], output=tmp_path / "b.safetensors").output
    )
    trained = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    again = safetensors.torch.save(load_file(tmp_path / "b.safetensors"), trained)
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(again[0x100000:0x110000]).hexdigest()[:8]


@pytest.mark.parametrize(("how", "family"), MADE)
def test_names_are_those_of_sd_scripts(how, family, made):
    found, known = parts_in(made(how, family)), own_shapes(family)
    if how != "extract":
        assert found.keys() == known.keys()
    else:  # and layers that sd-scripts does not train
        assert found.keys() > known.keys()
    for name, parts in found.items():
        assert parts.keys() == {"alpha", "lora_down.weight", "lora_up.weight"}
        if name in known:
            rows, *inner = known[name][1]
            rank = len(parts["lora_down.weight"])
            assert parts["lora_down.weight"].shape == (rank, *inner)
            assert parts["lora_up.weight"].shape == (rows, rank, *[1] * (len(inner) - 1))


@pytest.mark.parametrize(("how", "family"), MADE)
def test_diffusers_knows_every_module(how, family, made):
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    state_dict = load_file(made(how, family))
    count = len(state_dict) // 3
    config = type("Config", (), {"layers_per_block": 2})
    mapped = _maybe_map_sgm_blocks_to_diffusers(dict(state_dict), config)
    found, alphas = _convert_non_diffusers_lora_to_diffusers(mapped)
    assert len(found) == 2 * count
    assert len(alphas) == count
    places = set(blockmerge.anatomy.FAMILIES[family].origins(_layout(family), "ldm", "diffusers"))
    for name in found:
        component, _, rest = name.partition(".")
        if "text_projection" in rest:
            continue
        stem = rest.removesuffix(".weight")
        for ending in (".lora.down", ".lora.up", "_lora.down", "_lora.up", ".lora_linear_layer.down", ".lora_linear_layer.up"):  # fmt: skip
            stem = stem.removesuffix(ending)
        stem = stem.replace(".processor.to_out", ".to_out.0").replace(".processor.", ".")
        for letter in "qkv":
            stem = stem.replace(f"self_attn.to_{letter}", f"self_attn.{letter}_proj")
        stem = stem.replace("self_attn.to_out", "self_attn.out_proj")
        assert f"{component}/{stem}.weight" in places, name


def _layout(family):
    return blockmerge.anatomy.FAMILIES[family].layout


@pytest.mark.parametrize(("how", "family"), MADE)
def test_they_are_loras_for_blockmerge_too(how, family, made):
    adapter = blockmerge.adapters.Adapter.of(open_checkpoint(made(how, family)))
    assert adapter.family.name == family
    assert not adapter.unmet
    assert adapter.kinds.keys() <= {"lora", "locon"}
    assert {module.factor for module in adapter.modules} == {1.0}
    recipe = json.loads(metadata_of(made(how, family))["blockmerge.recipe"])
    assert recipe["method"] == f"lora {how}"
    assert "/" not in json.dumps(recipe)


def test_diffusers_loads_it_and_paints_the_same(tmp_path):
    """The U-Net of a thin pipeline, with the LoRA loaded and with it baked in."""
    pytest.importorskip("peft")
    from diffusers import UNet2DConditionModel
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    from blockmerge.demo import make_state_dicts

    lora = make_lora(tmp_path / "a.safetensors", "sd1", rank=2, only=lambda name: "unet" in name)
    merge_loras([(lora, 0.5)], output=tmp_path / "b.safetensors", dtype="fp32")
    save_file(make_state_dicts("sd1")[0], tmp_path / "model.safetensors")
    blockmerge.convert(tmp_path / "model.safetensors", tmp_path / "folder", naming="diffusers")
    blockmerge.bake(tmp_path / "folder", [(lora, 0.5)], output=tmp_path / "baked", naming="diffusers")
    outputs = []
    for folder, is_loaded in (("folder", True), ("baked", False), ("folder", False)):
        unet = UNet2DConditionModel.from_pretrained(tmp_path / folder / "unet").eval()
        if is_loaded:
            state_dict, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(
                load_file(tmp_path / "b.safetensors"), unet_config=unet.config
            )
            StableDiffusionLoraLoaderMixin.load_lora_into_unet(state_dict, network_alphas=alphas, unet=unet)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, 4, 16, 16, generator=generator)
        text = torch.randn(1, 7, unet.config.cross_attention_dim, generator=generator)
        with torch.no_grad():
            outputs.append(unet(noise, 10, text).sample)
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-2)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    """A function that merges, and returns what is said against it: in one line, with nothing written."""

    def refuse(loras, error, **how):
        before = {one.name: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()}
        with pytest.raises(error) as caught:
            merge_loras(loras, output=how.pop("output", tmp_path / "out.safetensors"), **how)
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
        assert {one.name: one.read_bytes() for one in tmp_path.iterdir() if one.is_file()} == before
        return str(caught.value)

    return refuse


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"rank": 0}, "rank (--rank) is a whole number from 1 up; 0 given"),
        ({"energy": 2}, "energy (--energy)"),
        ({"rank": 2, "energy": 0.5}, "leave one of them out"),
        ({"dtype": "fp64"}, "is not a dtype of LoRAs (--dtype)"),
        ({"threads": 0}, "threads"),
    ],
)
def test_what_makes_no_sense(how, said, refused, tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1")
    assert said in refused([a], blockmerge.RecipeError, **how)


def test_loras_that_are_none(refused, tmp_path, pairs):
    a = make_lora(tmp_path / "a.safetensors", "sd1")
    assert "at least one" in refused([], blockmerge.RecipeError)
    assert "is a model" in refused([a, pairs()[0]], blockmerge.CheckpointError)
    assert "folder" in refused([a, tmp_path], blockmerge.CheckpointError)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(a.read_bytes()[:-100])
    assert "cut short" in refused([a, cut], blockmerge.CheckpointError)
    assert "every strength" in refused([(a, 0)], blockmerge.RecipeError)
    assert "every strength" in refused([(a, 1, "NONE")], blockmerge.RecipeError)


def test_loras_of_other_families_and_widths(refused, tmp_path):
    a, x = (make_lora(tmp_path / f"{family}.safetensors", family) for family in ("sd1", "sdxl"))
    said = refused([a, x], blockmerge.IncompatibleModelsError)
    assert "Stable Diffusion 1.x" in said or "Stable Diffusion XL" in said
    wide = tmp_path / "wide.safetensors"
    save_file({f"{LINEAR}.{part}": one for part, one in Factors((16, 6)).lora().items()}, wide)
    narrow = tmp_path / "narrow.safetensors"
    save_file({f"{LINEAR}.{part}": one for part, one in Factors((8, 6)).lora().items()}, narrow)
    said = refused([wide, narrow], blockmerge.IncompatibleModelsError)
    assert "of different widths" in said
    assert "wide.safetensors" in said


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["lora_down.weight", "lora_up.weight"])
def test_values_that_are_none(part, value, refused, tmp_path):
    parts = Factors((8, 6)).lora()
    parts[part][0, 0] = value
    save_file({f"{LINEAR}.{name}": one for name, one in parts.items()}, tmp_path / "a.safetensors")
    said = refused([tmp_path / "a.safetensors"], blockmerge.NonFiniteError)
    assert "a.safetensors holds NaN or infinity" in said
    assert f"{LINEAR}.{part}" in said


def test_an_alpha_that_is_no_number(refused, tmp_path):
    parts = {**Factors((8, 6)).lora(), "alpha": torch.tensor(float("nan"))}
    save_file({f"{LINEAR}.{name}": one for name, one in parts.items()}, tmp_path / "a.safetensors")
    assert "alpha nan" in refused([tmp_path / "a.safetensors"], blockmerge.CheckpointError)


def test_values_too_large_for_half_precision(refused, tmp_path):
    parts = {name: one.float() * 1e5 for name, one in Factors((8, 6)).lora().items()}
    save_file({f"{LINEAR}.{name}": one for name, one in parts.items()}, tmp_path / "a.safetensors")
    said = refused([tmp_path / "a.safetensors"], blockmerge.NonFiniteError, dtype="fp16")
    assert "--dtype fp32" in said


def test_modules_that_no_table_knows(refused, tmp_path):
    tensors = load_file(make_lora(tmp_path / "a.safetensors", "sd1"))
    tensors |= {f"lora_unet_strange.{part}": one for part, one in Factors((8, 6)).lora().items()}
    save_file(tensors, tmp_path / "b.safetensors")
    said = refused([tmp_path / "b.safetensors"], blockmerge.CheckpointError)
    assert "1 module that Stable Diffusion 1.x does not have (lora_unet_strange): " in said


def test_outputs_that_cannot_be(refused, tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1")
    (tmp_path / "there.safetensors").write_text("somebody else's")
    for output, said in (
        (tmp_path / "out.pt", "give it that ending"),
        (tmp_path / "no folder" / "out.safetensors", "does not exist"),
        (tmp_path / "there.safetensors", "--overwrite"),
        (a, "is the input"),
    ):
        assert said in refused([a], blockmerge.OutputError, output=output)
    assert "is the input" in refused([a], blockmerge.OutputError, output=a, overwrite=True)


# -- what is never left behind -------------------------------------------------------------------------------


def test_nothing_remains_of_a_lora_that_is_given_up(pairs, system, tmp_path):
    base, tuned = pairs()

    def burst(done, total):
        raise KeyboardInterrupt

    lora = make_lora(tmp_path / "lora.safetensors", "sd1")
    before = {one.name for one in system.iterdir()}
    with unchanged(base, tuned, lora):
        for make in (
            lambda **how: merge_loras([lora, lora], **how),
            lambda **how: resize_lora(lora, rank=1, **how),
            lambda **how: extract_lora(tuned, base, rank=2, **how),
        ):
            with pytest.raises(KeyboardInterrupt):
                make(output=system / "out.safetensors", progress=burst)
            assert {one.name for one in system.iterdir()} == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("blockmerge")]


@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("size", [{"rank": 4}, {"energy": 0.9}], ids=str)
def test_a_full_disk_leaves_nothing(size, reserved, pairs, system, monkeypatch):
    """As a limit of a file's size, which systems tell in the same way."""
    base, tuned = pairs("sdxl")
    if not reserved:
        monkeypatch.setattr(disk, "reserve", lambda *_: None)
    before = {one.name for one in system.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700_000, hard))
    try:
        with pytest.raises(blockmerge.OutputError, match=r"cannot write .*file too large"):
            extract_lora(tuned, base, output=system / "out.safetensors", **size)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {one.name for one in system.iterdir()} == before


def test_ctrl_c_leaves_nothing(pairs, tmp_path):
    """The whole command, interrupted while it works."""
    base, tuned = pairs("sdxl", ("F32", "F32"))
    out = tmp_path / "out.safetensors"
    arguments = [
        "lora",
        "extract",
        str(tuned),
        str(base),
        "-o",
        str(out),
        "--energy",
        "0.99",
        "--threads",
        "1",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "blockmerge", *arguments], stderr=subprocess.PIPE
    ) as process:
        end = time.monotonic() + 60
        while not [*tmp_path.glob(".blockmerge-*")] and process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130, err
    assert b"Interrupted" in err
    assert [*tmp_path.iterdir()] == []


# -- commands ------------------------------------------------------------------------------------------------


def test_the_commands(pairs, here, capsys):
    base, tuned = pairs()
    a, b = (make_lora(here / f"{seed}.safetensors", "sd1", seed=seed) for seed in (1, 2))
    said = json.loads(
        ok(capsys, "lora", "merge", f"{a}:0.7", f"{b}:-0.5:OUTALL", "-o", "ab.safetensors", "--json")
    )
    assert (said["output"], said["family"], said["kind"]) == ("ab.safetensors", "sd1", "lora+locon")
    assert (said["rank"], said["modules"]) == (8, len(own_shapes("sd1")))
    assert said.keys() >= {"lost", "notes", "ranks", "dtype", "bytes", "seconds"}
    said = json.loads(
        ok(capsys, "lora", "extract", tuned, base, "-o", "x.safetensors", "--rank", "2", "--json")
    )
    assert all(0 <= share <= 1 for share in said["held"].values())
    assert said["dtype"] == "F16"
    text = ok(
        capsys,
        "lora",
        "resize",
        "ab.safetensors",
        "-o",
        "small.safetensors",
        "--rank",
        "3",
        "--dtype",
        "bf16",
    )
    assert "rank 3" in text
    assert "lost: " in text
    assert "small.safetensors" in text
    assert {one.dtype for one in load_file("small.safetensors").values()} == {torch.bfloat16}
    assert ok(capsys, "lora", "extract", tuned, base, "-o", "y.safetensors", "--energy", "0.5", "-q") == ""
    assert "holds of the difference: BASE" in ok(
        capsys, "lora", "extract", tuned, base, "-o", "y.safetensors", "--rank", "1", "--conv-rank", "1", "--overwrite"
    )  # fmt: skip
    assert changes("y.safetensors")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["merge", "a.safetensors", "-o", "b.safetensors"], "a.safetensors"),
        (["resize", "a.safetensors", "-o", "b.safetensors"], "--energy 0.95"),
        (["extract", "a.safetensors", "b.safetensors", "-o", "c.safetensors"], "--rank 32"),
    ],
)
def test_what_commands_refuse(arguments, said, here, capsys):
    assert run(["lora", *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.count("\n") == 1
    assert [*here.iterdir()] == []


@pytest.mark.parametrize(
    ("code", "arguments"),
    [  # 2 is for what is no command line; all values are looked at by the library, which refuses with 1
        (2, ["--rank", "x"]),
        (2, ["--rank", "1.5"]),
        (2, ["--energy", "x"]),
        (2, ["--threads", "x"]),
        (2, ["--nothing"]),
        (1, ["--rank", "0"]),
        (1, ["--rank", "-1"]),
        (1, ["--energy", "1.5"]),
        (1, ["--energy", "nan"]),
        (1, ["--rank", "1", "--energy", "0.5"]),
        (1, ["--rank", "1", "--threads", "0"]),
        (1, ["--rank", "1", "--dtype", "fp64"]),
        (0, ["--rank", "99999999999"]),
    ],
)
def test_exit_codes_of_values(code, arguments, here, capsys):
    make_lora(here / "a.safetensors", "sd1", only=lambda name: "mid_block" in name)
    assert run(["lora", "resize", "a.safetensors", "-o", "b.safetensors", *arguments]) == code
    assert (here / "b.safetensors").exists() == (code == 0)
    assert (capsys.readouterr().err.count("\n") == 1) == (code == 1)


def test_nothing_loads_torch_before_it_computes(tmp_path):
    code = "import blockmerge, sys; blockmerge.merge_loras, blockmerge.extract_lora; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("how", "of"), [("merge", "sd1.safetensors"), ("resize", "sd1"), ("extract", "sd1-b.safetensors, sd1-a")]
)
@pytest.mark.parametrize(
    "command",
    [["recipe"], ["recipe", "--json"], ["recipe", "--pin"], ["verify"], ["again", "-o", "x.safetensors"]],
)
def test_a_lora_is_not_made_again(how, of, command, made, here, capsys):
    path = made(how, "sd1")
    says = f"{path.name} is a LoRA, made by lora {how} from {of}"
    assert_refused(capsys, here, *command, path, says=[says, "lora inspect"])


def test_recipes_of_earlier_versions_are_shown_but_not_made_again(pairs, here, capsys):
    a, b = pairs()
    blockmerge.merge(a, b, weights=0.5, output="m.safetensors")
    run_of = json.loads(metadata_of("m.safetensors")["blockmerge.recipe"])
    del run_of["files"]
    save_file(load_file("m.safetensors"), "old.safetensors", {"blockmerge.recipe": json.dumps(run_of)})
    for command in (["recipe"], ["verify"], ["again", "-o", "x.safetensors"]):
        assert_refused(
            capsys, here, *command, "old.safetensors", says=["old.safetensors: ", "recipe FILE --json"]
        )
    assert json.loads(ok(capsys, "recipe", "old.safetensors", "--json")) == run_of
