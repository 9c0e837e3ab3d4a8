"""Transformers' Conv1D: a linear layer whose weight is stored [n, m] (GPT-2)."""

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from unilora_ext.fused import FusedLayer

__all__ = ["UniLoRAConv1D"]


class UniLoRAConv1D(FusedLayer, Conv1D):
    """Conv1D with a Uni-LoRA update."""

    fan_in_fan_out = True

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        return weight.T

    @classmethod
    def as_weight(cls, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.T

    def forward(self, x: Tensor) -> Tensor:  # Conv1D's name of the argument
        return super().forward(x)

    def __repr__(self) -> str:
        n, m = self.weight.shape
        return f"UniLoRAConv1D(in_features={n}, out_features={m}, r={self.r}, scaling={self.scaling:g})"
