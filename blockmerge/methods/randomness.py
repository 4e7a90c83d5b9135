"""Random numbers that depend on a key and a position alone: the same bits however a tensor is cut, on any
device.

The n-th 64 bits of a key are SplitMix64's (Steele, Lea, Flood: "Fast splittable pseudorandom number
generators", OOPSLA 2014; it passes BigCrush): its state after n steps is key + n·γ, so that any of them can
be had without those before. Each gives the 16 bits of four neighbouring positions, as making the words takes
long, or eight normal numbers. Small results are in scratch memory, good until the next call.
"""

from __future__ import annotations

from functools import cache

from blockmerge.methods.arithmetic import scratch
from blockmerge.methods.late import np, torch

_GAMMA = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""What is done to a word: it is combined with itself shifted right, then multiplied."""

_POSITIONS = 4  # that share a word

CHANCES = 1 << 16
"""How many different values a position's bits have, all equally likely."""

_PAIRS: dict[torch.device, torch.Tensor] = {}


def random_bits(key: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """Return 16 random bits, as int16 [count], for each of the positions from `position` on; `key` is of 64
    bits.
    """
    first = position // _POSITIONS
    words = -(-(position + count) // _POSITIONS) - first
    state, spare = (scratch(place, words, torch.int64, device) for place in ("state", "spare"))
    begin = key + (first + 1) * _GAMMA
    if device.type == "cpu":
        _splitmix_on_cpu(state.numpy().view(np.uint64), begin, spare.numpy().view(np.uint64))
    else:
        _splitmix(state, begin, spare)
    skipped = position % _POSITIONS
    return state.view(torch.int16)[skipped : skipped + count]


def _splitmix(state: torch.Tensor, begin: int, spare: torch.Tensor) -> None:
    """Fill `state` with random words."""
    torch.arange(state.numel(), out=state).mul_(_signed(_GAMMA)).add_(_signed(begin))
    for shift, factor in _ROUNDS:
        # torch has no unsigned shift: the copies of the sign are masked away.
        torch.bitwise_right_shift(state, shift, out=spare)
        state.bitwise_xor_(spare.bitwise_and_((1 << 64 - shift) - 1)).mul_(_signed(factor))


def _splitmix_on_cpu(state: np.ndarray, begin: int, spare: np.ndarray) -> None:
    """The same on uint64, with fewer passes; numpy multiplies such words in half of torch's time."""
    np.add(_multiples(1 << (len(state) - 1).bit_length())[: len(state)], np.uint64(begin % 2**64), out=state)
    for shift, factor in _ROUNDS:
        np.right_shift(state, np.uint64(shift), out=spare)
        state ^= spare
        if factor != 1:
            state *= np.uint64(factor)


@cache
def _multiples(count: int) -> np.ndarray:
    """0, γ, 2γ, … modulo 2⁶⁴."""
    return np.arange(count, dtype=np.uint64) * np.uint64(_GAMMA)


def chosen(rate: int, key: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """Return 1 with the probability `rate`/65,536, else 0, as int16 [count], for each of the positions from
    `position` on.
    """
    bits = random_bits(key, position, count, device)
    least = CHANCES // 2 - rate  # of the bits as numbers with a sign
    if device.type != "cpu":
        return bits.ge_(least)
    # numpy compares in a third of torch's time.
    np.greater_equal(bits.numpy(), least, out=bits.numpy())
    return bits


def normal(key: int, position: int, count: int, device: torch.device) -> torch.Tensor:
    """Return a normal number, mean 0 and variance 1, as float16 [count], for each of the positions from
    `position` on.

    It is one of 65,536 equally likely quantiles of the normal distribution, rounded; none is larger than
    4.33. Two neighbours, from an even position on, are one of 65,536 pairs, as looking values up is most of
    the work.
    """
    first = position // 2
    count_of_pairs = -(-(position + count) // 2) - first
    bits = random_bits(key, first, count_of_pairs, device)
    places = scratch("places", count_of_pairs, torch.int32, device)
    if device.type == "cpu":
        places.copy_(bits.view(torch.uint16))
    else:  # not all devices have that dtype
        places.copy_(bits).bitwise_and_(CHANCES - 1)
    pairs = torch.index_select(
        _pairs_on(device), 0, places, out=scratch("normals", count_of_pairs, torch.int32, device)
    )
    skipped = position % 2
    return pairs.view(torch.float16)[skipped : skipped + count]


def _pairs_on(device: torch.device) -> torch.Tensor:
    """The pairs, on a device, which keeps them: the same for all threads, of which several may make them."""
    found = _PAIRS.get(device)
    return _PAIRS.setdefault(device, _pairs().to(device)) if found is None else found


def _pairs() -> torch.Tensor:
    """The pairs of float16 that `normal` gives, each seen as an int32 [65536], which takes one copy.

    They are a Hammersley set, of the quantiles at (n + ½)/65,536 and (n' + ½)/65,536, n' being n with its
    bits in reverse and every other one flipped, without which they would correlate by 0.0013. Both ranges,
    cut into 2ᵏ and 2¹⁶⁻ᵏ equal parts, make boxes that hold one pair each.
    """
    number = torch.arange(CHANCES)
    other = torch.zeros_like(number)
    for bit in range(16):
        other |= ((number >> bit & 1) ^ bit % 2) << (15 - bit)
    values = torch.special.ndtri((torch.stack([number, other], dim=1).double() + 0.5) / CHANCES)
    values /= values.square().mean().sqrt()  # without the tails, the variance is a little small
    pairs: torch.Tensor = values.float().half().view(torch.int32)
    return pairs.flatten()


def _signed(bits: int) -> int:
    """Return the 64-bit integer, as torch has it, whose bits are the lowest of `bits`."""
    return ((bits + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
