"""Where a merge is computed: which device is meant, and what goes wrong there, in one line.

Loads torch: imported late.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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
        raise RecipeError(f"device {device} cannot be used: {shown(str(error).splitlines()[0])}") from error
    return f"cuda:{index}"


@contextmanager
def told_of(device: torch.device, instead: str) -> Iterator[None]:
    """Tell what fails on a device other than the CPU, memory above all, as a RecipeError of one line, which
    says what to do `instead`.
    """
    try:
        yield
    except RuntimeError as error:
        if device.type == "cpu":
            raise
        why = shown(str(error).splitlines()[0], 200)
        raise RecipeError(f"{device} cannot do this merge: {why} ({instead})") from error


def give_back(device: str) -> None:
    """Let other programs have the memory that torch keeps of a GPU, and page-locked, for the next time."""
    if not device.startswith("cuda"):
        return
    torch.cuda.empty_cache()
    # Public in the newest torch only.
    public = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)
    empty_locked = public or getattr(torch._C, "_host_emptyCache", None)
    if empty_locked is not None:
        empty_locked()
