"""Chance: SplitMix64's numbers, uniform and normal, independent of each other, the same however a tensor is
cut.
"""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from blockmerge.methods import key_of, randomness
from blockmerge.methods.randomness import normal, random_bits
from tests import method_oracle as oracle

CPU = torch.device("cpu")
KEYS = [key_of(seed, name) for seed in (0, 1) for name in ("a.weight", "b.weight")]


def test_the_oracle_has_the_published_numbers():
    # https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64
    assert oracle.splitmix64(1234567, 5) == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_keys_are_of_the_seed_and_the_name():
    assert key_of(7, "x") == int.from_bytes(hashlib.sha256(b"7\nx").digest()[:8], "little")
    assert len({key_of(seed, name) for seed in range(50) for name in "abcdefgh"}) == 400
    assert key_of(1, "1x") != key_of(11, "x")


@settings(max_examples=30)
@given(st.integers(0, 2**64 - 1), st.integers(0, 9000), st.integers(0, 5000))
def test_bits_are_the_oracles_wherever_one_begins(key, position, count):
    wanted = oracle.random_bits(key, position + count)[position:]
    assert random_bits(key, position, count, CPU).numpy().tolist() == wanted.tolist()


def test_positions_beyond_32_bits():
    far = 2**33 + 1
    state = (KEYS[0] + (far // 4) * 0x9E3779B97F4A7C15) % 2**64
    assert random_bits(KEYS[0], far - 1, 4, CPU).tolist() == oracle.random_bits(state, 4).tolist()


@settings(max_examples=15)
@given(st.integers(0, 2**64 - 1), st.integers(0, 9000), st.integers(0, 5000))
def test_normal_numbers_are_the_oracles_wherever_one_begins(key, position, count):
    found = normal(key, position, count, CPU).numpy().copy()
    assert found == pytest.approx(oracle.normals(key, position + count)[position:], rel=1e-3)
    assert (found == normal(key, 0, position + count, CPU).numpy()[position:]).all()


@pytest.mark.parametrize("key", KEYS)
def test_they_are_uniform_and_normal(key):
    bits = random_bits(key, 0, 1 << 20, CPU).numpy().copy()
    for byte in bits.view(np.uint8).reshape(-1, 2).T:
        assert stats.chisquare(np.bincount(byte, minlength=256)).pvalue > 1e-4
    assert stats.kstest((bits + 0.5) / 2**16 + 0.5, "uniform").pvalue > 1e-4
    values = normal(key, 0, 1 << 20, CPU).double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-4
    assert abs(stats.kurtosis(values)) < 0.03
    assert abs(values.mean()) < 0.005
    assert values.std() == pytest.approx(1, abs=0.005)
    assert 4.2 < np.abs(values).max() < 4.33


@pytest.mark.parametrize("kind", [random_bits, normal])
def test_neighbours_and_keys_are_independent(kind):
    count = 1 << 19
    series = [kind(key, 0, count, CPU).numpy().astype(np.float64) for key in KEYS]
    bound = 5 / count**0.5
    for one in series:
        for lag in (1, 2, 3, 4, 8, 4096):  # four neighbours come of one word
            for power in (1, 2):
                assert abs(np.corrcoef(one[:-lag] ** power, one[lag:] ** power)[0, 1]) < bound
    for place, one in enumerate(series):
        for other in series[:place]:
            assert abs(np.corrcoef(one, other)[0, 1]) < bound


def test_both_of_a_pair_are_all_quantiles_and_know_nothing_of_each_other():
    pairs = randomness._pairs().view(torch.float16).view(-1, 2).double()
    for values in pairs.T:
        values = values.sort().values
        assert torch.allclose(values, -values.flip(0))
        assert float(values.abs().max()) < 4.33
        assert float(values.square().mean()) == pytest.approx(1, abs=1e-5)
    for first, second in itertools.product((1, 2, 3), repeat=2):
        assert abs(np.corrcoef(pairs[:, 0] ** first, pairs[:, 1] ** second)[0, 1]) < 5e-4
    # Of every box of 2ᵏ by 2¹⁶⁻ᵏ equal parts there is one pair; some of the finest parts are one value when
    # rounded.
    parts = (stats.norm.cdf(pairs) * 65536).astype(int)
    for bits in range(4, 13):
        _, counts = np.unique(
            np.stack([parts[:, 0] >> 16 - bits, parts[:, 1] >> bits]), axis=1, return_counts=True
        )
        assert abs(counts - 1).mean() < 0.1, bits


def test_what_a_gpu_does_gives_the_words_that_the_cpu_has():
    from blockmerge.methods.randomness import _splitmix

    for key in (*KEYS, 0, 2**64 - 1):
        words = torch.arange(1000)
        _splitmix(words, key + 0x9E3779B97F4A7C15, torch.empty_like(words))
        assert words.numpy().view(np.uint64).tolist() == oracle.splitmix64(key, 1000)
