"""Every method through files and state dicts: the values, the copies, and that neither cuts nor namings
matter.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy import ndimage

import blockmerge
from blockmerge.checkpoints import Model, StateDict
from blockmerge.dtypes import torch_dtype
from blockmerge.expressions import Programs
from blockmerge.merging.execute import Pace, execute
from blockmerge.merging.in_memory import alike, compute_together, gather, tasks_of
from blockmerge.merging.outputs import choose_output
from blockmerge.merging.planning.plan import make_plan
from blockmerge.merging.planning.request import MergeRequest
from blockmerge.methods import METHODS, key_of
from blockmerge.weights import WeightsRequest
from tests import method_oracle, oracle
from tests.effort import in_turn, many, some
from tests.small_models import in_diffusers, small_model, write_folder
from tests.test_methods import tolerance

ALPHA = (
    "BASE=0.3,IN00-IN05=0.25,IN01=0,IN02=1,IN03=skip,IN06-M00=0.6,OUT00-OUT08=0.45,OUT03=0,OUT04=1.5,OUT05=1"
)
BETA = "BASE=0.2,IN00-IN08=0.4,IN01=0,IN02=0,M00-OUT02=0.7,OUT03=1,OUT04=0.1"
FIRST = "model.diffusion_model.input_blocks.0.0.weight"
PROJ = "model.diffusion_model.input_blocks.1.1.proj_in.weight"


@pytest.fixture(autouse=True)
def one_thread():
    """What torch does with several threads takes longer than tensors as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def options(method, *, seed=3):
    """What a merge is given for a method."""
    weights = {"weights": ALPHA, "weights_beta": BETA} if "beta" in method.weights else {"weights": ALPHA}
    return {"method": method.name, "seed": seed, **weights}


def block_weights(family="sd1"):
    return tuple(WeightsRequest(weights=text).resolve(family) for text in (ALPHA, BETA))


def exact(method, name, models, weights, limits=None, seed=3):
    """One tensor of the merge in float64, by the definitions."""
    arrays = [model[name].double().numpy() for model in models]
    if method.name == "ties" and models[0][name].itemsize == 2:
        arrays = [array.astype(np.float32) for array in arrays]
    if method.locality == "model":
        normalised = method.name == "cosine_a"
        shift = abs(weights["alpha"]) if normalised else weights["alpha"]
        result = method_oracle.cosine_merge(*arrays, shift=shift, limits=limits, normalised=normalised)
    elif method.name == "smooth_add_difference":
        smooth = ndimage.median_filter(arrays[1] - arrays[2], size=3, mode="reflect")
        result = arrays[0] + weights["alpha"] * ndimage.gaussian_filter(
            smooth, 1.0, mode="reflect", truncate=4.0
        )
    else:
        key = {"key": key_of(seed, name)} if method.random else {}
        result = getattr(method_oracle, method.name)(*arrays, **weights, **key)
    return torch.from_numpy(np.array(result, dtype=np.float64))


def count_of(method):
    return method.models or 4


MIXED = (torch.float16, torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"fp16": (torch.float16,) * 4, "mixed": MIXED, "fp32": (torch.float32,) * 4}


@pytest.mark.parametrize(("name", "dtypes"), in_turn(METHODS, tuple(DTYPES)))
def test_files_are_the_definition_and_state_dicts_the_same_bits(tmp_path, name, dtypes):
    method, dtypes = METHODS[name], DTYPES[dtypes]
    models = [
        small_model("sd1", dtype, seed) for seed, dtype in zip(range(count_of(method)), dtypes, strict=False)
    ]
    files = [tmp_path / f"{number}.safetensors" for number in range(len(models))]
    for model, file in zip(models, files, strict=True):
        save_file(model, file)
    blockmerge.merge(*files, output=tmp_path / "out.safetensors", **options(method))
    out = load_file(tmp_path / "out.safetensors")
    merged = blockmerge.merge_state_dicts(*models, **options(method))
    assert all(
        torch.equal(oracle.bits(out[name]), oracle.bits(merged[name])) for name in out.keys() | merged.keys()
    )
    looked_at = [n for n in out if not n.startswith("first_stage_model.") and not n.endswith("position_ids")]
    limits = None
    if method.locality == "model":
        pairs_of = ([model[name].double().numpy() for model in models] for name in looked_at)
        limits = method_oracle.cosine_limits(pairs_of, method.name == "cosine_a")
    alphas, betas = block_weights()
    for tensor in looked_at:
        block = oracle.block(tensor, "sd1")
        weights = (
            {"alpha": alphas[block], "beta": betas[block]}
            if "beta" in method.weights
            else {"alpha": alphas[block]}
        )
        copied = 0 if None in weights.values() else method.copies(**weights)
        if copied is not None and models[copied][tensor].dtype == out[tensor].dtype:
            assert torch.equal(oracle.bits(out[tensor]), oracle.bits(models[copied][tensor])), tensor
            continue
        inputs = [model[tensor] for model in models]
        wanted = exact(method, tensor, models, weights, limits) if copied is None else inputs[copied].double()
        error = (out[tensor].double() - wanted).abs()
        allowed = tolerance(method, inputs, wanted, out[tensor].dtype, weights)
        assert (error <= allowed).all(), (tensor, (error / allowed).max())


@functools.cache
def planned(name, dtypes):
    method = METHODS[name]
    models = [
        small_model("sd2", dtype, seed) for seed, dtype in zip(range(count_of(method)), dtypes, strict=False)
    ]
    opened = [Model.of(blockmerge.open_checkpoint(model)) for model in models]
    request = WeightsRequest(weights=ALPHA), WeightsRequest(weights=BETA, beta=True)
    recipe = MergeRequest(
        request[0], method=name, **({"beta": request[1]} if "beta" in method.weights else {})
    )
    return make_plan(opened, recipe, choose_output("out.safetensors", opened[0]))


def bytes_with(plan, pace, folder):
    path = folder / "out"
    path.write_bytes(b"")
    execute(plan, lambda _: path, pace, shown_as=path)
    return path.read_bytes()[: plan.size]


@functools.cache
def at_once(name, dtypes, folder):
    return bytes_with(planned(name, dtypes), Pace(1, 64 << 20, 64 << 20, direct=False), folder)


@settings(max_examples=many(40))
@given(
    name=st.sampled_from(sorted(METHODS)),
    threads=st.integers(1, 9),
    piece=st.integers(1, 100),
    chunk=st.integers(100, 30_000),
    direct=st.booleans(),
    dtypes=st.sampled_from([(torch.float16,) * 4, MIXED]),
)
def test_the_result_does_not_depend_on_threads_or_cuts(
    tmp_path_factory, name, threads, piece, chunk, direct, dtypes
):
    folder = tmp_path_factory.getbasetemp()
    cut = bytes_with(planned(name, dtypes), Pace(threads, piece * 4096, chunk, direct), folder)
    assert cut == at_once(name, dtypes, folder)


@pytest.mark.parametrize("name", METHODS)
def test_tensors_laid_side_by_side_give_the_same_bits(name):
    """As on a GPU, where few large launches are faster."""
    method = METHODS[name]
    models = [small_model(dtype=torch.float16, seed=seed) for seed in range(count_of(method))]
    one_by_one = blockmerge.merge_state_dicts(*models, **options(method))
    plan = in_memory_plan(models, method)
    figures = {one: gather(one) for one in plan.to_gather}
    together, tasks, programs = {}, [], Programs()
    for one in plan.decided.tensors:
        out = together[one.name] = torch.empty(one.shape, dtype=torch_dtype(one.dtype))
        tasks += tasks_of(one.expression, out, programs, 1 << 30, one.ldm)
    compute_together(tasks, figures, 10_000, 20_000)
    assert all(
        torch.equal(oracle.bits(one_by_one[n]), oracle.bits(together[n]))
        for n in one_by_one.keys() | together.keys()
    )
    if method.locality == "element" and not method.random:
        assert len(list(alike(tasks, 10_000, 20_000))) < len(together) / 4


def in_memory_plan(models, method):
    """The plan of that merge, whose tensors are in memory."""
    given = options(method)
    weights, beta = (
        WeightsRequest(weights=given["weights"]),
        WeightsRequest(weights=given.get("weights_beta"), beta=True),
    )
    numbers = {"seed": given["seed"]} if any(one.name == "seed" for one in method.numbers) else {}
    recipe = MergeRequest(weights, method=method, beta=beta, numbers=numbers)
    opened = [Model.of(StateDict(model)) for model in models]
    return make_plan(opened, recipe, choose_output("out.safetensors", opened[0]))


# Which have all that is joined, transposed or of fewer axes.
@pytest.mark.parametrize(("name", "family"), in_turn(METHODS, ["sd2", "sdxl"]))
def test_the_naming_does_not_matter(tmp_path, name, family):
    """Whatever the models' and the output's naming, the values are those of the LDM tensors, joined and as
    LDM has them.
    """
    method = METHODS[name]
    models = [small_model(family, seed=seed) for seed in range(count_of(method))]
    homeless = set(models[0]) - {n for n in models[0] if in_diffusers({n: models[0][n]}, family)}
    models = [{n: t for n, t in model.items() if n not in homeless} for model in models]
    given = {**options(method), "vae": "blend"}
    wanted = blockmerge.merge_state_dicts(*models, **given)
    other = [in_diffusers(model, family) for model in models]
    for mixed in (other, [other[0], *models[1:]], [models[0], *other[1:]]):
        merged = blockmerge.merge_state_dicts(*mixed, **given)
        expected = in_diffusers(wanted, family) if mixed[0] is other[0] else wanted
        assert merged.keys() == expected.keys()
        for tensor in merged:
            assert torch.equal(oracle.bits(merged[tensor]), oracle.bits(expected[tensor])), tensor
    if method.locality != "element" or method.random:
        folders = [write_folder(tmp_path / str(number), model, family) for number, model in enumerate(models)]
        blockmerge.merge(*folders, output=tmp_path / "out.safetensors", **given)
        out = load_file(tmp_path / "out.safetensors")
        assert out.keys() == wanted.keys()
        assert all(torch.equal(oracle.bits(out[tensor]), oracle.bits(wanted[tensor])) for tensor in out)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sd2", "extract"),
        ("sd2", "slerp"),
        ("sd1", "tensor_sum"),
        ("sd2", "tensor_sum_columns"),
        ("sd2", "add_noise"),
    ],
)
def test_an_output_folder_holds_the_same_values(tmp_path, family, name):
    method = METHODS[name]
    models = [small_model(family, seed=seed, for_a_folder=True) for seed in range(count_of(method))]
    given = {**options(method), "vae": "blend"}
    blockmerge.merge(*models, output=tmp_path / "out", naming="diffusers", **given)
    expected = in_diffusers(blockmerge.merge_state_dicts(*models, **given), family)
    folder = blockmerge.open_checkpoint(tmp_path / "out")
    assert folder.tensors.keys() == expected.keys()
    for tensor, value in expected.items():
        assert folder.read(tensor) == value.numpy().tobytes(), tensor


@pytest.mark.parametrize(
    ("name", "weights", "source"),
    [
        ("weighted_sum", (0, 0), "a"), ("weighted_sum", (1, 0), "b"), ("sigmoid", (1.5, 0), "b"), ("inverse_sigmoid", (-1, 0), "a"),
        ("slerp", (1, 0), "b"), ("tensor_sum", (1, 0.3), "b"), ("tensor_sum_columns", (0, 0.3), "a"), ("scale", (1, 0), "a"),
        ("add_noise", (0, 0), "a"), ("add_difference", (0, 0), "a"), ("triple_sum", (0, 0), "a"), ("triple_sum", (1, 0), "b"),
        ("triple_sum", (0, 1), "c"), ("sum_twice", (0.3, 1), "c"), ("sum_twice", (1, 0), "b"), ("train_difference", (0, 0), "a"),
        ("smooth_add_difference", (0, 0), "a"), ("average", (0, 0), "a"), ("dare", (0, 0), "a"), ("ties", (0, 0), "a"),
        ("model_stock", (0, 0), "a"), ("cosine_a", ("skip", 0), "a"), ("extract", ("skip", 0.5), "a"), ("extract", (0.5, "skip"), "a"),
    ],
)  # fmt: skip
def test_copies_are_bytes_and_nothing_else_is_read(tmp_path, name, weights, source):
    method = METHODS[name]
    models = [small_model(seed=seed) for seed in range(count_of(method))]
    for letter, model in zip("abcd", models, strict=False):
        save_file(model, tmp_path / f"{letter}.safetensors")
    files = [tmp_path / f"{letter}.safetensors" for letter in "abcd"[: len(models)]]
    beta = {"weights_beta": str(weights[1])} if "beta" in method.weights else {}
    made = MergeRequest(WeightsRequest(weights=str(weights[0])), method=name, vae="blend",
                  **({"beta": WeightsRequest(weights=str(weights[1]), beta=True)} if beta else {}))  # fmt: skip
    opened = [Model.of(blockmerge.open_checkpoint(file)) for file in files]
    plan = make_plan(opened, made, choose_output("out.safetensors", opened[0]))
    number = "abcd".index(source)
    header, *runs = plan.files[0].runs
    assert {operand.source for run in runs for operand in run.operands} == {opened[number].source}
    assert not any(run.is_computed for run in plan.files[0].runs)
    result = blockmerge.merge(
        *files, output=tmp_path / "out.safetensors", weights=str(weights[0]), **beta, method=name, vae="blend"
    )
    out = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(oracle.bits(out[n]), oracle.bits(models[number][n])) for n in models[0])
    counts = {letter: getattr(result.tensors, f"from_{letter}") for letter in "abc"}
    assert counts == {**dict.fromkeys("abc", 0), source: len(out)}
    assert result.tensors.computed == 0


def test_tensor_sum_reads_only_the_rows_it_takes(tmp_path):
    models = [Model.of(blockmerge.open_checkpoint(small_model(seed=seed))) for seed in range(2)]
    plan = make_plan(
        models,
        MergeRequest(WeightsRequest(weights=0.5), method="tensor_sum"),
        choose_output("out.safetensors", models[0]),
    )
    assert not any(run.is_computed for run in plan.files[0].runs)


# -- inpainting ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "wide"),
    some(
        (
            (name, channels, wide)
            for name, method in METHODS.items()
            if method.models != 1
            for channels, wide in [(9, 0), (8, 1), (9, 2)]
            if wide < (method.models or 4)
        ),
        of=3,
    ),
)
def test_more_input_channels_are_kept(tmp_path, name, channels, wide):
    method = METHODS[name]
    count = count_of(method)
    models = [small_model(seed=seed) for seed in range(count)]
    extra = torch.randn(8, channels - 4, 3, 3).half()
    plain = blockmerge.merge_state_dicts(*models, **options(method))[FIRST]
    models[wide] = {**models[wide], FIRST: torch.cat([models[wide][FIRST], extra], dim=1)}
    blockmerge.merge(*models, output=tmp_path / "out.safetensors", **options(method))
    out = load_file(tmp_path / "out.safetensors")[FIRST]
    assert torch.equal(out[:, 4:], extra)
    merged = blockmerge.merge_state_dicts(*models, **options(method))[FIRST]
    assert torch.equal(oracle.bits(merged), oracle.bits(out))
    if method.locality == "model":  # its figures are of tensors of one shape
        assert out[:, :4].isfinite().all()
    else:
        assert torch.equal(out[:, :4], plain)
    other = [in_diffusers(model, "sd1") for model in models]
    assert torch.equal(blockmerge.merge_state_dicts(*other, **options(method))["unet/conv_in.weight"], out)


@pytest.mark.parametrize("dtype", ["keep", "fp32", "fp8_e4m3fn"])
def test_the_recipe_for_inpainting_models(tmp_path, dtype):
    """The inpainting model, plus what a fine-tune has that its base has not."""
    inpainting, tuned, base = (small_model(seed=seed) for seed in range(3))
    tuned = {name: base[name] + tuned[name] / 64 for name in base}
    extra = torch.randn(8, 5, 3, 3).half()
    wanted = inpainting[FIRST].double() + tuned[FIRST].double() - base[FIRST].double()
    inpainting[FIRST] = torch.cat([inpainting[FIRST], extra], dim=1)
    result = blockmerge.merge(
        inpainting,
        tuned,
        base,
        method="add_difference",
        weights=1,
        dtype=dtype,
        output=tmp_path / "out.safetensors",
    )
    assert result.variant == "inpainting"
    out = load_file(tmp_path / "out.safetensors")[FIRST]
    assert torch.equal(out.float(), torch.cat([wanted, extra.double()], dim=1).to(out.dtype).float())


# -- what is not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), in_turn(METHODS, [float("nan"), float("inf")]))
def test_what_is_not_finite_is_found_and_stays_where_it_is(tmp_path, name, value):
    method = METHODS[name]
    models = [small_model(seed=seed) for seed in range(count_of(method))]
    models[-1] = {**models[-1], PROJ: models[-1][PROJ].clone()}
    models[-1][PROJ][-1, -1] = value
    options_ = {**options(method), "weights": 0.6}
    if method.name in ("tensor_sum", "tensor_sum_columns"):
        options_["weights_beta"] = 0.4
    sound = blockmerge.merge_state_dicts(
        *[small_model(seed=seed) for seed in range(count_of(method))], **options_
    )
    blockmerge.merge(*models, output=tmp_path / "out.safetensors", allow_nonfinite=True, **options_)
    out = load_file(tmp_path / "out.safetensors")
    if method.locality != "model":
        assert all(torch.equal(out[tensor], sound[tensor]) for tensor in out if tensor != PROJ)
    else:
        assert all(out[tensor].isfinite().all() for tensor in out if tensor != PROJ)
    if method.rows is None and not out[PROJ].isfinite().all():
        with pytest.raises(
            blockmerge.NonFiniteError, match=r"1 merged tensor would hold NaN .* in state dict [ABCD]\)"
        ) as caught:
            blockmerge.merge(*models, output=tmp_path / "no.safetensors", **options_)
        assert PROJ in str(caught.value)
        assert not (tmp_path / "no.safetensors").exists()


@pytest.mark.parametrize(("name", "weights"), in_turn(METHODS, [0.5, -0.5]))
def test_finite_in_finite_out(name, weights):
    """Models that are equal, zero, or nearly opposite."""
    method = METHODS[name]
    one = small_model(dtype=torch.float32)
    zero = {tensor: torch.zeros_like(value) for tensor, value in one.items()}
    for models in (
        [one] * 4,
        [zero] * 4,
        [one, zero, one, zero],
        [zero, one, zero, one],
        [one, {n: -t for n, t in one.items()}, zero, one],
    ):
        beta = {"weights_beta": 0.7} if "beta" in method.weights else {}
        blockmerge.merge_state_dicts(
            *models[: count_of(method)], method=name, weights=weights, check_finite=True, **beta
        )


@pytest.mark.parametrize("name", METHODS)
def test_tensors_that_hold_nothing_or_one_number(tmp_path, name):
    method = METHODS[name]
    shapes = {"v_pred": (0,), "rows": (0, 4), "columns": (3, 0), "one": ()}
    models = [
        {
            **small_model(seed=seed),
            **{marker: torch.full(shape, seed + 1.0) for marker, shape in shapes.items()},
        }
        for seed in range(count_of(method))
    ]
    merged = blockmerge.merge_state_dicts(*models, **options(method))
    files = [tmp_path / f"{number}.safetensors" for number in range(len(models))]
    for model, file in zip(models, files, strict=True):
        save_file(model, file)
    blockmerge.merge(*files, output=tmp_path / "out.safetensors", **options(method))
    out = load_file(tmp_path / "out.safetensors")
    for marker, shape in shapes.items():
        assert merged[marker].shape == out[marker].shape == shape
        assert torch.equal(oracle.bits(merged[marker]), oracle.bits(out[marker]))


@pytest.mark.parametrize("name", ["add_difference", "slerp", "cosine_a", "dare", "tensor_sum"])
def test_tensors_that_lie_in_memory_in_another_order(name):
    method = METHODS[name]
    models = [small_model(seed=seed) for seed in range(count_of(method))]
    wanted = blockmerge.merge_state_dicts(*models, **options(method))
    spread = [
        {
            name: tensor.to(memory_format=torch.channels_last)
            if tensor.dim() == 4
            else tensor.mT.contiguous().mT
            if tensor.dim() == 2
            else tensor
            for name, tensor in model.items()
        }
        for model in models
    ]
    assert any(not tensor.is_contiguous() for tensor in spread[0].values())
    merged = blockmerge.merge_state_dicts(*spread, **options(method))
    for tensor, value in wanted.items():
        assert torch.equal(oracle.bits(merged[tensor]), oracle.bits(value)), tensor


# -- on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["keep", "bf16", "fp8_e4m3fn", "fp32"])
@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_gives_the_values_of_the_cpu(tmp_path, name, dtype):
    method = METHODS[name]
    models = [small_model("sd2", seed=seed) for seed in range(count_of(method))]
    for device in ("cpu", "cuda"):
        blockmerge.merge(
            *models, output=tmp_path / f"{device}.safetensors", device=device, dtype=dtype, **options(method)
        )
    ours, theirs = (load_file(tmp_path / f"{device}.safetensors") for device in ("cpu", "cuda"))
    there = [{n: t.cuda() for n, t in model.items()} for model in models]
    merged = blockmerge.merge_state_dicts(*there, **options(method)) if dtype == "keep" else {}
    assert {tensor.device.type for tensor in merged.values()} <= {"cuda"}
    for tensor, ours_ in ours.items():
        size = (
            torch.stack([model[tensor].double().abs() for model in models])
            .amax(0)
            .maximum(ours_.double().abs())
        )
        allowed = (
            size.max() * 2.0**-2 if "fp8" in dtype else oracle.step_at(size, ours_.dtype) + 1e-5 * size.max()
        )
        for found in [theirs[tensor], *([merged[tensor].cpu()] if merged else [])]:
            assert ((found.double() - ours_.double()).abs() <= allowed).all(), tensor


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["add_difference", "slerp", "extract"])
def test_what_is_not_finite_is_found_on_a_gpu(tmp_path, name):
    models = [small_model(seed=seed) for seed in range(METHODS[name].models)]
    models[0][PROJ][-1, -1] = float("nan")
    with pytest.raises(blockmerge.NonFiniteError, match=PROJ.replace(".", r"\.")):
        blockmerge.merge(*models, output=tmp_path / "no.safetensors", device="cuda", **options(METHODS[name]))
