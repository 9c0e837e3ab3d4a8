"""An oracle of every operator: short, slow, in NumPy and plain PyTorch, sharing no code with the native library.

The index functions are also the specification of the adapter format's algorithms, `uniform` and `balanced`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_LOW = np.uint64(0xFFFFFFFF)
_WORD = np.uint64(32)


def philox4x32_10(key: tuple[int, int], counter: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., SC 2011).

    Args:
        key: two 32-bit words.
        counter: uint64 [n, 4], 32-bit words.

    Returns:
        uint64 [n, 4], 32-bit words.
    """
    c = [counter[:, i].astype(np.uint64) for i in range(4)]
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> _WORD) ^ c[1] ^ np.uint64(k0), p1 & _LOW, (p0 >> _WORD) ^ c[3] ^ np.uint64(k1), p0 & _LOW]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack(c, axis=1)


def _philox(seed: int, counter: np.ndarray, stream: int) -> np.ndarray:
    counter = counter.astype(np.uint64)
    high = np.full_like(counter, stream)
    words = np.stack([counter & _LOW, counter >> _WORD, high & _LOW, high >> _WORD], axis=1)
    return philox4x32_10((seed & 0xFFFFFFFF, seed >> 32), words)


def _position_bits(seed: int, start: int, stop: int, stream: int) -> list[int]:
    """64 bits for each position i: half i % 2 of Philox block i // 2."""
    position = np.arange(start, stop, dtype=np.uint64)
    words = _philox(seed, position // np.uint64(2), stream)
    half = (position % np.uint64(2)).astype(np.int64) * 2
    rows = np.arange(len(position))
    low, high = words[rows, half], words[rows, half + 1]
    return [int(h) << 32 | int(w) for w, h in zip(low, high, strict=True)]


def uniform_index(d: int, seed: int, start: int, stop: int) -> np.ndarray:
    """uniform, version 1: position i gets floor(u d / 2^64), u its 64 bits of stream 0."""
    columns = [(u * d) >> 64 for u in _position_bits(seed, start, stop, stream=0)]
    return np.array(columns, dtype=np.int32)


class BalancedBijection:
    """A keyed bijection of [0, D): a modular Feistel network of 6 rounds with cycle-walking."""

    def __init__(self, D: int, seed: int) -> None:
        self.D = D
        self.rows = math.isqrt(D - 1) + 1
        self.width = -(-D // self.rows)
        self.keys = _philox(seed, np.arange(2, dtype=np.uint64), stream=1).reshape(-1)[:6].tolist()

    @staticmethod
    def _draw(x: int, key: int, size: int) -> int:
        x = ((x ^ key) * 0x85EBCA6B) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0xC2B2AE35) & 0xFFFFFFFF
        return (x * size) >> 32

    def element(self, position: int) -> int:
        value = position
        while True:
            row, column = divmod(value, self.width)
            for i in range(0, 6, 2):
                row = (row + self._draw(column, self.keys[i], self.rows)) % self.rows
                column = (column + self._draw(row, self.keys[i + 1], self.width)) % self.width
            value = row * self.width + column
            if value < self.D:
                return value


def balanced_ranks(D: int, seed: int) -> list[int]:
    """The rank of each position's 64 bits of stream 2 among those of all D, equal ones in the order of positions."""
    bits = _position_bits(seed, 0, D, stream=2)
    ranks = [0] * D
    for rank, position in enumerate(sorted(range(D), key=bits.__getitem__)):
        ranks[position] = rank
    return ranks


def balanced_index(D: int, d: int, seed: int, start: int, stop: int, version: int = 2) -> np.ndarray:
    """balanced: position i gets column ``e mod d``, e its rank (version 2, D <= 256) or its element."""
    if version >= 2 and D <= 256:
        elements = balanced_ranks(D, seed)[start:stop]
    else:
        bijection = BalancedBijection(D, seed)
        elements = [bijection.element(i) for i in range(start, stop)]
    return np.array([e % d for e in elements], dtype=np.int32)


def project(theta_d: Tensor, scale: Tensor, index: Tensor, value: Tensor | None = None) -> Tensor:
    """theta_D in float64."""
    theta_D = (theta_d.double() * scale.double())[index.long()]
    return theta_D if value is None else theta_D * value.double()


def project_transpose(g_D: Tensor, scale: Tensor, index: Tensor, value: Tensor | None = None) -> Tensor:
    """g_d in float64."""
    sums = torch.zeros(scale.shape, dtype=torch.float64, device=g_D.device)
    terms = g_D.double() if value is None else g_D.double() * value.double()
    return scale.double() * sums.index_add_(0, index.long(), terms)


def column_members(index: Tensor, d: int, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(order int32 [n], offsets int32 [d + 1]): column j has the rows ``order[offsets[j]:offsets[j + 1]]``, ascending,
    each as a piece of `lengths`, in the high bits, and the place in it."""
    columns = index.tolist()
    places = [(piece, place) for piece, length in enumerate(lengths) for place in range(length)]
    bits = 32 - (len(lengths) - 1).bit_length()
    rows = sorted(range(len(columns)), key=columns.__getitem__)
    entries = [places[row][0] << bits | places[row][1] for row in rows]
    order = torch.from_numpy(np.array(entries, dtype=np.uint32).view(np.int32)).to(index.device)
    counts = torch.bincount(index.long().cpu(), minlength=d)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return order, offsets.int().to(index.device)


def hadamard(x: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of x [..., n], n a power of two, in float64: by the matrix, so for small n."""
    n = x.shape[-1]
    place = np.arange(n)
    parity = [[(i & j).bit_count() % 2 for j in place.tolist()] for i in place.tolist()]
    H = (1 - 2 * torch.tensor(parity, dtype=torch.float64, device=x.device)) / math.sqrt(n)
    return x.double() @ H


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """y in float64, by the dense update W + scaling B A."""
    dense = weight.double() + scaling * (B.double() @ A.double())
    y = x.double() @ dense.T
    return y if bias is None else y + bias.double()


def lora_linear_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_x, grad_A, grad_B) in float64, through the gradient of the dense update."""
    g, rows = grad_y.double().reshape(-1, weight.shape[0]), x.double().reshape(-1, weight.shape[1])
    dense = weight.double() + scaling * (B.double() @ A.double())
    grad_dense = g.T @ rows
    grad_x = (g @ dense).reshape(x.shape)
    return grad_x, scaling * (B.double().T @ grad_dense), scaling * (grad_dense @ A.double().T)
