"""What PyTorch must know of the operators of namespace ``unilora`` beside their kernels: shapes for tracing, and
derivatives for who calls ``torch.ops.unilora`` directly, a compiled graph among them. Importing registers it."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKeySet, _after_autograd_keyset, _AutoDispatchBelowAutograd
from torch.autograd import Function, forward_ad

import unilora_ext._native  # noqa: F401  registers the operators

__all__ = ["accumulator_dtype", "below_autograd", "library"]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums over tensors of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- fake kernels: shapes and dtypes only ---------------------------------------------------------------------------


def _register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``torch.library.register_fake``, with the check that every kernel makes: all tensors on one device. PyTorch calls
    a fake kernel for meta tensors, and so for a mixture with real ones, whose results would be uninitialised."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(fake).parameters)

        @functools.wraps(fake)
        def checked(*args):
            (first, like), *others = [
                (argument, t)
                for argument, value in zip(names, args, strict=False)
                for t in (value if isinstance(value, (list, tuple)) else (value,))
                if isinstance(t, Tensor)
            ]
            for argument, t in others:
                _expect(name, argument, t.device == like.device, f"the device of {first} ({like.device})", t.device)
            return fake(*args)

        return torch.library.register_fake(f"unilora::{name}")(checked)

    return register


def _expect(op: str, argument: str, good: bool, expected: str, got: object) -> None:
    if not good:
        raise RuntimeError(f"unilora::{op}: {argument}: expected {expected}, got {got}")


@_register_fake("fill_index")
def _(index, algorithm, version, D, d, seed, start):
    return None


def _expect_value(op: str, value: Tensor | None, scale: Tensor, index: Tensor) -> None:
    if value is not None:
        _expect(op, "value", value.shape == index.shape, f"shape {list(index.shape)}", list(value.shape))
        _expect(op, "value", value.dtype == scale.dtype, f"dtype {scale.dtype}", value.dtype)


@_register_fake("project")
def _(theta_d, scale, index, value, dtype):
    _expect("project", "scale", scale.shape == theta_d.shape, f"shape {list(theta_d.shape)}", list(scale.shape))
    _expect_value("project", value, scale, index)
    return theta_d.new_empty(index.shape, dtype=dtype)


@_register_fake("project_scatter")
def _(grad_theta_D, scale, index, value):
    rows = sum(piece.numel() for piece in grad_theta_D)
    _expect("project_scatter", "index", tuple(index.shape) == (rows,), f"shape [{rows}]", list(index.shape))
    _expect_value("project_scatter", value, scale, index)
    return scale.new_empty(scale.shape)


@_register_fake("project_segment_sum")
def _(grad_theta_D, scale, order, offsets, value):
    rows = sum(piece.numel() for piece in grad_theta_D)
    _expect("project_segment_sum", "order", tuple(order.shape) == (rows,), f"shape [{rows}]", list(order.shape))
    _expect_value("project_segment_sum", value, scale, order)
    return scale.new_empty(scale.shape)


@_register_fake("column_members")
def _(index, d, lengths):
    rows = sum(lengths)
    _expect("column_members", "index", tuple(index.shape) == (rows,), f"shape [{rows}]", list(index.shape))
    return index.new_empty(index.shape), index.new_empty((d + 1,))


@_register_fake("project_seeded")
def _(theta_d, scale, algorithm, version, D, seed, ranges, dtype):
    return theta_d.new_empty((sum(ranges[1::2]) - sum(ranges[::2]),), dtype=dtype)


@_register_fake("project_seeded_scatter")
def _(grad_theta_D, scale, algorithm, version, D, seed, ranges):
    return scale.new_empty(scale.shape)


@_register_fake("hadamard")
def _(x):
    n = x.shape[-1] if x.dim() else 0
    _expect("hadamard", "x", x.dtype in (torch.float32, torch.float64), "dtype float32 or float64", x.dtype)
    good = 1 <= n <= 2**30 and n & (n - 1) == 0
    _expect("hadamard", "x", good, "shape [..., n], n a power of two up to 2^30", list(x.shape))
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_register_fake("lora_linear")
def _(x, weight, bias, A, B, scaling):
    op, (m, n), r = "lora_linear", weight.shape, A.shape[0]
    _expect(op, "x", x.shape[-1] == n, f"shape [..., {n}]", list(x.shape))
    _expect(op, "A", A.shape[1] == n, f"shape [*, {n}]", list(A.shape))
    _expect(op, "B", tuple(B.shape) == (m, r), f"shape [{m}, {r}]", list(B.shape))
    for name, t in (("weight", weight), ("A", A), ("B", B)):
        _expect(op, name, t.dtype == x.dtype, f"dtype {x.dtype}", t.dtype)
    leading = x.shape[:-1]
    return x.new_empty((*leading, m)), x.new_empty((*leading, r), dtype=accumulator_dtype(x.dtype))


@_register_fake("lora_update")
def _(y, x, A, B, scaling):
    h = x.new_empty((*x.shape[:-1], A.shape[0]), dtype=accumulator_dtype(x.dtype))
    return torch.empty_like(y, memory_format=torch.contiguous_format), h


@_register_fake("lora_update_")
def _(y, x, A, B, scaling):
    return x.new_empty((*x.shape[:-1], A.shape[0]), dtype=accumulator_dtype(x.dtype))


@_register_fake("lora_linear_backward")
def _(grad_y, x, h, weight, A, B, scaling, need_grad_x, need_grad_A, need_grad_B):
    return (
        x.new_empty(x.shape if need_grad_x else (0,)),
        A.new_empty(A.shape if need_grad_A else (0,)),
        B.new_empty(B.shape if need_grad_B else (0,)),
    )


# ---- derivatives ---------------------------------------------------------------------------------------------------


def _without_derivative(op: str, value: Tensor | None) -> None:
    good = value is None or not value.requires_grad
    _expect(op, "value", good, "a tensor that requires no gradient (there is none of it)", "one that does")


def _save_project(ctx, inputs, output):
    _, scale, index, value, _ = inputs
    _without_derivative("project", value)
    ctx.save_for_backward(scale, index, value)


def _project_backward(ctx, grad_theta_D):
    scale, index, value = ctx.saved_tensors
    return _transpose(grad_theta_D, scale, index, value), *[None] * 4


def _transpose(g_D, scale, index, value):
    if not index.is_cuda:
        return torch.ops.unilora.project_scatter([g_D], scale, index, value)
    order, offsets = torch.ops.unilora.column_members(index, scale.numel(), [g_D.numel()])
    return torch.ops.unilora.project_segment_sum([g_D], scale, order, offsets, value)


def _save_scatter(ctx, inputs, output):
    pieces, scale, index, value = inputs
    _without_derivative("project_scatter", value)
    ctx.save_for_backward(scale, index, value)
    ctx.shapes, ctx.dtype = [piece.shape for piece in pieces], pieces[0].dtype


def _in_pieces(ctx, theta_D):
    parts = theta_D.split_with_sizes([shape.numel() for shape in ctx.shapes])
    return [part.view(shape) for part, shape in zip(parts, ctx.shapes, strict=True)]


def _scatter_backward(ctx, grad_g_d):
    return _in_pieces(ctx, torch.ops.unilora.project(grad_g_d, *ctx.saved_tensors, ctx.dtype)), *[None] * 3


def _save_segment_sum(ctx, inputs, output):
    pieces, scale, order, offsets, value = inputs
    _without_derivative("project_segment_sum", value)
    ctx.save_for_backward(scale, order, offsets, value)
    ctx.shapes, ctx.dtype = [piece.shape for piece in pieces], pieces[0].dtype


def _segment_sum_backward(ctx, grad_g_d):
    scale, order, offsets, value = ctx.saved_tensors
    members = torch.repeat_interleave(grad_g_d * scale, offsets.diff(), output_size=order.numel())
    positions = _positions(order, [shape.numel() for shape in ctx.shapes])
    theta_D = torch.empty_like(members).index_copy(0, positions, members)
    return _in_pieces(ctx, (theta_D if value is None else theta_D * value).to(ctx.dtype)), *[None] * 4


def _positions(order, lengths):
    """The rows that ``column_members`` has written as (piece, place in it), the piece in the high bits."""
    if len(lengths) == 1:
        return order.long()
    bits = 32 - (len(lengths) - 1).bit_length()
    entries = order.long() & 0xFFFFFFFF
    starts = torch.tensor([0, *itertools.accumulate(lengths[:-1])], device=order.device)
    return starts[entries >> bits] + (entries & ((1 << bits) - 1))


def _save_seeded(ctx, inputs, output):
    _, scale, *source, _ = inputs
    ctx.save_for_backward(scale)
    ctx.source = source


def _seeded_backward(ctx, grad_theta_D):
    (scale,) = ctx.saved_tensors
    algorithm, version, D, seed, ranges = ctx.source
    if not grad_theta_D.is_cuda or algorithm == "balanced":
        return torch.ops.unilora.project_seeded_scatter([grad_theta_D], scale, *ctx.source), *[None] * 7
    index = torch.empty(grad_theta_D.shape, dtype=torch.int32, device=grad_theta_D.device)
    start, parts = 0, zip(ranges[::2], ranges[1::2], strict=True)
    for first, stop in parts:
        rows = index[start : (start := start + stop - first)]
        torch.ops.unilora.fill_index(rows, algorithm, version, D, scale.numel(), seed, first)
    return _transpose(grad_theta_D, scale, index, None), *[None] * 7


def _save_seeded_scatter(ctx, inputs, output):
    pieces, scale, *source = inputs
    ctx.save_for_backward(scale)
    ctx.source, ctx.shapes, ctx.dtype = source, [piece.shape for piece in pieces], pieces[0].dtype


def _seeded_scatter_backward(ctx, grad_g_d):
    (scale,) = ctx.saved_tensors
    return _in_pieces(ctx, torch.ops.unilora.project_seeded(grad_g_d, scale, *ctx.source, ctx.dtype)), *[None] * 6


def _save_nothing(ctx, inputs, output):
    pass


def _hadamard_backward(ctx, grad_y):  # symmetric, and so its own derivative
    return (torch.ops.unilora.hadamard(grad_y),)


def below_autograd(operator: torch._ops.OpOverload, keyset: DispatchKeySet | None, *args: Any) -> Any:
    """The operator's own kernel: called as it is, or with the `keyset` of a call that has come as far as autograd, so
    that a profiler does not see a second one."""
    with _AutoDispatchBelowAutograd():
        if keyset is None:
            return operator(*args)
        return operator.redispatch(keyset & _after_autograd_keyset, *args)


def _register_derivative(name: str, backward: Callable[..., Any], save: Callable[..., None]) -> None:
    """``torch.library.register_autograd``, but for the tangents of forward-mode differentiation: that drops them, and
    this, as every ``torch.autograd.Function`` without a rule for them, refuses."""
    operator = getattr(torch.ops.unilora, name).default
    defaults = [argument.default_value for argument in operator._schema.arguments]

    class Derivative(Function):
        @staticmethod
        def forward(ctx, keyset, lengths, *flat):
            values = iter(flat)
            args = [next(values) if n is None else [next(values) for _ in range(n)] for n in lengths]
            output = below_autograd(operator, keyset, *args)
            save(ctx, args, output)
            ctx.lengths = lengths
            return output

        @staticmethod
        def backward(ctx, grad):
            flat: list[Any] = []
            for n, value in zip(ctx.lengths, backward(ctx, grad), strict=True):
                flat += [value] if n is None else [None] * n if value is None else value
            return None, None, *flat

    def kernel(keyset, *args):
        args = (*args, *defaults[len(args) :])
        if not torch.is_grad_enabled() and forward_ad._current_level < 0:
            return below_autograd(operator, keyset, *args)
        lengths = [len(value) if isinstance(value, (list, tuple)) else None for value in args]
        flat = [v for n, value in zip(lengths, args, strict=True) for v in ([value] if n is None else value)]
        return Derivative.apply(keyset, lengths, *flat)

    library.impl(name, kernel, "Autograd", with_keyset=True)


library = torch.library.Library("unilora", "FRAGMENT")
for _name, _backward, _save in (
    ("project", _project_backward, _save_project),
    ("project_scatter", _scatter_backward, _save_scatter),
    ("project_segment_sum", _segment_sum_backward, _save_segment_sum),
    ("project_seeded", _seeded_backward, _save_seeded),
    ("project_seeded_scatter", _seeded_scatter_backward, _save_seeded_scatter),
    ("hadamard", _hadamard_backward, _save_nothing),
):
    _register_derivative(_name, _backward, _save)
