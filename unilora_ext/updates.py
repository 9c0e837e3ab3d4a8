"""What a linear layer adds to its weight, however it came about."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unilora_ext import functional

__all__ = ["Convolve", "DenseUpdate", "LookUp", "LowRankUpdate", "Update"]

LookUp = Callable[[Tensor], Tensor]
"""table [V, k] -> its rows [..., k] at the indices of a call."""
Convolve = Callable[[Tensor, Tensor, int], Tensor]
"""x [N, g c, *size], kernels [k, n], groups g -> [N, k, *size']: a layer's convolution with other kernels, n values
each."""


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
    def looked_up(self, look_up: LookUp) -> Tensor:
        """Rows of dW^T [n, m] at the indices of a call: [..., m]."""

    @abstractmethod
    def convolved(self, x: Tensor, convolve: Convolve, groups: int) -> Tensor:
        """x [N, groups c, *size] convolved with dW [m, n], n = c times the size of a kernel: [N, m, *size']."""

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

    def looked_up(self, look_up: LookUp) -> Tensor:
        with functional.without_autocast(self.A.device):
            return F.linear(look_up(self.A.T), self.B).mul(self.scaling)

    def convolved(self, x: Tensor, convolve: Convolve, groups: int) -> Tensor:
        samples, channels, *size = x.shape
        if groups > 1:  # A is the same for all of them: each group of a sample is a sample
            x = x.reshape(samples * groups, channels // groups, *size)
        h = convolve(x, self.A, 1)
        if groups > 1:
            h = h.reshape(samples, groups * self.A.shape[0], *h.shape[2:])
        kernels = self.B.reshape(*self.B.shape, *(1 for _ in size))
        point_wise = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
        return point_wise(h, kernels, groups=groups).mul(self.scaling)

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

    def looked_up(self, look_up: LookUp) -> Tensor:
        return look_up(self.values.T).mul(self.scaling)

    def convolved(self, x: Tensor, convolve: Convolve, groups: int) -> Tensor:
        return convolve(x, self.values, groups).mul(self.scaling)

    def dense(self) -> Tensor:
        return self.values * self.scaling
