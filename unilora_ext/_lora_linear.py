"""What PyTorch must know of the LoRA matmul's operators beside kernels and shapes: derivatives of any order, autocast,
FLOPs. Importing registers it.

The derivative of ``lora_linear_backward`` is made of the same operators. With cotangents X, P, Q of its results, the
gradients of x, A and B, what it computes is linear in dy:

    <X, dx> + <P, dA> + <Q, dB> = <dy, lora_linear(X; W, A, B) + update(x; P, B) + update(x; A, Q)>

so the sum on the right is the gradient of dy, and the backwards of its three terms give those of x, W, A and B.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.autograd import Function
from torch.utils.flop_counter import register_flop_formula

from unilora_ext import nvtx
from unilora_ext._operators import accumulator_dtype, below_autograd, library

__all__ = ["LoraLinearFunction", "LoraUpdateFunction", "autocast_dtype", "autocasting"]

operators = torch.ops.unilora
_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)


# ---- derivatives ----------------------------------------------------------------------------------------------------


class LoraLinearFunction(Function):
    """(y, h): y = x W^T + b + s h B^T, h = x A^T. Saves x, h, W, A and B. The derivative of h is that of x and A."""

    # The forward that takes ctx: with a setup_context of its own, PyTorch inspects the signature in every call, which
    # costs a small layer as much as its low-rank part.
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scaling, keyset=None):
        with nvtx.span("unilora::lora_linear"):
            y, h = below_autograd(operators.lora_linear.default, keyset, x, weight, bias, A, B, scaling)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(h)
        ctx.save_for_backward(x, h, weight, A, B)
        ctx.scaling = scaling
        return y, h

    @staticmethod
    def backward(ctx, grad_y, _):
        if grad_y is None:
            return (None,) * 7
        x, h, weight, A, B = ctx.saved_tensors
        need_x, need_weight, need_bias, need_A, need_B, *_ = ctx.needs_input_grad
        with nvtx.span("unilora::lora_linear_backward"), _ExcludeDispatchKeyGuard(_AUTOCAST):
            grad_x, grad_A, grad_B = _gradients(grad_y, x, h, weight, A, B, ctx.scaling, need_x, need_A, need_B)
            # W and b are frozen in Uni-LoRA; a caller that trains them all the same gets their plain gradients.
            grad_weight = _rows(grad_y).T @ _rows(x) if need_weight else None
            grad_bias = _rows(grad_y).sum(0) if need_bias else None
        return grad_x, grad_weight, grad_bias, grad_A, grad_B, None, None


class LoraUpdateFunction(Function):
    """y + s h B^T, h = x A^T, in y's memory. Saves x, h, A and B."""

    @staticmethod
    def forward(ctx, y, x, A, B, scaling):
        with nvtx.span("unilora::lora_update"):
            h = below_autograd(operators.lora_update_.default, None, y, x, A, B, scaling)
        ctx.mark_dirty(y)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, A, B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, grad_y):
        if grad_y is None:
            return (None,) * 5
        x, h, A, B = ctx.saved_tensors
        with nvtx.span("unilora::lora_update_backward"), _ExcludeDispatchKeyGuard(_AUTOCAST):
            grads = _gradients(grad_y, x, h, None, A, B, ctx.scaling, *ctx.needs_input_grad[1:4])
        return grad_y, *grads, None


class _LoraUpdatedFunction(Function):
    """(y + s h B^T, h): :class:`LoraUpdateFunction` into new memory, the operator ``lora_update``."""

    @staticmethod
    def forward(ctx, y, x, A, B, scaling, keyset):
        updated, h = below_autograd(operators.lora_update.default, keyset, y, x, A, B, scaling)
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, A, B)
        ctx.scaling = scaling
        return updated, h

    @staticmethod
    def backward(ctx, grad_y, _):
        return *LoraUpdateFunction.backward(ctx, grad_y), None


class _LoraLinearBackwardFunction(Function):
    """(dx, dA, dB); see the head of this file."""

    @staticmethod
    def forward(ctx, grad_y, x, h, weight, A, B, scaling, need_x, need_A, need_B, keyset=None):
        args = grad_y, x, h, weight, A, B, scaling, need_x, need_A, need_B
        grads = below_autograd(operators.lora_linear_backward.default, keyset, *args)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grad_y, x, weight, A, B)
        ctx.scaling = scaling
        return grads

    @staticmethod
    def backward(ctx, X, P, Q):
        grad_y, x, weight, A, B = ctx.saved_tensors
        need_y, need_x, _, need_weight, need_A, need_B, *_ = ctx.needs_input_grad
        updates = (
            (X, A, B, (False, need_A, need_B)),
            (x, P, B, (need_x, False, need_B)),
            (x, A, Q, (need_x, need_A, False)),
        )
        grad_grad_y = grad_weight = None
        sums: list[Tensor | None] = [None, None, None]
        with _ExcludeDispatchKeyGuard(_AUTOCAST):
            if need_y:
                grad_grad_y = torch.zeros_like(grad_y) if X is None or weight is None else F.linear(X, weight)
            for x_, A_, B_, needs in updates:
                if x_ is None or A_ is None or B_ is None:
                    continue
                if need_y:
                    grad_grad_y, _ = operators.lora_update(grad_grad_y, x_, A_, B_, ctx.scaling)
                if any(needs):
                    parts = _gradients(grad_y, x_, _hidden(x_, A_), None, A_, B_, ctx.scaling, *needs)
                    sums = [_sum(total, part) for total, part in zip(sums, parts, strict=True)]
            if need_weight and X is not None:
                grad_weight = _rows(grad_y).T @ _rows(X)
        grad_x, grad_A, grad_B = sums
        return grad_grad_y, grad_x, None, grad_weight, grad_A, grad_B, *[None] * 5


def _gradients(grad_y, x, h, weight, A, B, scaling, *needs: bool) -> tuple[Tensor | None, ...]:
    """(dx, dA, dB), None for what is not needed; differentiable where a graph of the backward is made."""
    if not any(needs):
        return None, None, None
    args = grad_y, x, h, weight, A, B, scaling, *needs
    if torch.is_grad_enabled():
        grads = _LoraLinearBackwardFunction.apply(*args)
    else:
        grads = below_autograd(operators.lora_linear_backward.default, None, *args)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


@torch.no_grad()
def _hidden(x: Tensor, A: Tensor) -> Tensor:
    dtype = accumulator_dtype(x.dtype)
    return F.linear(x.to(dtype), A.to(dtype))


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _no_derivative(keyset, *args):
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args):
        raise RuntimeError("unilora::lora_update_: has no derivative; unilora::lora_update has")
    return below_autograd(operators.lora_update_.default, keyset, *args)


# Function.apply in any case: it refuses the tangents of forward-mode differentiation, which a kernel without it drops.
for _name, _function in (
    ("lora_linear", LoraLinearFunction),
    ("lora_update", _LoraUpdatedFunction),
    ("lora_linear_backward", _LoraLinearBackwardFunction),
):
    library.impl(_name, lambda keyset, *args, f=_function: f.apply(*args, keyset), "Autograd", with_keyset=True)
library.impl("lora_update_", _no_derivative, "Autograd", with_keyset=True)


# ---- autocast: casts at the entry, as F.linear does; ATen's products inside do not meet it again ------------------


_AUTOCAST_DEVICES = {kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind)}


def autocasting(device: torch.device) -> bool:
    """Whether autocast is on for tensors of `device`."""
    return device.type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device.type)


def autocast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a linear layer computes: autocast's where it is on (float64 is left alone), else `dtype`."""
    if dtype != torch.float64 and autocasting(device):
        return torch.get_autocast_dtype(device.type)
    return dtype


def _autocast_lora_linear(x, weight, bias, A, B, scaling):
    dtype = autocast_dtype(x.device, x.dtype)
    x, weight, bias, A, B = (t if t is None else t.to(dtype) for t in (x, weight, bias, A, B))
    with _ExcludeDispatchKeyGuard(_AUTOCAST):
        return operators.lora_linear(x, weight, bias, A, B, scaling)


def _autocast_lora_linear_backward(*args):
    with _ExcludeDispatchKeyGuard(_AUTOCAST):
        return operators.lora_linear_backward(*args)


for _key in ("AutocastCPU", "AutocastCUDA"):
    library.impl("lora_linear", _autocast_lora_linear, _key)
    library.impl("lora_linear_backward", _autocast_lora_linear_backward, _key)


# ---- FLOPs, as torch.utils.flop_counter counts a product -----------------------------------------------------


def _products(x_shape, *factors) -> int:
    """Two for each element of each factor and each row of x."""
    rows = 1
    for size in x_shape[:-1]:
        rows *= size
    return 2 * rows * sum(m * n for m, n in factors)


@register_flop_formula(operators.lora_linear)
def _(x, weight, bias, A, B, scaling, *args, out_shape=None, **kwargs) -> int:
    return _products(x, weight, A, B)


@register_flop_formula([operators.lora_update, operators.lora_update_])
def _(y, x, A, B, scaling, *args, out_shape=None, **kwargs) -> int:
    return _products(x, A, B)


@register_flop_formula(operators.lora_linear_backward)
def _(grad_y, x, h, weight, A, B, scaling, need_x, need_A, need_B, *args, out_shape=None, **kwargs) -> int:
    u = [B] if need_x or need_A else []
    of_x = [A] + ([weight] if weight is not None else []) if need_x else []
    return _products(x, *u, *of_x, *[A] * need_A, *[B] * need_B)
