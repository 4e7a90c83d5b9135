"""Random numbers that depend on a key and a position alone: the same bits however a tensor is cut, on any device.

The n-th 64 bits of a key are SplitMix64's (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA
2014; it passes BigCrush): its state after n steps is key + n·γ, so that any of them can be had without those before.
Each gives the 32 bits of two neighbouring positions. Small results are in scratch memory, good until the next call.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from blockmerge.methods.arithmetic import scratch

_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""What is done to a word: it is combined with itself shifted right, then multiplied."""

_BLOCK = 4096  # positions whose normal numbers are made together: one half has the sines, the other the cosines


def random_bits(key: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """Return 32 random bits, as int32 [count], for each of the positions from `position` on; `key` is of 64 bits."""
    first = position // 2
    words = (position + count + 1) // 2 - first
    state = torch.arange(words, out=scratch("state", words, torch.int64, device))
    spare = scratch("spare", words, torch.int64, device)
    begin = key + (first + 1) * _GAMMA
    if device.type == "cpu":
        _splitmix_on_cpu(state.numpy().view(np.uint64), begin, spare.numpy().view(np.uint64))
    else:
        _splitmix(state, begin, spare)
    return state.view(torch.int32)[position % 2 :][:count]


def _splitmix(state: torch.Tensor, begin: int, spare: torch.Tensor) -> None:
    """Turn the counts in `state` into random words."""
    state.mul_(_signed(_GAMMA)).add_(_signed(begin))
    for shift, factor in _ROUNDS:
        # torch has no unsigned shift: the copies of the sign are masked away.
        torch.bitwise_right_shift(state, shift, out=spare)
        state.bitwise_xor_(spare.bitwise_and_((1 << 64 - shift) - 1)).mul_(_signed(factor))


def _splitmix_on_cpu(state: np.ndarray, begin: int, spare: np.ndarray) -> None:
    """The same on uint64, with fewer passes; numpy multiplies such words in half of torch's time."""
    state *= np.uint64(_GAMMA)
    state += np.uint64(begin % 2**64)
    for shift, factor in _ROUNDS:
        np.right_shift(state, np.uint64(shift), out=spare)
        state ^= spare
        if factor != 1:
            state *= np.uint64(factor)


def normal(key: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """Return a normal number, mean 0 and variance 1, as float32 [count], for each of the positions from `position` on.

    By Box and Muller (1958): of two uniform u, v in (0, 1) the numbers √(−2 ln u)·cos 2πv and √(−2 ln u)·sin 2πv, where u
    is of one half of a block of positions and v of the other. None is larger than 6.7.
    """
    start = position // _BLOCK * _BLOCK
    stop = -(-(position + count) // _BLOCK) * _BLOCK
    bits = random_bits(key, start, stop - start, device).view(-1, 2, _BLOCK // 2)
    # Signed bits give uniform numbers in [−½, ½]: right for the angle, and for the radius without their sign.
    uniform, angle, spare = (
        scratch(place, (stop - start) // 2, torch.float32, device).view(-1, _BLOCK // 2) for place in ("radius", "angle", "spare")
    )
    radius = uniform.copy_(bits[:, 0]).abs_().clamp_(min=0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle.copy_(bits[:, 1]).mul_(math.pi * 2.0**-31)
    normals = scratch("normals", stop - start, torch.float32, device).view(-1, 2, _BLOCK // 2)
    torch.mul(radius, torch.cos(angle, out=spare), out=normals[:, 0])
    torch.mul(radius, angle.sin_(), out=normals[:, 1])
    return normals.view(-1)[position - start :][:count]


def _signed(bits: int) -> int:
    """Return the 64-bit integer, as torch has it, whose bits are the lowest of `bits`."""
    return ((bits + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
