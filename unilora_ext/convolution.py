"""``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` with an update."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from unilora_ext.errors import UniLoRAError
from unilora_ext.fused import FusedLayer

__all__ = ["ConvolutionLayer", "UniLoRAConv1d", "UniLoRAConv2d", "UniLoRAConv3d"]


class ConvolutionLayer(FusedLayer):
    """The update, as a mixin in front of a convolution with kernels [m, n], n = in_channels / groups times the size of
    a kernel: x is convolved with A [r, n] as with the layer's own kernels, then with B [m, r] point by point. Groups
    share A, as dW = s B A says.

    Shape: as of the layer, x [N, in_channels, *size] or [in_channels, *size].
    """

    is_linear = False
    dimensions: ClassVar[int]
    own_convolution: ClassVar[Callable[..., Tensor]]

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    @classmethod
    def as_weight(cls, matrix: Tensor, weight: Tensor) -> Tensor:
        return matrix.reshape(weight.shape)

    @classmethod
    def plain_lora_shapes(cls, layer: nn.Module, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        for name, plain in (("groups", 1), ("dilation", (1,) * cls.dimensions), ("padding_mode", "zeros")):
            if (got := getattr(layer, name)) != plain:
                raise UniLoRAError(f"expected {name} = {plain}, the only one of PEFT's LoRA; got {got}")
        kernel = (r, layer.in_channels, *layer.kernel_size)
        return {"lora_A.weight": kernel, "lora_B.weight": (m, r, *(1,) * cls.dimensions)}

    def _updated(self, x: Tensor) -> Tensor:
        y = self._conv_forward(x, self.weight, self.bias)
        update = self._update(self.weight.device, y.dtype)
        samples = x if x.dim() > self.dimensions + 1 else x.unsqueeze(0)
        if self._dropping():
            samples = F.dropout(samples, self._unilora.dropout)
        return y + update.convolved(samples, self._convolve, self.groups).view_as(y)

    def _convolve(self, x: Tensor, kernels: Tensor, groups: int) -> Tensor:
        """x convolved with `kernels` [k, n] in place of the layer's."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        kernels = kernels.reshape(kernels.shape[0], -1, *self.kernel_size)
        return type(self).own_convolution(x, kernels, None, self.stride, padding, self.dilation, groups)


class UniLoRAConv1d(ConvolutionLayer, nn.Conv1d):
    """``nn.Conv1d`` with a Uni-LoRA update, see :class:`ConvolutionLayer`. (GPT-2's Conv1D is a linear layer.)"""

    dimensions = 1
    own_convolution = F.conv1d


class UniLoRAConv2d(ConvolutionLayer, nn.Conv2d):
    """``nn.Conv2d`` with a Uni-LoRA update, see :class:`ConvolutionLayer`."""

    dimensions = 2
    own_convolution = F.conv2d


class UniLoRAConv3d(ConvolutionLayer, nn.Conv3d):
    """``nn.Conv3d`` with a Uni-LoRA update, see :class:`ConvolutionLayer`."""

    dimensions = 3
    own_convolution = F.conv3d
