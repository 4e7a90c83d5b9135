"""Matrices and products of factors, taken apart and cut to a size.

Loads torch: imported only where weights are computed.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from blockmerge.lora_making.size import Size

_ITERATIONS = 2
_MORE = 16  # columns of a sketch beside the wanted ones
_FIRST = 64  # columns of a sketch where no rank is wanted
_NOISE = 1e-13  # of the factors' largest numbers: singular values that are rounding
_CHUNK = 4096  # columns that are widened at once


@dataclass(frozen=True)
class Pair:
    """up [rows, rank] and down [rank, columns]; of the energy `total` of what was taken apart, their product
    has `kept`.
    """

    up: torch.Tensor
    down: torch.Tensor
    total: float
    kept: float

    @property
    def rank(self) -> int:
        """Their rank, which is 0 for what is nothing but zeros."""
        return self.up.shape[1]


def cut_product(up: torch.Tensor, down: torch.Tensor, size: Size) -> Pair:
    """Return a product in the factors of its best approximation of a size, without ever forming it: by QR of
    both factors, and the singular values of R₁·R₂ᵀ. Both are float64.
    """
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    # Factors that cancel out leave their rounding.
    noise = _NOISE * float(r_up.abs().max() * r_down.abs().max())
    energies = [value * value if value > noise else 0.0 for value in s.tolist()]
    total = float(sum(energies))
    rank = _rank(size, energies, total)
    return _pair(q_up @ u[:, :rank], s[:rank], vh[:rank] @ q_down.T, total)


def cut_matrix(matrix: torch.Tensor, total: float, size: Size, seed: str) -> Pair:
    """Return a float32 matrix in the factors of a good approximation of a size.

    `total` is its energy. By a randomised method (Halko, Martinsson and Tropp, arXiv 0909.4061, algorithm
    4.4) where a part of the singular values is enough, with random numbers that depend on `seed` alone; else
    by the eigenvectors of the smaller of M·Mᵀ and Mᵀ·M in float64.
    """
    rows, columns = matrix.shape
    if total == 0:
        return Pair(matrix[:, :0], matrix[:0], 0.0, 0.0)
    if rows > columns:
        turned = cut_matrix(matrix.T, total, size, seed)
        up, down = _signed(turned.down.T, turned.up.T)
        return Pair(up, down, total, turned.kept)
    width = _FIRST if size.rank is None else _width(size.rank)
    while not size.is_exact and 2 * width <= rows:
        u, s, vh = _sketched(matrix, width, seed)
        energies = s.square().tolist()
        rank = size.least_rank(energies, total)
        if rank is not None and (size.rank is not None or _width(rank) <= width):
            return _pair(u[:, :rank], s[:rank], vh[:rank], total)
        wanted = len(energies) + size.missing(energies, total) if rank is None else rank
        width = max(2 * width, _width(wanted))
    return _exactly(matrix, total, size)


def _width(rank: int) -> int:
    """How many columns a sketch needs for a rank."""
    return max(2 * rank, rank + _MORE)


def _rank(size: Size, energies: list[float], total: float) -> int:
    """The rank to keep where all singular values are known."""
    found = size.least_rank(energies, total)
    filled = sum(energy > 0 for energy in energies)
    return filled if found is None else min(found, filled)


def _sketched(matrix: torch.Tensor, width: int, seed: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first singular values and vectors, approximately; the singular values are float64."""
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "little") >> 1
    )
    q = torch.linalg.qr(matrix @ torch.randn(matrix.shape[1], width, generator=generator))[0]
    for _ in range(_ITERATIONS):
        q = torch.linalg.qr(matrix.T @ q)[0]
        q = torch.linalg.qr(matrix @ q)[0]
    q_right, r = torch.linalg.qr(matrix.T @ q)
    u, s, vh = torch.linalg.svd(r.T.double())
    return q @ u.float(), s, vh.float() @ q_right.T


def _exactly(matrix: torch.Tensor, total: float, size: Size) -> Pair:
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
    for start in range(0, matrix.shape[1], _CHUNK):
        wide = matrix[:, start : start + _CHUNK].double()
        gram.addmm_(wide, wide.T)
    values, vectors = torch.linalg.eigh(gram)
    energies = values.flip(0).clamp_min(0).tolist()
    rank = _rank(size, energies, total)
    u = vectors.flip(1)[:, :rank].float()
    s = torch.tensor(energies[:rank], dtype=torch.float64).sqrt()
    return _pair(u, s, (u.T @ matrix).div_(s.float().unsqueeze(1)), total)


def _pair(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor, total: float) -> Pair:
    """u·s·vh as two factors, in the memory of u and vh."""
    roots = s.sqrt().to(u.dtype)
    up, down = _signed(u.mul_(roots), vh.mul_(roots.unsqueeze(1)))
    return Pair(up, down, total, min(total, float(s.square().sum())))


def _signed(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, in their memory, with the largest entry of each column of `up` positive."""
    if not up.shape[1]:
        return up, down
    largest = up.gather(0, up.abs().argmax(0, keepdim=True)).squeeze(0)
    signs = torch.where(largest < 0, -1.0, 1.0).to(up.dtype)
    return up.mul_(signs), down.mul_(signs.unsqueeze(1))
