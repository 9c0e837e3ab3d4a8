"""tinylora: LoRA-XS with a small matrix from a few numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Layout, Range
from unilora_ext.projections.base import Given, Option, Weights
from unilora_ext.projections.draws import Draws, Purpose
from unilora_ext.projections.svd import SingularProjection

_Operands = tuple[Tensor, Tensor, Tensor]


class TinyLoraProjection(SingularProjection):
    """TinyLoRA (arXiv 2602.04118) as PEFT has it: B = U_r sqrt(S_r) sum_i v_i P_i, A = sqrt(S_r) V_r^T, P_i [r, r] of
    N(0, 1/r) drawn for each module; v [u] is shared by the modules of a group. theta_d = the v of each group in turn;
    A is constant. See :class:`SingularProjection`.

    Starts with v = 0.

    Args:
        layout: of theta_D.
        weights: the base weights.
        seed: of the P_i.
        version: 1 or None.
        **options: see :attr:`Projection.options`.

    Raises:
        UniLoRAError: more groups than modules.
    """

    name = "tinylora"
    options: ClassVar[Mapping[str, Option]] = {
        "u": Option(64, "number of elements of v", least=1),
        "groups": Option(1, "number of groups, each of neighbouring modules that share a v", least=1),
    }
    learning_rates: ClassVar[Mapping[str, float]] = {"theta_d": 1e-2}

    def __init__(
        self, layout: Layout, weights: Weights, seed: int = 0, version: int | None = None, **options: Any
    ) -> None:
        super().__init__(layout, weights, self.size(layout, self.checked_options(options)), seed, version, options)

    @classmethod
    def size(cls, layout: Layout, options: Mapping[str, Any]) -> int:
        cls.check_rank(layout)
        if options["groups"] > len(layout):
            raise UniLoRAError(
                f"projection_options['groups']: expected at most {len(layout)}, the number of modules; "
                f"got {options['groups']}"
            )
        return options["u"] * options["groups"]

    @classmethod
    def of(cls, given: Given) -> TinyLoraProjection:
        return cls(given.layout, given.weights, given.seed, given.version, **given.options)

    def start(self, dtype: torch.dtype, bound: float | None = None) -> dict[str, Tensor]:
        self._no_bound(bound)
        return {"theta_d": torch.zeros(self.d, dtype=dtype, device="cpu")}

    def columns_of(self, block: int) -> Range:
        u, groups = self.given_options["u"], self.given_options["groups"]
        group = min(block // (len(self.layout) // groups), groups - 1)  # PEFT's: the last one has what is left
        return group * u, (group + 1) * u

    def directions(self, module: int) -> Tensor:
        """P [u, r, r] of a module, float32."""
        u, r = self.given_options["u"], self.layout.r
        drawn = Draws(self.seed, Purpose.TINYLORA, module).normal(0, u * r * r) / math.sqrt(r)
        return torch.from_numpy(drawn.astype("float32")).view(u, r, r)

    def block_operands(self, block: int, device: torch.device, dtype: torch.dtype) -> _Operands:
        U, S, V = self.bases[block]
        root = S.sqrt()
        left, P, A = ((U * root), self.directions(block).flatten(1), (V * root).T)
        return tuple(t.to(device=device, dtype=dtype) for t in (left, P, A))

    @staticmethod
    def block(theta_d: Tensor, trained: Sequence[Tensor], operands: _Operands) -> Tensor:
        left, P, A = operands
        return torch.cat([(left @ (theta_d @ P).view(len(A), len(A))).reshape(-1), A.reshape(-1)])
