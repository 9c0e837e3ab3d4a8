"""The LoRA matmul as differentiable functions. (The projection: :mod:`unilora_ext.projections`.)

``reference.py`` holds an oracle of every operator under the same name. While ``torch.compile`` or ``torch.export``
traces, each function becomes the operator itself, whose shapes and derivatives ``_operators.py`` and
``_lora_linear.py`` register.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from unilora_ext import nvtx
from unilora_ext._lora_linear import LoraLinearFunction, LoraUpdateFunction, autocast_dtype, autocasting
from unilora_ext._operators import accumulator_dtype, below_autograd

__all__ = [
    "accumulator_dtype",
    "autocast_dtype",
    "graph_is_traced",
    "lora_linear",
    "lora_update",
    "without_autocast",
]


def graph_is_traced() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` records what runs now."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


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
    with nvtx.span("unilora::lora_linear"):  # without autograd's frame, which is half the cost of a token's call
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
