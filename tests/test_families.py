"""Families as data: descriptions agree with their layouts, and what names and shapes told before families were
data they tell still.

`anatomy_before/` was written once, by the regular expressions and tables that families were made of: real names
and mutated ones, and U-Nets with something missing or too much.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blockmerge import BlockmergeError
from blockmerge.anatomy import (
    FAMILIES,
    NAMINGS,
    block_of,
    canonical_name,
    component_of,
    identify,
    is_position_ids,
    is_prediction_marker,
    is_schedule,
    origins_in_diffusers,
    relation_of,
)
from blockmerge.anatomy.family import _unlisted_block
from blockmerge.demo import demo_layout

BEFORE = Path(__file__).parent / "anatomy_before"
NAMES = ("sd1", "sd2", "sdxl", "sdxl_refiner")
SIGNS = {
    "ldm": (
        "model.diffusion_model.",
        "label_emb.0.0.weight",
        "input_blocks.1.1.proj_in.weight",
        "input_blocks.0.0.weight",
        "input_blocks.{}.0.x",
        "output_blocks.99.x",
    ),
    "diffusers": (
        "unet/",
        "add_embedding.linear_1.weight",
        "down_blocks.0.attentions.0.proj_in.weight",
        "conv_in.weight",
        "down_blocks.{}.x",
        "up_blocks.99.resnets.0.x",
    ),
}


def block_or_not(name, family):
    try:
        return block_of(name, family)
    except BlockmergeError as error:
        return "!" + str(error).split("would be in ")[1].split(",")[0]


def place(name, family):
    relation = relation_of(name, family)
    if not relation.diffusers:
        return None
    how = [word for word in ("transposed", "squeezed") if getattr(relation, word)]
    return [" ".join(relation.diffusers), *how]


def each(values):
    """One value where all families have the same."""
    return values[0] if all(value == values[0] for value in values) else values


def test_names_tell_what_they_told():
    for line in (BEFORE / "names.jsonl").read_text().splitlines():
        name, canonical, component, flags, blocks, places = json.loads(line)
        assert canonical_name(name) == (name if canonical is None else canonical)
        assert component_of(name) == component, name
        found = {
            "schedule": is_schedule(name),
            "marker": is_prediction_marker(name),
            "position_ids": is_position_ids(name),
        }
        assert [flag for flag, holds in found.items() if holds] == [
            f for f in flags if "leftover" not in f
        ], name
        assert each([block_or_not(name, family) for family in (None, *NAMES)]) == blocks, name
        assert each([place(name, family) for family in NAMES]) == places, name


def mutated(shapes, naming):
    """{what is done: the shapes after it}."""
    prefix, label, projection, first, numbered, too_high = SIGNS[naming]
    without = {
        name: {other: shape for other, shape in shapes.items() if other != prefix + name}
        for name in (label, projection, first)
    }
    found = {"as is": shapes, "no label": without[label], "label": {**shapes, prefix + label: (3, 3)}}
    for axes in ((4, 4), (4, 4, 1, 1), (4,), ()):
        found[f"proj{axes}"] = {**shapes, prefix + projection: axes}
    found["no proj"] = without[projection]
    for channels in (4, 5, 8, 9, 7):
        found[f"ch{channels}"] = {**shapes, prefix + first: (8, channels, 3, 3)}
    found["ch2d"] = {**shapes, prefix + first: (8, 4)}
    for number in (2, 3, 4, 5, 8, 9, 11, 12, 123456789):
        found[f"high{number}"] = {**shapes, prefix + numbered.format(number): (1,)}
    found["no first"] = without[first]
    both = dict.fromkeys(("input_blocks.0.0.weight", "conv_in.weight"), (8, 4, 3, 3))
    found["both"] = {**shapes, **both}
    found["out99"] = {**shapes, prefix + too_high: (1,)}
    return found


def told(shapes):
    try:
        anatomy = identify(shapes)
    except BlockmergeError as error:
        return f"{type(error).__name__}: {error}"
    return f"{anatomy.family.name} {anatomy.variant} {anatomy.naming}"


def test_shapes_tell_what_they_told():
    before = json.loads((BEFORE / "identify.json").read_text())
    found = {
        "empty": told({}),
        "vae": told({"first_stage_model.decoder.conv_in.weight": (1,)}),
        "text": told({"cond_stage_model.transformer.text_model.x": (1,)}),
        "bert": told({"bert.x": (1,)}),
    }
    for family in NAMES:
        shapes = demo_layout(family)
        renamed = {
            name: shapes[origin.rows[0].name][: origin.axes]
            for name, origin in origins_in_diffusers(shapes, family).items()
        }
        for naming, given in (("ldm", shapes), ("diffusers", renamed)):
            found.update({f"{family} {naming} {what}": told(s) for what, s in mutated(given, naming).items()})
    assert found == before


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_a_description_agrees_with_its_layout(family):
    outside = set() if family.arms else {"BASE"}  # the layouts of transformers are of them alone
    assert {listed.block for listed in family.listed.values()} | outside == set(family.blocks)
    assert len(set(family.blocks)) == len(family.blocks)
    prefix = family.unet_prefix("ldm")
    roots = {"ldm": set(), "diffusers": set()}
    for name, listed in family.listed.items():
        assert listed.component == component_of(name)
        assert (listed.block == "BASE") == (listed.component != "unet")
        # The rule for names that are not listed says of those that are what the layout says.
        if family.arms:
            assert _unlisted_block(family, name) == listed.block
        for naming, names in (("ldm", [name]), ("diffusers", family.relation_of(name).diffusers)):
            for one in names:
                assert family.block_of(one) == listed.block
                if listed.component == "unet":
                    short = one.removeprefix(family.unet_prefix(naming))
                    roots[naming].add(short.partition(".")[0])
    for naming in NAMINGS if family.arms else ():
        assert roots[naming] == set(family.roots[naming])
    for beginning in family.attention.layers.values():
        assert all(f"{beginning}{letter}.weight" in family.layout for letter in "qkv")
    assert all(prefix + name in family.layout for name in family.adjusted)
    assert prefix + family.signs["ldm"].first in family.layout


def test_what_is_not_asked_for_is_not_read():
    code = (
        "import sys, blockmerge.anatomy as a\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        "read = [f for f in a.FAMILIES.values() if 'listed' in vars(f)]\n"
        "assert read == []\n"
        "a.block_of('out.2.bias', 'sdxl')\n"
        "assert [f.name for f in a.FAMILIES.values() if 'listed' in vars(f)] == ['sdxl']\n"
        "assert a.FAMILIES['sdxl'].layout is a.FAMILIES['sdxl'].layout\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
