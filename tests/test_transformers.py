"""Transformers: what a file is, and which block each tensor is in, under every prefix, in both namings, thin and
at full size.
"""

from __future__ import annotations

import random
from collections import Counter
from math import prod

import pytest
from safetensors.torch import save_file

import blockmerge
from blockmerge import IncompatibleModelsError, UnknownFamilyError
from blockmerge.anatomy import FAMILIES, canonical_names, core_of, identify
from blockmerge.checkpoints import Model, open_checkpoint
from blockmerge.demo import demo_layout, make_state_dicts
from tests.effort import some
from tests.published import KNOWN, layouts, thin, write_sparse

PREFIXES = (
    "",
    "model.diffusion_model.",
    "net.",
    "model.",
    "transformer.",
    "model.model.",
    "diffusion_model.",
)
NAMED = [name for name in layouts() if name.removesuffix(".diffusers") in KNOWN]


def model_of(path, shapes):
    return Model.of(open_checkpoint(write_sparse(path, shapes)))


def sizes_of(model):
    """{block: (tensors, parameters)}, of original tensors."""
    tensors, parameters = Counter(), Counter()
    for name, one in model.tensors.items():
        block = model.anatomy.family.block_of(name)
        tensors[block] += 1
        parameters[block] += one.elements
    return {block: (tensors[block], parameters[block]) for block in tensors}


@pytest.mark.parametrize("layout", NAMED)
@pytest.mark.parametrize("narrow", [False, True], ids=["full size", "thin"])
def test_every_layout_is_recognised_under_every_prefix(tmp_path, layout, narrow):
    name = layout.removesuffix(".diffusers")
    family, variant, blocks = KNOWN[name]
    shapes = thin(layouts()[layout]) if narrow else layouts()[layout]
    prefixes = some(PREFIXES, of=3, chosen_by=layout) if narrow else PREFIXES[:2]
    for prefix in prefixes:  # widths tell nothing of prefixes
        model = model_of(tmp_path / "x.safetensors", {prefix + one: shape for one, shape in shapes.items()})
        anatomy = model.anatomy
        assert (anatomy.family.name, anatomy.variant) == (family, variant)
        assert anatomy.naming == ("ldm" if layout == name else "diffusers")
        assert len(anatomy.family.blocks) == blocks
        assert not anatomy.standing.missing
        # Each is in a block of its own, and every block has some.
        assert set(sizes_of(model)) == {*anatomy.family.blocks} - {"BASE"}
        assert model.prefix == prefix
    if not narrow:
        assert sum(parameters for _, parameters in sizes_of(model).values()) == sum(
            map(prod, shapes.values())
        )


@pytest.mark.parametrize("name", [name for name in KNOWN if f"{name}.diffusers" in layouts()])
def test_blocks_are_the_same_in_both_namings(tmp_path, name):
    original, renamed = (
        write_sparse(tmp_path / f"{number}.safetensors", layouts()[layout])
        for number, layout in enumerate((name, f"{name}.diffusers"))
    )
    blocks = [
        {block: (part.tensors, part.parameters) for block, part in blockmerge.inspect(path).blocks.items()}
        for path in (original, renamed)
    ]
    if name == "lumina2":  # the one tensor that folders do not have
        tensors, parameters = blocks[0]["OUT"]
        blocks[0]["OUT"] = (tensors - 1, parameters - 2304)
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("layout", KNOWN)
def test_the_families_templates_are_the_published_layouts(layout):
    family, variant, _ = KNOWN[layout]
    shapes = layouts()[layout]
    core = core_of(shapes)
    listed = {core.family.short(name): shape for name, shape in core.family.layout.items()}
    more = {name for name in shapes if name not in listed}
    assert listed == {name: shape for name, shape in shapes.items() if name not in more}
    assert more == ({name for name in shapes if "guidance_in" in name or name == "norm_final.weight"})
    assert core.family.name == family
    assert all(core.family.knows("model.diffusion_model." + name) for name in more)


def test_blocks_are_counted_in_the_file(tmp_path):
    """As in a Flux of which layers were cut out."""
    shapes = thin(layouts()["flux1_schnell"])
    lite = {
        name: shape
        for name, shape in shapes.items()
        if not any(name.startswith(f"double_blocks.{n}.") for n in range(8, 19))
    }
    model = model_of(tmp_path / "lite.safetensors", lite)
    assert model.anatomy.family.blocks[2:11] == (*(f"D{n:02}" for n in range(8)), "S00")
    assert not model.anatomy.standing.missing
    whole = write_sparse(tmp_path / "whole.safetensors", shapes)
    with pytest.raises(
        IncompatibleModelsError,
        match=r"lite.safetensors is Flux.1 with 8 double_blocks and 38 single_blocks and whole.safetensors is "
        r"Flux.1 with 19 double_blocks and 38 single_blocks: only models of as many blocks can be merged",
    ):
        blockmerge.merge(tmp_path / "lite.safetensors", whole, weights=0.5, output=tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


REFUSED_PAIRS = {
    ("flux1_dev", "chroma"): "is Flux.1 and b.safetensors is Chroma",
    (
        "sd3_medium",
        "sd35_medium",
    ): "is Stable Diffusion 3 medium and b.safetensors is Stable Diffusion 3.5 medium",
    (
        "sd35_large",
        "sd35_medium",
    ): "is Stable Diffusion 3.5 large and b.safetensors is Stable Diffusion 3.5 medium",
    ("z_image", "lumina2"): "is Z-Image and b.safetensors is Lumina 2",
    ("anima", "cosmos_predict2_2b"): "is Anima and b.safetensors is Cosmos-Predict2",
    (
        "flux1_schnell",
        "flux1_dev",
    ): r"has 4 transformer tensors that a.safetensors lacks \(.*guidance_in.*\), "
    r"since it is dev .*: give it as the first model",
}


@pytest.mark.parametrize("pair", REFUSED_PAIRS, ids=" × ".join)
def test_what_does_not_merge_is_refused_in_one_line(tmp_path, pair):
    a, b = (
        write_sparse(tmp_path / f"{letter}.safetensors", thin(layouts()[name]))
        for letter, name in zip("ab", pair, strict=True)
    )
    with pytest.raises(IncompatibleModelsError, match=REFUSED_PAIRS[pair]) as caught:
        blockmerge.merge(a, b, weights=0.5, output=tmp_path / "o.safetensors")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize("layout", NAMED)
def test_a_part_of_a_known_model_is_never_anything_else(layout):
    """With tensors taken away at random it is a damaged model of its family, or refused; never one of unknown
    kind. Whole ranges are taken, too, as of one shard of several.
    """
    chance = random.Random(layout)
    names = list(layouts()[layout])
    for share in (0.999, 0.95, 0.7, 0.4, 0.1, 0.02):
        kept = [name for name in names if chance.random() < share]
        start = chance.randrange(len(names))
        for part in (kept, names[start : start + int(len(names) * share)]):
            if len(part) < 2:
                continue
            prefix = chance.choice(PREFIXES)
            shapes = {prefix + name: layouts()[layout][name] for name in part}
            from blockmerge.anatomy import any_core_of

            if core_of(shapes) is None:
                assert any_core_of(shapes) is None, (share, prefix, part[:5])
                with pytest.raises(UnknownFamilyError):
                    identify(shapes)


def test_a_missing_part_is_named(tmp_path):
    shapes = thin(layouts()["flux1_dev"])
    gone = {name: shape for name, shape in shapes.items() if name != "double_blocks.3.img_mod.lin.weight"}
    a = write_sparse(tmp_path / "a.safetensors", shapes)
    b = write_sparse(tmp_path / "b.safetensors", gone)
    with pytest.raises(
        IncompatibleModelsError,
        match=r"b.safetensors is not a whole Flux.1 transformer: it lacks 1 tensor \(.*double_blocks.3",
    ):
        blockmerge.merge(a, b, weights=0.5, output=tmp_path / "o.safetensors")
    assert "missing_tensors" in {problem.code for problem in blockmerge.check(b).problems}
    without = {name: shape for name, shape in shapes.items() if name != "img_in.weight"}
    write_sparse(b, without)
    with pytest.raises(
        UnknownFamilyError, match=r"b.safetensors holds no whole Flux.1 transformer: it lacks 1 tensor"
    ):
        blockmerge.merge(a, b, weights=0.5, output=tmp_path / "o.safetensors")


def test_original_names_are_kept_as_the_first_model_has_them(tmp_path):
    a, b = make_state_dicts("cosmos_predict2")
    short = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in a.items()}
    save_file({f"net.{name}": tensor for name, tensor in short.items()}, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    output = tmp_path / "o.safetensors"
    blockmerge.merge(tmp_path / "a.safetensors", tmp_path / "b.safetensors", weights=0.5, output=output)
    assert set(open_checkpoint(output).tensors) == {f"net.{name}" for name in short}


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].lists])
def test_thin_models_are_whole(family):
    shapes = demo_layout(family)
    found = identify(shapes)
    assert found.family.name == family
    assert not found.standing.missing
    assert sum(map(prod, shapes.values())) < 4e6
    assert canonical_names(shapes, core_of(shapes)) == {name: name for name in shapes}
