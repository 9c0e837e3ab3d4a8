"""Numbers drawn by position: the same on every platform, and any stretch of them by itself."""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np

__all__ = ["Draws", "Purpose"]


class Purpose(IntEnum):
    """What numbers are drawn for: streams of one seed do not overlap. Part of the file format."""

    VERA_A = 1
    VERA_B = 2
    TINYLORA = 3
    GAUSSIAN = 4
    FASTFOOD_B = 5
    FASTFOOD_G = 6
    FASTFOOD_PERMUTATION = 7
    FOURIERFT = 8


class Draws:
    """The numbers of one seed and purpose.

    Word p is number p % 4 of NumPy's Philox4x64-10 (Salmon et al., 2011) with key (seed, purpose) and counter
    (p // 4, 0, part, 0). Whole numbers and uniform ones are the same on every platform, normal ones but for the last
    bits that its logarithm and cosine leave open.

    Args:
        seed: in [0, 2^63).
        purpose: of the numbers.
        part: number of a module, say, that has a sequence of its own.
    """

    def __init__(self, seed: int, purpose: Purpose, part: int = 0) -> None:
        self._key, self._part = [seed, int(purpose)], part

    def words(self, start: int, count: int) -> np.ndarray:
        """Words [start, start + count): uint64 [count]."""
        philox = np.random.Philox(key=self._key, counter=[start // 4, 0, self._part, 0])
        return philox.random_raw(start % 4 + count)[start % 4 :]

    def uniform(self, start: int, count: int) -> np.ndarray:
        """Numbers [start, start + count), uniform in (0, 1): float64 [count], odd multiples of 2^-53."""
        return ((self.words(start, count) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52

    def normal(self, start: int, count: int) -> np.ndarray:
        """Numbers [start, start + count) of N(0, 1), by Box and Muller's method: float64 [count]. Numbers 2 k and
        2 k + 1 are made of the uniform ones of these positions."""
        first = start // 2 * 2
        u, v = self.uniform(first, (start + count + 1) // 2 * 2 - first).reshape(-1, 2).T
        radius, angle = np.sqrt(-2 * np.log(u)), 2 * math.pi * v
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
        return pairs.reshape(-1)[start - first :][:count]

    def signs(self, start: int, count: int) -> np.ndarray:
        """Numbers [start, start + count), each -1 or 1: int8 [count]."""
        return (self.words(start, count) >> np.uint64(63)).astype(np.int8) * np.int8(2) - np.int8(1)

    def permutations(self, first: int, count: int, n: int) -> np.ndarray:
        """Permutations [first, first + count) of n elements: int64 [count, n], the order of the words' values."""
        return np.argsort(self.words(first * n, count * n).reshape(count, n), axis=1, kind="stable")

    def permutation(self, n: int) -> np.ndarray:
        """A permutation of n elements: int64 [n]."""
        return self.permutations(0, 1, n)[0]

    def distinct(self, count: int, size: int) -> np.ndarray:
        """`count` different numbers below `size`: int64 [count]. The first values of floor(uniform size) that were
        not there before; where they are a quarter of `size` or more, the beginning of a permutation."""
        if 4 * count >= size:
            return self.permutation(size)[:count]
        drawn = 2 * count
        while True:
            values, firsts = np.unique((self.uniform(0, drawn) * size).astype(np.int64), return_index=True)
            if len(values) >= count:
                return values[np.argsort(firsts)[:count]]
            drawn *= 2
