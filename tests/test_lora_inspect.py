"""`lora inspect` and `lora similarity`: against an oracle in float64, and what they say of odd files.

Over 500 lines: both are held against the same oracle of the same modules.
"""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import blockmerge
from blockmerge import CheckpointError, IncompatibleModelsError, Lora, NonFiniteError, UnknownFamilyError
from blockmerge.anatomy import Family, register, unregister
from blockmerge.cli.main import run
from tests import toy_family
from tests.adapter_names import modules
from tests.commands import ok
from tests.lora_oracle import KINDS as ALL_KINDS
from tests.lora_oracle import added, bias_change, parts_of

LOOKING = ("dora", "glora", "ia3", "oft", "boft")
KINDS = [kind for kind in ALL_KINDS if not kind.startswith(LOOKING)]
# {name of a module: the shape of its weight, its block}; the shapes are not the real ones, but no side is another.
PLACES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0": ((8, 6), "IN01"),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2": ((8, 12), "IN01"),
    "lora_unet_mid_block_resnets_0_conv1": ((10, 6, 3, 3), "M00"),
    "lora_unet_up_blocks_3_resnets_2_conv_shortcut": ((8, 14, 1, 1), "OUT11"),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": ((16, 4), "BASE"),
}


def lora_of(kinds, seed=0, places=PLACES, alpha=None):
    """({name: parts}, as in a file), of kinds that take turns where they fit."""
    found = {}
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    for number, (module, (shape, _)) in enumerate(places.items()):
        kind = kinds[number % len(kinds)]
        if "tucker" in kind and len(shape) < 4:
            kind = (
                kind.replace("tucker", "product") if "lokr" in kind else "loha" if "loha" in kind else "lora"
            )
        if "flat" in kind and len(shape) == 4 and shape[2] > 1:
            kind = "lora"
        found[module] = parts_of(kind, shape, alpha, seed=seed + number, dtype=torch.float32)
    return found


def in_a_file(lora):
    return {f"{module}.{part}": tensor for module, parts in lora.items() for part, tensor in parts.items()}


def changes(lora, places=PLACES):
    """{block: all that a LoRA adds there, weights and biases, in a row}; every module has its own stretch."""
    found = {}
    for module, (shape, block) in places.items():
        parts = lora.get(module, {})
        change = added(parts, shape) if parts else None
        bias = bias_change(parts, None) if parts else None
        for one, size in ((change, math.prod(shape)), (bias, shape[0])):
            row = torch.zeros(size, dtype=torch.float64) if one is None else one.reshape(-1)
            found[block] = torch.cat([found.get(block, row[:0]), row])
    return found


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


# -- inspect -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_every_block_is_the_norm_of_what_is_added_there(kind):
    lora = lora_of(kind, alpha=torch.tensor(1.5))
    found = blockmerge.inspect_lora(in_a_file(lora))
    wanted = changes(lora)
    assert found.family == "sd1"
    assert list(found.blocks) == ["BASE", "IN01", "M00", "OUT11"]
    for block, one in found.blocks.items():
        assert one.norm == pytest.approx(wanted[block].norm().item(), rel=1e-12)
    assert found.norm == pytest.approx(torch.cat(list(wanted.values())).norm().item(), rel=1e-12)
    assert found.modules == len(PLACES)


def test_kinds_ranks_and_alphas_are_counted():
    lora = lora_of(["lora", "full", "loha"], alpha=torch.tensor(1.5))
    names = list(lora)
    lora[names[0]]["alpha"] = torch.tensor(8.0)
    found = blockmerge.inspect_lora(in_a_file(lora))
    assert found.kinds == {"lora": 2, "full": 2, "loha": 1}
    assert found.ranks == {3: 3}
    assert found.alphas == {1.5: 2, 8.0: 1}
    said = found.to_dict()
    assert (said["ranks"], said["alphas"]) == ({"3": 3}, {"1.5": 2, "8": 1})
    assert {block: one["modules"] for block, one in said["blocks"].items()} == {
        "BASE": 1,
        "IN01": 2,
        "M00": 1,
        "OUT11": 1,
    }
    assert found.dtypes == {"F32": len(in_a_file(lora))}


def test_alphas_are_those_of_the_file(tmp_path, capsys):
    """0 and none count as the rank, and are shown as what they are."""
    lora = lora_of("lora", alpha=torch.tensor(1.5))
    first, second, *_ = lora
    lora[first]["alpha"] = torch.tensor(0.0)
    del lora[second]["alpha"]
    save_file({name: one.clone() for name, one in in_a_file(lora).items()}, tmp_path / "x.safetensors")
    assert blockmerge.inspect_lora(tmp_path / "x.safetensors").alphas == {0.0: 1, 1.5: 3}
    out = ok(capsys, "lora", "inspect", tmp_path / "x.safetensors")
    assert "alpha  1.5 (3), 0 (1), none, for which the rank counts (1)\n" in out
    assert "has alpha 0 in 1 module: the rank is taken in its place" in out


@pytest.mark.parametrize(
    ("program", "family"), [("sd15-kohya", "sd1"), ("sdxl-kohya", "sdxl"), ("sdxl-peft", "sdxl")]
)
def test_all_modules_of_real_programs_are_in_the_blocks_that_they_should_be(program, family):
    said = modules(family, program)
    down, up = ("lora_A", "lora_B") if program.endswith("peft") else ("lora_down", "lora_up")
    tensors = {}
    counts = {}
    for name, one in said.items():
        tensors[f"{name}.{down}.weight"] = torch.ones(1, *one.shape[1:]).half()
        tensors[f"{name}.{up}.weight"] = torch.ones(one.shape[0], 1, *one.shape[2:]).half()
        counts[one.block] = counts.get(one.block, 0) + 1
    found = blockmerge.inspect_lora(tensors)
    assert found.family == family
    assert {block: one.modules for block, one in found.blocks.items()} == counts
    for block, one in found.blocks.items():  # of ones, ‖ΔW‖² is the number of elements
        elements = sum(math.prod(place.shape) for place in said.values() if place.block == block)
        assert one.norm == pytest.approx(math.sqrt(elements), rel=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind.startswith(LOOKING)])
def test_kinds_that_look_at_the_weight_have_no_share(kind):
    shape = {"lora_unet_mid_block_resnets_0_conv1": ((16, 8, 3, 3), "M00")}
    lora = lora_of(kind, places=shape)
    found = blockmerge.inspect_lora(in_a_file(lora))
    assert found.blocks["M00"].norm is None
    with pytest.raises(IncompatibleModelsError, match="whose change depends on the model"):
        blockmerge.lora_similarity(in_a_file(lora), in_a_file(lora))


def test_blocks_of_modules_that_look_at_the_weight_have_no_share():
    lora = lora_of("lora")
    first = next(iter(lora))
    lora[first]["dora_scale"] = torch.ones(8, 1)
    found = blockmerge.inspect_lora(in_a_file(lora))
    assert found.kinds["dora"] == 1
    assert found.blocks["IN01"].norm is None
    assert found.norm is None
    assert found.blocks["M00"].norm == pytest.approx(changes(lora)["M00"].norm().item())
    assert any("1 module of dora" in note for note in found.notes)


def test_nan_is_named_and_has_no_share():
    lora = lora_of("lora")
    lora[list(lora)[2]]["lora_up.weight"][0, 0] = math.nan
    found = blockmerge.inspect_lora(in_a_file(lora))
    assert found.blocks["M00"].norm is None
    assert any("NaN or infinity in 1 module" in note for note in found.notes)
    assert found.blocks["IN01"].norm > 0


def test_what_is_not_known_is_listed():
    tensors = in_a_file(lora_of("lora"))
    tensors["lora_unet_strange.lora_up.weight"] = torch.ones(4, 2)
    tensors["lora_unet_strange.lora_down.weight"] = torch.ones(2, 4)
    tensors["bundle_emb.word.clip_l"] = torch.ones(1, 768)
    found = blockmerge.inspect_lora(tensors)
    assert found.unmet == ("lora_unet_strange",)
    assert found.embeddings == ("bundle_emb.word.clip_l",)
    assert any("lora_unet_strange" in note for note in found.notes)


METADATA = {
    "ss_tag_frequency": json.dumps({"10_cat": {"cat ": 30, "sofa": 4}, "2_dog": {"sofa": 7, "dog": 2}}),
    "ss_base_model_version": "sd_v1",
    "ss_network_dim": "3",
    "ss_network_alpha": "1.5",
    "ss_training_comment": "None",
    "modelspec.title": "Cats",
    "modelspec.author": "somebody",
    "ss_epoch": "3",
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "cats.safetensors"
    save_file(in_a_file(lora_of("lora")), path, METADATA)
    return path


def test_what_people_look_for_in_the_metadata(file):
    assert blockmerge.inspect_lora(file).metadata == {
        "trigger_words": {"cat": 30, "sofa": 11, "dog": 2},
        "modelspec.title": "Cats",
        "modelspec.author": "somebody",
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": "3",
        "ss_network_alpha": "1.5",
    }
    assert blockmerge.inspect_lora(Lora(file)).norm == blockmerge.inspect_lora(file).norm


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 50_000 + "1",
        '{"a": 1}',
        '{"a": {"b": "c"}}',
        '{"a": {"b": 1e999}}',
        "cat",
        "[]",
    ],
)
def test_hostile_tags_are_named(tmp_path, text):
    save_file(in_a_file(lora_of("lora")), tmp_path / "x.safetensors", {"ss_tag_frequency": text})
    found = blockmerge.inspect_lora(tmp_path / "x.safetensors")
    assert "trigger_words" not in found.metadata
    assert any("ss_tag_frequency in its metadata cannot be read" in note for note in found.notes)


def test_inspect_on_the_command_line(file, capsys):
    said = json.loads(ok(capsys, "lora", "inspect", file, "--json"))
    assert {"name", "family", "kinds", "ranks", "alphas", "blocks", "metadata"} <= said.keys()
    assert said["name"] == "cats.safetensors"
    assert said == blockmerge.inspect_lora(file).to_dict() | {
        "notes": said["notes"],
        "unmet": [],
        "embeddings": [],
    }
    out = ok(capsys, "lora", "inspect", file)
    assert "cats.safetensors  a LoRA for Stable Diffusion 1.x, 5 modules" in out
    assert "trigger_words: cat (30), sofa (11), dog (2)" in out
    assert "OUT11" in out
    assert "IN00" in out
    assert "%" in out


@pytest.mark.parametrize("given", ["0.5", "1:OUTALL"])
@pytest.mark.parametrize("command", [["inspect"], ["convert", "--to", "kohya", "-o", "out.safetensors"]])
def test_a_strength_without_effect_is_refused(command, given, file, here, capsys):
    said = f"Error: cats.safetensors is {command[0]}ed as it is: give the file without strength and blocks"
    assert run(["lora", *command, f"{file}:{given}"]) == 1
    assert capsys.readouterr().err.startswith(said)
    assert [*here.iterdir()] in ([], [file])


def test_inspect_names_it(file, capsys):
    assert "blockmerge lora inspect" in ok(capsys, "inspect", file)


# -- similarity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "lokr product, tucker", "full with a bias"])
def test_cosines_are_those_of_what_is_added(kind, other):
    one, two = lora_of(kind, alpha=torch.tensor(1.5)), lora_of(other, seed=50)
    found = blockmerge.lora_similarity(in_a_file(one), in_a_file(two), blocks=True)
    a, b = changes(one), changes(two)
    assert list(found.parts) == ["BASE", "IN01", "M00", "OUT11"]
    for block, value in found.parts.items():
        assert value == pytest.approx(cosine(a[block], b[block]), abs=1e-12)
    assert found.similarity == pytest.approx(
        cosine(*(torch.cat([one[block] for block in PLACES_OF]) for one in (a, b))), abs=1e-12
    )


PLACES_OF = ("BASE", "IN01", "M00", "OUT11")


def test_the_same_in_another_spelling_and_rank_is_the_same():
    one = lora_of("lora")
    two = {}
    for name, parts in one.items():
        up, down = parts["lora_up.weight"], parts["lora_down.weight"]
        two[name] = {  # twice as strong, from twice the rank
            "lora_up.weight": torch.cat([up, up], 1),
            "lora_down.weight": torch.cat([down, down]),
            "alpha": torch.tensor(float(2 * len(down))),
        }
    renamed = {
        name.replace("lora_te_text_model", "lora_te1_text_model").replace(
            "lora_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"
        ): tensor
        for name, tensor in in_a_file(two).items()
    }
    found = blockmerge.lora_similarity(in_a_file(one), renamed, blocks=True)
    assert found.similarity == pytest.approx(1, abs=1e-12)
    assert found.parts == pytest.approx(dict.fromkeys(PLACES_OF, 1.0), abs=1e-12)
    zero = {name: {**parts, "alpha": torch.tensor(0.0)} for name, parts in one.items()}
    notes = blockmerge.lora_similarity(in_a_file(zero), in_a_file(zero)).notes
    assert sum("has alpha 0 in 5 modules" in note for note in notes) == 1
    assert len(notes) == len({*notes})
    negative = blockmerge.lora_similarity((in_a_file(one), -2), renamed)
    assert negative.similarity == pytest.approx(-1, abs=1e-12)
    assert negative.parts == {}


def test_what_only_one_has_counts_as_zero():
    one, two = lora_of("lora"), lora_of("lora", seed=50)
    for name in list(PLACES)[2:]:
        del two[name]
    found = blockmerge.lora_similarity(in_a_file(one), in_a_file(two), blocks=True)
    a, b = changes(one), changes(two)
    assert found.parts["M00"] == 0
    assert found.similarity == pytest.approx(
        cosine(*(torch.cat([x[y] for y in PLACES_OF]) for x in (a, b))), abs=1e-12
    )
    some = blockmerge.lora_similarity((in_a_file(one), 1, "IN01=1"), in_a_file(two), blocks=True)
    assert list(some.parts) == ["IN01"]
    assert some.similarity == pytest.approx(cosine(a["IN01"], b["IN01"]), abs=1e-12)


@pytest.fixture
def toy(tmp_path):
    """A family whose q, k and v lie joined, and some rows of which are swapped."""
    folder = toy_family.write(tmp_path)
    described = (folder / "family.toml").read_text()
    (folder / "family.toml").write_text(
        described + '\n[adapters.names.unet]\nunderscored = ["lora_toy_"]\ndotted = ["toy."]\n'
    )
    register(Family.read(folder))
    yield
    unregister(toy_family.NAME)


def pair(name, rows, columns, seed, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{name}.lora_up.weight": torch.randn(rows, rank, generator=generator),
        f"{name}.lora_down.weight": torch.randn(rank, columns, generator=generator),
    }


def product(name, tensors):
    return tensors[f"{name}.lora_up.weight"].double() @ tensors[f"{name}.lora_down.weight"].double()


@pytest.mark.parametrize("is_first", [True, False])
def test_a_whole_is_compared_with_parts_of_it(toy, is_first):
    whole = {**pair("toy.layers.1.qkv", 40, 16, 0), "toy.layers.1.qkv.diff_b": torch.randn(40)}
    whole |= pair("toy.final.modulation", 32, 16, 1)
    parts = {**pair("toy.blocks.1.attn.to_k", 8, 16, 2), "toy.blocks.1.attn.to_k.diff_b": torch.randn(8)}
    parts |= {**pair("toy.blocks.1.attn.to_q", 24, 16, 3), **pair("toy.norm_out.linear", 32, 16, 4)}
    a = [
        product("toy.layers.1.qkv", whole),
        whole["toy.layers.1.qkv.diff_b"],
        product("toy.final.modulation", whole),
    ]
    qkv = torch.zeros(40, 16).double()
    qkv[:24], qkv[24:32] = product("toy.blocks.1.attn.to_q", parts), product("toy.blocks.1.attn.to_k", parts)
    bias = torch.zeros(40).double()
    bias[24:32] = parts["toy.blocks.1.attn.to_k.diff_b"]
    b = [qkv, bias, product("toy.norm_out.linear", parts).roll(16, 0)]
    found = blockmerge.lora_similarity(*((whole, parts) if is_first else (parts, whole)), blocks=True)
    assert found.family == "toy"
    rows = (torch.cat([one.double().reshape(-1) for one in side]) for side in (a, b))
    assert found.similarity == pytest.approx(cosine(*rows), abs=1e-12)
    assert found.parts == {"L01": found.similarity}


def test_nothing_at_all_is_like_nothing_at_all():
    zero = {
        name: {**parts, "lora_up.weight": 0 * parts["lora_up.weight"]}
        for name, parts in lora_of("lora").items()
    }
    one = in_a_file(lora_of("lora"))
    assert blockmerge.lora_similarity(in_a_file(zero), in_a_file(zero)).similarity == 1
    assert blockmerge.lora_similarity(in_a_file(zero), one).similarity == 0


def test_another_family_is_refused():
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    xl = {f"{name}.lora_up.weight": torch.ones(640, 1), f"{name}.lora_down.weight": torch.ones(1, 2048)}
    sd1 = {
        f"{place}.{part}": torch.ones(shape)
        for place, one in list(modules("sd1", "sd15-kohya").items())[:40]
        for part, shape in {
            "lora_up.weight": (one.shape[0], 1),
            "lora_down.weight": (1, *one.shape[1:]),
        }.items()
    }
    with pytest.raises(
        IncompatibleModelsError, match=r"is a LoRA for Stable Diffusion 1\.x, .* for Stable Diffusion XL"
    ):
        blockmerge.lora_similarity(sd1, xl)


def test_of_one_that_fits_several_families_the_other_tells_which():
    clip = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    both = {f"{clip}.lora_up.weight": torch.ones(3072, 1), f"{clip}.lora_down.weight": torch.ones(1, 768)}
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    xl = {
        f"{name}.lora_up.weight": torch.ones(640, 1),
        f"{name}.lora_down.weight": torch.ones(1, 2048),
        **both,
    }
    for pair in ((both, xl), (xl, both)):
        found = blockmerge.lora_similarity(*pair, blocks=True)
        assert found.family == "sdxl"
        assert found.parts["BASE"] == pytest.approx(1)
        assert 0 < found.similarity < 1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_fewer_input_channels_change_nothing_in_the_others(kind):
    """LoRAs for a model and for its inpainting variant."""
    name, narrow, wide = "lora_unet_conv_in", (320, 4, 3, 3), (320, 9, 3, 3)
    one, two = (lora_of(kind, seed, {name: (shape, "IN00")}) for seed, shape in enumerate((narrow, wide)))
    filled = torch.zeros(wide, dtype=torch.float64)
    filled[:, :4] = added(one[name], narrow).view(narrow)
    b = added(two[name], wide).reshape(-1)
    found = blockmerge.lora_similarity(in_a_file(one), in_a_file(two))
    assert found.similarity == pytest.approx(cosine(filled.view(-1), b), abs=1e-12)


def test_loras_for_models_of_different_widths_are_refused():
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    one, two = pair(name, 8, 8, 0), pair(name, 16, 8, 0)
    with pytest.raises(IncompatibleModelsError, match="different widths") as caught:
        blockmerge.lora_similarity((one, 0.5), two)
    assert f"{name} changes [8, 8] and [16, 8]" in str(caught.value)


def test_those_that_look_at_the_weight_are_refused():
    lora = lora_of("lora")
    lora[next(iter(lora))]["dora_scale"] = torch.ones(8, 1)
    with pytest.raises(IncompatibleModelsError, match="1 module of dora, whose change depends on the model"):
        blockmerge.lora_similarity(in_a_file(lora), in_a_file(lora_of("lora")))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_refused(value):
    lora = lora_of("lora")
    lora[list(lora)[2]]["lora_up.weight"][0, 0] = value
    with pytest.raises(
        NonFiniteError, match=r"holds NaN or infinity .* in lora_unet_mid_block_resnets_0_conv1"
    ):
        blockmerge.lora_similarity(in_a_file(lora), in_a_file(lora_of("lora")))


def test_similarity_on_the_command_line(file, tmp_path, capsys):
    other = tmp_path / "dogs.safetensors"
    save_file(in_a_file(lora_of("lora", seed=50)), other)
    wanted = blockmerge.lora_similarity(file, other, blocks=True)
    said = json.loads(ok(capsys, "lora", "similarity", file, other, "--json"))
    assert said["similarity"] == wanted.similarity
    assert said["parts"] == dict(wanted.parts)
    out = ok(capsys, "lora", "similarity", file, other)
    assert f"{wanted.similarity:.6f}  cats.safetensors and dogs.safetensors" in out
    assert "OUT11" not in out
    assert f"OUT11  {wanted.parts['OUT11']:.6f}" in ok(capsys, "lora", "similarity", file, other, "--blocks")
    assert "-1.000000" in ok(capsys, "lora", "similarity", file, f"{file}:-0.5")


# -- what is no LoRA -----------------------------------------------------------------------------------------


def cut_off(path):
    save_file(in_a_file(lora_of("lora")), path)
    path.write_bytes(path.read_bytes()[:-100])


BAD = {
    "nothing": (lambda path: None, CheckpointError),
    "empty": (lambda path: path.write_bytes(b""), CheckpointError),
    "cut off": (cut_off, CheckpointError),
    "a model": (
        lambda path: save_file({"model.diffusion_model.out.2.weight": torch.ones(4, 320, 3, 3)}, path),
        CheckpointError,
    ),
    "of no family": (
        lambda path: save_file(
            {"lora_x.lora_up.weight": torch.ones(2, 1), "lora_x.lora_down.weight": torch.ones(1, 2)}, path
        ),
        UnknownFamilyError,
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["inspect", "similarity"])
def test_bad_files_are_one_line(case, command, file, tmp_path, capsys):
    make, error = BAD[case]
    bad = tmp_path / "bad.safetensors"
    make(bad)
    with pytest.raises(error):
        blockmerge.inspect_lora(bad)
    for files in ([bad],) if command == "inspect" else ([bad, file], [file, bad]):
        assert run(["lora", command, *map(str, files)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("Error: ")
        assert err.count("\n") == 1
        assert "bad.safetensors" in err


def test_the_threads_change_nothing():
    one, two = in_a_file(lora_of(list(KINDS))), in_a_file(lora_of(list(KINDS), seed=9))
    found = [blockmerge.lora_similarity(one, two, blocks=True, threads=count) for count in (1, 2, 8)]
    assert found[0] == found[1] == found[2]
