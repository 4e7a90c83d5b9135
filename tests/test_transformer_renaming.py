"""Transformers, original ↔ diffusers names: against diffusers' own converters, on every name of the published
models. Rows are what is renamed, so that tensors have one column and the published number of rows.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.loaders import single_file_utils as diffusers

from blockmerge.anatomy import FAMILIES
from blockmerge.checkpoints import made
from blockmerge.expressions import Stored
from blockmerge.merging.in_memory import tensor_of
from tests.other_names import Held
from tests.thin_transformers import read_table, to_original

PREFIX = "model.diffusion_model."
MODELS = {
    "flux1": ("flux1", "", diffusers.convert_flux_transformer_checkpoint_to_diffusers, "flux1_dev"),
    "chroma": ("chroma", "", diffusers.convert_chroma_transformer_checkpoint_to_diffusers, "chroma"),
    "sd3 medium": ("sd3", "medium", diffusers.convert_sd3_transformer_checkpoint_to_diffusers, "sd3_medium"),
    "sd3.5 medium": (
        "sd3", "3.5-medium", diffusers.convert_sd3_transformer_checkpoint_to_diffusers, "sd35_medium",
    ),
    "sd3.5 large": (
        "sd3", "3.5-large", diffusers.convert_sd3_transformer_checkpoint_to_diffusers, "sd35_large",
    ),
    "z_image": ("z_image", "", diffusers.convert_z_image_transformer_checkpoint_to_diffusers, "z_image"),
    "lumina2": ("lumina2", "", diffusers.convert_lumina2_to_diffusers, "lumina2"),
    "cosmos_predict2": (
        "cosmos_predict2", "", diffusers.convert_cosmos_transformer_checkpoint_to_diffusers, "cosmos_predict2_2b",
    ),
    "anima": (
        "anima", "", diffusers.convert_cosmos_transformer_checkpoint_to_diffusers, "cosmos_predict2_2b",
    ),
}  # fmt: skip
DROPPED = {"norm_final.weight"}


def of_size(family, version):
    counts = {"3.5-large": (38,)}.get(version, FAMILIES[family].counts)
    return FAMILIES[family].sized(counts, version)


def addresses(family):
    """Every tensor of the family's layout, and what not all have, with a number of its own in every row."""
    found, start = {}, 0
    beside = dict.fromkeys(family.beside_layout, (3072, 1))
    for name, shape in (family.layout | beside).items():
        rows = shape[0] if shape else 1
        # The patches of SD3 are what tells its converter the width; most have two axes or one.
        found[name] = torch.arange(start, start + rows, dtype=torch.int32).reshape(
            rows, *(1 for _ in shape[1:])
        )
        start += rows
    return found


def renamed(tensors, family, naming, wanted):
    source = Held(tensors)
    stored = {name: Stored.of(source, name) for name in tensors}
    origins = family.origins(tensors, naming, wanted)
    return {name: tensor_of(made(origin, stored, "it")).clone() for name, origin in origins.items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.flatten(), theirs[name].flatten()), name


@pytest.mark.parametrize("model", MODELS)
def test_renamed_as_diffusers_own_converter_does_it_and_back(model):
    name, version, converter, _ = MODELS[model]
    family = of_size(name, version)
    tensors = addresses(family)
    ours = renamed(tensors, family, "ldm", "diffusers")
    bare = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    adapter = {name: bare.pop(name) for name in [*bare] if name.startswith("llm_adapter.")}
    theirs = {f"transformer/{name}": tensor for name, tensor in converter(dict(bare)).items()}
    # diffusers' AnimaTextConditioner has the adapter's own names.
    theirs |= {name.replace("llm_adapter.", "text_conditioner/"): tensor for name, tensor in adapter.items()}
    assert_equal(ours, theirs)
    back = renamed(ours, family, "diffusers", "ldm")
    assert_equal(
        back, {name: one for name, one in tensors.items() if name.removeprefix(PREFIX) not in DROPPED}
    )


@pytest.mark.parametrize("model", MODELS)
def test_the_tables_that_other_tests_read_say_the_same(model):
    name, version, _, table = MODELS[model]
    family = of_size(name, version)
    tensors = addresses(family)
    ours = renamed(tensors, family, "ldm", "diffusers")
    ours = {
        name.removeprefix("transformer/"): one
        for name, one in ours.items()
        if name.startswith("transformer/")
    }
    expected = {
        name.removeprefix(PREFIX): one
        for name, one in tensors.items()
        if "llm_adapter." not in name and name.removeprefix(PREFIX) not in DROPPED
    }
    assert_equal(to_original({name: one.double() for name, one in ours.items()}, read_table(table)), expected)
