"""The operators of namespace ``unilora`` as differentiable functions, with fake kernels for tracing.

Importing this module loads the native libraries: ``_C`` (schemas, CPU kernels) and, where PyTorch has CUDA and the
package was built with nvcc, ``_C_cuda``. ``reference.py`` holds an oracle of every operator under the same name.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    from unilora_ext import _C  # noqa: F401  registers the operators
except ImportError as error:  # a source folder that was not built, or a build for another Python
    raise ImportError(
        f"unilora_ext: the native library _C of {Path(__file__).parent} cannot be loaded ({error}). "
        "Build it: pip install . (or pip install -e . in a source checkout)"
    ) from error

__all__ = ["cuda_library", "lora_linear", "project", "project_transpose", "segment_order"]

_HALF_TYPES = (torch.float16, torch.bfloat16)


def _load_cuda_library() -> Path | None:
    path = Path(__file__).parent / "_C_cuda.so"
    if torch.version.cuda is None or not path.is_file():
        return None
    torch.ops.load_library(path)
    return path


cuda_library: Path | None = _load_cuda_library()
"""The CUDA library in use; None where PyTorch has no CUDA or the package was built without nvcc."""


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


@torch.library.register_fake("unilora::segment_order")
def _(index, d):
    return index.new_empty(index.shape), index.new_empty((d + 1,))


@torch.library.register_fake("unilora::project")
def _(theta_d, scale, index, dtype):
    _expect("project", "scale", scale.shape == theta_d.shape, f"shape {list(theta_d.shape)}", list(scale.shape))
    return theta_d.new_empty(index.shape, dtype=dtype)


@torch.library.register_fake("unilora::project_transpose")
def _(grad_theta_D, scale, order, offsets):
    _expect(
        "project_transpose",
        "order",
        order.shape == grad_theta_D.shape,
        list(grad_theta_D.shape),
        list(order.shape),
    )
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


def segment_order(index: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Members of each column, for :func:`project_transpose`.

    Args:
        index: int32 [D], the column of each position, values in [0, d).
        d: number of columns.

    Returns:
        (order, offsets), int32 [D] and [d + 1]: column j owns the positions ``order[offsets[j]:offsets[j + 1]]``,
        in ascending order.
    """
    if index.is_cuda:
        columns, order = torch.sort(index, stable=True)
        offsets = torch.searchsorted(columns, torch.arange(d + 1, dtype=index.dtype, device=index.device))
        return order.int(), offsets.int()
    return torch.ops.unilora.segment_order(index, d)


class ProjectFunction(torch.autograd.Function):
    """theta_D = P theta_d. Linear, so it saves no activations, and its backward is :class:`TransposeFunction`."""

    @staticmethod
    def forward(ctx, theta_d, block, dtype):
        # Constants, kept as attributes: activation checkpointing counts what is saved as tensors, and a recomputation
        # may project through another block of the same P.
        ctx.block, ctx.dtype = block, theta_d.dtype
        return torch.ops.unilora.project(theta_d, block.scale(theta_d.dtype), block.index, dtype)

    @staticmethod
    def backward(ctx, grad_theta_D):
        return TransposeFunction.apply(grad_theta_D, ctx.block, ctx.dtype), None, None


class TransposeFunction(torch.autograd.Function):
    """g_d = P^T g_D in `dtype` (float32 or float64)."""

    @staticmethod
    def forward(ctx, g_D, block, dtype):
        ctx.block, ctx.dtype = block, g_D.dtype
        scale = block.scale(dtype)
        if block.order is not None:
            return torch.ops.unilora.project_transpose(g_D, scale, block.order, block.offsets)
        # A few rows of P, without a stored order: PyTorch's accumulating index_put_ is deterministic.
        sums = torch.zeros_like(scale)
        return sums.index_put_((block.index.long(),), g_D.to(dtype), accumulate=True).mul_(scale)

    @staticmethod
    def backward(ctx, grad_g_d):
        return ProjectFunction.apply(grad_g_d, ctx.block, ctx.dtype), None, None


def project(theta_d: Tensor, block, dtype: torch.dtype | None = None) -> Tensor:
    """``theta_D[i] = theta_d[index[i]] * scale[index[i]]`` (paper, section 3.2), differentiable.

    Args:
        theta_d: [d], on the device of `block`; float16 and bfloat16 are widened to float32 first.
        block: rows of a projection (:class:`~unilora_ext.projections.RowBlock`).
        dtype: floating dtype of the result; default: that of `theta_d`.

    Returns:
        theta_D: [len(block.index)], in `dtype`. Its gradient is summed in float32 (float64 for float64 `theta_d`),
        in a fixed order.
    """
    dtype = theta_d.dtype if dtype is None else dtype
    if theta_d.dtype in _HALF_TYPES:
        theta_d = theta_d.float()
    return ProjectFunction.apply(theta_d, block, dtype)


def project_transpose(g_D: Tensor, block, dtype: torch.dtype | None = None) -> Tensor:
    """``g_d[j] = scale[j] * sum_{i: index[i] = j} g_D[i]``, differentiable: the adjoint of :func:`project`.

    Args:
        g_D: [len(block.index)], on the device of `block`.
        block: rows of a projection (:class:`~unilora_ext.projections.RowBlock`).
        dtype: float32 or float64, of the sums and the result; default: float64 for float64 `g_D`, else float32.
    """
    return TransposeFunction.apply(g_D, block, dtype or accumulator_dtype(g_D.dtype))


# ---- lora_linear ----------------------------------------------------------------------------------------------------


class LoraLinearFunction(torch.autograd.Function):
    """y = x W^T + b + s (x A^T) B^T. Saves x, h = x A^T, W, A and B."""

    @staticmethod
    def forward(x, weight, bias, A, B, scaling):
        return torch.ops.unilora.lora_linear(x, weight, bias, A, B, scaling)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, A, B, scaling = inputs
        _, h = output
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, weight, A, B)
        ctx.scaling = scaling

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, _):
        if grad_y is None:
            return (None,) * 6
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
    y, _ = LoraLinearFunction.apply(x, weight, bias, A, B, float(scaling))
    return y


# ---- the same derivatives for who calls torch.ops.unilora directly --------------------------------------------------


def _save_project(ctx, inputs, output):
    _, scale, index, _ = inputs
    ctx.save_for_backward(scale, index)


def _project_backward(ctx, grad_theta_D):
    scale, index = ctx.saved_tensors
    sums = torch.zeros_like(scale).index_put((index.long(),), grad_theta_D.to(scale.dtype), accumulate=True)
    return sums * scale, None, None, None


def _save_transpose(ctx, inputs, output):
    g_D, scale, order, offsets = inputs
    ctx.save_for_backward(scale, order, offsets)
    ctx.dtype = g_D.dtype


def _transpose_backward(ctx, grad_g_d):
    scale, order, offsets = ctx.saved_tensors
    members = torch.repeat_interleave(grad_g_d * scale, offsets.diff(), output_size=order.numel())
    return torch.empty_like(members).index_copy(0, order.long(), members).to(ctx.dtype), None, None, None


torch.library.register_autograd("unilora::project", _project_backward, setup_context=_save_project)
torch.library.register_autograd("unilora::project_transpose", _transpose_backward, setup_context=_save_transpose)
torch.library.register_autograd(
    "unilora::lora_linear", LoraLinearFunction.backward, setup_context=LoraLinearFunction.setup_context
)
