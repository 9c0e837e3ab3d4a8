"""The operators of namespace ``unilora`` as differentiable functions, with fake kernels for tracing.

``reference.py`` holds an oracle of every operator under the same name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import unilora_ext._native  # noqa: F401  registers the operators

if TYPE_CHECKING:
    from unilora_ext.projections.rows import Rows

__all__ = ["lora_linear", "project", "project_transpose"]

_HALF_TYPES = (torch.float16, torch.bfloat16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums over tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- fake kernels: shapes and dtypes only ---------------------------------------------------------------------------


def _expect(op: str, argument: str, good: bool, expected: str, got: object) -> None:
    if not good:
        raise RuntimeError(f"unilora::{op}: {argument}: expected {expected}, got {got}")


@torch.library.register_fake("unilora::fill_uniform_index")
def _(index, d, seed, start):
    return None


@torch.library.register_fake("unilora::fill_balanced_index")
def _(index, D, d, seed, start):
    return None


@torch.library.register_fake("unilora::project")
def _(theta_d, scale, index, dtype):
    _expect("project", "scale", scale.shape == theta_d.shape, f"shape {list(theta_d.shape)}", list(scale.shape))
    return theta_d.new_empty(index.shape, dtype=dtype)


@torch.library.register_fake("unilora::project_scatter")
def _(grad_theta_D, scale, index):
    rows = sum(piece.numel() for piece in grad_theta_D)
    _expect("project_scatter", "index", tuple(index.shape) == (rows,), f"shape [{rows}]", list(index.shape))
    return scale.new_empty(scale.shape)


@torch.library.register_fake("unilora::project_segment_sum")
def _(grad_theta_D, scale, order, offsets):
    _expect(
        "project_segment_sum", "order", order.shape == grad_theta_D.shape, list(grad_theta_D.shape), list(order.shape)
    )
    return scale.new_empty(scale.shape)


@torch.library.register_fake("unilora::project_seeded")
def _(theta_d, scale, algorithm, D, seed, ranges, dtype):
    return theta_d.new_empty((sum(ranges[1::2]) - sum(ranges[::2]),), dtype=dtype)


@torch.library.register_fake("unilora::project_seeded_scatter")
def _(grad_theta_D, scale, algorithm, D, seed, ranges):
    return scale.new_empty(scale.shape)


@torch.library.register_fake("unilora::lora_linear")
def _(x, weight, bias, A, B, scaling):
    op, (m, n), r = "lora_linear", weight.shape, A.shape[0]
    _expect(op, "x", x.shape[-1] == n, f"shape [..., {n}]", list(x.shape))
    _expect(op, "A", A.shape[1] == n, f"shape [*, {n}]", list(A.shape))
    _expect(op, "B", tuple(B.shape) == (m, r), f"shape [{m}, {r}]", list(B.shape))
    for name, t in (("weight", weight), ("A", A), ("B", B)):
        _expect(op, name, t.dtype == x.dtype, f"dtype {x.dtype}", t.dtype)
    leading = x.shape[:-1]
    return x.new_empty((*leading, m)), x.new_empty((*leading, r), dtype=accumulator_dtype(x.dtype))


@torch.library.register_fake("unilora::lora_linear_backward")
def _(grad_y, x, h, weight, A, B, scaling, need_grad_x, need_grad_A, need_grad_B):
    return (
        x.new_empty(x.shape if need_grad_x else (0,)),
        A.new_empty(A.shape if need_grad_A else (0,)),
        B.new_empty(B.shape if need_grad_B else (0,)),
    )


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
    @once_differentiable
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
        y, h = torch.ops.unilora.lora_linear(x, weight, bias, A, B, scaling)
        ctx.save_for_backward(x, h, weight, A, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        x, h, weight, A, B = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, _ = ctx.needs_input_grad
        grad_x = grad_A = grad_B = grad_weight = grad_bias = None
        if need_x or need_A or need_B:
            grads = torch.ops.unilora.lora_linear_backward(
                grad_y, x, h, weight, A, B, ctx.scaling, need_x, need_A, need_B
            )
            grad_x, grad_A, grad_B = (
                g if need else None for g, need in zip(grads, (need_x, need_A, need_B), strict=True)
            )
        # W and b are frozen in Uni-LoRA; a caller that trains them all the same gets their plain gradients.
        rows = grad_y.flatten(0, -2) if need_weight or need_bias else None
        if need_weight:
            grad_weight = rows.T @ x.flatten(0, -2)
        if need_bias:
            grad_bias = rows.sum(0)
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None


def _autocasting(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a linear layer computes: autocast's where it is on (float64 is left alone), else `dtype`."""
    if dtype != torch.float64 and _autocasting(device):
        return torch.get_autocast_dtype(device.type)
    return dtype


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
    return LoraLinearFunction.apply(x, weight, bias, A, B, float(scaling))


# ---- the same derivatives for who calls torch.ops.unilora directly --------------------------------------------------


def _save_project(ctx, inputs, output):
    _, scale, index, _ = inputs
    ctx.save_for_backward(scale, index)


def _project_backward(ctx, grad_theta_D):
    scale, index = ctx.saved_tensors
    if index.is_cuda:  # PyTorch's accumulating index_put is deterministic there
        sums = torch.zeros_like(scale).index_put((index.long(),), grad_theta_D.to(scale.dtype), accumulate=True)
        return sums * scale, None, None, None
    return torch.ops.unilora.project_scatter([grad_theta_D], scale, index), None, None, None


def _save_scatter(ctx, inputs, output):
    pieces, scale, index = inputs
    ctx.save_for_backward(scale, index)
    ctx.shapes, ctx.dtype = [piece.shape for piece in pieces], pieces[0].dtype


def _in_pieces(ctx, theta_D):
    parts = theta_D.split_with_sizes([shape.numel() for shape in ctx.shapes])
    return [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]


def _scatter_backward(ctx, grad_g_d):
    scale, index = ctx.saved_tensors
    return _in_pieces(ctx, torch.ops.unilora.project(grad_g_d, scale, index, ctx.dtype)), None, None


def _save_segment_sum(ctx, inputs, output):
    g_D, scale, order, offsets = inputs
    ctx.save_for_backward(scale, order, offsets)
    ctx.dtype = g_D.dtype


def _segment_sum_backward(ctx, grad_g_d):
    scale, order, offsets = ctx.saved_tensors
    members = torch.repeat_interleave(grad_g_d * scale, offsets.diff(), output_size=order.numel())
    return torch.empty_like(members).index_copy(0, order.long(), members).to(ctx.dtype), None, None, None


def _save_seeded(ctx, inputs, output):
    _, scale, *source, _ = inputs
    ctx.save_for_backward(scale)
    ctx.source = source


def _seeded_backward(ctx, grad_theta_D):
    (scale,) = ctx.saved_tensors
    return torch.ops.unilora.project_seeded_scatter([grad_theta_D], scale, *ctx.source), *[None] * 6


def _save_seeded_scatter(ctx, inputs, output):
    pieces, scale, *source = inputs
    ctx.save_for_backward(scale)
    ctx.source, ctx.shapes, ctx.dtype = source, [piece.shape for piece in pieces], pieces[0].dtype


def _seeded_scatter_backward(ctx, grad_g_d):
    (scale,) = ctx.saved_tensors
    return _in_pieces(ctx, torch.ops.unilora.project_seeded(grad_g_d, scale, *ctx.source, ctx.dtype)), *[None] * 5


def _save_lora_linear(ctx, inputs, output):
    x, weight, _, A, B, ctx.scaling = inputs
    _, h = output
    ctx.mark_non_differentiable(h)
    ctx.save_for_backward(x, h, weight, A, B)


def _lora_linear_backward(ctx, grad_y, _):
    return LoraLinearFunction.backward(ctx, grad_y)


for _name, _backward, _save in (
    ("project", _project_backward, _save_project),
    ("project_scatter", _scatter_backward, _save_scatter),
    ("project_segment_sum", _segment_sum_backward, _save_segment_sum),
    ("project_seeded", _seeded_backward, _save_seeded),
    ("project_seeded_scatter", _seeded_scatter_backward, _save_seeded_scatter),
    ("lora_linear", _lora_linear_backward, _save_lora_linear),
):
    torch.library.register_autograd(f"unilora::{_name}", _backward, setup_context=_save)
