"""y = x W^T + b + s (x A^T) B^T and its gradients, against the float64 oracle."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import unilora_ext as ul
from unilora_ext import functional as functions
from unilora_ext import reference

ops = torch.ops.unilora
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# leading shape, n, m, r
SHAPES = [
    ((5,), 8, 6, 1),
    ((2, 3), 33, 17, 3),
    ((), 7, 5, 4),
    ((40,), 64, 700, 64),
    ((3, 0), 12, 9, 4),
    ((37,), 513, 129, 5),
    ((1, 1, 2), 1, 1, 2),
    ((18,), 40, 30, 70),
    ((1,), 31, 45, 8),
    ((2,), 19, 37, 16),
    ((2,), 21, 23, 5),
]


def inputs(leading, n, m, r, dtype, device="cpu", bias=True):
    def draw(*shape, size=1.0):
        return (torch.randn(*shape, dtype=torch.float64, device=device) * size).to(dtype)

    b = draw(m) if bias else None
    return draw(*leading, n), draw(m, n, size=n**-0.5), b, draw(r, n, size=n**-0.5), draw(m, r, size=r**-0.5)


def assert_near(actual, expected, dtype, terms, size=1.0):
    """Within the rounding of a few results of `dtype` and a sum of `terms` float32 (float64) products."""
    sums = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    tolerance = 6 * torch.finfo(dtype).eps + 2 * terms**0.5 * sums
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * max(largest, size))


@pytest.mark.parametrize(("leading", "n", "m", "r"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_forward(device, leading, n, m, r, dtype, bias):
    x, weight, b, A, B = inputs(leading, n, m, r, dtype, device, bias)
    y = ul.lora_linear(x, weight, b, A, B, 0.7)
    assert y.shape == (*leading, m) and y.dtype == dtype and y.is_contiguous()
    assert_near(y, reference.lora_linear(x, weight, b, A, B, 0.7), dtype, n + r)


@pytest.mark.parametrize(("leading", "n", "m", "r"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(device, leading, n, m, r, dtype):
    x, weight, b, A, B = inputs(leading, n, m, r, dtype, device)
    for t in (x, A, B):
        t.requires_grad_()
    grad_y = torch.randn(*leading, m, device=device).to(dtype)
    ul.lora_linear(x, weight, b, A, B, -1.3).backward(grad_y)
    with torch.no_grad():
        expected = reference.lora_linear_backward(grad_y, x, weight, A, B, -1.3)
    for actual, wanted in zip((x.grad, A.grad, B.grad), expected, strict=True):
        assert actual.dtype == dtype and actual.shape == wanted.shape
        assert_near(actual, wanted, dtype, n + m + x.numel() // max(n, 1))


def test_the_update_itself_is_right(device):
    """With W = 0 nothing hides an error of the low-rank part."""
    x, weight, _, A, B = inputs((31,), 65, 47, 3, torch.float32, device)
    expected = 2.5 * (x.double() @ A.double().T) @ B.double().T
    torch.testing.assert_close(
        ul.lora_linear(x, torch.zeros_like(weight), None, A, B, 2.5).double(), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(device, dtype):
    """NaN and infinity survive the in-place update and its rounding, in their own rows alone."""
    x, weight, b, A, B = inputs((9,), 33, 50, 3, dtype, device)
    x[2], x[5, 7] = float("nan"), float("inf")
    y = ul.lora_linear(x, weight, b, A, B)
    assert y[2].isnan().all() and not y[5].isfinite().any()
    assert torch.cat([y[:2], y[3:5], y[6:]]).isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(device, bias):
    x, weight, b, A, B = inputs((2, 3), 5, 4, 2, torch.float64, device, bias)
    trained = [t.requires_grad_() for t in (x, weight, b, A, B) if t is not None]

    def function(*tensors):
        x, weight, *rest = tensors
        b = rest.pop(0) if bias else None
        return ul.lora_linear(x, weight, b, *rest, 0.5)

    assert torch.autograd.gradcheck(function, trained)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3)])
def test_gradients_of_a_trained_weight(device, leading):
    x, weight, b, A, B = inputs(leading, 6, 5, 2, torch.float64, device)
    trained = [weight.requires_grad_(), b.requires_grad_()]
    grad_y = torch.randn(*leading, 5, dtype=torch.float64, device=device)
    actual = torch.autograd.grad(ul.lora_linear(x, weight, b, A, B), trained, grad_y)
    expected = torch.autograd.grad(reference.lora_linear(x, weight, b, A, B, 1.0), trained, grad_y)
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_flops_are_counted(device):
    N, n, m, r = 6, 9, 7, 3
    x, weight, b, A, B = inputs((2, 3), n, m, r, torch.float32, device)
    dense, low_rank = 2 * N * n * m, 2 * N * r * (n + m)

    def count(function):
        with FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    assert count(lambda: ul.lora_linear(x, weight, b, A, B)) == dense + low_rank
    assert count(lambda: functions.lora_update(torch.zeros(2, 3, m, device=device), x, A, B)) == low_rank
    for t in (x, A, B):
        t.requires_grad_()
    y = ul.lora_linear(x, weight, b, A, B)  # backward: u = dy B, dx = dy W + u A, dA = u^T x, dB = dy^T h
    assert count(lambda: y.sum().backward()) == dense + 2 * low_rank


def test_only_wanted_gradients_are_computed(device):
    x, weight, b, A, B = inputs((4,), 6, 5, 2, torch.float32, device)
    A.requires_grad_()
    ul.lora_linear(x, weight, b, A, B).sum().backward()
    assert A.grad is not None and x.grad is None and B.grad is None and weight.grad is None
    y, h = ops.lora_linear(x, weight, b, A.detach(), B, 1.0)
    grads = ops.lora_linear_backward(y, x, h, weight, A.detach(), B, 1.0, False, True, False)
    assert [list(g.shape) for g in grads] == [[0], [2, 6], [0]]


def test_non_contiguous_inputs(device):
    x, weight, b, A, B = inputs((6, 9), 10, 8, 3, torch.float32, device)
    y = ul.lora_linear(x, weight, b, A, B)
    strided = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        weight.T.contiguous().T,
        torch.stack([b, b], 1)[:, 0],
        A.T.contiguous().T,
        B.T.contiguous().T,
    ]
    assert not any(t.is_contiguous() for t in strided)
    torch.testing.assert_close(ul.lora_linear(*strided), y)
    x = strided[0].detach().requires_grad_()
    strided[0] = x
    ul.lora_linear(*strided).transpose(0, 1).sum().backward()  # a non-contiguous gradient too
    expected = reference.lora_linear_backward(torch.ones_like(y), x.detach(), weight, A, B, 1.0)[0]
    torch.testing.assert_close(x.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_results_do_not_depend_on_threads_or_repeats(threads):
    x, weight, b, A, B = inputs((300,), 200, 333, 5, torch.float32)
    for t in (x, A, B):
        t.requires_grad_()
    zero = torch.zeros_like(weight)  # the dense products are ATen's, with its own guarantees
    results = []
    for count in (1, 2, 3, *[2] * 20):
        threads(count)
        y = ul.lora_linear(x, zero, b, A, B)
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, A, B))))
    for result in results[1:]:
        assert all(torch.equal(a, e) for a, e in zip(result, results[0], strict=True))


@pytest.mark.cuda
def test_cuda_gradients_are_bit_equal_over_runs():
    x, weight, b, A, B = inputs((300,), 200, 333, 5, torch.bfloat16, "cuda")
    for t in (x, A, B):
        t.requires_grad_()

    def run():
        y = ul.lora_linear(x, weight, b, A, B)
        return (y, *torch.autograd.grad(y.float().sin().sum(), (x, A, B)))

    first = run()
    assert all(torch.equal(a, e) for _ in range(100) for a, e in zip(run(), first, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    x, weight, b, A, B = inputs((7,), 12, 10, 2, torch.float32, device)
    for t in (x, A, B):
        t.requires_grad_()
    with torch.autocast(device.type, dtype=dtype):
        y = ul.lora_linear(x, weight, b, A, B)
        plain = torch.nn.functional.linear(x, weight, b)
        double = ul.lora_linear(*(t.detach().double() for t in (x, weight, b, A, B)))
    assert y.dtype == plain.dtype == dtype and double.dtype == torch.float64
    cast = [t.detach().to(dtype) for t in (x, weight, b, A, B)]
    assert torch.equal(y, ul.lora_linear(*cast))
    y.float().sum().backward()
    assert x.grad.dtype == A.grad.dtype == B.grad.dtype == torch.float32


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype, requires_grad):
    x, weight, b, A, B = inputs((2, 3), 8, 6, 2, dtype, device)
    for t in (x, A, B):
        t.requires_grad_(requires_grad)
    tolerance = {} if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)
    for bias in (b, None):
        torch.library.opcheck(ops.lora_linear, (x, weight, bias, A, B, 0.5), **tolerance)
    y, h = ops.lora_linear(x.detach(), weight, b, A.detach(), B.detach(), 0.5)
    with torch.no_grad():
        for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            arguments = (y, x.detach(), h, weight, A.detach(), B.detach(), 0.5, *needs)
            torch.library.opcheck(ops.lora_linear_backward, arguments)


def test_operator_differentiates_when_called_directly(device):
    x, weight, b, A, B = inputs((3,), 5, 4, 2, torch.float64, device)
    for t in (x, A, B):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, A, B: ops.lora_linear(x, weight, b, A, B, 0.5)[0], (x, A, B))


def test_what_is_saved_for_backward():
    """x, h, W, A and B: nothing of the size of y."""
    x, weight, b, A, B = inputs((50,), 16, 400, 2, torch.float32)
    for t in (x, A, B):
        t.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        ul.lora_linear(x, weight, b, A, B)
    assert sorted(saved) == sorted([(50, 16), (50, 2), (400, 16), (2, 16), (400, 2)])


def test_wrong_arguments_are_named(device):
    x, weight, b, A, B = inputs((3,), 8, 6, 2, torch.float32, device)
    cases = [
        ((x[:, 1:], weight, b, A, B), r"x: expected shape \[\.\.\., 8\], got \[3, 7\]"),
        ((x, weight[0], b, A, B), r"weight: expected shape \[\*, \*\], got \[8\]"),
        ((x, weight, b[1:], A, B), r"bias: expected shape \[6\], got \[5\]"),
        ((x, weight, b, A[:, 1:], B), r"A: expected shape \[\*, 8\], got \[2, 7\]"),
        ((x, weight, b, A[:0], B[:, :0]), r"A: expected rank r >= 1, got shape \[0, 8\]"),
        ((x, weight, b, A, B.T), r"B: expected shape \[6, 2\], got \[2, 6\]"),
        ((x, weight, b, A.double(), B), "A: expected dtype Float, got Double"),
        ((x.bfloat16(), weight, b, A, B), "weight: expected dtype BFloat16, got Float"),
        ((x.int(), weight, b, A, B), "x: expected dtype Float, Double, Half or BFloat16, got Int"),
    ]
    for arguments, message in cases:
        with pytest.raises(RuntimeError, match="unilora::lora_linear: " + message):
            ul.lora_linear(*arguments)
