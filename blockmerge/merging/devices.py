"""Where a merge is computed: which device and which streams are meant, and what goes wrong there, in one
line.

Loads torch: imported late.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from blockmerge.checkpoints import StateDict
from blockmerge.errors import RecipeError, shown
from blockmerge.methods import Method


def choose_device(device: str, method: Method | None = None) -> str:
    """Return the device that `device` means, a GPU with its number: without one, the calling thread's
    current one, which a worker's need not be.

    "auto" is that GPU, where there is one that can be used, for the methods that compute enough to be worth
    the way there and back. Raises RecipeError.
    """
    if device == "cpu":
        return device
    if device == "auto":
        heavy = method is not None and (method.locality != "element" or method.random)
        try:
            return _usable("cuda") if heavy and torch.cuda.is_available() else "cpu"
        except RecipeError:
            return "cpu"
    if re.fullmatch(r"cuda(:\d{1,3})?", device) is None:
        raise RecipeError(f"unknown device '{shown(device)}': cpu, cuda, cuda:N or auto")
    return _usable(device)


def _usable(device: str) -> str:
    number = device.partition(":")[2]
    try:
        index = int(number) if number else torch.cuda.current_device()
        count = torch.cuda.device_count()
        if index >= max(1, count):  # torch keeps eight bits of a number: 256 would be 0
            said = f"there {'is' if count == 1 else 'are'} {count}"
            raise RecipeError(f"device {device} cannot be used: GPUs are counted from 0, and {said}")
        torch.empty(1, device=f"cuda:{index}")
    except (RuntimeError, AssertionError) as error:
        # torch says "not compiled with CUDA" with an AssertionError
        raise RecipeError(f"device {device} cannot be used: {first_line(error)}") from error
    return f"cuda:{index}"


def devices_in(*given: object) -> Iterator[torch.device]:
    """Yield where the tensors of modules and of state dicts are; of anything else nothing."""
    for one in given:
        one = one.state_dict if isinstance(one, StateDict) else one
        held: Iterable[object] = one.values() if isinstance(one, Mapping) else ()
        held = one.parameters() if isinstance(one, torch.nn.Module) else held
        yield from (tensor.device for tensor in held if isinstance(tensor, torch.Tensor))


@contextmanager
def told_of(devices: Iterable[torch.device], instead: str) -> Iterator[None]:
    """Tell what fails on devices other than the CPU, memory above all, as a RecipeError of one line, which
    says what to do `instead`. `devices` are gone through only then.
    """
    try:
        yield
    except RuntimeError as error:
        others = sorted({str(device) for device in devices if device.type != "cpu"})
        if not others:
            raise
        said = f"{' or '.join(others)} cannot do this merge: {first_line(error)}"
        raise RecipeError(f"{said} ({instead})") from error


def first_line(error: BaseException) -> str:
    """What an error of torch's says, without the advice that follows; its class, where it says nothing."""
    return shown(next(iter(str(error).splitlines()), "") or type(error).__name__, 200)


def current_streams(devices: Iterable[torch.device]) -> list[Any]:
    """The calling thread's current streams of those devices that have streams and let memory be kept for
    them.
    """
    kinds = {device: getattr(torch, device.type) for device in devices if device.type in ("cuda", "xpu")}
    return [kind.current_stream(device) for device, kind in kinds.items()]


@contextmanager
def on_streams(streams: Iterable[Any]) -> Iterator[None]:
    """Make these the current streams of their devices: in a new thread, those of another."""
    with ExitStack() as stack:
        for stream in streams:
            stack.enter_context(getattr(torch, stream.device.type).stream(stream))
        yield


@contextmanager
def memory_given_back() -> Iterator[None]:
    """Let other programs have the memory that torch keeps of GPUs, and page-locked, for the next time: also
    what it keeps for the program that asks for the merge, which then has to ask for its own again.
    """
    handled = sys.exception()  # by whoever asks for the merge: what it holds is theirs
    try:
        yield
    except BaseException as error:
        _let_go(error, handled)
        raise
    finally:
        # Public in the newest torch only.
        public = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
        for empty in (torch.cuda.empty_cache, public or getattr(torch._C, "_host_emptyCache", None)):
            with suppress(Exception):  # a merge has ended as it has, and an error says why
                if empty is not None:
                    empty()


def _let_go(error: BaseException | None, handled: BaseException | None) -> None:
    """Hold nothing of what the functions that failed had in memory, however long the error is held; but leave
    what was `handled` before.
    """
    seen = [handled]
    while error is not None and error not in seen:
        traceback.clear_frames(error.__traceback__)
        seen.append(error)
        error = error.__cause__ or error.__context__
