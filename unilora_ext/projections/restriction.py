"""Some rows of a projection on one device, and their derivative."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from unilora_ext import nvtx
from unilora_ext._operators import accumulator_dtype

__all__ = ["Gradients", "Restriction", "cut", "widened"]

Gradients = tuple[Tensor | None, ...]
"""Of theta_d, then of the projection's trained parts."""


class Restriction(ABC):
    """Rows of c + P theta_d on one device, made for many uses: what it keeps are ordinary tensors."""

    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes kept for these rows."""

    @abstractmethod
    def operands(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """What :meth:`Projection.compute` reads for a theta_d in `dtype`: tensors, numbers, and tuples of them."""

    @abstractmethod
    def forward(self, theta_d: Tensor, trained: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """theta_D of these rows in `dtype`; called without autograd."""

    @abstractmethod
    def transpose(self, pieces: Sequence[Tensor], dtype: torch.dtype, at: Sequence[Tensor] = ()) -> Gradients:
        """The gradients from g_D of these rows, differentiable.

        Args:
            pieces: g_D in tensors that lie end to end.
            dtype: float32 or float64, of the sums and of g_d.
            at: theta_d and the trained parts, where P has any.
        """

    def project(self, theta_d: Tensor, dtype: torch.dtype | None = None, trained: Sequence[Tensor] = ()) -> Tensor:
        """theta_D of these rows, differentiable.

        Args:
            theta_d: [d] on this device; float16 and bfloat16 are widened to float32 first.
            dtype: floating dtype of the result; default: that of `theta_d`.
            trained: P's own trained parts, where it has any.

        Returns:
            [len(self)]. Its gradient is summed in float32 (float64 for float64 `theta_d`), in a fixed order.
        """
        return self.matrices(theta_d, [(len(self),)], theta_d.dtype if dtype is None else dtype, trained)[0]

    def project_transpose(self, g_D: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """P^T g_D for g_D of these rows, differentiable: the adjoint of :meth:`project`, for P without trained parts.

        Args:
            g_D: [len(self)], on this device.
            dtype: float32 or float64, of the sums and the result; default: float64 for float64 `g_D`, else float32.
        """
        with nvtx.span("unilora::project_backward"):
            return self.transpose([g_D], dtype or accumulator_dtype(g_D.dtype))[0]

    def matrices(
        self, theta_d: Tensor, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, trained: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """:meth:`project`, cut into matrices of `shapes`, which lie end to end in theta_D, each row by row."""
        return ProjectFunction.apply(self, dtype, shapes, widened(theta_d), *map(widened, trained))


class ProjectFunction(torch.autograd.Function):
    """theta_D = c + P theta_d, handed out as matrices. The gradient is summed from theirs as they lie in memory:
    differentiating views of one theta_D would copy them all into a vector of D numbers first.

    Saves no tensors: activation checkpointing counts them, and a recomputation may project other rows of the same P.
    """

    @staticmethod
    def forward(ctx, restriction, dtype, shapes, theta_d, *trained):
        ctx.restriction, ctx.dtype = restriction, theta_d.dtype
        ctx.at = ctx.versions = ()
        if trained and any(ctx.needs_input_grad):  # P itself is differentiated, at these values
            ctx.at = theta_d, *trained
            ctx.versions = tuple(tensor._version for tensor in ctx.at)
        with nvtx.span("unilora::project"):
            return cut(restriction.forward(theta_d, trained, dtype), shapes)

    @staticmethod
    def backward(ctx, *grads):
        if ctx.versions != tuple(tensor._version for tensor in ctx.at):
            raise RuntimeError(
                "unilora: theta_d or a trained part of the projection was changed in place between the forward and "
                "its backward"
            )
        with nvtx.span("unilora::project_backward"):
            return None, None, None, *ctx.restriction.transpose(grads, ctx.dtype, ctx.at)


def cut(theta_D: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Matrices that lie end to end in theta_D, each row by row."""
    if len(shapes) == 1:
        return (theta_D.view(shapes[0]),)
    parts = theta_D.split_with_sizes([math.prod(shape) for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def widened(tensor: Tensor) -> Tensor:
    """In the dtype of sums over it."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
