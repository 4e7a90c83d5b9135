"""Merges of tensors on a GPU, and files with one, where there is none: the CPU's bits, no waits, and the rules
of CUDA kept. What `EmulatedGpu` holds to is told there, and tested at the end.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import blockmerge
from blockmerge import LiveMerge
from blockmerge.anatomy import is_position_ids, layout
from blockmerge.merging import flat_unet
from blockmerge.methods import METHODS
from tests import oracle
from tests.emulated_gpu import EmulatedGpu
from tests.emulated_streams import LateCopyError, OrderError
from tests.small_models import small_model
from tests.test_live import module_of, unet_of, values

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
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


def models_for(method, dtype=torch.float16, family="sd1"):
    return [small_model(family, dtype, seed) for seed in range(method.models or 3)]


def on_gpu(model):
    return {name: tensor.cuda() for name, tensor in model.items()}


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(oracle.bits(tensor), oracle.bits(wanted[name])), name


# -- in memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_state_dicts(name, dtype):
    """The bits of the CPU, on the device, without a wait."""
    method = METHODS[name]
    models = [unet_of(model) for model in models_for(method, DTYPES[dtype])]
    wanted = blockmerge.merge_state_dicts(*models, **options(method))
    with EmulatedGpu() as gpu:
        there = [on_gpu(model) for model in models]
        if method.random:  # its table is brought to a device once
            blockmerge.merge_state_dicts(*there, **options(method))
        gpu.waits.clear()
        merged = blockmerge.merge_state_dicts(*there, **options(method))
        assert {str(tensor.device) for tensor in merged.values()} == {"cuda:0"}
        assert not gpu.waits
    assert_same_bits(merged, wanted)


@pytest.mark.parametrize("other", ["bf16", "fp32", "fp8_e4m3fn"])
@pytest.mark.parametrize("name", ["weighted_sum", "add_difference", "slerp", "dare", "cosine_a"])
def test_models_of_several_dtypes_and_devices(name, other):
    """A on the GPU, the others in the CPU's memory and in another dtype: each is brought there."""
    method = METHODS[name]
    a, *others = models_for(method)
    others = [
        {
            name: tensor.to(DTYPES[other]) if tensor.is_floating_point() else tensor
            for name, tensor in one.items()
        }
        for one in others
    ]
    wanted = blockmerge.merge_state_dicts(a, *others, **options(method))
    with EmulatedGpu():
        merged = blockmerge.merge_state_dicts(on_gpu(a), *others, **options(method))
        assert {str(tensor.device) for tensor in merged.values()} == {"cuda:0"}
    assert_same_bits(merged, wanted)


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


# -- files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three models in files, with a tensor of 6 MB, two pieces, and one in fp8."""
    folder = tmp_path_factory.mktemp("files")
    paths = []
    for seed in range(3):
        model = small_model(seed=seed)
        model[TOKENS] = torch.randn(49408, 64, generator=torch.Generator().manual_seed(seed)).half()
        model[PROJ] = model[PROJ].to(torch.float8_e4m3fn)
        paths.append(folder / f"{seed}.safetensors")
        save_file(model, paths[-1])
    return paths


@pytest.mark.parametrize("name", METHODS)
def test_files(files, tmp_path, name):
    """Three workers, each with a stream and page-locked memory of its own, and late copies: the same bytes."""
    method = METHODS[name]
    given = files[: method.models or 3]
    blockmerge.merge(*given, output=tmp_path / "cpu.safetensors", **options(method))
    with EmulatedGpu() as gpu:
        blockmerge.merge(
            *given, output=tmp_path / "gpu.safetensors", device="cuda", threads=3, **options(method)
        )
        assert gpu.launches or method.rows
        assert gpu.emptied
        assert not gpu.locked_bytes
    ours, theirs = ((tmp_path / f"{device}.safetensors").read_bytes() for device in ("cpu", "gpu"))
    assert ours == theirs


def test_a_piece_is_computed_at_once(files, tmp_path):
    """A tensor of 6 MB is two pieces of 4 MB at most, not 12 of 512 KB."""
    with EmulatedGpu() as gpu:
        blockmerge.merge(
            files[0],
            output=tmp_path / "out.safetensors",
            method="add_noise",
            weights=0.4,
            device="cuda",
            threads=8,
        )
    tensors = len(load_file(files[0]))
    assert gpu.launches.count("arange") <= tensors + 2


def test_the_callers_gpu_is_meant_by_cuda_and_auto(files, tmp_path):
    """New threads have GPU 0 as their current one; the merge is on the caller's."""
    for device in ("cuda", "auto", "cuda:1"):
        with EmulatedGpu(devices=2) as gpu:
            torch.cuda.set_device(1)
            blockmerge.merge(
                *files[:2],
                output=tmp_path / f"{device.replace(':', '')}.safetensors",
                method="slerp",
                weights=0.4,
                device=device,
                threads=3,
            )
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
def test_gpus_that_are_not_there(files, tmp_path, device, says):
    with EmulatedGpu(devices=2), pytest.raises(blockmerge.RecipeError, match=says):
        blockmerge.merge(*files[:2], output=tmp_path / "no.safetensors", weights=0.4, device=device)
    assert not (tmp_path / "no.safetensors").exists()


def test_auto_is_the_cpu_where_the_gpu_cannot_be_used(files, tmp_path):
    with EmulatedGpu(fails={"memory": "CUDA error: out of memory"}, most=0) as gpu:
        blockmerge.merge(
            *files[:2], output=tmp_path / "auto.safetensors", method="slerp", weights=0.4, device="auto"
        )
        assert not gpu.launches
    blockmerge.merge(*files[:2], output=tmp_path / "cpu.safetensors", method="slerp", weights=0.4)
    assert (tmp_path / "auto.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["stream", "page-locked memory", "memory"])
def test_what_fails_on_a_gpu_is_told_in_a_line(files, tmp_path, what):
    message = f"CUDA error: no {what}\nCUDA kernel errors might be asynchronously reported"
    with (
        EmulatedGpu(fails={what: message}, most=1 << 16 if what == "memory" else None) as gpu,
        pytest.raises(blockmerge.RecipeError) as refused,
    ):
        blockmerge.merge(
            *files[:2], output=tmp_path / "no.safetensors", method="slerp", weights=0.4, device="cuda"
        )
    assert str(refused.value) == (
        f"cuda:0 cannot do this merge: CUDA error: no {what} (fewer threads, or the device cpu, can)"
    )
    assert gpu.emptied
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_memory_is_told_in_a_line():
    models = [small_model(seed=seed) for seed in range(2)]
    with EmulatedGpu(fails={"memory": "CUDA out of memory. Tried …"}) as gpu:
        there = [on_gpu(model) for model in models]
        gpu.most = 64
        with pytest.raises(
            blockmerge.RecipeError, match=r"^cuda:0 cannot do this merge: CUDA out of memory"
        ) as no:
            blockmerge.merge_state_dicts(*there, weights=0.4)
        assert "\n" not in str(no.value)


# -- what some devices and versions lack ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
@pytest.mark.parametrize("name", METHODS)
def test_without_float8_in_what_moves_elements(name, dtype):
    """As in torch 2.4, whose GPUs can copy and convert 8-bit floats, but not join or pick them."""
    method = METHODS[name]
    models = [unet_of(model) for model in models_for(method, DTYPES[dtype])]
    wanted = blockmerge.merge_state_dicts(*models, **options(method))
    with EmulatedGpu(lacks_float8={"cat", "_foreach_copy_", "index_select", "stack", "index", "fill_"}):
        merged = blockmerge.merge_state_dicts(*[on_gpu(model) for model in models], **options(method))
    assert_same_bits(merged, wanted)


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


def test_ties_keeps_the_same_values_for_every_density_and_nan():
    models = [small_model(seed=seed) for seed in range(3)]
    models[1][PROJ].view(-1)[::3] = torch.nan
    models[2][PROJ].view(-1)[::5] = torch.inf
    for density in (0, 0.01, 0.3, 0.5, 0.7, 0.99, 1):
        given = {"method": "ties", "weights": 0.4, "density": density}
        wanted = blockmerge.merge_state_dicts(*models, **given)
        with EmulatedGpu() as gpu:
            merged = blockmerge.merge_state_dicts(*[on_gpu(model) for model in models], **given)
            assert "kthvalue" not in gpu.launches
        for name, tensor in wanted.items():
            assert torch.equal(merged[name].isnan(), tensor.isnan()), name
            assert torch.equal(merged[name].nan_to_num(), tensor.nan_to_num()), name


# -- live ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", METHODS)
def test_live(name, dtype):
    method = METHODS[name]
    models = [unet_of(model) for model in models_for(method, DTYPES[dtype])]
    given = {key: value for key, value in options(method).items() if key != "method"}
    on_cpu = module_of(models[0])
    LiveMerge(on_cpu, *models, method=name).apply(**given)
    module = module_of(models[0])
    with EmulatedGpu() as gpu:
        live = LiveMerge(module.cuda(), *models, method=name)
        live.apply(weights=0.7)
        gpu.waits.clear()
        live.apply(**given)
        live.apply(weights={"OUT05": 0.75, "IN00": 0}, keep=True)
        live.apply(**given)
        assert not gpu.waits
        assert {str(one.device) for one in module.parameters()} == {"cuda:0"}
    assert_same_bits(values(module), values(on_cpu))


@pytest.mark.parametrize("kind", ["cuda", "mps"])
@pytest.mark.parametrize("name", ["weighted_sum", "cosine_a", "extract", "dare"])
def test_a_live_merge_in_several_buffers(monkeypatch, name, kind):
    """As it is for SDXL, whose U-Net is larger than what some devices give out at once."""
    method = METHODS[name]
    models = [unet_of(model) for model in models_for(method)]
    given = {key: value for key, value in options(method).items() if key != "method"}
    whole = module_of(models[0])
    LiveMerge(whole, *models, method=name).apply(**given)
    monkeypatch.setattr(flat_unet, "_MOST_BYTES", 1 << 16)
    largest = max(tensor.nbytes for tensor in models[0].values())
    with EmulatedGpu(kind=kind, fails={"memory": "Invalid buffer size: 9 GB"}, most=max(largest, 1 << 16)):
        module = module_of(models[0]).to(kind)
        with LiveMerge(module, *models, method=name) as live:
            live.apply(weights=0.7)
            live.apply(**given)
            live.apply(weights={"OUT05": 0.75}, keep=True)
            live.apply(**given)
            found = {name: tensor.clone() for name, tensor in values(module).items()}
            assert len({one.untyped_storage().data_ptr() for one in module.parameters()}) > 1
        assert_same_bits(values(module), models[0])
    if kind == "cuda":
        assert_same_bits(found, values(whole))
    for name, tensor in found.items():  # without float64, a step may be another
        assert torch.allclose(tensor, values(whole)[name], rtol=2e-3, atol=1e-3), name


def test_memory_outlives_what_another_stream_does_with_it():
    """`close` after `apply` on a side stream: what that has not done yet keeps its memory."""
    models = [unet_of(small_model(seed=seed)) for seed in range(2)]
    with EmulatedGpu():
        module = module_of(models[0]).cuda()
        live = LiveMerge(module, *models)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # for the models, which were brought there on it
        with torch.cuda.stream(side):
            live.apply(weights=0.4)
        live.close()
        del live
        side.synchronize()


# -- how much is launched ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [method.name for method in METHODS.values() if method.locality == "element" and not method.random]
)
def test_small_tensors_are_computed_together(name):
    """No function is launched half as many times as there are tensors."""
    method = METHODS[name]
    models = [unet_of(model) for model in models_for(method)]
    with EmulatedGpu() as gpu:
        there = [on_gpu(model) for model in models]
        gpu.launches.clear()
        blockmerge.merge_state_dicts(*there, **options(method))
        assert max(map(gpu.launches.count, set(gpu.launches))) < len(models[0]) / 2


def test_large_tensors_are_not_laid_side_by_side():
    models = [unet_of(small_model(seed=seed)) for seed in range(2)]
    for model in models:
        model[PROJ.removeprefix("model.diffusion_model.")] = torch.randn(2200, 2000).half()
    with EmulatedGpu() as gpu:
        there = [on_gpu(model) for model in models]
        gpu.launched_bytes.clear()
        blockmerge.merge_state_dicts(*there, weights=0.4)
        assert gpu.launched_bytes["cat"] < 2200 * 2000


def test_the_benchmark_of_stages_is_the_merge(files, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    overlap = importlib.import_module("benchmarks.overlap")
    blockmerge.merge(*files[:2], output=tmp_path / "cpu.safetensors", method="slerp", weights=0.4)
    given = {"method": "slerp", "weights": 0.4, "threads": 1, "device": "cuda"}
    with EmulatedGpu(), overlap.timed_stages() as spent:
        blockmerge.merge(*files[:2], output=tmp_path / "gpu.safetensors", **given)
    assert {"read", "there", "compute", "back", "write"} == spent.keys()
    assert (tmp_path / "gpu.safetensors").read_bytes() == (tmp_path / "cpu.safetensors").read_bytes()


# -- the emulation itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda a: a.sum().item(),
        lambda a: a[a > 0],
        lambda a: a.cpu(),
        lambda a: bool(a.isfinite().all()),
        torch.nonzero,
        lambda a: torch.tensor([1.0], device=a.device),
        lambda a: torch.ones(3).to(a.device),
        lambda a: a.masked_fill_(a > 0, 0).tolist(),
        lambda a: a.view(-1)[torch.tensor([0])],
        lambda a: torch.ones(1 << 15).to(a.device, non_blocking=True),
        lambda a: torch.cuda.synchronize(),
        lambda a: torch.cuda.current_stream().synchronize(),
        lambda a: torch.cuda.current_stream().record_event().synchronize(),
        lambda a: torch.cuda.empty_cache(),
    ],
)
def test_what_waits_is_seen(wait):
    @blockmerge.merge_method()
    def waiting(a, b, *, alpha):
        """Waits."""
        wait(a)
        return a

    models = [unet_of(small_model(seed=seed)) for seed in range(2)]
    with EmulatedGpu() as gpu:
        there = [on_gpu(model) for model in models]
        gpu.waits.clear()
        blockmerge.merge_state_dicts(*there, method=waiting, weights=0.5)
        assert gpu.waits


def test_devices_do_not_meet():
    with EmulatedGpu(devices=2):
        a, b = torch.ones(3).cuda(), torch.ones(3)
        for there in (b, b.to("cuda:1")):
            with pytest.raises(RuntimeError, match="same device"):
                a + there
        with pytest.raises(TypeError, match="numpy"):
            a.numpy()
        assert (a + torch.tensor(1.0)).device == a.device  # a single number may be anywhere


def test_memory_that_is_used_again_too_early_is_seen():
    with EmulatedGpu():
        stream = torch.cuda.Stream()
        locked = torch.zeros(8, pin_memory=True)
        with torch.cuda.stream(stream):
            locked.to("cuda", non_blocking=True)
            locked.fill_(1)  # the next chunk, before this one is there
        with pytest.raises(LateCopyError, match="changed"):
            stream.synchronize()


@pytest.mark.parametrize("way", ["there", "back"])
def test_page_locked_memory_that_is_freed_too_early_is_seen(way):
    with EmulatedGpu() as gpu:
        locked, there = torch.zeros(8, pin_memory=True), torch.ones(8).cuda()
        there.copy_(locked, non_blocking=True) if way == "there" else locked.copy_(there, non_blocking=True)
        del locked
        with pytest.raises(LateCopyError, match="freed"):
            gpu.finish()


def test_results_that_are_read_too_early_are_rubbish():
    with EmulatedGpu() as gpu:
        there, locked = torch.ones(8).cuda(), torch.zeros(8, pin_memory=True)
        locked.copy_(there, non_blocking=True)
        assert not torch.equal(locked, torch.ones(8))
        gpu.finish()
        assert torch.equal(locked, torch.ones(8))


def test_device_memory_that_is_freed_too_early_is_seen():
    with EmulatedGpu():
        side, there = torch.cuda.Stream(), torch.ones(8).cuda()
        with torch.cuda.stream(side):
            there.add_(1)
        del there
        with pytest.raises(LateCopyError, match="freed"):
            side.synchronize()


WAYS_TO_WAIT = {
    "nothing": lambda one, other: None,
    "a stream": lambda one, other: other.wait_stream(one),
    "an event": lambda one, other: other.wait_event(one.record_event()),
    "the processor": lambda one, other: one.synchronize(),
    "the device": lambda one, other: torch.cuda.synchronize(),
    "the processor for an event": lambda one, other: one.record_event().synchronize(),
}


@pytest.mark.parametrize("wait", WAYS_TO_WAIT)
def test_streams_that_do_not_wait_for_each_other_are_seen(wait):
    with EmulatedGpu():
        one, other = torch.cuda.Stream(), torch.cuda.Stream()
        with torch.cuda.stream(one):
            there = torch.ones(8).cuda().add_(1)
        WAYS_TO_WAIT[wait](one, other)
        with torch.cuda.stream(other):
            if wait == "nothing":
                with pytest.raises(OrderError):
                    there.add_(1)
                with pytest.raises(OrderError):
                    there.cpu()
            else:
                there.add_(1)
                there.record_stream(other)
        one.wait_stream(other)


def test_new_threads_are_under_its_rules():
    found = []

    def look():
        found.append((torch.cuda.current_device(), str(torch.ones(1, device="cuda").device)))

    with EmulatedGpu(devices=2):
        torch.cuda.set_device(1)
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert found == [(0, "cuda:0")]
