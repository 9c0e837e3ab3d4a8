"""loraxs: a small matrix between singular vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from unilora_ext.layout import Layout, Range
from unilora_ext.projections.base import Given, Option, Weights
from unilora_ext.projections.svd import SingularProjection


class LoraXSProjection(SingularProjection):
    """LoRA-XS (Bałazy et al., arXiv 2405.17604): B = U_r S_r R, A = V_r^T, the SVD of W cut at rank r.
    theta_d = vec_row(R [r, r]) for each module in turn; A is constant. See :class:`SingularProjection`.

    Starts with R of N(0, 10^-10), a standard deviation of 1e-5.

    Args:
        layout: of theta_D.
        weights: the base weights.
        version: 1 or None.
        seed: kept in an adapter file as it is in the configuration; nothing is drawn from it.
        **options: see :attr:`Projection.options`.
    """

    name = "loraxs"
    options: ClassVar[Mapping[str, Option]] = {
        "sigma": Option(True, "whether B has the singular values; without them P is isometric")
    }

    def __init__(
        self, layout: Layout, weights: Weights, version: int | None = None, seed: int = 0, **options: Any
    ) -> None:
        super().__init__(layout, weights, self.size(layout, options), seed, version, options)

    @classmethod
    def size(cls, layout: Layout, options: Mapping[str, Any]) -> int:
        cls.check_rank(layout)
        return layout.r**2 * len(layout)

    @classmethod
    def of(cls, given: Given) -> LoraXSProjection:
        return cls(given.layout, given.weights, given.version, given.seed, **given.options)

    def start(self, dtype: torch.dtype, bound: float | None = None) -> dict[str, Tensor]:
        self._no_bound(bound)
        return {"theta_d": torch.randn(self.d, dtype=dtype, device="cpu") * 1e-5}

    def columns_of(self, block: int) -> Range:
        return block * self.layout.r**2, (block + 1) * self.layout.r**2

    def block_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        U, S, V = self.bases[block]
        left = U * S if self.given_options["sigma"] else U
        return left.to(device=device, dtype=dtype), V.T.to(device=device, dtype=dtype)

    @staticmethod
    def block(theta_d: Tensor, trained: Sequence[Tensor], operands: tuple[Tensor, Tensor]) -> Tensor:
        left, A = operands
        return torch.cat([(left @ theta_d.view(len(A), len(A))).reshape(-1), A.reshape(-1)])
