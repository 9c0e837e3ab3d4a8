"""gaussian: a dense random matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unilora_ext.projections.base import Given
from unilora_ext.projections.blocks import BlockProjection
from unilora_ext.projections.draws import Draws, Purpose

_BLOCK = 1 << 22
_MOST_KEPT = 1 << 28  # 1 GiB


class GaussianProjection(BlockProjection):
    """P with elements of N(0, 1/D), drawn independently: P^T P = I in expectation. Cost and memory are D d, so it is
    for small models: the dense matrix that the others replace.

    Args:
        D, d: rows and columns.
        seed: integer in [0, 2^63).
        materialize: True: P is kept, 4 D d bytes in float32. False: it is drawn anew in every use, at most 16 MiB at
            a time. None: kept for D d <= 2^28.
        version: 1 or None.
    """

    name = "gaussian"

    def __init__(
        self, D: int, d: int, seed: int = 0, materialize: bool | None = None, version: int | None = None
    ) -> None:
        rows = max(1, _BLOCK // max(d, 1))
        super().__init__([*range(0, D, rows), D], d, seed, version)
        self.keeps = D * d <= _MOST_KEPT if materialize is None else materialize

    @classmethod
    def of(cls, given: Given) -> GaussianProjection:
        return cls(given.layout.D, given.d, given.seed, given.materialize, given.version)

    def block_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor]:
        start, stop = self.bounds[block : block + 2]
        drawn = Draws(self.seed, Purpose.GAUSSIAN).normal(start * self.d, (stop - start) * self.d)
        rows = torch.from_numpy((drawn / math.sqrt(self.D)).astype("float32"))
        return (rows.view(-1, self.d).to(device=device, dtype=dtype),)

    @staticmethod
    def block(theta_d: Tensor, trained: Sequence[Tensor], operands: tuple[Tensor]) -> Tensor:
        return operands[0] @ theta_d

    @staticmethod
    def block_transpose(g: Tensor, operands: tuple[Tensor]) -> Tensor:
        return operands[0].T @ g
