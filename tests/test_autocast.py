"""torch.autocast, entered and left anywhere: no operator meets it below its own entry."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import unilora_ext as ul
from unilora_ext import functional, reference

operators = torch.ops.unilora
HALVES = [torch.bfloat16, torch.float16]


def inputs(device, dtype, N=6, n=9, m=7, r=3):
    shapes = ((N, n), (m, n), (m,), (r, n), (m, r))
    return [(torch.randn(shape, dtype=torch.float64, device=device) * shape[-1] ** -0.5).to(dtype) for shape in shapes]


def near(actual, expected, dtype):
    tolerance = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def autocast(device, dtype):
    return torch.autocast(device.type, dtype)


@pytest.mark.parametrize("size", [1, 8, 300])
def test_a_backward_inside_autocast_does_not_touch_foreign_memory(tmp_path, size):
    """In a process of its own, which a write beyond a tensor ends."""
    code = f"""
import torch, unilora_ext as ul
x, W, A, B = (torch.randn(s).requires_grad_() for s in [({size}, 64), (48, 64), (4, 64), (48, 4)])
for dtype in (torch.bfloat16, torch.float16):
    for _ in range(20):
        y = ul.lora_linear(x, W.detach(), None, A, B)
        with torch.autocast("cpu", dtype):
            grads = torch.autograd.grad(y.sum(), (x, A, B))
            torch.ops.unilora.lora_linear(x, W, None, A, B, 1.0)
    assert all(g.dtype == torch.float32 for g in grads)
print("whole")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "whole\n", done.stderr[-2000:]


@pytest.mark.parametrize("outer", HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_a_backward_is_what_it_is_outside(device, dtype, outer):
    """To the bit: of the fused layer, the update, and a trained weight."""
    x, weight, bias, A, B = (t.requires_grad_() for t in inputs(device, dtype))
    for function in (
        lambda: ul.lora_linear(x, weight, bias, A, B, 0.7),
        lambda: functional.lora_update(nn.functional.linear(x, weight, bias), x, A, B, 0.7),
    ):
        y = function()
        grad_y = torch.randn(y.shape, device=device).to(dtype)
        expected = torch.autograd.grad(y, (A, B), grad_y, retain_graph=True)
        with autocast(device, outer):
            actual = torch.autograd.grad(y, (A, B), grad_y)
        assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(actual, expected, strict=True))
    y = ul.lora_linear(x, weight, bias, A, B, 0.7)
    expected = torch.autograd.grad(y, (x, weight, bias), grad_y, retain_graph=True)
    with autocast(device, outer):
        actual = torch.autograd.grad(y, (x, weight, bias), grad_y)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", HALVES)
def test_operators_called_inside(device, dtype):
    """lora_linear casts, as F.linear does; float64 and the other operators are as outside."""
    tensors = inputs(device, torch.float32)
    x, weight, bias, A, B = (t.requires_grad_() for t in tensors)
    with autocast(device, dtype):
        y, h = operators.lora_linear(x, weight, bias, A, B, 0.5)
        assert torch.nn.functional.linear(x, weight).dtype == y.dtype == dtype and h.dtype == torch.float32
        doubles = [t.double() for t in tensors]
        assert operators.lora_linear(*doubles, 0.5)[0].dtype == torch.float64
        plain = [t.detach() for t in tensors]
        whole = torch.randn(6, 7, device=device)
        hidden = plain[0] @ plain[3].T
        grads = operators.lora_linear_backward(whole, plain[0], hidden.float(), plain[1], *plain[3:], 0.5, *[True] * 3)
        assert operators.lora_update(whole, plain[0], *plain[3:], 0.5)[0].dtype == torch.float32
    near(y, reference.lora_linear(*tensors, 0.5), dtype)
    expected = reference.lora_linear_backward(whole, plain[0], plain[1], *plain[3:], 0.5)
    near(grads[0], expected[0], torch.float32)
    near(grads[1], expected[1], torch.float32)
    assert all(g.dtype == torch.float32 for g in grads)
    y.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, weight, bias, A, B))
    near(x.grad, reference.lora_linear_backward(torch.ones_like(y), x, weight, A, B, 0.5)[0].detach(), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_second_derivatives_inside(device, dtype):
    x, weight, bias, A, B = (t.requires_grad_() for t in inputs(device, torch.float64))

    def penalty(enabled):
        (g,) = torch.autograd.grad(ul.lora_linear(x, weight, bias, A, B).square().sum(), x, create_graph=True)
        with torch.autocast(device.type, dtype, enabled=enabled):
            return torch.autograd.grad(g.square().sum(), (x, weight, A, B))

    assert all(torch.equal(a, b) for a, b in zip(penalty(True), penalty(False), strict=True))


@pytest.mark.parametrize("mode", ["eager", "compiled", "exported"])
def test_models(mode):
    """A forward inside, the backward inside another autocast: theta_d's gradient within 16 bits of float32's."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=9, init_bound=0.3))
    x = torch.randn(8, 12)
    (expected,) = torch.autograd.grad(model(x).square().sum(), adapter.theta_d)
    run, theta_d = model, adapter.theta_d
    if mode == "compiled":
        run = torch.compile(model, backend="aot_eager")
    elif mode == "exported":
        run = torch.export.export(model, (x,)).module()
        theta_d = dict(run.named_parameters())["0.unilora.theta_d"]
    with torch.autocast("cpu", torch.bfloat16):
        y = run(x)
        assert y.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        (actual,) = torch.autograd.grad(y.square().sum(), theta_d)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=float(0.05 * expected.abs().max()))
