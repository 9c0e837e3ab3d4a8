"""tied: VeRA with matrices that are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from unilora_ext.layout import Layout, Range
from unilora_ext.projections.base import Given
from unilora_ext.projections.blocks import BlockProjection
from unilora_ext.projections.vera import largest, parts_of, scaled_size


class TiedProjection(BlockProjection):
    """Tied-LoRA (Renduchintala et al., arXiv 2311.09578): B = diag(b) P_B[:m], A = diag(g) P_A[:, :n], with P_A [r,
    max n] and P_B [max m, r] trained and shared by all modules. theta_d = [g (r), b (m)] for each module in turn.

    Starts with P_A Kaiming uniform, P_B = 0, g = b = 1.

    Args:
        layout: of theta_D.
        version: 1 or None.
        seed: kept in an adapter file as it is in the configuration; nothing is drawn from it.
    """

    name = "tied"
    trained = ("P_A", "P_B")
    stored_names = trained
    learning_rates: ClassVar[Mapping[str, float]] = {"theta_d": 1e-3, "P_A": 1e-3, "P_B": 1e-3}

    def __init__(self, layout: Layout, version: int | None = None, seed: int = 0) -> None:
        super().__init__(layout.starts, scaled_size(layout), seed, version)
        self.layout, self._parts = layout, parts_of(layout)

    @classmethod
    def size(cls, layout: Layout, options: Mapping[str, Any]) -> int:
        return scaled_size(layout)

    @classmethod
    def of(cls, given: Given) -> TiedProjection:
        return cls(given.layout, given.version, given.seed)

    def start(self, dtype: torch.dtype, bound: float | None = None) -> dict[str, Tensor]:
        self._no_bound(bound)
        (m, n), r = largest(self.layout), self.layout.r
        bound = math.sqrt(6 / n)
        return {
            "theta_d": torch.ones(self.d, dtype=dtype, device="cpu"),
            "P_A": torch.empty(r, n, dtype=dtype, device="cpu").uniform_(-bound, bound),
            "P_B": torch.zeros(m, r, dtype=dtype, device="cpu"),
        }

    def columns_of(self, block: int) -> Range:
        return self._parts[block]

    def block_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
        return self.layout.shapes[block]

    @staticmethod
    def block(theta_d: Tensor, trained: Sequence[Tensor], operands: tuple[int, int]) -> Tensor:
        (P_A, P_B), (m, n) = trained, operands
        g, b = theta_d.split_with_sizes([len(P_A), m])
        return torch.cat([(b[:, None] * P_B[:m]).reshape(-1), (g[:, None] * P_A[:, :n]).reshape(-1)])
