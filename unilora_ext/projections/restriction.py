"""Some rows of a projection on one device, and their derivative."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from unilora_ext import nvtx
from unilora_ext._operators import accumulator_dtype
from unilora_ext.layout import Range, joined

__all__ = ["Gradients", "Restriction", "cut", "widened"]

Gradients = tuple[Tensor | None, ...]
"""Of theta_d, then of the projection's trained parts."""


class _Restrictable(Protocol):
    def restrict(self, device: torch.device, ranges: Sequence[Range]) -> Restriction: ...


class Restriction(ABC):
    """Rows of c + P theta_d on one device, made for many uses: what it keeps are ordinary tensors.

    Args:
        projection: P.
        device: where the rows are.
        ranges: of P's rows, one after the other.
    """

    def __init__(self, projection: _Restrictable, device: torch.device, ranges: Sequence[Range]) -> None:
        self.projection, self.device, self.ranges = projection, device, tuple(ranges)
        self._len = sum(stop - start for start, stop in ranges)

    def __len__(self) -> int:
        """Number of rows."""
        return self._len

    def part(self, rows: Sequence[Range]) -> Restriction:
        """Those of these rows that `rows` counts, in ascending order."""
        starts = accumulate((stop - start for start, stop in self.ranges), initial=0)
        inside = [
            (start + max(first - before, 0), min(start + last - before, stop))
            for before, (start, stop) in zip(starts, self.ranges, strict=False)
            for first, last in rows
            if first < before + stop - start and last > before
        ]
        return self.projection.restrict(self.device, joined(inside))

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
        ctx.set_materialize_grads(False)
        ctx.shapes = shapes
        with nvtx.span("unilora::project"):
            return cut(restriction.forward(theta_d, trained, dtype), shapes)

    @staticmethod
    def backward(ctx, *grads):
        if ctx.versions != tuple(tensor._version for tensor in ctx.at):
            raise RuntimeError(
                "unilora: theta_d or a trained part of the projection was changed in place between the forward and "
                "its backward"
            )
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        restriction, pieces = _with_gradients(ctx.restriction, ctx.shapes, grads)
        with nvtx.span("unilora::project_backward"):
            return None, None, None, *restriction.transpose(pieces, ctx.dtype, ctx.at)


def _with_gradients(
    restriction: Restriction, shapes: Sequence[tuple[int, ...]], grads: Sequence[Tensor | None]
) -> tuple[Restriction, list[Tensor]]:
    """Rows that hold all matrices with a gradient, and the gradients: all rows, with zeros for the others, or less than
    half of them (a few layers were used, or computed anew by activation checkpointing)."""
    present = [grad for grad in grads if grad is not None]
    if len(present) == len(grads):
        return restriction, present
    if 2 * sum(grad.numel() for grad in present) >= len(restriction):
        zeros = present[0].new_zeros
        return restriction, [zeros(s) if grad is None else grad for s, grad in zip(shapes, grads, strict=True)]
    stops = accumulate(math.prod(shape) for shape in shapes)
    rows = [(stop - grad.numel(), stop) for stop, grad in zip(stops, grads, strict=True) if grad is not None]
    return restriction.part(joined(rows)), present


def cut(theta_D: Tensor, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Matrices that lie end to end in theta_D, each row by row."""
    if len(shapes) == 1:
        return (theta_D.view(shapes[0]),)
    parts = theta_D.split_with_sizes([math.prod(shape) for shape in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def widened(tensor: Tensor) -> Tensor:
    """In the dtype of sums over it."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
