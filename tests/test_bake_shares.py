"""How large what LoRAs change is against the weights, against a float64 oracle: of each and of all, by block."""

from __future__ import annotations

import json
import math
from collections import defaultdict

import pytest
import torch
from safetensors.torch import save_file

import blockmerge
from blockmerge.expressions import Known, LowRank
from tests.commands import ok
from tests.lora_oracle import KINDS, NO_BIAS, baked, written
from tests.small_models import small_model, write_folder
from tests.test_bake import EVERYWHERE, FAMILIES, SDXL, lora_for, model_of

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = [SDXL[name] for name in EVERYWHERE]


@pytest.fixture(scope="module")
def sdxl():
    return model_of("sdxl", SDXL.values())


def squares(model, values, places):
    """{block: Σ(value − model)²} and {block: Σ model²} of the places' own weights and biases that differ."""
    change, weight = defaultdict(float), defaultdict(float)
    for where in places:
        for name in {where.weight, where.bias} - {NO_BIAS}:
            before, after = (where.of(one[name]).double() for one in (model, values))
            if not torch.equal(before, after):
                change[where.block] += float((after - before).square().sum())
                weight[where.block] += float(before.square().sum())
    return change, weight


def assert_shares(result, model, loras):
    places = {where: None for lora, _ in loras for where in lora}
    of_all, weights = squares(model, baked(model, loras)[0], places)
    assert set(result.change) == set(of_all) > set()
    for block, share in result.change.items():
        assert share == pytest.approx(math.sqrt(of_all[block] / weights[block]), rel=1e-4)
    for said, lora in zip(result.loras, loras, strict=True):
        alone, _ = squares(model, baked(model, [lora])[0], places)
        assert set(said["change"]) == set(alone)
        for block, share in said["change"].items():
            assert share == pytest.approx(math.sqrt(alone[block] / weights[block]), rel=1e-4)


def bake(model, loras, path, **options):
    given = [(written(lora), strength) for lora, strength in loras]
    return blockmerge.bake(model, given, output=path / "out.safetensors", overwrite=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_of_every_kind(sdxl, tmp_path, kind):
    loras = [(lora_for(PLACES, sdxl, kind), -0.5)]
    assert_shares(bake(sdxl, loras, tmp_path), sdxl, loras)


def test_of_several_which_may_cancel_out(sdxl, tmp_path):
    """Products together and with other kinds, on the same weights and on others; one of them twice, once
    taken away, leaves nothing of all.
    """
    everywhere = [SDXL[name] for name in SDXL]
    one = lora_for(everywhere[1:], sdxl)
    several = [
        (one, 0.8),
        (lora_for(everywhere[:4], sdxl, "tucker", seed=20), -1),
        (lora_for(everywhere[2:], sdxl, "loha", seed=30), 0.5),
        (lora_for(everywhere, sdxl, "full with a bias", seed=40), 1),
        (lora_for(everywhere, sdxl, "lora with a bias", seed=60), 0.3),
    ]
    for loras in (several, several[:2], several[2:]):
        assert_shares(bake(sdxl, loras, tmp_path), sdxl, loras)
    gone = bake(sdxl, [(one, 0.7), (one, -0.7)], tmp_path)
    for block, share in gone.change.items():
        assert share < 2e-3 * min(said["change"][block] for said in gone.loras)


def test_what_looks_at_changed_weights_has_a_share_and_all_have_none(sdxl, tmp_path):
    loras = [(lora_for(PLACES[:1], sdxl), 0.5), (lora_for(PLACES[:2], sdxl, "dora", seed=5), 0.5)]
    result = bake(sdxl, loras, tmp_path)
    assert [list(said["change"]) for said in result.loras] == [["M00"], ["IN04", "M00"]]
    assert result.change["M00"] is None
    assert result.change["IN04"] == result.loras[1]["change"]["IN04"] > 0


def test_the_same_however_it_is_cut_and_named(sdxl, tmp_path):
    """Files and folders, threads, and output of a merge, whose weight is what the method gives."""
    loras = [
        (lora_for([SDXL[name] for name in SDXL], sdxl), 0.8),
        (lora_for(PLACES, sdxl, "loha", seed=9), -1),
    ]
    save_file(sdxl, tmp_path / "a.safetensors")
    write_folder(tmp_path / "folder", sdxl, "sdxl")
    expected = bake(sdxl, loras, tmp_path)
    for model in ("a.safetensors", "folder"):
        for threads in (1, 3):
            found = bake(tmp_path / model, loras, tmp_path, threads=threads)
            assert found.change == pytest.approx(expected.change, rel=1e-5)
    other = model_of("sdxl", SDXL.values(), seed=3)
    given = [(written(lora), strength) for lora, strength in loras]
    merged = blockmerge.merge(
        sdxl, other, weights=0.25, loras=given, output=tmp_path / "m.safetensors", dtype="fp32"
    )
    both = {name: (0.75 * one.double() + 0.25 * other[name].double()).float() for name, one in sdxl.items()}
    assert_shares(merged, both, loras)


def test_none_before_it_is_done_and_of_weights_that_are_nothing(sdxl, tmp_path, capsys):
    loras = [(lora_for(PLACES, sdxl), 1)]
    save_file({name: one.clone() for name, one in written(loras[0][0]).items()}, tmp_path / "l.safetensors")
    save_file(sdxl, tmp_path / "a.safetensors")
    command = [
        "bake",
        tmp_path / "a.safetensors",
        tmp_path / "l.safetensors",
        "-o",
        tmp_path / "o.safetensors",
    ]
    said = json.loads(ok(capsys, *command, "--dry-run", "--json"))
    assert said["change"] == said["loras"][0]["change"] == {}
    shown = ok(capsys, *command)
    share = bake(sdxl, loras, tmp_path).change["M00"]
    assert f"M00 {share:.1%}" in " ".join(shown.split())
    empty = {name: one * 0 if name == PLACES[0].weight else one for name, one in sdxl.items()}
    result = bake(empty, [(lora_for(PLACES[:1], sdxl), 1)], tmp_path)
    assert result.change == {"M00": None}


@pytest.mark.parametrize("channels", [(9, 4), (4, 9)])
def test_different_input_channels_of_one_convolution_are_not_known(tmp_path, channels):
    where = FAMILIES["sd1"][-1]
    model = small_model("sd1")
    usual = lora_for([where], model)
    model[where.weight] = torch.randn(8, 9, 3, 3, generator=torch.Generator().manual_seed(0)).half()
    own = lora_for([where], model, seed=5)
    loras = [({4: usual, 9: own}[count], 0.5) for count in channels]
    result = bake(model, loras, tmp_path)
    assert result.change == {"IN00": None}
    assert [said["change"] for said in result.loras] == [{"IN00": None}, {"IN00": None}]


def test_what_is_not_finite_is_not_known(sdxl, tmp_path):
    lora = lora_for(PLACES[:1], sdxl)
    parts = lora[PLACES[0]]
    parts["lora_up.weight"] = parts["lora_up.weight"] * math.nan
    result = bake(sdxl, [(lora, 1)], tmp_path, allow_nonfinite=True)
    assert result.change == {"M00": None}


def test_a_part_of_a_product_is_as_large_as_its_rows():
    """Whose rows lie within tiles."""
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(600, 4, generator=generator), torch.randn(4, 1024, generator=generator)
    factors = [Known(one.numpy().tobytes(), "F32", tuple(one.shape)) for one in (up, down)]
    whole = LowRank((600, 1024), "F32", ups=(factors[0],), downs=(factors[1],), scales=(0.5,))
    for start, stop in ((0, 600), (0, 200), (200, 400), (170, 555)):
        part = whole.part(start, stop)
        given = []
        for place, factor in enumerate((up, down)):
            begin, shape = part.read(place, 0, part.elements)
            given.append(factor.view(-1)[begin : begin + math.prod(shape)].view(shape))
        wanted = (0.5 * up[start:stop].double() @ down.double()).square().sum()
        assert part.squares(given).item() == pytest.approx(wanted.item(), rel=1e-5)
