"""`EmulatedGpu` itself: what it holds merges to is seen when it is broken."""

from __future__ import annotations

import threading

import pytest
import torch

import blockmerge
from tests.emulated_gpu import EmulatedGpu
from tests.emulated_streams import LateCopyError, OrderError
from tests.small_models import small_model
from tests.test_live import unet_of


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
        there = [{name: tensor.cuda() for name, tensor in model.items()} for model in models]
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
