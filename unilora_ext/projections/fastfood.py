"""fastfood: a product of Walsh-Hadamard matrices, signs and permutations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unilora_ext.projections.base import Given, Option
from unilora_ext.projections.blocks import BlockProjection
from unilora_ext.projections.draws import Draws, Purpose

_Operands = tuple[Tensor, Tensor, Tensor, float, int]

_TOGETHER = 1 << 18
"""Rows that are computed at once, where n is less."""


class FastfoodProjection(BlockProjection):
    """Fastfood (Le et al., 2013) over the whole of theta_D, as Li et al. (arXiv 1804.08838) use it: with n = 2^k >= d
    and x [n] = theta_d and zeros, theta_D is ceil(D / n) vectors s H G Pi H B x, one after the other and cut at D. H
    is the orthonormal Walsh-Hadamard matrix, B and G diagonals of random signs, Pi a permutation, all drawn for each
    vector, and s = sqrt(n / D).

    The columns of P are orthonormal exactly where D is a multiple of n; elsewhere in expectation, as the last vector
    is cut. Cost: D log2 n.

    Args:
        D, d: rows and columns.
        seed: integer in [0, 2^63).
        version: 1 or None.
        **options: see :attr:`Projection.options`.
    """

    name = "fastfood"
    options: ClassVar[Mapping[str, Option]] = {
        "gaussian": Option(False, "whether G is of N(0, 1), as in the paper of Fastfood, not of random signs")
    }

    def __init__(self, D: int, d: int, seed: int = 0, version: int | None = None, **options: Any) -> None:
        self.n = 1 << max(d - 1, 0).bit_length()
        rows = max(self.n, _TOGETHER)
        super().__init__([*range(0, D, rows), D], d, seed, version, options)

    @classmethod
    def of(cls, given: Given) -> FastfoodProjection:
        return cls(given.layout.D, given.d, given.seed, given.version, **given.options)

    @property
    def isometric(self) -> bool:
        """Whether P^T P = I exactly."""
        return self.D % self.n == 0 and not self.given_options["gaussian"]

    def block_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> _Operands:
        n, (start, stop) = self.n, self.bounds[block : block + 2]
        first, count = start // n, -(-(stop - start) // n)

        def draws(purpose: Purpose) -> Draws:
            return Draws(self.seed, purpose)

        def placed(array: Any) -> Tensor:
            return torch.from_numpy(array).to(device)

        B = placed(draws(Purpose.FASTFOOD_B).signs(first * n, count * n))
        if self.given_options["gaussian"]:
            G = placed(draws(Purpose.FASTFOOD_G).normal(first * n, count * n).astype("float32")).to(dtype)
        else:
            G = placed(draws(Purpose.FASTFOOD_G).signs(first * n, count * n))
        Pi = draws(Purpose.FASTFOOD_PERMUTATION).permutations(first, count, n)
        Pi += n * torch.arange(count, device="cpu").numpy()[:, None]
        return B.view(count, n), placed(Pi.astype("int32").reshape(-1)), G.view(count, n), math.sqrt(n / self.D), self.d

    @staticmethod
    def block(theta_d: Tensor, trained: Sequence[Tensor], operands: _Operands) -> Tensor:
        B, Pi, G, s, _ = operands
        hadamard = torch.ops.unilora.hadamard
        x = hadamard(F.pad(theta_d, (0, B.shape[1] - len(theta_d))) * B)
        x = x.view(-1).index_select(0, Pi).view_as(B)
        return hadamard(x * G) * s

    @staticmethod
    def block_transpose(g: Tensor, operands: _Operands) -> Tensor:
        B, Pi, G, s, d = operands
        hadamard = torch.ops.unilora.hadamard
        y = hadamard(F.pad(g, (0, B.numel() - len(g))).view_as(B) * s) * G
        y = torch.zeros_like(y).view(-1).index_copy(0, Pi.long(), y.view(-1)).view_as(B)
        return (hadamard(y) * B).sum(0)[:d]
