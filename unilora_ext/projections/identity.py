"""identity: plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from unilora_ext.layout import Layout, Range
from unilora_ext.projections.base import Given, Projection
from unilora_ext.projections.restriction import Gradients, Restriction


class IdentityProjection(Projection):
    """LoRA (Hu et al., arXiv 2106.09685): P = I, d = D, every element of A and B is trained.

    Starts with A uniform in [-1 / sqrt(n), 1 / sqrt(n)] (Kaiming, a = sqrt(5), as PEFT has it) and B = 0.

    Args:
        layout: of theta_D.
        version: 1 or None.
        seed: kept in an adapter file as it is in the configuration; nothing is drawn from it.
    """

    name = "identity"

    def __init__(self, layout: Layout, version: int | None = None, seed: int = 0) -> None:
        super().__init__(layout.D, layout.D, seed, version)
        self.layout = layout

    @classmethod
    def size(cls, layout: Layout, options: Mapping[str, Any]) -> int:
        return layout.D

    @classmethod
    def of(cls, given: Given) -> IdentityProjection:
        return cls(given.layout, given.version, given.seed)

    def start(self, dtype: torch.dtype, bound: float | None = None) -> dict[str, Tensor]:
        self._no_bound(bound)
        theta_d = torch.zeros(self.d, dtype=dtype, device="cpu")
        for module, (_, n) in enumerate(self.layout.shapes):
            theta_d[slice(*self.layout.range_of_A(module))].uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n))
        return {"theta_d": theta_d}

    @classmethod
    def compute(
        cls, theta_d: Tensor, trained: Sequence[Tensor], operands: tuple[Any, ...], dtype: torch.dtype
    ) -> Tensor:
        return torch.cat([theta_d[start:stop].to(dtype) for start, stop in operands])

    def _restrict(self, device: torch.device, ranges: Sequence[Range]) -> Restriction:
        return _Slices(self, device, ranges)


class _Slices(Restriction):
    """Rows that are elements of theta_d."""

    nbytes = 0

    def operands(self, dtype: torch.dtype) -> tuple[Any, ...]:
        return self.ranges

    def forward(self, theta_d: Tensor, trained: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        return IdentityProjection.compute(theta_d, trained, self.ranges, dtype)

    def transpose(self, pieces: Sequence[Tensor], dtype: torch.dtype, at: Sequence[Tensor] = ()) -> Gradients:
        g_D = torch.cat([piece.reshape(-1) for piece in pieces]).to(dtype)
        d = self.projection.d
        if self.ranges == ((0, d),):
            return (g_D,)
        g_d = g_D.new_zeros(d)
        for (start, stop), part in zip(self.ranges, g_D.split([b - a for a, b in self.ranges]), strict=True):
            g_d[start:stop] += part
        return (g_d,)
