"""Every method written anew from the definitions, in numpy and float64, without any of blockmerge's code.

Each takes float64 arrays of one shape; for `ties`, whose choice hangs on the last bit, of the dtype that it
computes in.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
from scipy import special


def clamp(weight):
    return min(1.0, max(0.0, weight))


def weighted_sum(a, b, *, alpha):
    return (1 - alpha) * a + alpha * b


def sigmoid(a, b, *, alpha):
    return weighted_sum(a, b, alpha=clamp(alpha) ** 2 * (3 - 2 * clamp(alpha)))


def inverse_sigmoid(a, b, *, alpha):
    return weighted_sum(a, b, alpha=0.5 - math.sin(math.asin(1 - 2 * clamp(alpha)) / 3))


def slerp(a, b, *, alpha):
    norm_a, norm_b = np.sqrt((a * a).sum()), np.sqrt((b * b).sum())
    if not norm_a or not norm_b:
        return weighted_sum(a, b, alpha=alpha)
    cosine = (a / norm_a * (b / norm_b)).sum()
    if abs(abs(cosine) - 1) < 1e-12:
        return weighted_sum(a, b, alpha=alpha)
    angle = np.arccos(cosine)
    direction = (np.sin((1 - alpha) * angle) * (a / norm_a) + np.sin(alpha * angle) * (b / norm_b)) / np.sin(
        angle
    )
    return direction * ((1 - alpha) * norm_a + alpha * norm_b)


def _swapped(length, alpha, beta):
    alpha, beta = (Fraction(str(clamp(weight))) for weight in (alpha, beta))
    if alpha + beta <= 1:
        of_b = np.zeros(length, dtype=bool)
        of_b[math.floor(length * beta) : math.floor(length * (alpha + beta))] = True
    else:
        of_b = np.ones(length, dtype=bool)
        of_b[math.floor(length * (alpha + beta - 1)) : math.floor(length * beta)] = False
    return of_b


def tensor_sum(a, b, *, alpha, beta=0.0):
    if not a.ndim:
        return b if alpha > 0.5 else a
    return np.where(_swapped(len(a), alpha, beta).reshape(-1, *[1] * (a.ndim - 1)), b, a)


def tensor_sum_columns(a, b, *, alpha, beta=0.0):
    if a.ndim < 2:
        return tensor_sum(a, b, alpha=alpha, beta=beta)
    return np.where(_swapped(a.shape[1], alpha, beta).reshape(1, -1, *[1] * (a.ndim - 2)), b, a)


def scale(a, *, alpha):
    return alpha * a if alpha else a


def add_difference(a, b, c, *, alpha):
    return a + alpha * (b - c)


def triple_sum(a, b, c, *, alpha, beta=0.0):
    return (1 - alpha - beta) * a + alpha * b + beta * c


def sum_twice(a, b, c, *, alpha, beta=0.0):
    return (1 - beta) * ((1 - alpha) * a + alpha * b) + beta * c


def train_difference(a, b, c, *, alpha):
    first, second = np.abs(b - a), np.abs(b - c)
    whole = first + second
    share = np.divide(first, whole, out=np.zeros_like(whole), where=whole > 0)
    return a + 1.8 * alpha * np.sign(b - c) * np.abs(b - c) * share


def smooth_add_difference(a, b, c, *, alpha):
    delta = b - c
    if not delta.size or not delta.ndim:
        return a + alpha * delta
    padded = np.pad(delta, 1, mode="symmetric")
    around = [
        padded[tuple(slice(place, place + extent) for place, extent in zip(places, delta.shape, strict=True))]
        for places in itertools.product(range(3), repeat=delta.ndim)
    ]
    delta = np.median(np.stack(around), axis=0)
    taps = np.exp(-0.5 * np.arange(-4, 5) ** 2.0)
    for axis in range(delta.ndim):
        padded = np.pad(
            delta, [(4, 4) if axis == other else (0, 0) for other in range(delta.ndim)], mode="symmetric"
        )
        delta = np.apply_along_axis(np.convolve, axis, padded, taps / taps.sum(), mode="valid")
    return a + alpha * delta


def extract(a, b, c, *, alpha, beta=0.0, gamma=1.0):
    alpha, beta = clamp(alpha), clamp(beta)
    b, c = np.atleast_1d(b - a), np.atleast_1d(c - a)
    norms = np.sqrt((b * b).sum(-1, keepdims=True)) * np.sqrt((c * c).sum(-1, keepdims=True))
    cosine = np.divide((b * c).sum(-1, keepdims=True), norms, out=np.zeros_like(norms), where=norms > 0)
    d = ((np.clip(cosine, -1, 1) + 1) / 2) ** gamma
    return a + (((1 - alpha) * b + alpha * c) * ((1 - beta) * d + beta * (1 - d))).reshape(a.shape)


def average(*models, alpha=1.0, ratios=()):
    ratios = ratios or [1] * len(models)
    mean = sum(ratio * model for ratio, model in zip(ratios, models, strict=True)) / sum(ratios)
    return (1 - alpha) * models[0] + alpha * mean


def ties(*models, alpha, density=0.2):
    a, *others = models
    count = math.ceil(Fraction(str(density)) * a.size)
    kept = []
    for other in others:
        delta = other - a
        border = np.sort(np.abs(delta), axis=None)[::-1][count - 1] if count else np.inf
        kept.append(np.where(np.abs(delta) >= border, delta, 0).astype(np.float64))
    sign = np.sign(sum(kept))
    total, agreeing = np.zeros(a.shape), np.zeros(a.shape)
    for delta in kept:
        agrees = (np.sign(delta) == sign) & (sign != 0)
        total, agreeing = total + np.where(agrees, delta, 0), agreeing + agrees
    return a + alpha * np.divide(total, agreeing, out=np.zeros(a.shape), where=agreeing > 0)


def model_stock(*models, alpha):
    deltas = [model - models[0] for model in models[1:]]
    cosines = []
    for one, other in itertools.combinations(deltas, 2):
        norm = np.sqrt((one * one).sum()) * np.sqrt((other * other).sum())
        cosines.append((one * other).sum() / norm if norm else 0.0)
    n, c = len(deltas), float(np.mean(cosines))
    t = 0.0 if c <= 0 else clamp(n * c / (1 + (n - 1) * c))
    return models[0] + alpha * t * sum(deltas) / n


def _cosine(x, y):
    norm = np.sqrt((x * x).sum()) * np.sqrt((y * y).sum())
    return (x * y).sum() / norm if norm else np.nan


def _cosines(a, b, normalised):
    """The cosine of every column, and of the whole."""
    x, y = (
        array.reshape(len(array), -1) if array.ndim > 1 and array.size else array.reshape(-1, 1)
        for array in (a, b)
    )
    columns = np.array([_cosine(x[:, place], y[:, place]) for place in range(x.shape[1])])
    if normalised:
        with np.errstate(invalid="ignore"):
            x, y = (np.nan_to_num(array / np.sqrt((array * array).sum(0))) for array in (x, y))
    return columns, _cosine(x, y)


def cosine_limits(pairs, normalised):
    values = []
    for a, b in pairs:
        columns, whole = _cosines(a, b, normalised)
        values += [
            value for value in (columns if normalised else (columns + whole) / 2) if not np.isnan(value)
        ]
    for percent, keep in ((1, np.greater_equal), (99, np.less_equal)):
        if len(values):
            values = np.array(values)
            values = values[keep(values, np.percentile(values, percent, method="midpoint"))]
    return (min(values), max(values)) if len(values) else None


def cosine_merge(a, b, *, shift, limits, normalised):
    columns, whole = _cosines(a, b, normalised)
    k = np.ones_like(columns)
    if limits is not None and limits[0] != limits[1]:
        k = np.nan_to_num(
            np.clip(((columns + whole) / 2 - limits[0]) / (limits[1] - limits[0]) - shift, 0, 1), nan=1.0
        )
    k = k.reshape(1, *a.shape[1:]) if a.ndim > 1 and a.size else k[0]
    return (1 - k) * b + k * a


def splitmix64(key, count):
    """The first `count` 64-bit numbers, as in Java's SplittableRandom."""
    numbers = []
    for step in range(1, count + 1):
        z = (key + step * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


def random_bits(key, count):
    """Signed 16-bit numbers: four of each 64 bits, the lowest first."""
    return np.array(splitmix64(key, -(-count // 4)), dtype="<u8").view("<i2")[:count]


def normals(key, count):
    """Quantiles of the normal distribution, scaled to variance 1: of 16 bits, and of the same in reverse
    order, every other one flipped; rounded to float32, then to float16.
    """
    values = special.ndtri((np.arange(65536) + 0.5) / 65536)
    bits = random_bits(key, -(-count // 2)).astype(np.uint16)
    reverse = [int(f"{number:016b}"[::-1], 2) ^ 0b0101010101010101 for number in bits]
    return (
        (values / values.std())
        .astype(np.float32)
        .astype(np.float16)
        .astype(float)[np.stack([bits, reverse], axis=-1).astype(int)]
        .reshape(-1)[:count]
    )


def add_noise(a, *, alpha, key):
    return a + alpha * normals(key, a.size).reshape(a.shape)


def dare(a, b, *, alpha, key, drop_rate=0.5):
    dropped = round(drop_rate * 65536)
    kept = random_bits(key, a.size).astype(int) + 32768 >= dropped
    return a + alpha * (b - a) * kept.reshape(a.shape) / (1 - dropped / 65536)
