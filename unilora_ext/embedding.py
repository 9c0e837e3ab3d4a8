"""``nn.Embedding`` with an update."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilora_ext.fused import FusedLayer

__all__ = ["UniLoRAEmbedding", "problem_of"]


class UniLoRAEmbedding(FusedLayer, nn.Embedding):
    """A table E [n, m] of n rows, with a Uni-LoRA update: y = E[ids] + s (A^T)[ids] B^T, A [r, n], B [m, r].

    As in PEFT, ``padding_idx`` keeps a row of E, here a column of A, from getting a gradient, and an output head that
    shares E does not get the update. In training, dropout drops the update of whole tokens: an input of the LoRA path
    is a one-hot row.

    Shape: integer ids [...] -> y [..., m].
    """

    is_linear = False

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        return weight.T

    @classmethod
    def as_weight(cls, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.T

    @classmethod
    def plain_lora_shapes(cls, layer: nn.Module, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        return {"lora_embedding_A": (r, n), "lora_embedding_B": (m, r)}

    def _updated(self, x: Tensor) -> Tensor:
        y = nn.Embedding.forward(self, x)
        update = self._update(self.weight.device, y.dtype)
        change = update.looked_up(lambda table: F.embedding(x, table, self.padding_idx))
        if self._dropping():
            change = change * F.dropout(torch.ones_like(change[..., :1]), self._unilora.dropout)
        return y + change


def problem_of(embedding: nn.Embedding) -> str | None:
    """Why a plain embedding cannot be adapted; None: it can."""
    if embedding.max_norm is not None:
        return "with max_norm it writes its weight in every forward"
    if embedding.scale_grad_by_freq:
        return "scale_grad_by_freq is a gradient of its weight that the factors of an update do not have"
    return None
