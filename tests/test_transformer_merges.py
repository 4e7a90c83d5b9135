"""Merges of transformers: the values of every method, what is A's, and the same live, in memory and in folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import IncompatibleModelsError
from blockmerge.anatomy import FAMILIES
from blockmerge.anatomy.renaming import lacking_by_rule, names_by_rule
from blockmerge.demo import demo_layout
from blockmerge.methods import METHODS
from tests import method_oracle, oracle
from tests.effort import in_turn
from tests.test_merge_methods import count_of, exact
from tests.test_methods import tolerance

SIZES = {
    "flux1": (2, 3),
    "chroma": (2, 2, 5, 5),
    "sd3": (3,),
    "z_image": (3, 2, 2),
    "lumina2": (3, 2, 2),
    "anima": (3, 6),
    "cosmos_predict2": (3,),
}
UNET = "model.diffusion_model."


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def family_of(name):
    return FAMILIES[name].sized(SIZES[name], FAMILIES[name].version)


def tiny(name, seed, dtype=torch.float16, **more):
    """A thin model of few blocks; `more` are {name without prefix: shape}."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {**demo_layout(family_of(name)), **{UNET + own: shape for own, shape in more.items()}}
    base = torch.Generator().manual_seed(1000)
    found = {}
    for own, shape in sorted(shapes.items()):
        common = torch.randn(shape, generator=base) * 0.1
        found[own] = (common + 0.02 * torch.randn(shape, generator=generator)).to(dtype)
    return found


def write(path, model):
    save_file(model, path)
    return path


def weights_of(family):
    """Weights for all blocks with every special case among them: {block: alpha}, {block: beta}."""
    special = [0.25, 0.0, 1.0, None, 0.6, 1.5, 0.45]
    alphas = {block: special[n % len(special)] for n, block in enumerate(family.blocks)}
    betas = {block: (0.2, 0.4, 0.0, 0.3, 0.7, 1.0)[n % 6] for n, block in enumerate(family.blocks)}
    return alphas, betas


@pytest.mark.parametrize(("name", "family"), in_turn(METHODS, ["flux1", "z_image"]))
def test_every_method_is_its_definition(tmp_path, family, name):
    method, known = METHODS[name], family_of(family)
    models = [tiny(family, seed) for seed in range(count_of(method))]
    files = [write(tmp_path / f"{number}.safetensors", model) for number, model in enumerate(models)]
    alphas, betas = weights_of(known)
    given = {"weights": {b: "skip" if w is None else w for b, w in alphas.items()}, "method": name, "seed": 3}
    if "beta" in method.weights:
        given["weights_beta"] = betas
    blockmerge.merge(*files, output=tmp_path / "out.safetensors", **given)
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == models[0].keys()
    limits = None
    if method.locality == "model":
        pairs = ([model[tensor].double().numpy() for model in models] for tensor in out)
        limits = method_oracle.cosine_limits(pairs, method.name == "cosine_a")
    for tensor in out:
        block = known.block_of(tensor)
        weights = {"alpha": alphas[block]} | ({"beta": betas[block]} if "beta" in method.weights else {})
        copied = 0 if None in weights.values() else method.copies(**weights)
        inputs = [model[tensor] for model in models]
        if copied is not None:
            assert torch.equal(out[tensor], inputs[copied]), tensor
            continue
        wanted = exact(method, tensor, models, weights, limits)
        error = (out[tensor].double() - wanted).abs()
        assert (error <= tolerance(method, inputs, wanted, out[tensor].dtype, weights)).all(), tensor


@pytest.mark.parametrize("family", SIZES)
def test_namings_do_not_matter(tmp_path, family):
    """original × folder = original × original, and so for folders as A; by a method that looks at whole
    tensors, which are joined of several in folders.
    """
    a, b = tiny(family, 1), tiny(family, 2)
    files = [
        write(tmp_path / f"{letter}.safetensors", model) for letter, model in zip("ab", (a, b), strict=True)
    ]
    folders = [tmp_path / "folder-a", tmp_path / "folder-b"]
    for file, folder in zip(files, folders, strict=True):
        blockmerge.convert(file, output=folder, naming="diffusers")
    for method in ("weighted_sum", "slerp"):
        given = {"weights": 0.3, "method": method, "overwrite": True}
        blockmerge.merge(*files, output=tmp_path / "wanted.safetensors", **given)
        wanted = load_file(tmp_path / "wanted.safetensors")
        blockmerge.merge(files[0], folders[1], output=tmp_path / "mixed.safetensors", **given)
        blockmerge.merge(folders[0], files[1], output=tmp_path / "folder", naming="diffusers", **given)
        blockmerge.convert(
            tmp_path / "folder", output=tmp_path / "back.safetensors", naming="ldm", overwrite=True
        )
        mixed, back = (load_file(tmp_path / f"{name}.safetensors") for name in ("mixed", "back"))
        short = {name.removeprefix(UNET): tensor for name, tensor in wanted.items()}
        assert {name.removeprefix(UNET) for name in back} == short.keys()
        for name, tensor in wanted.items():
            assert torch.equal(oracle.bits(tensor), oracle.bits(mixed[name])), name
        for name, tensor in back.items():
            assert torch.equal(oracle.bits(tensor), oracle.bits(short[name.removeprefix(UNET)])), name


def test_what_the_first_model_alone_has_is_kept_with_a_note(tmp_path):
    """dev takes a guidance strength, schnell does not."""
    guidance = {f"guidance_in.{layer}.{end}": shape for layer, end, shape in (
        ("in_layer", "weight", (48, 256)), ("in_layer", "bias", (48,)), ("out_layer", "weight", (48, 48)), ("out_layer", "bias", (48,)),
    )}  # fmt: skip
    dev = write(tmp_path / "dev.safetensors", tiny("flux1", 1, **guidance))
    schnell = write(tmp_path / "schnell.safetensors", tiny("flux1", 2))
    output = tmp_path / "o.safetensors"
    result = blockmerge.merge(dev, schnell, weights=0.5, output=output)
    assert result.variant == "dev"
    assert any("only in dev.safetensors" in note and "guidance_in" in note for note in result.notes), (
        result.notes
    )
    merged, first = load_file(output), load_file(dev)
    for name in guidance:
        assert torch.equal(merged[UNET + name], first[UNET + name])
    with pytest.raises(IncompatibleModelsError, match="give it as the first model"):
        blockmerge.merge(schnell, dev, weights=0.5, output=tmp_path / "p.safetensors")
    assert not (tmp_path / "p.safetensors").exists()


@pytest.mark.parametrize("wide", [128, 384])
@pytest.mark.parametrize("first", [True, False], ids=["A has more", "B has more"])
def test_more_input_channels_are_merged_over_what_is_shared(tmp_path, wide, first):
    plain, more = tiny("flux1", 1), tiny("flux1", 2)
    own = torch.randn(48, wide, generator=torch.Generator().manual_seed(5)).half()
    more[UNET + "img_in.weight"] = own
    models = (more, plain) if first else (plain, more)
    files = [write(tmp_path / f"{n}.safetensors", model) for n, model in enumerate(models)]
    result = blockmerge.merge(*files, weights=0.25, output=tmp_path / "o.safetensors")
    merged = load_file(tmp_path / "o.safetensors")[UNET + "img_in.weight"]
    a, b = (model[UNET + "img_in.weight"][:, :64].double() for model in models)
    assert merged.shape == (48, wide)
    assert torch.equal(merged[:, :64], (0.75 * a + 0.25 * b).half())
    assert torch.equal(merged[:, 64:], own[:, 64:])
    assert result.variant == {128: "control", 384: "fill"}[wide]


def test_masks_of_other_places_are_not_blended(tmp_path):
    a, b = tiny("cosmos_predict2", 1), tiny("cosmos_predict2", 2)
    b[UNET + "x_embedder.proj.1.weight"] = torch.zeros(48, 72).half()
    files = [write(tmp_path / f"{n}.safetensors", model) for n, model in enumerate((a, b))]
    with pytest.raises(
        IncompatibleModelsError, match=r"x_embedder.proj.1.weight \(shapes differ: \[48, 68\], \[48, 72\]"
    ):
        blockmerge.merge(*files, weights=0.5, output=tmp_path / "o.safetensors")


def test_equal_position_tables_are_copied_and_others_merged(tmp_path):
    a, b = tiny("sd3", 1), tiny("sd3", 2)
    table = UNET + "pos_embed"
    same = {**b, table: a[table].clone()}
    for model, is_same in ((same, True), (b, False)):
        files = [write(tmp_path / f"{n}.safetensors", one) for n, one in enumerate((a, model))]
        result = blockmerge.merge(
            *files, weights=0.5, method="slerp", output=tmp_path / "o.safetensors", overwrite=True
        )
        merged = load_file(tmp_path / "o.safetensors")[table]
        assert torch.equal(merged, a[table]) == is_same
        assert any("the same in all models and copied" in note for note in result.notes) == is_same


def with_encoders(model, seed):
    generator = torch.Generator().manual_seed(seed)
    names = [
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.weight",
    ]
    return {**model, **{name: torch.randn(6, 4, generator=generator).half() for name in names}}


@pytest.mark.parametrize("choice", ["auto", "a", "blend"])
def test_text_encoders_are_the_first_models_unless_asked(tmp_path, choice):
    a, b = with_encoders(tiny("flux1", 1), 7), with_encoders(tiny("flux1", 2), 8)
    files = [write(tmp_path / f"{n}.safetensors", model) for n, model in enumerate((a, b))]
    result = blockmerge.merge(*files, weights=0.5, output=tmp_path / "o.safetensors", text_encoder=choice)
    merged = load_file(tmp_path / "o.safetensors")
    for name in a:
        if name.startswith("text_encoders."):
            blended = torch.lerp(a[name].float(), b[name].float(), 0.5).half()
            assert torch.equal(merged[name], blended if choice == "blend" else a[name])
    assert any("text encoders (2 tensors) are those of" in note for note in result.notes) == (
        choice != "blend"
    )
    assert any("--text-encoder blend" in note for note in result.notes) == (choice == "auto")
    written = blockmerge.Recipe.from_dict(result.recipe, models=files)
    assert written.request.text_encoder == choice
    dicts = blockmerge.merge_state_dicts(a, b, weights=0.5, text_encoder=choice)
    assert all(torch.equal(dicts[name], merged[name]) for name in merged)


def test_text_encoders_of_other_families_follow_base_unless_asked(tmp_path):
    from tests.small_models import small_model

    a, b = small_model("sd1", torch.float16, 1), small_model("sd1", torch.float16, 2)
    name = next(name for name in a if name.startswith("cond_stage_model.") and name.endswith("fc1.weight"))
    assert not torch.equal(blockmerge.merge_state_dicts(a, b, weights=0.5)[name], a[name])
    assert torch.equal(blockmerge.merge_state_dicts(a, b, weights=0.5, text_encoder="a")[name], a[name])
    with pytest.raises(blockmerge.RecipeError, match="unknown text_encoder 'b'"):
        blockmerge.merge_state_dicts(a, b, weights=0.5, text_encoder="b")


def classes():
    diffusers = pytest.importorskip("diffusers")
    return {
        "flux1": diffusers.FluxTransformer2DModel,
        "chroma": diffusers.ChromaTransformer2DModel,
        "sd3": diffusers.SD3Transformer2DModel,
        "z_image": diffusers.ZImageTransformer2DModel,
        "lumina2": diffusers.Lumina2Transformer2DModel,
        "anima": diffusers.CosmosTransformer3DModel,
        "cosmos_predict2": diffusers.CosmosTransformer3DModel,
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", SIZES)
def test_live_on_the_classes_of_diffusers(tmp_path, family):
    more = {"norm_final.weight": (48,)} if family in ("z_image", "lumina2") else {}  # which no folder has
    a, b = tiny(family, 1, torch.float32, **more), tiny(family, 2, torch.float32, **more)
    files = [
        write(tmp_path / f"{letter}.safetensors", model) for letter, model in zip("ab", (a, b), strict=True)
    ]
    blockmerge.convert(files[0], output=tmp_path / "folder", naming="diffusers")
    module = classes()[family].from_pretrained(tmp_path / "folder", subfolder="transformer")
    known = family_of(family)
    weights = {block: n / len(known.blocks) for n, block in enumerate(known.blocks)}
    with blockmerge.LiveMerge(module, *files) as live:
        live.apply(weights=weights)
        parameters = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        merged = blockmerge.merge_state_dicts(a, b, weights=weights)
        save_file({name: tensor.contiguous() for name, tensor in merged.items()}, tmp_path / "m.safetensors")
        blockmerge.convert(tmp_path / "m.safetensors", output=tmp_path / "m", naming="diffusers")
        wanted = load_file(tmp_path / "m" / "transformer" / "diffusion_pytorch_model.safetensors")
        assert parameters.keys() <= wanted.keys()
        for name, parameter in parameters.items():
            assert torch.equal(parameter, wanted[name]), name
    assert np.isfinite(sum(float(parameter.sum()) for parameter in module.parameters()))


def test_similarity_and_explain(tmp_path):
    a, b = (write(tmp_path / f"{n}.safetensors", tiny("z_image", seed)) for n, seed in enumerate((1, 2)))
    with pytest.raises(
        blockmerge.CheckpointError, match=r"attention similarity is for U-Nets: .*--method weights"
    ):
        blockmerge.similarity(a, [b])
    compared = blockmerge.similarity(a, [b], method="weights").references[0]
    assert set(compared.blocks) == {*family_of("z_image").blocks} - {"BASE"}
    assert set(compared.components) == {"transformer"}
    given = {"IN": 0.25, "CONT": 0.5, "NOISE": 0.75, "L00": 0.1, "L01": 0.2, "L02": 0.3, "OUT": 0.9}
    save_file(
        blockmerge.merge_state_dicts(load_file(a), load_file(b), weights=given), tmp_path / "m.safetensors"
    )
    found = blockmerge.explain(tmp_path / "m.safetensors", [a, b])
    assert {block: found.blocks[block].weights[b.name] for block in given} == pytest.approx(given, abs=2e-3)


@pytest.mark.parametrize("rule", ["vae", "video_vae"])
def test_incomplete_vaes_are_never_taken_in_silence(tmp_path, rule):
    """Of families whose layouts hold no VAE: baked in they are refused, in a file `check` names what is gone."""
    family, prefix, gone = {
        "vae": ("flux1", "vae.", "decoder.up.2.block.1.conv1.weight"),
        "video_vae": ("cosmos_predict2", "vae.", "decoder.upsamples.5."),
    }[rule]
    whole = {name: torch.full((16, 16, 1, 1), 0.5).half() for name in names_by_rule(rule)}
    assert lacking_by_rule(rule, whole) == []
    part = {name: tensor for name, tensor in whole.items() if not name.startswith(gone)}
    assert [name.startswith(gone.rstrip(".")) for name in lacking_by_rule(rule, part)] == [True]
    model = tiny(family, 1)
    write(tmp_path / "a.safetensors", model)
    write(tmp_path / "vae.safetensors", part)
    with pytest.raises(
        IncompatibleModelsError, match=r"vae.safetensors is not a complete VAE: it lacks .*decoder.up"
    ):
        blockmerge.convert(
            tmp_path / "a.safetensors", output=tmp_path / "o.safetensors", vae=tmp_path / "vae.safetensors"
        )
    assert not (tmp_path / "o.safetensors").exists()
    write(tmp_path / "b.safetensors", {**model, **{prefix + name: tensor for name, tensor in part.items()}})
    problems = {one.code: one.message for one in blockmerge.check(tmp_path / "b.safetensors").problems}
    assert gone.rstrip(".") in problems["missing_tensors"]
