"""LoRAs merged and resized: held against sums and singular values in float64."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import Lora, merge_loras, resize_lora
from blockmerge.anatomy import FAMILIES as BLOCKS
from blockmerge.demo import make_state_dicts
from tests import lora_oracle
from tests.lora_oracle import Factors
from tests.thin_loras import (
    assert_near,
    change,
    changes,
    make_lora,
    metadata_of,
    own_shapes,
    parts_in,
    ranks_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("sd1", "sd2", "sdxl")
LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0"
CONV = "lora_unet_mid_block_resnets_0_conv1"
POINT = "lora_unet_mid_block_attentions_0_proj_in"
FIRST = "lora_unet_conv_in"
NORM = "lora_unet_mid_block_resnets_0_norm1"


def added(family, *scaled):
    """What LoRAs do together: {module: Σ strength × weight of its block × its change}."""
    blocks = {name: block for name, (block, _) in own_shapes(family).items()}
    total = {}
    for path, strength, weights in scaled:
        for name, one in changes(path).items():
            by = strength * (weights.get(blocks[name], 0.0) if weights is not None else 1.0)
            if by:
                total[name] = total.get(name, 0) + by * one
    return total


def of_one(tmp_path, name="a", **parts):
    """A file of one module or a few: {module: parts}."""
    path = tmp_path / f"{name}.safetensors"
    save_file({f"{module}.{part}": t for module, held in parts.items() for part, t in held.items()}, path)
    return path


# -- exactly -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_factors_do_what_all_do_together(family, tmp_path):
    a = make_lora(tmp_path / "a.safetensors", family, rank=4, alpha=2, seed=1)
    b = make_lora(
        tmp_path / "b.safetensors", family, rank=3, seed=2, only=lambda name: "attn" in name or "_te" in name
    )
    c = make_lora(tmp_path / "c.safetensors", family, rank=2, alpha=3, seed=3, dtype=torch.float32)
    weights = {"BASE": 1.0, "M00": 0.5, "OUT03": -2.0}
    loras = [(a, 0.7), Lora(b, -0.4, "BASE=1,M00=0.5,OUT03=-2"), (c, 1)]
    result = merge_loras(loras, output=tmp_path / "out.safetensors")
    assert_near(changes(result.output), added(family, (a, 0.7, None), (b, -0.4, weights), (c, 1, None)), 1e-6)
    blocks = {name: block for name, (block, _) in own_shapes(family).items()}
    ranks = [ranks_of(path) for path in (a, b, c)]
    like = parts_in(c)
    for name, parts in parts_in(result.output).items():
        rank = sum(
            held.get(name, 0) for held in (ranks[0], ranks[1] if blocks[name] in weights else {}, ranks[2])
        )
        assert parts["alpha"].shape == ()
        assert parts["alpha"].item() == rank == len(parts["lora_down.weight"])
        assert {tensor.dtype for tensor in parts.values()} == {torch.float32}  # the widest
        for part in ("lora_up.weight", "lora_down.weight"):
            assert parts[part].dim() == like[name][part].dim()
    assert (result.modules, result.rank) == (len(ranks[0]), max(ranks_of(result.output).values()))
    assert set(result.lost.values()) == {0.0}
    assert result.family == family
    assert result.to_dict().keys() >= {"output", "family", "kind", "rank", "modules", "lost", "notes"}
    assert "held" not in result.to_dict()


@pytest.mark.parametrize(("dtype", "allowed"), [("fp32", 1e-6), ("fp16", 1e-3), ("bf16", 6e-3)])
def test_baking_the_merged_is_baking_both(dtype, allowed, tmp_path):
    model = make_state_dicts("sd1")[0]
    loras = [
        (make_lora(tmp_path / f"{seed}.safetensors", "sd1", rank=seed, alpha=1.7, seed=seed), strength)
        for seed, strength in ((2, 0.7), (3, -0.4))
    ]
    merge_loras(loras, output=tmp_path / "ab.safetensors", dtype=dtype)
    baked = []
    for number, given in enumerate((loras, [tmp_path / "ab.safetensors"])):
        out = tmp_path / f"baked{number}.safetensors"
        blockmerge.bake(model, given, output=out, dtype="fp32")
        baked.append(load_file(out))
    changed = 0
    for name, both in baked[0].items():
        size = (both.double() - model[name].double()).norm()
        changed += bool(size)
        error = (baked[1][name].double() - both.double()).norm()
        assert error <= allowed * size + 2.0**-23 * both.double().norm(), name
    assert changed == len(own_shapes("sd1"))


def test_factors_of_unlike_sizes_keep_their_digits_in_half_precision(tmp_path):
    factors = Factors((8, 6), dtype=torch.float32)
    parts = {"lora_up.weight": factors.new(8, 3) * 1e-6, "lora_down.weight": factors.new(3, 6) * 100}
    path = of_one(tmp_path, **{LINEAR: parts})
    result = merge_loras([(path, 0.3)], output=tmp_path / "out.safetensors", dtype="fp16")
    assert_near(changes(result.output), {LINEAR: 0.3 * change(parts)}, 1e-3)


def test_at_strength_1_nothing_is_rounded(tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1", rank=4)
    result = merge_loras([a], output=tmp_path / "out.safetensors")
    found = load_file(result.output)
    for name, tensor in load_file(a).items():
        assert torch.equal(found[name], tensor), name


def test_a_rank_that_alpha_cannot_say_counts_all_the_same(tmp_path):
    factors = Factors((8, 6), dtype=torch.float32)
    parts = factors.lora(301)  # no number of bf16, which has 300 and 302
    path = of_one(tmp_path, **{LINEAR: parts})
    result = merge_loras([path], output=tmp_path / "out.safetensors", dtype="bf16")
    found = parts_in(result.output)[LINEAR]
    assert found["alpha"].item() != 301 == len(found["lora_down.weight"])
    assert_near({LINEAR: change(found)}, {LINEAR: change(parts)}, 5e-3)


@pytest.mark.parametrize("size", [{"rank": 2}, {"energy": 0.9}], ids=str)
def test_what_cancels_out_is_nothing(size, tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1")
    with pytest.raises(blockmerge.RecipeError, match="what is to go into it adds up to 0"):
        merge_loras([a, (a, -1)], output=tmp_path / "out.safetensors", **size)


@pytest.mark.parametrize("strength", [1e160, 1e300])
@pytest.mark.parametrize("size", [{}, {"rank": 2}], ids=str)
def test_strengths_too_large_for_any_dtype(size, strength, tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1")
    with pytest.raises(blockmerge.NonFiniteError, match=r"too large for F32: give smaller strengths"):
        merge_loras([(a, strength)], output=tmp_path / "out.safetensors", dtype="fp32", **size)


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("fp16", 1e-4, 5e-4), ("bf16", 1e-3, 4e-3), ("fp32", 0, 0)]
)
def test_what_rounding_takes_is_told(dtype, least, most, tmp_path):
    """As large as it is: against the products before and after."""
    a = make_lora(tmp_path / "a.safetensors", "sd1", dtype=torch.float32)
    b = make_lora(tmp_path / "b.safetensors", "sd1", dtype=torch.float32, seed=1)
    for size in ({}, {"rank": 8}):
        result = merge_loras([(a, 0.7), b], output=tmp_path / f"{len(size)}.safetensors", dtype=dtype, **size)
        told = [
            float(found[1]) / 100
            for note in result.notes
            if (found := re.search(r"rounding to .* (\S+) %", note))
        ]
        if not most:
            assert told == []
            continue
        whole, rounded = changes(a), changes(result.output)
        other = changes(b)
        wanted = {name: 0.7 * one + other[name] for name, one in whole.items()}
        errors = [float((rounded[name] - one).norm() / one.norm()) for name, one in wanted.items()]
        [share] = told
        assert least < share < most
        assert share == pytest.approx(max(errors), rel=0.6)


def test_a_strength_and_blocks_are_in_a_resized_lora_and_told(tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1", dtype=torch.float32)
    out = tmp_path / "out.safetensors"
    result = resize_lora((a, 0.5, "BASE=1,M00=2"), output=out, rank=4)
    assert result.notes[0] == (
        "a.safetensors is taken at strength 0.5, times its block weights: at strength 1 the new LoRA does what "
        "that does"
    )
    scales = {name: {"BASE": 0.5, "M00": 1.0}.get(block) for name, (block, _) in own_shapes("sd1").items()}
    whole = changes(a)
    assert_near(changes(out), {name: scale * whole[name] for name, scale in scales.items() if scale}, 1e-5)
    plain = resize_lora(a, output=tmp_path / "plain.safetensors", rank=4)
    assert not any("at strength" in note for note in plain.notes)


def test_many_at_once(tmp_path):
    loras = [
        (make_lora(tmp_path / f"{n}.safetensors", "sd1", rank=1, seed=n, only=lambda one: "mid" in one), 0.1)
        for n in range(40)
    ]
    result = merge_loras(loras, output=tmp_path / "out.safetensors", dtype="fp32")
    assert set(ranks_of(result.output).values()) == {40}
    assert_near(changes(result.output), added("sd1", *((path, by, None) for path, by in loras)), 1e-6)


# -- kinds ---------------------------------------------------------------------------------------------------

SHAPES = {LINEAR: (8, 6), POINT: (8, 6, 1, 1), CONV: (8, 6, 3, 3)}
PLAIN = ("lora", "flat lora", "tucker")
LOOKING = ("dora", "glora", "ia3", "oft", "boft")
KINDS = {kind: make for kind, make in lora_oracle.KINDS.items() if not kind.startswith(LOOKING)}
WHOLE = [kind for kind in KINDS if kind.endswith("whole") or kind == "full"]


EVERY = [
    (kind, module)
    for kind in KINDS
    for module in SHAPES
    if "bias" not in kind
    and (module == CONV or "tucker" not in kind)
    and (module != CONV or kind != "flat lora")
]


@pytest.mark.parametrize(("kind", "module"), EVERY)
def test_kinds_become_lora(kind, module, tmp_path):
    shape = SHAPES[module]
    parts = KINDS[kind](Factors(shape, dtype=torch.float32))
    parts |= {} if kind == "full" else {"alpha": torch.tensor(2.0)}
    plain = Factors(shape, seed=1, dtype=torch.float32).lora()
    a, b = of_one(tmp_path, **{module: parts}), of_one(tmp_path, "b", **{module: plain})
    result = merge_loras([(a, -0.5), (b, 2)], output=tmp_path / "out.safetensors")
    wanted = -0.5 * lora_oracle.added(parts, shape) + 2 * lora_oracle.added(plain, shape)
    assert_near(changes(result.output), {module: wanted.flatten(1)}, 2e-6)
    assert result.kind == ("locon" if module == CONV else "lora")
    assert any("decomposed by their singular values" in note for note in result.notes) == (kind in WHOLE)
    assert any("become LoRA" in note for note in result.notes) == kind.startswith(("loha", "lokr"))
    if kind in PLAIN:
        assert result.rank == 6


def test_norms_and_biases_are_added_up(tmp_path):
    a = of_one(
        tmp_path,
        **{
            NORM: {"w_norm": torch.arange(8.0), "b_norm": torch.ones(8)},
            LINEAR: {**Factors((8, 6), dtype=torch.float32).lora(), "diff_b": torch.arange(8.0)},
        },
    )
    b = of_one(tmp_path, "b", **{NORM: {"w_norm": torch.ones(8)}, LINEAR: {"diff_b": torch.ones(8)}})
    result = merge_loras([(a, 0.5), (b, -1)], output=tmp_path / "out.safetensors")
    found = parts_in(result.output)
    assert torch.equal(found[NORM]["w_norm"], torch.arange(8.0) / 2 - 1)
    assert torch.equal(found[NORM]["b_norm"], torch.ones(8) / 2)
    assert torch.equal(found[LINEAR]["diff_b"], torch.arange(8.0) / 2 - 1)
    assert result.modules == 2
    assert any("norms and biases" in note for note in result.notes)
    again = merge_loras([result.output], output=tmp_path / "again.safetensors")
    assert torch.equal(parts_in(again.output)[NORM]["w_norm"], found[NORM]["w_norm"])


def test_peft_biases_take_the_factor_of_their_module(tmp_path):
    parts = {**Factors((8, 6), dtype=torch.float32).biased_lora(), "alpha": torch.tensor(1.5)}
    result = merge_loras([of_one(tmp_path, **{LINEAR: parts})], output=tmp_path / "out.safetensors")
    assert torch.allclose(parts_in(result.output)[LINEAR]["diff_b"], 0.5 * parts["lora_B.bias"])


def test_a_first_layer_of_more_channels_takes_in_others(tmp_path):
    narrow, wide = (Factors((8, inputs, 3, 3), dtype=torch.float32).lora() for inputs in (4, 9))
    a, b = of_one(tmp_path, **{FIRST: narrow}), of_one(tmp_path, "b", **{FIRST: wide})
    result = merge_loras([a, b], output=tmp_path / "out.safetensors")
    wanted = change(wide).view(8, 9, 3, 3)
    wanted[:, :4] += change(narrow).view(8, 4, 3, 3)
    assert_near(changes(result.output), {FIRST: wanted.flatten(1)}, 1e-6)


@pytest.mark.parametrize("kind", ["dora", "glora", "ia3", "oft", "boft"])
def test_kinds_that_look_at_weights_are_refused_with_what_to_do(kind, tmp_path):
    factors = Factors((8, 6), dtype=torch.float32)
    parts = {
        "dora": {**factors.lora(), "dora_scale": factors.new(8, 1)},
        "glora": {f"{part}.weight": factors.new(*shape) for part, shape in
                  (("a1", (6, 2)), ("a2", (2, 6)), ("b1", (8, 2)), ("b2", (2, 6)))},
        "ia3": {"weight": factors.new(8, 1), "on_input": torch.tensor(False)},
        "oft": {"oft_blocks": factors.new(4, 2, 2)},
        "boft": {"oft_blocks": factors.new(2, 4, 2, 2)},
    }[kind]  # fmt: skip
    path = of_one(tmp_path, **{LINEAR: parts})
    for make in (merge_loras, resize_lora):
        given = path if make is resize_lora else [path]
        with pytest.raises(blockmerge.CheckpointError) as caught:
            make(given, output=tmp_path / "out.safetensors", rank=2)
        assert f"of the kind {kind}" in str(caught.value)
        assert "blockmerge bake" in str(caught.value)
        assert "blockmerge lora extract" in str(caught.value)
    assert [one.name for one in tmp_path.iterdir()] == ["a.safetensors"]


# -- to a size -----------------------------------------------------------------------------------------------


def best(matrix, rank):
    """The error of the best approximation of a rank, and how much there is, both squared."""
    squares = torch.linalg.svdvals(matrix).square()
    return squares[rank:].sum(), squares.sum()


@pytest.mark.parametrize(("family", "rank"), [("sd1", 1), ("sd1", 100), ("sd2", 3), ("sdxl", 3)])
def test_a_rank_is_the_best_approximation_there_is(family, rank, tmp_path):
    """All modules of SD1; of the others, whose are no different, those of some blocks."""
    some = None if family == "sd1" else re.compile(r"_te|mid_block|down_blocks_1|up_blocks_1").search
    a = make_lora(tmp_path / "a.safetensors", family, rank=4, alpha=2, seed=1, dtype=torch.float32, only=some)
    b = make_lora(tmp_path / "b.safetensors", family, rank=3, seed=2, only=some)
    result = merge_loras([(a, 0.7), (b, -0.4)], output=tmp_path / "out.safetensors", rank=rank)
    wanted = added(family, (a, 0.7, None), (b, -0.4, None))
    blocks = {name: block for name, (block, _) in own_shapes(family).items()}
    lost = {}
    for name, found in changes(result.output).items():
        left, size = best(wanted[name], rank)
        error = (found - wanted[name]).square().sum()
        assert error.sqrt() <= left.sqrt() * (1 + 1e-6) + 1e-6 * size.sqrt(), name
        block = lost.setdefault(blocks[name], [0.0, 0.0])
        block[0] += float(left)
        block[1] += float(size)
    assert result.lost == pytest.approx({one: part / all for one, (part, all) in lost.items()}, abs=1e-6)
    assert [*result.lost] == [block for block in BLOCKS[family].blocks if block in lost]
    held = ranks_of(a), ranks_of(b)
    most = max(sum(ranks[name] for ranks in held) for name in wanted)
    assert max(ranks_of(result.output).values()) == min(rank, most) == result.rank


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1])
def test_a_share_of_the_energy_is_met_by_the_least_rank(energy, tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1", rank=6, seed=1, dtype=torch.float32)
    b = make_lora(tmp_path / "b.safetensors", "sd1", rank=2, seed=2)
    result = merge_loras([(a, 1), (b, 0.1)], output=tmp_path / "out.safetensors", energy=energy)
    wanted = added("sd1", (a, 1, None), (b, 0.1, None))
    ranks = ranks_of(result.output)
    for name, found in changes(result.output).items():
        size = wanted[name].square().sum()
        assert (found - wanted[name]).square().sum() <= (1 - energy + 1e-9) * size, name
        if ranks[name] > 1:
            left, _ = best(wanted[name], ranks[name] - 1)
            assert left > (1 - energy) * size, name
    assert max(result.lost.values()) <= 1 - energy + 1e-12
    assert result.ranks == {rank: [*ranks.values()].count(rank) for rank in sorted({*ranks.values()})}


@pytest.mark.parametrize("size", [{"rank": 40}, {"energy": 0.6}], ids=str)
def test_ranks_beyond_what_a_weight_can_have(size, tmp_path):
    """What is added up is then smaller than its factors."""
    shape = 300, 280
    each = [Factors(shape, seed=seed, dtype=torch.float32).lora(90) for seed in range(4)]
    loras = [
        (of_one(tmp_path, f"{number}", **{LINEAR: parts}), 0.5**number) for number, parts in enumerate(each)
    ]
    result = merge_loras(loras, output=tmp_path / "out.safetensors", **size)
    wanted = sum(0.5**number * change(parts) for number, parts in enumerate(each))
    (found,) = changes(result.output).values()
    left, whole = best(wanted, result.rank)
    assert (found - wanted).norm() <= 1.01 * left.sqrt()
    if "energy" in size:
        assert left <= 0.4 * whole < best(wanted, result.rank - 1)[0]


def test_signs_are_fixed(tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1", rank=5)
    result = resize_lora(a, output=tmp_path / "out.safetensors", rank=2)
    for parts in parts_in(result.output).values():
        up = parts["lora_up.weight"].flatten(1)
        assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()


def test_what_training_said_stays_when_a_lora_is_resized(tmp_path):
    said = {
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "ss_network_module": "lycoris.kohya",
        "ss_tag_frequency": '{"1_cat": {"cat": 3}}',
        "ss_base_model_version": "sd_v1",
        "ss_dataset_dirs": '{"/home/me/cats": 1}',
        "modelspec.title": "Cats",
        "modelspec.author": "me",
        "modelspec.hash_sha256": "0x12",
        "sshs_model_hash": "12",
        "lora_adapter_metadata": '{"lora_alpha": 1}',
    }
    a = make_lora(tmp_path / "a.safetensors", "sd1", alpha=4, metadata=said)
    found = metadata_of(resize_lora(a, output=tmp_path / "out.safetensors", rank=2).output)
    for key in ("ss_tag_frequency", "ss_base_model_version", "modelspec.title", "modelspec.author"):
        assert found[key] == said[key]
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "2.0")
    assert found["ss_network_module"] == "networks.lora"
    assert not {"ss_dataset_dirs", "modelspec.hash_sha256", "lora_adapter_metadata"} & found.keys()
    assert len(found["sshs_model_hash"]) == 64


# -- what does not change the result -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [{}, {"rank": 2}, {"energy": 0.9}], ids=str)
def test_the_same_bits_for_any_threads(size, tmp_path):
    loras = [make_lora(tmp_path / f"{seed}.safetensors", "sd1", rank=3, seed=seed) for seed in (1, 2)]
    files = set()
    for threads in (1, 2, 8):
        out = tmp_path / f"out{threads}.safetensors"
        merge_loras([(loras[0], 0.7), loras[1]], output=out, threads=threads, **size)
        files.add(out.read_bytes())
    assert len(files) == 1


def test_torch_has_its_threads_back(tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1")
    torch.set_num_threads(3)
    merge_loras([a], output=tmp_path / "out.safetensors", threads=1)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)


def test_state_dicts_and_other_spellings(tmp_path):
    a = make_lora(tmp_path / "a.safetensors", "sd1")
    there = load_file(a)
    peft = {}
    for name, tensor in there.items():
        module, _, part = name.partition(".")
        if "mid_block" in module and "attn1_to_q" in module:
            dotted = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
            peft[f"{dotted}.{part.replace('lora_down', 'lora_A').replace('lora_up', 'lora_B')}"] = tensor
    result = merge_loras([peft], output=tmp_path / "out.safetensors")
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    assert [*parts_in(result.output)] == [name]
    assert torch.equal(change(parts_in(result.output)[name]), changes(a)[name])


def test_the_family_that_all_fit(tmp_path):
    """A LoRA that fits two families is taken for its fellows'."""
    either = of_one(tmp_path, "either", **{CONV: {**Factors((1280, 1280, 3, 3)).lora(1)}})
    sd2 = of_one(tmp_path, "sd2", **{
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": Factors((1280, 1024)).lora(1)
    })  # fmt: skip
    for loras in ([either, sd2], [sd2, either]):
        result = merge_loras(loras, output=tmp_path / "out.safetensors", overwrite=True)
        assert result.family == "sd2"
        assert result.ranks == {1: 2}
