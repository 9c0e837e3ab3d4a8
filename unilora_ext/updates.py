"""What a linear layer adds to its weight, however it came about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unilora_ext import functional

__all__ = ["DenseUpdate", "LowRankUpdate", "Update"]


class Update(ABC):
    """dW [m, n] of a layer, differentiable."""

    __slots__ = ()

    @abstractmethod
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x (W + dW)^T + b``: x [..., n], weight W [m, n], bias b [m] -> [..., m]."""

    @abstractmethod
    def added(self, y: Tensor, x: Tensor) -> Tensor:
        """``y + x dW^T``, in the memory of y where autograd allows that: y [..., m], x [..., n]."""

    @abstractmethod
    def dense(self) -> Tensor:
        """dW [m, n]."""


@dataclass(slots=True)
class LowRankUpdate(Update):
    """dW = s B A.

    Attributes:
        A: [r, n].
        B: [m, r].
        scaling: s.
    """

    A: Tensor
    B: Tensor
    scaling: float

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.lora_linear(x, weight, bias, self.A, self.B, self.scaling)

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        return functional.lora_update(y, x, self.A, self.B, self.scaling)

    def dense(self) -> Tensor:
        with functional.without_autocast(self.A.device):
            return (self.B @ self.A).mul(self.scaling)


@dataclass(slots=True)
class DenseUpdate(Update):
    """dW = s V.

    Attributes:
        values: V [m, n].
        scaling: s.
    """

    values: Tensor
    scaling: float

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.values.dtype in (torch.float16, torch.bfloat16):  # which would round most of a small dW in W + dW away
            return self.added(F.linear(x, weight, bias), x)
        return F.linear(x, torch.add(weight, self.values, alpha=self.scaling), bias)

    def added(self, y: Tensor, x: Tensor) -> Tensor:
        return torch.add(y, F.linear(x.to(self.values.dtype), self.values), alpha=self.scaling).to(y.dtype)

    def dense(self) -> Tensor:
        return self.values * self.scaling
