"""Where merges come from whose weights change within blocks and components: by element rules, and by methods
that weigh each tensor for itself.
"""

from __future__ import annotations

import pytest
from safetensors.torch import save_file

import blockmerge
from blockmerge.anatomy import component_of
from blockmerge.weights import ElementRules
from tests import oracle
from tests.effort import in_turn
from tests.test_explain import relatives, tuned

B = "b.safetensors"
ANY = 0.005


@pytest.fixture
def merged(tmp_path):
    """Merge relatives of a family with blockmerge, and explain the result with all of them as candidates."""

    def merge(count=2, family="sd1", *, used=None, more=1, **options):
        models = relatives(count + more, family=family)
        paths = {name: tmp_path / f"{name}.safetensors" for name in models}
        for name, path in paths.items():
            save_file(models[name], path)
        some = [paths[name] for name in (used or tuple(models)[:count])]
        blockmerge.merge(*some, output=tmp_path / "m.safetensors", overwrite=True, **options)
        return blockmerge.explain(tmp_path / "m.safetensors", [*paths.values()], tensors=True)

    return merge


def weight_of(origin):
    return origin.weights.get(B, 0.0)


def assert_rules(found, family, weights, rules, *, blended_vae=False):
    """Every tensor's weight of B is what rules and weights say, by the grammar's own reading of it."""
    resolved = ElementRules.parse(rules).resolve(family)
    checked = 0
    for name, origin in found.tensors.items():
        block = oracle.block(name, family)
        wanted = resolved.weight(block, name, weights)
        if component_of(name) == "vae" and not blended_vae:
            wanted = 0.0
        if origin.determined and origin.uncertainty < 0.05:
            share = weight_of(origin) if found.base != B else 1 - sum(origin.weights.values())
            assert share == pytest.approx(wanted, abs=max(ANY, origin.uncertainty)), name
            checked += 1
    assert checked > len(found.tensors) / 3


@pytest.mark.parametrize(
    ("family", "weights", "rules", "vae", "within"),
    [
        ("sd1", 0.3, "NOT OUT04:attn:1", "auto", "the text encoder"),
        ("sd2", 0.3, "NOT OUT04:attn:1", "auto", "the text encoder"),
        ("sdxl", 0.3, "NOT OUT04:attn:1", "auto", "the text encoder, the second text encoder"),
        ("sdxl", 0.4, "BASE:conditioner.embedders.1 attn:0.8", "auto", "the text encoder"),
        ("sd1", 0.3, "BASE:mlp:0.9", "auto", "the text encoder"),
        ("sd1", 0.0, "BASE:mlp:0.5", "auto", "the text encoder"),
        ("sd1", 0.4, "BASE:conv:0.1", "blend", "the VAE"),
        ("sd2", 0.6, ":attn:0.2, BASE:norm:1", "blend", "the text encoder, the VAE"),
    ],
)  # fmt: skip
def test_element_rules_outside_the_unet(merged, family, weights, rules, vae, within):
    found = merged(family=family, weights=weights, rules=rules, vae=vae)
    assert found.exact, (found.verdict, found.notes)
    assert set(found.parents) == {"a.safetensors", B}
    note = next(note for note in found.notes if note.startswith("weights change within"))
    assert note.startswith(f"weights change within {within}"), note
    assert_rules(found, family, weights, rules, blended_vae=vae == "blend")


@pytest.mark.parametrize("family", ["sdxl"])
def test_each_text_encoder_with_a_weight_of_its_own(merged, family):
    found = merged(family=family, weights=0.4, rules="BASE:conditioner.embedders.1:0.8", vae="blend")
    assert found.exact, (found.verdict, found.notes)
    assert "BASE has no single weight: its components have weights of their own" in found.notes
    assert not any(note.startswith("weights change within") for note in found.notes)
    assert weight_of(found.components["text_encoder"]) == pytest.approx(0.4)
    assert weight_of(found.components["text_encoder_2"]) == pytest.approx(0.8)
    assert weight_of(found.components["vae"]) == pytest.approx(0.4)
    assert found.blocks["BASE"].divided
    assert not any(found.blocks[block].divided for block in found.blocks if block != "BASE")


@pytest.mark.parametrize("weights", [0.25, "high_res"])
def test_rules_for_the_smallest_tensors(merged, weights):
    """They hardly move the sum over a block, whose weight still explains it within rounding."""
    options = {"weights": weights} if weights == 0.25 else {"preset": weights}
    found = merged(rules=":norm:0.9", **options)
    assert found.exact, (found.verdict, found.notes)
    assert "change within blocks" in found.verdict
    for name, origin in found.tensors.items():
        if "norm" in name and component_of(name) == "unet" and origin.determined:
            assert weight_of(origin) == pytest.approx(0.9, abs=max(ANY, origin.uncertainty)), name


@pytest.mark.parametrize(("count", "family"), in_turn([3, 4], ["sdxl", "sd1"]))
def test_model_stock(merged, count, family):
    found = merged(count, family, method="model_stock", weights=0.8, vae="blend")
    assert found.exact, (found.verdict, found.notes)
    assert set(found.parents) == {f"{letter}.safetensors" for letter in "abcd"[:count]}
    for origin in found.tensors.values():  # all but A are of equal share
        if origin.determined and max(origin.uncertainty, 0) < 0.02:
            of_a, *others = (origin.weights.get(f"{letter}.safetensors") for letter in "abcd"[:count])
            of_a, *others = (
                1 - sum(origin.weights.values()) if share is None else share for share in (of_a, *others)
            )
            assert max(others) - min(others) <= 2 * max(ANY, origin.uncertainty)


def test_the_parents_are_those_of_the_text_encoder(merged):
    """The U-Net is A's, which any pair with A explains; only one of them explains the rest."""
    found = merged(3, used="ac", weights="BASE=0.5", rules="BASE:mlp:0.8")
    assert found.exact, (found.verdict, found.notes)
    assert set(found.parents) == {"a.safetensors", "c.safetensors"}
    found = merged(3, used="ac", weights="BASE=0.5")
    assert found.exact
    assert set(found.parents) == {"a.safetensors", "c.safetensors"}


def test_a_copy_with_another_text_encoder_stays_a_copy(tmp_path):
    models = relatives(3)
    foreign = tuned(models["b"], 0.05, seed=99)
    made = {n: t if component_of(n) == "unet" else foreign[n] for n, t in models["a"].items()}
    for name, model in {**models, "m": made}.items():
        save_file(model, tmp_path / f"{name}.safetensors")
    found = blockmerge.explain(
        tmp_path / "m.safetensors", [tmp_path / f"{name}.safetensors" for name in models]
    )
    assert (found.method, found.parents, found.exact) == ("copy", ("a.safetensors",), False)
    assert "the text encoder is not from these" in found.notes


def test_nothing_is_claimed_that_is_not_there(tmp_path):
    """Weights that change within a text encoder of which one tensor is tuned, or one number changed."""
    models = relatives(2)
    text = [
        name for name in models["a"] if component_of(name) == "text_encoder" and models["a"][name].dim() > 1
    ]
    for what in ("tuned", "altered"):
        for name, model in models.items():
            save_file(model, tmp_path / f"{name}.safetensors")
        merged = blockmerge.merge_state_dicts(
            *models.values(), weights=0.3, rules="BASE:mlp:1, NOT BASE:attn:1"
        )
        if what == "tuned":
            merged |= tuned({text[1]: merged[text[1]]}, 0.05, seed=5)
        else:
            merged[text[1]].view(-1)[7] *= 1.5
        save_file(merged, tmp_path / "m.safetensors")
        paths = [tmp_path / f"{name}.safetensors" for name in models]
        found = blockmerge.explain(tmp_path / "m.safetensors", paths)
        assert not found.exact, what
        assert set(found.parents) == {"a.safetensors", B}
        if what == "tuned":
            assert "the text encoder is not from these" in found.notes


def test_reports_say_what_changes_within(merged):
    from blockmerge.rendering.comparison import remark

    found = merged(weights=0.3, rules="NOT OUT04:attn:1")
    assert remark(found.components["text_encoder"]) == "changes within"
    assert remark(found.blocks["OUT04"]) == ""
    assert remark(found.blocks["OUT03"]) == "changes within"
    assert weight_of(found.blocks["OUT04"]) == pytest.approx(0.3, abs=1e-9)
    assert found.to_dict()["blocks"]["BASE"]["divided"] is True
