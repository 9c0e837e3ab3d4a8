"""The operators of namespace ``unilora`` as differentiable functions.

``reference.py`` holds an oracle of every operator under the same name. While ``torch.compile`` or ``torch.export``
traces, each function becomes the operator itself, whose shapes and derivatives ``_operators.py`` and
``_lora_linear.py`` register.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

from unilora_ext import trace
from unilora_ext._lora_linear import LoraLinearFunction, LoraUpdateFunction, autocast_dtype, autocasting
from unilora_ext._operators import accumulator_dtype, below_autograd

if TYPE_CHECKING:
    from unilora_ext.projections import Projection
    from unilora_ext.projections.rows import Rows

__all__ = [
    "accumulator_dtype",
    "autocast_dtype",
    "graph_is_traced",
    "lora_linear",
    "lora_update",
    "project",
    "project_factors",
    "project_traced",
    "project_transpose",
    "without_autocast",
]


def graph_is_traced() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` records what runs now."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


_HALF_TYPES = (torch.float16, torch.bfloat16)


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
        One matrix for each shape, differentiable in theta_d.
    """
    return ProjectFactorsFunction.apply(_widened(theta_d), rows, dtype, shapes)


@torch.compiler.assume_constant_result
def _constant_operands(projection: Projection, device: torch.device, ranges, dtype: torch.dtype):
    """What the operator reads of some rows, made for real while a graph is traced, and constants of that graph."""
    recorder = torch._C._get_tracing_state()  # of torch.jit.trace
    torch._C._set_tracing_state(None)
    try:
        with _disable_current_modes():
            return projection.rows(device, ranges).operands(dtype)
    finally:
        torch._C._set_tracing_state(recorder)


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
    theta_D = getattr(torch.ops.unilora, operator)(theta_d, *operands, dtype)
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


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which operators on `device` compute in the dtype of their arguments."""
    return torch.autocast(device.type, enabled=False) if autocasting(device) else nullcontext()


def lora_linear(x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """``y = x W^T + b + scaling (x A^T) B^T``, differentiable in x, A and B, to any order.

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
    if autocasting(x.device):
        dtype = autocast_dtype(x.device, x.dtype)
        x, weight, A, B = (t.to(dtype) for t in (x, weight, A, B))
        bias = None if bias is None else bias.to(dtype)
    if graph_is_traced():
        return torch.ops.unilora.lora_linear(x, weight, bias, A, B, float(scaling))[0]
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        return LoraLinearFunction.apply(x, weight, bias, A, B, float(scaling))[0]
    with trace.span("unilora::lora_linear"):  # without autograd's frame, which is half the cost of a token's call
        return below_autograd(torch.ops.unilora.lora_linear.default, None, x, weight, bias, A, B, float(scaling))[0]


def lora_update(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    """``y + scaling (x A^T) B^T``, differentiable in y, x, A and B, to any order: for a layer that makes y in its own
    way.

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
    if graph_is_traced():
        return torch.ops.unilora.lora_update(y, x, A, B, float(scaling))[0]
    if not y.is_contiguous() or y._is_view() or (y.is_leaf and y.requires_grad):
        y = y.clone(memory_format=torch.contiguous_format)
    return LoraUpdateFunction.apply(y, x, A, B, float(scaling))
