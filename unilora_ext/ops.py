"""The operators of namespace ``unilora`` as differentiable functions.

``reference.py`` holds an oracle of every operator under the same name. While ``torch.compile`` or ``torch.export``
traces, each function becomes the operator itself, whose shapes and derivatives ``_operators.py`` registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes

from unilora_ext import trace
from unilora_ext._operators import accumulator_dtype, lora_gradients

if TYPE_CHECKING:
    from unilora_ext.projections import Projection
    from unilora_ext.projections.rows import Rows

__all__ = [
    "accumulator_dtype",
    "autocast_dtype",
    "lora_linear",
    "lora_update",
    "project",
    "project_factors",
    "project_traced",
    "project_transpose",
    "without_autocast",
]

_HALF_TYPES = (torch.float16, torch.bfloat16)


def _once_differentiable(gradients: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's decorator, called only where a graph of the backward is made: it costs a small layer as much as its
    low-rank part."""
    guarded = once_differentiable(gradients)

    def backward(ctx, *grads):
        return (guarded if torch.is_grad_enabled() else gradients)(ctx, *grads)

    return backward


# ---- project --------------------------------------------------------------------------------------------------------


class ProjectFunction(torch.autograd.Function):
    """theta_D = P theta_d. Linear, so it saves no activations, and its backward is :class:`TransposeFunction`."""

    @staticmethod
    def forward(ctx, theta_d, rows, dtype):
        # Kept as an attribute: activation checkpointing counts what is saved as tensors, and a recomputation may
        # project through other rows of the same P.
        ctx.rows, ctx.dtype = rows, theta_d.dtype
        return rows.gather(theta_d, dtype)

    @staticmethod
    def backward(ctx, grad_theta_D):
        return TransposeFunction.apply(grad_theta_D, ctx.rows, ctx.dtype), None, None


class TransposeFunction(torch.autograd.Function):
    """g_d = P^T g_D in `dtype` (float32 or float64)."""

    @staticmethod
    def forward(ctx, g_D, rows, dtype):
        ctx.rows, ctx.dtype = rows, g_D.dtype
        return rows.scatter([g_D], dtype)

    @staticmethod
    def backward(ctx, grad_g_d):
        return ProjectFunction.apply(grad_g_d, ctx.rows, ctx.dtype), None, None


class ProjectFactorsFunction(torch.autograd.Function):
    """theta_D = P theta_d, handed out as the layers' factors. The gradient is summed from theirs as they lie in memory:
    differentiating views of one theta_D would copy them all into a vector of D numbers first."""

    @staticmethod
    def forward(ctx, theta_d, rows, dtype, shapes):
        ctx.rows, ctx.dtype = rows, theta_d.dtype
        theta_D = rows.gather(theta_d, dtype)
        parts = theta_D.split_with_sizes([m * n for m, n in shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))

    @staticmethod
    @_once_differentiable
    def backward(ctx, *grads):
        return ctx.rows.scatter(grads, ctx.dtype), None, None, None


def _widened(theta_d: Tensor) -> Tensor:
    return theta_d.float() if theta_d.dtype in _HALF_TYPES else theta_d


def project(theta_d: Tensor, rows: Rows, dtype: torch.dtype | None = None) -> Tensor:
    """``theta_D[i] = theta_d[index[i]] * scale[index[i]]`` (paper, section 3.2), differentiable.

    Args:
        theta_d: [d], on the device of `rows`; float16 and bfloat16 are widened to float32 first.
        rows: rows of a projection (:meth:`unilora_ext.Projection.rows`).
        dtype: floating dtype of the result; default: that of `theta_d`.

    Returns:
        theta_D: [len(rows)], in `dtype`. Its gradient is summed in float32 (float64 for float64 `theta_d`), in a
        fixed order.
    """
    return ProjectFunction.apply(_widened(theta_d), rows, theta_d.dtype if dtype is None else dtype)


def project_factors(
    theta_d: Tensor, rows: Rows, shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """:func:`project`, cut into matrices.

    Args:
        theta_d: [d], on the device of `rows`, as for :func:`project`.
        rows: rows of a projection; their number is that of the matrices' elements.
        shapes: of the matrices, which lie end to end in theta_D, each row by row.
        dtype: floating dtype of the result.

    Returns:
        One matrix for each shape, differentiable in theta_d, once.
    """
    return ProjectFactorsFunction.apply(_widened(theta_d), rows, dtype, shapes)


@torch.compiler.assume_constant_result
def _constant_operands(projection: Projection, device: torch.device, ranges, dtype: torch.dtype):
    """What the operator reads of some rows, made for real while a graph is traced, and constants of that graph."""
    with _disable_current_modes():
        return projection.rows(device, ranges).operands(dtype)


def project_traced(
    theta_d: Tensor,
    projection: Projection,
    ranges: Sequence[tuple[int, int]],
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    """:func:`project_factors` for a graph that is being traced; rows as (start, stop) `ranges` of `projection`."""
    theta_d = _widened(theta_d)
    operator, *operands = _constant_operands(projection, theta_d.device, ranges, theta_d.dtype)
    if operator == "project":
        scale, index, *members = operands
        theta_D = torch.ops.unilora.project(theta_d, scale, index, dtype, *members)
    else:
        theta_D = torch.ops.unilora.project_seeded(theta_d, *operands, dtype)
    parts = theta_D.split_with_sizes([m * n for m, n in shapes])
    return tuple(part.view(shape) for part, shape in zip(parts, shapes, strict=True))


def project_transpose(g_D: Tensor, rows: Rows, dtype: torch.dtype | None = None) -> Tensor:
    """``g_d[j] = scale[j] * sum_{i: index[i] = j} g_D[i]``, differentiable: the adjoint of :func:`project`.

    Args:
        g_D: [len(rows)], on the device of `rows`.
        rows: rows of a projection (:meth:`unilora_ext.Projection.rows`).
        dtype: float32 or float64, of the sums and the result; default: float64 for float64 `g_D`, else float32.
    """
    return TransposeFunction.apply(g_D, rows, dtype or accumulator_dtype(g_D.dtype))


# ---- lora_linear ----------------------------------------------------------------------------------------------------


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T. Saves x, h = x A^T, W, A and B."""

    # The forward that takes ctx: with a setup_context of its own, PyTorch inspects the signature in every call, which
    # costs a small layer as much as its low-rank part.
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling):
        with trace.span("unilora::lora_linear"):
            y, h = torch.ops.unilora.lora_linear(x, weight, bias, A, B, scaling)
        ctx.save_for_backward(x, h, weight, A, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad_y):
        with trace.span("unilora::lora_linear_backward"):
            return lora_gradients(ctx, grad_y)


class LoraUpdateFunction(torch.autograd.Function):
    """y + s (x A^T) B^T, in y's memory. Saves x, h = x A^T, A and B."""

    @staticmethod
    def forward(ctx, y, x, A, B, scaling):
        with trace.span("unilora::lora_update"):
            h = torch.ops.unilora.lora_update(y, x, A, B, scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, A, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    @_once_differentiable
    def backward(ctx, grad_y):
        x, h, A, B = ctx.saved_tensors
        _, *needs, _ = ctx.needs_input_grad
        with trace.span("unilora::lora_update_backward"):
            grads = torch.ops.unilora.lora_linear_backward(grad_y, x, h, None, A, B, ctx.scaling, *needs)
        return grad_y, *(g if need else None for g, need in zip(grads, needs, strict=True)), None


def _autocasting(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a linear layer computes: autocast's where it is on (float64 is left alone), else `dtype`."""
    if dtype != torch.float64 and _autocasting(device):
        return torch.get_autocast_dtype(device.type)
    return dtype


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operators on `device` compute in the dtype of their arguments."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """``y = x W^T + b + scaling (x A^T) B^T``, differentiable in x, A and B.

    Args:
        x: [..., n], any leading shape, empty and non-contiguous ones too.
        weight: W [m, n].
        bias: b [m] or None.
        A: [r, n].
        B: [m, r].
        scaling: s = alpha / r.

    Returns:
        y: [..., m]. All tensors have one dtype (float16, bfloat16, float32, float64); under autocast they are cast to
        its dtype, as ``torch.nn.functional.linear`` does. The low-rank sums run in float32 or wider.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit; the message names the argument.
    """
    if _autocasting(x.device):
        dtype = autocast_dtype(x.device, x.dtype)
        x, weight, A, B = (t.to(dtype) for t in (x, weight, A, B))
        bias = None if bias is None else bias.to(dtype)
    if torch.compiler.is_compiling():
        return torch.ops.unilora.lora_linear(x, weight, bias, A, B, float(scaling))[0]
    return LoraLinearFunction.apply(x, weight, bias, A, B, float(scaling))


def lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """``y + scaling (x A^T) B^T``, differentiable in y, x, A and B: for a layer that makes y in its own way.

    Args:
        y: [..., m]. Its memory is used for the result where autograd allows that.
        x: [..., n], with the leading shape of y; cast to its dtype.
        A: [r, n], in the dtype of y.
        B: [m, r], in the dtype of y.
        scaling: s = alpha / r.

    Returns:
        [..., m], in the dtype of y.
    """
    x = x.to(y.dtype)
    if torch.compiler.is_compiling():
        return y + scaling * F.linear(F.linear(x, A), B)
    if not y.is_contiguous() or y._is_view() or (y.is_leaf and y.requires_grad):
        y = y.clone(memory_format=torch.contiguous_format)
    return LoraUpdateFunction.apply(y, x, A, B, float(scaling))
