"""y = H x, the Walsh-Hadamard transform, against the float64 oracle."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from unilora_ext import reference

hadamard = torch.ops.unilora.hadamard
DTYPES = [torch.float32, torch.float64]


def butterflies(x):
    """As csrc/hadamard/hadamard.h says it: the factor, then bit after bit, each rounded."""
    n = x.shape[-1]
    bits = n.bit_length() - 1
    y = x * torch.tensor(math.ldexp(math.sqrt(0.5) if bits % 2 else 1.0, -(bits // 2)), dtype=x.dtype)
    for bit in range(bits):
        pairs = y.reshape(-1, n >> (bit + 1), 2, 1 << bit)
        a, b = pairs[:, :, 0], pairs[:, :, 1]
        y = torch.stack([a + b, a - b], dim=2)
    return y.reshape(x.shape)


def error_bound(x):
    """(bits + 2) roundings of the norm of each row."""
    rounding = torch.finfo(x.dtype).eps / 2
    return 1.01 * (x.shape[-1].bit_length() + 1) * rounding * x.double().norm(dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(11))
@pytest.mark.parametrize("leading", [(), (0,), (1,), (3,), (2, 0), (5, 1, 7), (67,)])
def test_definition(device, dtype, bits, leading):
    x = torch.randn(*leading, 1 << bits, dtype=dtype)
    y = hadamard(x.to(device))
    assert y.shape == x.shape and y.dtype == dtype and y.device.type == device.type and y.is_contiguous()
    error = (y.cpu().double() - reference.hadamard(x)).norm(dim=-1)
    if dtype == torch.float32:  # the oracle's own sums are as inexact as float64 ones
        assert (error <= error_bound(x)).all()
    else:
        assert (error <= 4 * error_bound(x) + 1e-15).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_signs_of_the_entries(device, dtype):
    """A row of H for each row of the identity, exact where sqrt(n) is."""
    H = hadamard(torch.eye(16, dtype=dtype, device=device)).cpu()
    assert H[1].tolist() == [0.25, -0.25] * 8 and H[8].tolist() == [0.25] * 8 + [-0.25] * 8
    assert torch.equal(H, H.t()) and torch.equal(H[3], 4 * H[1] * H[2])
    assert hadamard(torch.tensor([[3.0, 4.0]], device=device)).tolist()[0] == pytest.approx([7 / 2**0.5, -1 / 2**0.5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", range(22))
def test_large_sizes_and_threads(device, threads, dtype, bits):
    """Equal to the butterflies, and so to every other way of dealing them out, to the bit."""
    for rows in {1, 3} | ({65, 1001} if bits < 10 else {80} if bits in (12, 13) else set()):
        x = torch.randn(rows, 1 << bits, dtype=dtype)
        expected = butterflies(x)
        for count in (1, 2):
            threads(count)
            assert torch.equal(hadamard(x.to(device)).cpu(), expected), (rows, count)


@pytest.mark.parametrize("bits", [15, 18])
def test_many_long_rows(device, threads, bits):
    """More data than is passed over as a whole: long rows are transformed part by part."""
    x = torch.randn((1 << 24) + (1 << 18)).view(-1, 1 << bits)
    expected = butterflies(x)
    for count in (1, 2):
        threads(count)
        assert torch.equal(hadamard(x.to(device)).cpu(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_its_own_inverse_and_keeps_the_norm(device, dtype):
    for bits in (0, 1, 6, 13, 17):
        x = torch.randn(2, 1 << bits, dtype=dtype, device=device)
        y = hadamard(x)
        assert ((hadamard(y).double() - x.double()).norm(dim=-1) <= 2 * error_bound(x)).all()
        torch.testing.assert_close(y.norm(), x.norm(), rtol=100 * torch.finfo(dtype).eps, atol=0)


def test_non_contiguous_and_unaligned(device):
    x = torch.randn(64, 33, device=device).t()  # [33, 64], columns of the transpose
    assert torch.equal(hadamard(x), hadamard(x.contiguous()))
    flat = torch.randn(3 * 256 + 1, device=device)
    assert torch.equal(hadamard(flat[1:].view(3, 256)), hadamard(flat[1:].view(3, 256).clone()))
    spread = torch.randn(5, 128, device=device)[:, ::2]
    assert torch.equal(hadamard(spread), hadamard(spread.contiguous()))
    one = torch.randn(1, 32, device=device).expand(4, 32)
    assert torch.equal(hadamard(one), hadamard(one[:1]).expand(4, 32))


def test_extreme_values(device):
    y = hadamard(torch.full((1, 1 << 12), 3e36, device=device))
    assert y[0, 0].item() == pytest.approx(1.92e38) and not y[0, 1:].any()  # the plain sum, 1.2e40, is out of range
    x = torch.zeros(2, 64, device=device)
    x[0, 5] = math.nan
    assert hadamard(x)[0].isnan().all() and not hadamard(x)[1].any()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    for shape in ((3, 8), (1,), (2, 0, 4), (128,)):
        torch.library.opcheck(hadamard, (torch.randn(shape, device=device, requires_grad=requires_grad),))


def test_derivatives_of_any_order(device):
    x = torch.randn(3, 8, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, x) and torch.autograd.gradgradcheck(hadamard, x)
    (grad,) = torch.autograd.grad((hadamard(x) ** 4).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    H = reference.hadamard(torch.eye(8)).to(device)
    ones = H.sum(dim=0)
    torch.testing.assert_close(third, (24 * (x @ H) * ones**2) @ H, rtol=1e-10, atol=1e-10)


def test_compiled():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(x):
        return hadamard(x * 2)

    x = torch.randn(4, 16, requires_grad=True)
    y = f(x)
    assert torch.equal(y, hadamard(x * 2))
    y[0, 3].backward()
    torch.testing.assert_close(x.grad[0], 2 * reference.hadamard(torch.eye(16))[3].float())
    assert not x.grad[1:].any()


def test_wrong_arguments_are_named(device):
    cases = [
        (torch.zeros(3), r"x: expected shape \[\.\.\., n\], n a power of two.*, got \[3\]"),
        (torch.zeros(4, 6), r"x: expected shape \[\.\.\., n\], n a power of two.*, got \[4, 6\]"),
        (torch.zeros(4, 0), r"x: expected shape \[\.\.\., n\], n a power of two.*, got \[4, 0\]"),
        (torch.zeros(()), r"x: expected shape \[\.\.\., n\], n a power of two.*, got \[\]"),
        (torch.zeros(0, 1 << 31), r"x: expected shape \[\.\.\., n\], n a power of two"),
        (torch.zeros(4, dtype=torch.int32), "x: expected dtype Float or Double, got Int"),
        (torch.zeros(4, dtype=torch.float16), "x: expected dtype Float or Double, got Half"),
        (torch.zeros(4, dtype=torch.bfloat16), "x: expected dtype Float or Double, got BFloat16"),
        (torch.zeros(4, dtype=torch.complex64), "x: expected dtype Float or Double, got ComplexFloat"),
    ]
    for x, message in cases:
        with pytest.raises(RuntimeError, match="unilora::hadamard: " + message):
            hadamard(x.to(device))


def test_fake_tensors():
    for fake in (torch.empty(3, 8, device="meta"), FakeTensorMode().from_tensor(torch.empty(8, 3).t())):
        y = hadamard(fake)
        assert y.shape == (3, 8) and y.dtype == torch.float32 and y.is_contiguous() and y.device == fake.device
    for bad, message in (
        (torch.empty(3, device="meta"), "x: expected shape"),
        (torch.empty((), device="meta"), "x: expected shape"),
        (torch.empty(0, 1 << 31, device="meta"), "x: expected shape"),
        (torch.empty(4, dtype=torch.float16, device="meta"), "x: expected dtype"),
    ):
        with pytest.raises(RuntimeError, match="unilora::hadamard: " + message):
            hadamard(bad)
