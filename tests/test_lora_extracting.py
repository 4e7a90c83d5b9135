"""LoRAs extracted from two models: held against known changes, and singular values in float64."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import extract_lora
from blockmerge.demo import make_state_dicts
from tests.quantising import quantised, saved
from tests.small_models import write_folder
from tests.thin_loras import assert_near, changes, make_lora, metadata_of, own_shapes, parts_in, ranks_of

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ("sd1", "sd2", "sdxl")
UNET = "model.diffusion_model."
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def models(tmp_path, family, dtype=torch.float32, *, rank=3, seed=0, **lora):
    """A model, the same with a LoRA baked in, and the LoRA."""
    base = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in make_state_dicts(family, seed=seed)[0].items()}  # fmt: skip
    save_file(base, tmp_path / "base.safetensors")
    path = make_lora(
        tmp_path / "lora.safetensors", family, rank=rank, seed=seed + 1, dtype=torch.float32, **lora
    )
    tuned = tmp_path / "tuned.safetensors"
    blockmerge.bake(tmp_path / "base.safetensors", [path], output=tuned)
    return tmp_path / "base.safetensors", tuned, path


def differences(tuned, base, family):
    """{module: tuned − base as a matrix in float64} of all modules that trainers' LoRAs have, with conv."""
    from tests.adapter_names import modules
    from tests.thin_loras import PROGRAMS

    one, other = load_file(tuned), load_file(base)
    found = {}
    for name, named in modules(family, PROGRAMS[family]).items():
        whole = one[named.ldm].double() - other[named.ldm].double()
        if named.rows:
            third = len(whole) // 3
            number = "qkv".index(name.split("_proj")[0][-1])
            whole = whole[number * third : (number + 1) * third]
        found[name] = whole.flatten(1)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_known_lora_is_found_again(family, tmp_path):
    base, tuned, lora = models(tmp_path, family)
    result = extract_lora(tuned, base, output=tmp_path / "out.safetensors", rank=3, conv_rank=3)
    assert_near(changes(result.output), changes(lora), 1e-3)
    assert_near(changes(result.output), differences(tuned, base, family), 1e-3)
    assert ranks_of(result.output) == ranks_of(lora)
    assert {tensor.dtype for parts in parts_in(result.output).values() for tensor in parts.values()} == {torch.float16}  # fmt: skip
    assert [*result.held] == list(result.lost)
    assert min(result.held.values()) > 0.999
    assert result.modules == len(own_shapes(family)) == sum(result.ranks.values())
    again = tmp_path / "again.safetensors"
    blockmerge.bake(base, [result.output], output=again)
    ours, theirs, before = map(load_file, (again, tuned, base))
    for name, tensor in theirs.items():
        size = (tensor.double() - before[name].double()).norm()
        assert (ours[name].double() - tensor.double()).norm() <= 1e-3 * size, name


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_files_in_half_precision_give_nearly_what_svd_gives(dtype, tmp_path):
    base, tuned, _ = models(tmp_path, "sd1", HALF[dtype], scale=0.1)
    result = extract_lora(tuned, base, output=tmp_path / "out.safetensors", rank=3, conv_rank=3)
    ranks = ranks_of(result.output)
    found = changes(result.output)
    for name, matrix in differences(tuned, base, "sd1").items():
        left = torch.linalg.svdvals(matrix)[ranks[name] :].norm()
        assert (found[name] - matrix).norm() <= 2 * left + 1e-3 * matrix.norm(), name


@pytest.mark.parametrize("rank", [1, 5])
def test_less_than_all_is_nearly_the_best_there_is(rank, pairs, tmp_path):
    base, tuned = pairs("sdxl", ("F32", "F32"))
    result = extract_lora(tuned, base, output=tmp_path / "out.safetensors", rank=rank, dtype="fp32")
    found = changes(result.output)
    assert not any("in_layers" in name or "_op" in name for name in found)
    for name, matrix in differences(tuned, base, "sdxl").items():
        if name in found:
            left = torch.linalg.svdvals(matrix)[rank:].norm()
            assert (found[name] - matrix).norm() <= 1.03 * left, name


@pytest.fixture(scope="module")
def wide_models(tmp_path_factory):
    """A function that gives two models with one wide layer that differs, and by what; each is made once."""
    made = {}

    def of(shape=(700, 900), decay=1.0):
        if (shape, decay) not in made:
            made[shape, decay] = write_wide_models(tmp_path_factory.mktemp("wide"), shape, decay)
        return made[shape, decay]

    return of


def write_wide_models(tmp_path, shape, decay):
    """The layer differs by singular values that fall off slowly."""
    base = make_state_dicts("sd1")[0]
    name = f"{UNET}middle_block.1.transformer_blocks.0.ff.net.2.weight"
    generator = torch.Generator().manual_seed(7)
    u, v = (torch.linalg.qr(torch.randn(side, min(shape), generator=generator, dtype=torch.float64))[0] for side in shape)  # fmt: skip
    s = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    base[name] = torch.randn(shape, generator=generator) * 0.03
    tuned = {**base, name: (base[name].double() + (u * s) @ v.T * 0.1).float()}
    for which, model in (("base", base), ("tuned", tuned)):
        save_file(model, tmp_path / f"{which}.safetensors")
    matrix = tuned[name].double() - base[name].double()
    squares = torch.linalg.svdvals(matrix).square()
    return tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", matrix, squares


@pytest.mark.parametrize(
    ("decay", "energy", "shape"),
    [
        (1.0, 0.5, (700, 900)),
        (1.0, 0.95, (900, 700)),
        (0.5, 0.6, (700, 900)),
        (0.2, 0.9, (900, 700)),
        (0.5, 1, (700, 900)),
    ],
)
def test_a_share_of_the_energy_is_met_by_the_least_rank(wide_models, shape, decay, energy, tmp_path):
    tuned, base, matrix, squares = wide_models(shape, decay)
    result = extract_lora(tuned, base, output=tmp_path / "out.safetensors", energy=energy, dtype="fp32")
    (found,) = changes(result.output).values()
    if energy < 1:
        least = int((squares.cumsum(0) < energy * squares.sum()).sum()) + 1
        assert result.rank == least
    assert (found - matrix).square().sum() <= (1 - energy + 1e-6) * squares.sum()
    assert result.held == pytest.approx(
        {"M00": 1 - ((found - matrix).norm() / matrix.norm()).item() ** 2}, abs=1e-5
    )


@pytest.mark.parametrize("rank", [8, 100, 340, 2000])
def test_any_rank_of_a_wide_layer(wide_models, rank, tmp_path):
    tuned, base, matrix, squares = wide_models(decay=0.5)
    result = extract_lora(tuned, base, output=tmp_path / "out.safetensors", rank=rank, dtype="fp32")
    (found,) = changes(result.output).values()
    left = squares[rank:].sum().sqrt()
    assert (found - matrix).norm() <= 1.01 * left + 1e-5 * matrix.norm()
    assert result.rank == min(rank, 700)
    (parts,) = parts_in(result.output).values()
    up, down = (parts[f"lora_{side}.weight"].norm() for side in ("up", "down"))
    assert 0.5 < up / down < 2


def test_convolutions_only_with_a_rank_of_their_own(tmp_path):
    base, tuned, lora = models(tmp_path, "sd1")
    plain = extract_lora(tuned, base, output=tmp_path / "plain.safetensors", rank=3)
    kernels = {name for name, (_, shape) in own_shapes("sd1").items() if shape[2:] == (3, 3)}
    assert changes(plain.output).keys() == changes(lora).keys() - kernels
    assert (plain.kind, "ss_network_args" in metadata_of(plain.output)) == ("lora", False)
    assert any("convolutions" in note and "--conv-rank" in note for note in plain.notes)
    assert plain.held["IN03"] == 0
    assert plain.lost["IN04"] < 1e-3 < 1 - plain.held["IN04"]
    with_conv = extract_lora(tuned, base, output=tmp_path / "conv.safetensors", rank=3, conv_rank=1)
    assert {name for name, rank in ranks_of(with_conv.output).items() if rank == 1} >= kernels
    assert with_conv.kind == "lora+locon"
    assert metadata_of(with_conv.output)["ss_network_args"] == '{"conv_dim": "1", "conv_alpha": "1.0"}'


def test_what_does_not_differ_is_left_out_and_what_no_lora_holds_is_named(tmp_path):
    base, tuned, lora = models(tmp_path, "sd1", only=lambda name: "mid_block" in name)
    model = load_file(tuned)
    model[f"{UNET}middle_block.0.in_layers.0.weight"] += 1
    model["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"][0] += 1
    model["first_stage_model.encoder.conv_in.bias"] += 1
    save_file(model, tuned)
    result = extract_lora(tuned, base, output=tmp_path / "out.safetensors", rank=3, conv_rank=3)
    assert changes(result.output).keys() == changes(lora).keys()
    notes = "\n".join(result.notes)
    for what, name in (
        ("1 norms and biases", "middle_block.0.in_layers.0.weight"),
        ("1 embeddings", "token_embedding.weight"),
        ("1 tensors of the VAE", "first_stage_model.encoder.conv_in.bias"),
    ):
        assert any(what in note and name in note for note in result.notes), notes
    assert result.held.keys() == {"BASE", "M00"}
    assert result.held["BASE"] == 0
    assert 0 < result.held["M00"] < 1
    assert result.lost["M00"] < 1e-3


def test_a_small_difference_is_not_lost(tmp_path):
    base, tuned, lora = models(tmp_path, "sd1", scale=1e-3)
    result = extract_lora(tuned, base, output=tmp_path / "out.safetensors", rank=3, conv_rank=3)
    assert changes(result.output).keys() == changes(lora).keys()
    assert_near(changes(result.output), changes(lora), 5e-3)


@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_folders_give_the_same_bits(family, pairs, tmp_path):
    base, tuned = pairs(family)
    files = {(base, tuned)}
    folders = [write_folder(tmp_path / path.stem, load_file(path), family) for path in (base, tuned)]
    files.add(tuple(folders))
    files.add((base, folders[1]))
    out = {
        extract_lora(b, a, output=tmp_path / f"{n}.safetensors", rank=3, conv_rank=2).output: (a, b)
        for n, (a, b) in enumerate(files)
    }
    assert len({tuple((name, *map(_bits, parts.values())) for name, parts in parts_in(path).items()) for path in out}) == 1  # fmt: skip


def _bits(tensor):
    return tensor.numpy().tobytes()


def test_other_containers(pairs, tmp_path):
    base, tuned = pairs("sd1")
    torch.save({"state_dict": load_file(tuned)}, tmp_path / "tuned.ckpt")
    wanted = extract_lora(tuned, base, output=tmp_path / "a.safetensors", rank=3)
    found = extract_lora(tmp_path / "tuned.ckpt", base, output=tmp_path / "b.safetensors", rank=3)
    assert_near(changes(found.output), changes(wanted.output), 0)
    dicts = extract_lora(load_file(tuned), load_file(base), output=tmp_path / "c.safetensors", rank=3)
    assert_near(changes(dicts.output), changes(wanted.output), 0)
    codes, said, plain = quantised(load_file(tuned))
    scaled = saved(tmp_path, "scaled", codes, said)
    meant = saved(tmp_path, "meant", plain)
    assert_near(
        changes(extract_lora(scaled, base, output=tmp_path / "d.safetensors", rank=3).output),
        changes(extract_lora(meant, base, output=tmp_path / "e.safetensors", rank=3).output),
        0,
    )


@pytest.mark.parametrize("size", [{"rank": 3, "conv_rank": 2}, {"energy": 0.7}], ids=str)
def test_the_same_bits_for_any_threads(size, pairs, tmp_path):
    base, tuned = pairs("sd1")
    files = set()
    for threads in (None, 1, 5):
        out = tmp_path / f"out{threads}.safetensors"
        extract_lora(tuned, base, output=out, threads=threads, **size)
        files.add(out.read_bytes())
    assert len(files) == 1


def test_a_unet_alone_has_no_text_encoder_to_compare(tmp_path, pairs):
    base, tuned = pairs("sd1")
    alone = {name: tensor for name, tensor in load_file(tuned).items() if name.startswith(UNET)}
    save_file(alone, tmp_path / "alone.safetensors")
    result = extract_lora(tmp_path / "alone.safetensors", base, output=tmp_path / "out.safetensors", rank=2)
    assert not any(name.startswith("lora_te") for name in changes(result.output))
    assert any("text_encoder" in note and "not compared" in note for note in result.notes)


@pytest.mark.parametrize(
    ("family", "version", "architecture"),
    [
        ("sd1", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_the_metadata(family, version, architecture, pairs, tmp_path):
    base, tuned = pairs(family)
    said = metadata_of(extract_lora(tuned, base, output=tmp_path / "style.safetensors", rank=2).output)
    assert said["ss_base_model_version"] == version
    assert said["modelspec.architecture"] == architecture
    assert said["ss_v2"] == str(family == "sd2")
    assert (said["ss_network_dim"], said["ss_network_alpha"]) == ("2", "2.0")
    assert said["modelspec.title"] == "b"
    assert said["modelspec.merged_from"] == "b.safetensors, a.safetensors"
    assert said["ss_network_module"] == "networks.lora"


def test_sd2_that_predicts_noise(pairs, tmp_path):
    base, tuned = pairs("sd2")
    save_file(load_file(tuned), tmp_path / "t.safetensors", {"modelspec.prediction_type": "epsilon"})
    result = extract_lora(tmp_path / "t.safetensors", base, output=tmp_path / "out.safetensors", rank=2)
    assert metadata_of(result.output)["ss_base_model_version"] == "sd_v2"


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path):
    """A function that extracts, and returns what is said against it: in one line, with nothing written."""

    def refuse(tuned, base, error, **how):
        out = tmp_path / "out.safetensors"
        how = {"rank": 2} | how if "energy" not in how else how
        with pytest.raises(error) as caught:
            extract_lora(tuned, base, output=how.pop("output", out), **how)
        assert type(caught.value) is error
        assert "\n" not in str(caught.value)
        assert not out.exists()
        assert not [one for one in tmp_path.iterdir() if one.name.startswith(".")]
        return str(caught.value)

    return refuse


def test_models_that_are_no_pair(refused, pairs, tmp_path):
    base, tuned = pairs("sd1")
    said = refused(tuned, pairs("sdxl")[0], blockmerge.IncompatibleModelsError)
    assert "Stable Diffusion 1.x" in said
    assert "Stable Diffusion XL" in said
    model = load_file(tuned)
    other = {**model, f"{UNET}input_blocks.0.0.weight": torch.zeros(8, 9, 3, 3).half()}
    said = refused(other, base, blockmerge.IncompatibleModelsError)
    assert "[8, 9, 3, 3]" in said
    assert "[8, 4, 3, 3]" in said
    lacking = {name: tensor for name, tensor in model.items() if not name.startswith(f"{UNET}middle_block.2")}
    assert "takes nothing away" in refused(lacking, base, blockmerge.IncompatibleModelsError)
    said = refused(base, base, blockmerge.RecipeError)
    assert (
        said
        == "nothing would be in the LoRA: a.safetensors and a.safetensors do not differ in what both have"
    )
    model = load_file(base)
    model[f"{UNET}input_blocks.0.0.weight"] += 1
    said = refused(model, base, blockmerge.RecipeError)
    assert (
        "tuned and a.safetensors are alike in all layers that it can hold; left out, though they differ: "
        in said
    )
    assert f"({UNET}input_blocks.0.0.weight): conv_rank (--conv-rank) takes them in" in said


def test_layers_that_are_alike_are_counted(pairs, tmp_path):
    base, tuned = pairs("sd1")
    said = extract_lora(tuned, base, output=tmp_path / "all.safetensors", rank=1)
    assert said.notes[0] == f"all {said.modules} layers that it can hold differ"
    one = load_file(base)
    one[f"{UNET}middle_block.1.proj_in.weight"] += 1
    few = extract_lora(one, base, output=tmp_path / "one.safetensors", rank=1)
    assert (
        f"of {said.modules} layers that it can hold, {said.modules - 1} are alike and left out" in few.notes
    )


def test_values_that_are_none(refused, pairs):
    base, tuned = pairs("sd1")
    model = load_file(tuned)
    model[f"{UNET}middle_block.1.proj_in.weight"][0] = torch.nan
    said = refused(model, base, blockmerge.NonFiniteError)
    assert "tuned holds NaN or infinity" in said
    assert "middle_block.1.proj_in.weight" in said
    assert "base holds NaN or infinity" in refused(tuned, model, blockmerge.NonFiniteError)


def test_too_large_for_half_precision(refused, pairs, tmp_path):
    base, _ = pairs("sd1", ("F32", "F32"))
    model = load_file(base)
    model[f"{UNET}middle_block.1.proj_in.weight"][0] = 1e12
    said = refused(model, base, blockmerge.NonFiniteError)
    assert "--dtype fp32" in said
    extract_lora(model, base, output=tmp_path / "fine.safetensors", rank=1, dtype="fp32")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"rank": 0}, "rank (--rank) is a whole number from 1 up; 0 given"),
        ({"rank": -1}, "rank (--rank)"),
        ({"rank": 1.5}, "rank (--rank)"),
        ({"rank": True}, "rank (--rank)"),
        ({"rank": None}, "how large?"),
        ({"energy": 0}, "energy (--energy)"),
        ({"energy": 1.5}, "energy (--energy)"),
        ({"energy": float("nan")}, "energy (--energy)"),
        ({"energy": "0.9"}, "energy (--energy)"),
        ({"energy": 0.9, "rank": 2}, "leave one of them out"),
        ({"energy": 0.9, "conv_rank": 2}, "conv_rank (--conv-rank) goes with a rank"),
        ({"conv_rank": 0}, "conv_rank (--conv-rank) is a whole number"),
        ({"dtype": "fp8_e4m3fn"}, "is not a dtype of LoRAs (--dtype): fp16, bf16, fp32"),
        ({"dtype": "keep"}, "is not a dtype of LoRAs (--dtype)"),
        ({"threads": 0}, "threads"),
        ({"ema": "keep"}, "ema (--ema) is drop or use"),
    ],
)
def test_what_makes_no_sense(how, said, refused, pairs):
    base, tuned = pairs("sd1")
    assert said in refused(tuned, base, blockmerge.RecipeError, **how)


def test_outputs_that_cannot_be(refused, pairs, tmp_path):
    base, tuned = pairs("sd1")
    for output, said in (
        (tmp_path / "out.ckpt", "give it that ending"),
        (tmp_path / "no folder" / "out.safetensors", "does not exist"),
        (5, "the output is a path"),
    ):
        assert said in refused(tuned, base, blockmerge.OutputError, output=output)
    before = base.read_bytes()
    assert "is the input" in refused(tuned, base, blockmerge.OutputError, output=base, overwrite=True)
    assert base.read_bytes() == before


def test_a_broken_off_model(refused, pairs, tmp_path):
    base, tuned = pairs("sd1")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tuned.read_bytes()[:-1000])
    assert "cut short" in refused(cut, base, blockmerge.CheckpointError)
    lora = make_lora(tmp_path / "lora.safetensors", "sd1")
    assert "LoRA" in refused(lora, base, blockmerge.UnknownFamilyError)
