"""Merges of tensors on a GPU, and files with one, where there is none: the CPU's bits, no waits but those that
docs tell of, and the rules of CUDA kept. What `EmulatedGpu` holds to is told there, and tested in
test_emulation.py.

Over 500 lines: all of it is merges on that GPU, of the same few models.
"""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import LiveMerge
from blockmerge.anatomy import is_position_ids, layout
from blockmerge.demo import demo_layout
from blockmerge.merging import flat_unet
from blockmerge.methods import METHODS, randomness
from tests import oracle
from tests.effort import EVERY_CASE, some
from tests.emulated_gpu import EmulatedGpu
from tests.quantising import SPELLINGS, quantised
from tests.small_models import small_model
from tests.test_live import module_of, unet_of, values

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
LIVE_DTYPES = dict(zip(METHODS, cycle(DTYPES[:3])))
OF_ELEMENTS = [
    method.name for method in METHODS.values() if method.locality == "element" and not method.random
]
IN_FILES = some(METHODS, of=2)
LIVE = METHODS if EVERY_CASE else [name for name in METHODS if name not in IN_FILES]
MOVES = {"cat", "_foreach_copy_", "index_select", "stack", "index", "fill_"}
"""What GPUs have for no 8-bit floats in torch 2.4: these can be copied and converted, but not joined or picked."""
POSITIONS = {
    family: next((name for name in layout(family) if is_position_ids(name)), None)
    for family in ("sd1", "sd2", "sdxl")
}
PROJ = "model.diffusion_model.middle_block.1.proj_in.weight"
TOKENS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"


def options(method):
    return {
        "method": method.name,
        "weights": 0.4,
        **({"weights_beta": 0.25} if "beta" in method.weights else {}),
    }


def for_apply(method):
    return {key: value for key, value in options(method).items() if key != "method"}


def mixed(model, first=0):
    """A model whose tensors take turns at all dtypes."""
    turns = cycle([*DTYPES[first:], *DTYPES[:first]])
    return {
        name: tensor.to(next(turns)) if tensor.is_floating_point() else tensor
        for name, tensor in model.items()
    }


def models_for(method, dtype=torch.float16, family="sd1"):
    return [small_model(family, dtype, seed) for seed in range(method.models or 3)]


def u_nets(count=2, dtype=torch.float16):
    return [unet_of(small_model(dtype=dtype, seed=seed)) for seed in range(count)]


def on_gpu(model, device="cuda"):
    return {name: tensor.to(device) for name, tensor in model.items()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(oracle.bits(tensor), oracle.bits(wanted[name])), name


# -- in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_state_dicts(name):
    """Tensors of all dtypes: the bits of the CPU, on the device, without a wait."""
    method = METHODS[name]
    models = [mixed(unet_of(model)) for model in models_for(method, torch.float32)]
    wanted = blockmerge.merge_state_dicts(*models, **options(method))
    with EmulatedGpu(lacks_float8=MOVES) as gpu:
        there = [on_gpu(model) for model in models]
        if method.random:  # its table is brought to a device once
            blockmerge.merge_state_dicts(*there, **options(method))
        gpu.waits.clear()
        merged = blockmerge.merge_state_dicts(*there, **options(method))
        assert {str(tensor.device) for tensor in merged.values()} == {"cuda:0"}
        assert not gpu.waits
    assert_same_bits(merged, wanted)


@pytest.mark.parametrize("name", ["weighted_sum", "add_difference", "slerp", "dare", "cosine_a"])
def test_models_of_several_dtypes_and_devices(name):
    """A on the GPU, the others in the CPU's memory and in other dtypes: each tensor is waited for on its way."""
    method = METHODS[name]
    a, *others = [unet_of(model) for model in models_for(method, torch.float32)]
    a, others = mixed(a), [mixed(one, first) for first, one in enumerate(others, 1)]
    wanted = blockmerge.merge_state_dicts(a, *others, **options(method))
    with EmulatedGpu() as gpu:
        there = on_gpu(a)
        gpu.waits.clear()
        merged = blockmerge.merge_state_dicts(there, *others, **options(method))
        assert {str(tensor.device) for tensor in merged.values()} == {"cuda:0"}
        passes = 2 if method.locality == "model" else 1
        tables = 1 if method.random and "normal" in method.formula else 0
        assert gpu.waits == ["a copy to the device"] * (passes * len(a) * len(others) + tables)
    assert_same_bits(merged, wanted)


def test_page_locked_models_may_be_changed_once_they_are_merged():
    """Also those of which tensors are only copied, as at weight 1."""
    a, b = u_nets()
    with EmulatedGpu() as gpu:
        locked = {name: tensor.pin_memory() for name, tensor in b.items()}
        merged = blockmerge.merge_state_dicts(on_gpu(a), locked, weights=1)
        for tensor in locked.values():
            tensor.zero_()
        gpu.finish()
    assert_same_bits(merged, b)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_position_ids_are_waited_for_once_and_put_right_without(family):
    models = [small_model(family, seed=seed) for seed in range(2)]
    name = POSITIONS.get(family)
    if name is not None:
        models[0][name] = torch.arange(77).expand(1, -1).half()
        models[0][name][0, 5] = 4.25
    wanted = blockmerge.merge_state_dicts(*models, weights=0.5)
    with EmulatedGpu() as gpu:
        there = [on_gpu(model) for model in models]
        gpu.waits.clear()
        merged = blockmerge.merge_state_dicts(*there, weights=0.5)
        assert gpu.waits == ["a copy from the device"] * (name is not None)
    assert_same_bits(merged, wanted)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scales_are_waited_for_together(spelling, by_row):
    a, b = u_nets()
    codes, _, _ = quantised(a, spelling, by_row=by_row)
    wanted = blockmerge.merge_state_dicts(codes, b, weights=0.5)
    with EmulatedGpu() as gpu:
        there = [on_gpu(model) for model in (codes, b)]
        gpu.waits.clear()
        merged = blockmerge.merge_state_dicts(*there, weights=0.5)
        assert len(gpu.waits) == sum(word in " ".join(codes) for word in ("scale", "comfy_quant"))
    assert_same_bits(merged, wanted)


def test_what_is_brought_to_the_cpu_is_that_of_the_callers_stream():
    a, b = u_nets()
    wanted = blockmerge.merge_state_dicts(a, b, weights=0.4)
    with EmulatedGpu() as gpu, torch.cuda.stream(torch.cuda.Stream()):
        there = {
            name: torch.empty_like(tensor, device="cuda").copy_(tensor.cuda()) for name, tensor in b.items()
        }
        merged = blockmerge.merge_state_dicts(a, there, weights=0.4)
        gpu.finish()
    assert_same_bits(merged, wanted)


def test_threads_share_the_table_of_chance():
    found, start = [], threading.Barrier(8)

    def look():
        start.wait()
        found.append(randomness._pairs_on(torch.device("cuda", 1)))

    with EmulatedGpu(devices=2):
        threads = [threading.Thread(target=look) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(map(id, found))) == 1


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three models in files, of all dtypes, with a tensor of 6 MB, two pieces."""
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for seed in range(3):
        model = mixed(small_model(dtype=torch.float32, seed=seed))
        model[TOKENS] = torch.randn(49408, 64, generator=torch.Generator().manual_seed(seed)).half()
        paths.append(folder / f"{seed}.safetensors")
        save_file(model, paths[-1])
    return paths


@pytest.fixture
def merged_on(files, tmp_path):
    """A function that merges files on a device and returns the output's path, which is new."""

    def merge(device, count=2, **given):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
        given = {"method": "slerp", "weights": 0.4, "threads": 3, **given}
        blockmerge.merge(*files[:count], output=output, device=device, **given)
        return output

    return merge


@pytest.mark.parametrize("name", IN_FILES)
def test_files(merged_on, name):
    """Three workers, each with a stream and page-locked memory of its own, and late copies: the same bytes. No
    memory is kept but the table of chance.
    """
    method = METHODS[name]
    given = {"count": method.models or 3, **options(method)}
    wanted = merged_on("cpu", **given)
    with EmulatedGpu() as gpu:
        found = merged_on("cuda", **given)
        assert gpu.launches or method.rows
        table = randomness._PAIRS.get(torch.device("cuda:0"))  # of this emulation or an earlier one
        assert gpu.emptied in ([(0, 0)], [(0 if table is None else table.nbytes, 0)])
        assert gpu.emptied_locked == 1
        assert {size & (size - 1) for size in gpu.locked_at_once} <= {0}  # powers of two
    assert found.read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("allowed", [False, True])
def test_files_wait_for_what_is_computed_in_one_way_of_a_piece(merged_on, allowed):
    """Once for it to be back, and before that once for its sum, where NaN and infinity are looked for."""
    given = {"method": "add_difference", "count": 3, "allow_nonfinite": allowed}
    wanted = merged_on("cpu", **given)
    with EmulatedGpu() as gpu:
        found = merged_on("cuda", **given)
        waits = Counter(gpu.waits)
        count = waits["Stream.synchronize"]
        looks = {} if allowed else {"_local_scalar_dense": count}
        assert waits == {"Stream.synchronize": count, "empty_cache": 1, **looks}
        assert count < 2 * len(load_file(wanted))
    assert found.read_bytes() == wanted.read_bytes()


def test_a_piece_is_computed_at_once(files, merged_on):
    """A tensor of 6 MB is two pieces of 4 MB at most, not 12 of 512 KB."""
    with EmulatedGpu() as gpu:
        merged_on("cuda", 1, method="add_noise", threads=8)
    assert gpu.launches.count("arange") <= len(load_file(files[0])) + 2


@pytest.mark.parametrize("device", ["cuda", "auto", "cuda:1"])
def test_the_callers_gpu_is_meant_by_cuda_and_auto(merged_on, device):
    """New threads have GPU 0 as their current one; the merge is on the caller's."""
    with EmulatedGpu(devices=2) as gpu:
        torch.cuda.set_device(1)
        merged_on(device)
        assert gpu.used == {torch.device("cuda", 1)}


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("cuda:2", "device cuda:2 cannot be used: GPUs are counted from 0, and there are 2"),
        ("cuda:256", "device cuda:256 cannot be used: GPUs are counted from 0, and there are 2"),
        ("cuda:257", "device cuda:257 cannot be used"),
        ("mps", "unknown device 'mps'"),
    ],
)
def test_gpus_that_are_not_there(merged_on, tmp_path, device, says):
    with EmulatedGpu(devices=2), pytest.raises(blockmerge.RecipeError, match=says):
        merged_on(device)
    assert list(tmp_path.iterdir()) == []


def test_auto_is_the_cpu_where_the_gpu_cannot_be_used(merged_on):
    with EmulatedGpu(fails={"memory": "CUDA error: out of memory"}, most=0) as gpu:
        found = merged_on("auto")
        assert not gpu.launches
    assert found.read_bytes() == merged_on("cpu").read_bytes()


@pytest.mark.parametrize("what", ["stream", "page-locked memory", "memory", "a value"])
def test_what_fails_on_a_gpu_is_told_in_a_line(merged_on, tmp_path, what):
    """And no memory is kept, however long the error is."""
    message = f"CUDA error: no {what}\nCUDA kernel errors might be asynchronously reported"
    with EmulatedGpu(fails={what: message}, most=1 << 16 if what == "memory" else None) as gpu:
        with pytest.raises(blockmerge.RecipeError) as refused:
            merged_on("cuda")
        assert gpu.emptied == [(0, 0)]
    assert str(refused.value) == (
        f"cuda:0 cannot do this merge: CUDA error: no {what} (fewer threads, or the device cpu, can)"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_fails_on_a_gpu_keeps_no_memory(merged_on):
    @blockmerge.merge_method()
    def failing(a, b, *, alpha):
        """Fails at the largest tensor."""
        if a.numel() > 1 << 20:
            raise ValueError("too large")
        return a * alpha + b

    with EmulatedGpu() as gpu:
        with pytest.raises(blockmerge.RecipeError, match=r"the method .* failed: ValueError: too large"):
            merged_on("cuda", method=failing)
        assert gpu.emptied == [(0, 0)]


def test_memory_that_cannot_be_given_back_is_no_error_and_hides_none(merged_on):
    fails = {"an empty cache": "CUDA error: unspecified launch failure"}
    with EmulatedGpu(fails=fails):
        found = merged_on("cuda")
        fails["stream"] = "CUDA error: no stream"
        with pytest.raises(blockmerge.RecipeError, match="no stream"):
            merged_on("cuda")
    assert found.read_bytes() == merged_on("cpu").read_bytes()


def test_what_fails_in_memory_is_told_in_a_line():
    """With all the devices it may have been, wherever in the merge it fails."""
    a, b = (small_model(seed=seed) for seed in range(2))
    a[POSITIONS["sd1"]] = torch.arange(77).view(1, -1)
    fails = {"memory": "CUDA out of memory. Tried …\nmore"}
    with EmulatedGpu(devices=2, fails=fails) as gpu:
        there, elsewhere = on_gpu(a), on_gpu(b, "cuda:1")
        gpu.most = 64
        with pytest.raises(blockmerge.RecipeError) as refused:
            blockmerge.merge_state_dicts(there, b, weights=0.4)
        said = "cuda:0 cannot do this merge: CUDA out of memory. Tried … (merge state dicts on the CPU, or files)"
        assert str(refused.value) == said
        with pytest.raises(blockmerge.RecipeError, match=r"^cuda:0 or cuda:1 cannot do this merge: CUDA out"):
            blockmerge.merge_state_dicts(there, elsewhere, weights=0.4)
        fails["memory"] = ""
        with pytest.raises(blockmerge.RecipeError, match=r"^cuda:0 cannot do this merge: OutOfMemoryError "):
            blockmerge.merge_state_dicts(there, b, weights=0.4)
        gpu.most, fails["a value"] = None, "CUDA error: an illegal memory access was encountered"
        for given in ((there, b), (a, elsewhere)):  # of position_ids, and of B
            with pytest.raises(
                blockmerge.RecipeError, match=r"^cuda:[01] cannot do this merge: CUDA error: an il"
            ):
                blockmerge.merge_state_dicts(*given, weights=0.4)
        there, b = unet_of(there), unet_of(b)
        with pytest.raises(
            blockmerge.RecipeError, match=r"^cuda:0 cannot do this merge: CUDA error: an illegal"
        ):
            blockmerge.merge_state_dicts(there, b, weights=0.4, check_finite=True)


# -- what some devices and versions lack ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weighted_sum", "slerp", "cosine_a", "ties", "model_stock", "dare"])
def test_a_device_without_float64(name):
    """A on an Apple GPU, others in float64 in the CPU's memory: computed in float32, near float64's results."""
    method = METHODS[name]
    a, *others = [unet_of(model) for model in models_for(method, torch.float32)]
    others = [{name: tensor.double() for name, tensor in one.items()} for one in others]
    wanted = blockmerge.merge_state_dicts(a, *others, **options(method))
    with EmulatedGpu(kind="mps"):
        there = {name: tensor.to("mps") for name, tensor in a.items()}
        merged = blockmerge.merge_state_dicts(there, *others, **options(method))
        assert {tensor.device.type for tensor in merged.values()} == {"mps"}
    for tensor, value in wanted.items():
        assert torch.allclose(merged[tensor], value, rtol=1e-4, atol=1e-5), tensor


@pytest.mark.parametrize("density", [0, 0.2, 0.3, 0.7, 1])
def test_ties_keeps_the_same_values_for_every_density_and_nan(density):
    """Deterministic algorithms are enough for it."""
    models = u_nets(4)
    proj = PROJ.removeprefix("model.diffusion_model.")
    models[1][proj].view(-1)[::3] = torch.nan
    models[2][proj].view(-1)[::5] = torch.inf
    models[3][proj].view(-1)[::4] = torch.nan  # a quarter, and a tenth of infinity
    models[3][proj].view(-1)[1::10] = torch.inf
    given = {"method": "ties", "weights": 0.4, "density": density}
    wanted = blockmerge.merge_state_dicts(*models, **given)
    torch.use_deterministic_algorithms(True)
    try:
        with EmulatedGpu():
            merged = blockmerge.merge_state_dicts(*[on_gpu(model) for model in models], **given)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, tensor in wanted.items():
        assert torch.equal(merged[name].isnan(), tensor.isnan()), name
        assert torch.equal(merged[name].nan_to_num(), tensor.nan_to_num()), name


# -- live ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIVE)
def test_live(name):
    method = METHODS[name]
    models = [unet_of(model) for model in models_for(method, LIVE_DTYPES[name])]
    on_cpu = module_of(models[0])
    LiveMerge(on_cpu, *models, method=name).apply(**for_apply(method))
    module = module_of(models[0])
    with EmulatedGpu() as gpu:
        live = LiveMerge(module.cuda(), *models, method=name)
        if method.random:  # its table is brought to a device once
            live.apply(weights=0.7)
        gpu.waits.clear()
        live.apply(weights={"OUT05": 0.75, "IN00": 0}, keep=True)
        live.apply(**for_apply(method))
        assert not gpu.waits
        assert {str(one.device) for one in module.parameters()} == {"cuda:0"}
    assert_same_bits(values(module), values(on_cpu))


def test_live_from_files(files):
    models = [
        unet_of({name: tensor.half() for name, tensor in load_file(path).items()}) for path in files[:2]
    ]
    module, on_cpu = module_of(models[0]), module_of(models[0])
    LiveMerge(on_cpu, *files[:2]).apply(weights=0.4)
    with EmulatedGpu() as gpu, LiveMerge(module.cuda(), *files[:2]) as live:
        gpu.waits.clear()
        live.apply(weights=0.4)
        assert not gpu.waits
        found = {name: one.cpu() for name, one in values(module).items()}
    assert_same_bits(found, values(on_cpu))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", ["weighted_sum", "cosine_a", "extract", "dare"])
def test_a_live_merge_in_several_buffers(monkeypatch, name, kind):
    """As it is for SDXL, whose U-Net is larger than what some devices give out at once."""
    method = METHODS[name]
    models = [unet_of(model) for model in models_for(method)]
    whole = module_of(models[0])
    LiveMerge(whole, *models, method=name).apply(**for_apply(method))
    monkeypatch.setattr(flat_unet, "_MOST_BYTES", 1 << 16)
    largest = max(tensor.nbytes for tensor in models[0].values())
    with EmulatedGpu(kind=kind, fails={"memory": "Invalid buffer size: 9 GB"}, most=max(largest, 1 << 16)):
        module = module_of(models[0]).to(kind)
        with LiveMerge(module, *models, method=name) as live:
            live.apply(weights={"OUT05": 0.75}, keep=True)
            live.apply(**for_apply(method))
            found = {name: tensor.clone() for name, tensor in values(module).items()}
            assert len({one.untyped_storage().data_ptr() for one in module.parameters()}) > 1
        assert_same_bits(values(module), models[0])
    if kind == "cuda":
        assert_same_bits(found, values(whole))
    for name, tensor in found.items():  # without float64, a step may be another
        assert torch.allclose(tensor, values(whole)[name], rtol=2e-3, atol=1e-3), name


@pytest.fixture
def beside():
    """A GPU, and a stream that has waited for the one on which a module is brought there."""
    with EmulatedGpu():
        side = torch.cuda.Stream()

        def make(method="weighted_sum"):
            models = u_nets()
            module = module_of(models[0]).cuda()
            live = LiveMerge(module, *models, method=method)
            side.wait_stream(torch.cuda.current_stream())
            return module, live

        yield side, make
        side.finish()


@pytest.mark.parametrize("method", ["weighted_sum", "cosine_a"])
def test_memory_outlives_what_another_stream_does_with_it(beside, method):
    """`close` after `apply` on a side stream: what that has not done yet keeps its memory."""
    side, make = beside
    _, live = make(method)
    live.apply(weights=0.7)  # some look at the whole model first
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        live.apply(weights=0.4)
    live.close()


def test_memory_outlives_what_a_method_that_failed_has_begun(beside):
    side, make = beside

    @blockmerge.merge_method()
    def failing(a, b, *, alpha):
        """Fails in its second block."""
        if alpha == 0.5:
            raise ValueError
        return a + b

    _, live = make(failing)
    with torch.cuda.stream(side), pytest.raises(blockmerge.RecipeError, match="failed: ValueError"):
        live.apply(weights={"IN00": 0.4, "OUT05": 0.5})
    live.close()


def test_memory_outlives_what_the_module_does_on_the_stream_where_it_is_closed(beside):
    side, make = beside
    module, live = make()
    with torch.cuda.stream(side):
        for one in module.parameters():
            one.detach().float()
        live.close()


@pytest.mark.parametrize("from_files", [False, True])
def test_what_fails_while_models_are_brought_there_is_told_in_a_line(files, from_files):
    models = u_nets()
    module = module_of(models[0])
    given = files[:2] if from_files else models
    fails = {}
    with EmulatedGpu(fails=fails):
        module.cuda()
        fails["copy"] = "CUDA error: an illegal memory access"
        with pytest.raises(blockmerge.RecipeError) as refused:
            LiveMerge(module, *given)
    assert str(refused.value) == (
        "cuda:0 cannot do this merge: CUDA error: an illegal memory access "
        "(let go of other things there, or merge files)"
    )
    assert_same_bits(values(module), models[0])


# -- how much is launched ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "family"), [("add_difference", "sdxl"), *((name, "sd1") for name in some(OF_ELEMENTS, of=2))]
)
def test_small_tensors_are_computed_together(name, family):
    """No function is launched half as many times as a U-Net has tensors: thin ones, but as many as there are.

    Those of more than 4 million elements are computed on their own, and in blocks.
    """
    method = METHODS[name]
    shapes = {n: shape for n, shape in demo_layout(family).items() if n.startswith("model.diffusion_model.")}
    models = [
        {n: torch.full(shape, 1.0 + number).half() for n, shape in shapes.items()}
        for number in range(method.models or 3)
    ]
    with EmulatedGpu() as gpu:
        there = [on_gpu(model) for model in models]
        gpu.launches.clear()
        blockmerge.merge_state_dicts(*there, **options(method))
        assert max(map(gpu.launches.count, set(gpu.launches))) < len(models[0]) / 2


def test_large_tensors_are_computed_on_their_own_and_in_blocks():
    """They are not laid side by side, nor do they part those that are; what is wide fits a GPU's cache."""
    proj = PROJ.removeprefix("model.diffusion_model.")
    models = u_nets(3)
    for model in models:
        model[proj] = torch.ones(2200, 2000).half()
    with EmulatedGpu() as gpu:
        there = [on_gpu(model) for model in models]
        for method, wide in (("weighted_sum", 0), ("add_difference", 1 << 22)):
            gpu.launches.clear()
            gpu.launched_most.clear()
            blockmerge.merge_state_dicts(*there[: METHODS[method].models], method=method, weights=0.4)
            assert gpu.launches.count("cat") == METHODS[method].models
            assert gpu.launched_most.get(torch.float32, 0) == wide
            assert gpu.launched_most[torch.float16] == (1 << 22 if wide else 2200 * 2000)


def test_the_benchmark_of_stages_is_the_merge(merged_on, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    overlap = importlib.import_module("benchmarks.overlap")
    with EmulatedGpu(), overlap.timed_stages() as spent:
        found = merged_on("cuda", threads=1)
    assert {"read", "there", "compute", "back", "write"} == spent.keys()
    assert found.read_bytes() == merged_on("cpu").read_bytes()
