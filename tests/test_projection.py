"""theta_D = P theta_d and its transpose, against the float64 oracle."""

import math

import pytest
import torch

import unilora_ext as ul
from unilora_ext import reference

ops = torch.ops.unilora
EPS = {t: torch.finfo(t).eps for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}
# D, d: one element, one column, more columns than rows, primes, the demo's size
SIZES = [(1, 1), (1, 5), (1000, 1), (37, 101), (9973, 127), (10007, 10007), (36864, 4096)]
KINDS = [ul.UniformProjection, ul.BalancedProjection]


def test_toy_example_of_the_paper():
    index = [0, 1, 0, 2, 0, 1, 2, 0, 1, 2]
    P = ul.OneHotProjection(index, 3)
    a, b, c = 0.6, -1.5, 2.0
    assert P.counts.tolist() == [4, 3, 3]
    expected = {0: a / 2, 1: b / math.sqrt(3), 2: c / math.sqrt(3)}
    theta_D = P(torch.tensor([a, b, c], dtype=torch.float64))
    torch.testing.assert_close(
        theta_D, torch.tensor([expected[j] for j in index], dtype=torch.float64), rtol=1e-15, atol=0
    )
    assert P.index.dtype == P.counts.dtype == torch.int32 and P.scale.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "d"), [(10, 3), (997, 31), (2048, 113), (64, 64)])
def test_isometry(kind, D, d):
    """P^T P = I on the columns in use (all of them, when balanced and d <= D)."""
    P = kind(D, d, seed=int(torch.randint(0, 2**40, ())))
    used = (P.counts > 0).double()
    gram = P.dense().T @ P.dense()
    torch.testing.assert_close(gram, torch.diag(used), rtol=0, atol=1e-14)
    if kind is ul.BalancedProjection:
        assert used.all()
    theta_d = torch.randn(d, dtype=torch.float64) * used
    torch.testing.assert_close(P(theta_d).norm(), theta_d.norm(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "d"), SIZES)
@pytest.mark.parametrize("dtype", EPS)
def test_forward(device, kind, D, d, dtype):
    P = kind(D, d, seed=3)
    theta_d = torch.randn(d, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    theta_D = P(theta_d, dtype=dtype)
    assert theta_D.dtype == dtype and theta_D.device.type == device.type
    expected = reference.project(theta_d.cpu(), P.column_scale(), P.index)
    torch.testing.assert_close(
        theta_D.cpu().double(),
        expected,
        rtol=2 * EPS[dtype] + 2 * EPS[theta_d.dtype],
        atol=6e-8 if dtype == torch.float16 else 0,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "d"), SIZES)
@pytest.mark.parametrize("dtype", EPS)
def test_transpose(device, kind, D, d, dtype):
    """Error bound of a sum of n terms in the accumulator's precision: n eps sum |term|."""
    P = kind(D, d, seed=4)
    g_D = torch.randn(D, device=device).to(dtype)
    g_d = P.transpose(g_D)
    assert g_d.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scale, index = P.column_scale(), P.index
    expected = reference.project_transpose(g_D.cpu(), scale, index)
    bound = reference.project_transpose(g_D.cpu().abs(), scale, index) * (P.counts + 2) * EPS[g_d.dtype]
    assert ((g_d.cpu().double() - expected).abs() <= bound).all()


def test_adjoint(device):
    """<P u, v> = <u, P^T v>."""
    P = ul.UniformProjection(5001, 77, seed=5)
    u, v = torch.randn(77, dtype=torch.float64, device=device), torch.randn(5001, dtype=torch.float64, device=device)
    torch.testing.assert_close(P(u) @ v, u @ P.transpose(v), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(device, kind):
    P = kind(53, 7, seed=6)
    theta_d = torch.randn(7, dtype=torch.float64, device=device, requires_grad=True)
    g_D = torch.randn(53, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(P, theta_d) and torch.autograd.gradgradcheck(P, theta_d)
    assert torch.autograd.gradcheck(P.transpose, g_D) and torch.autograd.gradgradcheck(P.transpose, g_D)


def test_rows_alone_equal_the_whole(device):
    P = ul.UniformProjection(1000, 31, seed=7)
    theta_d = torch.randn(31, device=device, requires_grad=True)
    whole = P(theta_d)
    weights = torch.randn(1000, device=device)
    (whole * weights).sum().backward()
    expected, theta_d.grad = theta_d.grad, None
    pieces = [P.restrict(device, [r]).project(theta_d) for r in [(0, 1), (1, 500), (500, 1000)]]
    assert torch.equal(torch.cat(pieces), whole)
    (torch.cat(pieces) * weights).sum().backward()
    torch.testing.assert_close(theta_d.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_several_ranges(device, kind):
    P = kind(600, 17, seed=8)
    rows = P.restrict(device, [(10, 50), (301, 302), (500, 600)])
    theta_d = torch.randn(17, device=device, requires_grad=True)
    whole, part = P(theta_d), rows.project(theta_d)
    chosen = torch.cat([torch.arange(10, 50), torch.arange(301, 302), torch.arange(500, 600)]).to(device)
    assert len(rows) == 141 and torch.equal(part, whole[chosen])
    g = torch.randn(len(chosen), device=device)
    full = torch.zeros(600, device=device).index_copy(0, chosen, g)
    torch.testing.assert_close(rows.project_transpose(g), P.transpose(full), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("materialize", [True, False])
def test_factors_are_the_projection_cut_up(device, kind, materialize, threads):
    """Values and gradients of the factors, to the bit, from gradients of any strides and one that is missing."""
    shapes = [(1, 1), (301, 7), (7, 400), (2048, 3), (3, 999), (64, 64)]
    D = sum(m * n for m, n in shapes)
    P = kind(D, 97, seed=12, materialize=materialize)
    for count in (1, 2, 3):
        threads(count)
        theta_d = torch.randn(97, device=device, requires_grad=True)
        factors = P.restrict(device).matrices(theta_d, shapes, torch.float32)
        assert [tuple(f.shape) for f in factors] == shapes
        assert torch.equal(torch.cat([f.flatten() for f in factors]), P(theta_d))
        grads = [torch.randn(n, m, device=device).T for m, n in shapes]
        (g_d,) = torch.autograd.grad(factors[:-1], theta_d, grads[:-1])
        g_D = torch.cat([*(g.flatten() for g in grads[:-1]), torch.zeros(64 * 64, device=device)])
        assert torch.equal(g_d, P.transpose(g_D))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("materialize", [True, False])
def test_the_gradient_of_a_few_factors_is_made_of_their_rows(device, kind, materialize):
    """Of rows that are several ranges of P; the same as with zeros for the other factors."""
    D = 5000
    P = kind(D, 97, seed=12, materialize=materialize)
    rows = P.restrict(device, [(7, 1000), (1003, 1004), (2000, 4000)])
    shapes = [(3, 5), (900, 1), (80, 1), (1990, 1), (3, 3)]
    assert sum(m * n for m, n in shapes) == len(rows)
    theta_d = torch.randn(97, dtype=torch.float64, device=device, requires_grad=True)
    for wanted in ([0], [2], [0, 2, 4], [1], [0, 1, 2, 3, 4]):
        factors = rows.matrices(theta_d, shapes, torch.float64)
        grads = [torch.randn_like(f) if k in wanted else torch.zeros_like(f) for k, f in enumerate(factors)]
        (g_d,) = torch.autograd.grad([factors[k] for k in wanted], theta_d, [grads[k] for k in wanted])
        whole = rows.project_transpose(torch.cat([g.flatten() for g in grads]))
        torch.testing.assert_close(g_d, whole, rtol=1e-12, atol=1e-12)


def test_memory_of_a_large_result_is_used_again_only_when_it_is_free():
    P = ul.UniformProjection(3_000_001, 1009, seed=1)  # 12 MB: recycled
    theta_d = torch.randn(1009)
    kept = P(theta_d)
    before = kept.clone()
    others = [P(theta_d + k) for k in range(3)]
    assert torch.equal(kept, before) and len({t.data_ptr() for t in (kept, *others)}) == 4
    view, address = kept[7:9], kept.data_ptr()
    del kept
    assert P(-theta_d).data_ptr() != address and torch.equal(view, before[7:9])
    del view
    again = P(theta_d)
    assert again.data_ptr() == address and torch.equal(again, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("D", "d"), SIZES)
@pytest.mark.parametrize("dtype", EPS)
def test_computed_rows_equal_stored_ones_to_the_bit(kind, D, d, dtype, threads):
    stored, computed = (kind(D, d, seed=5, materialize=m) for m in (True, False))
    theta_d, g_D = torch.randn(d), torch.randn(D).to(dtype)
    ranges = [(D // 7, D // 3), (D // 2 + 1, D)] if D > 20 else [(0, D)]
    for count in (1, 2, 3):
        threads(count)
        for of in (lambda P: P.restrict("cpu"), lambda P: P.restrict("cpu", ranges)):
            rows = of(computed)
            g = g_D[: len(rows)]
            assert rows.nbytes == 0 and len(rows) == len(of(stored))
            assert torch.equal(rows.project(theta_d, dtype), of(stored).project(theta_d, dtype))
            assert torch.equal(rows.project_transpose(g), of(stored).project_transpose(g))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("materialize", [True, False])
def test_results_do_not_depend_on_threads_or_repeats(threads, kind, materialize):
    P = kind(300_007, 9001, seed=9, materialize=materialize)
    theta_d, g_D = torch.randn(9001), torch.randn(300_007)
    results = []
    for count in (1, 2, 3, *[2] * 20):
        threads(count)
        results.append((P(theta_d), P.transpose(g_D)))
    for theta_D, g_d in results[1:]:
        assert torch.equal(theta_D, results[0][0]) and torch.equal(g_d, results[0][1])


@pytest.mark.cuda
def test_cuda_gradients_are_bit_equal_over_runs():
    P = ul.UniformProjection(300_007, 9001, seed=9)
    g_D = torch.randn(300_007, device="cuda")
    first = P.transpose(g_D)
    assert all(torch.equal(P.transpose(g_D), first) for _ in range(100))


def test_non_contiguous_and_half_inputs(device):
    P = ul.UniformProjection(999, 41, seed=10)
    theta_d, g_D = torch.randn(82, device=device)[::2], torch.randn(1998, device=device)[::2]
    assert torch.equal(P(theta_d), P(theta_d.contiguous()))
    assert torch.equal(P.transpose(g_D), P.transpose(g_D.contiguous()))
    half = torch.randn(41, device=device).bfloat16().requires_grad_()
    theta_D = P(half)
    assert theta_D.dtype == torch.bfloat16 and torch.equal(theta_D, P(half.detach().float(), dtype=torch.bfloat16))
    theta_D.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def cut(g_D):
    """Pieces of uneven lengths, an empty one and a matrix among them."""
    return g_D[:5], g_D[5:5], g_D[5:17].view(3, 4), g_D[17:]


def in_pieces(operator):
    def of_one(g_D, *rest):
        return operator(list(cut(g_D)), *rest)

    of_one.of = operator
    return of_one


def arguments(device, dtype=torch.float64, requires_grad=True):
    """Arguments of every projection operator of a device."""
    D, d = 61, 9
    rows = ul.UniformProjection(D, d, seed=3).restrict(device)
    scale = torch.rand(d, device=device, dtype=dtype)
    theta_d = torch.randn(d, dtype=dtype, device=device, requires_grad=requires_grad)
    g_D = torch.randn(D, dtype=dtype, device=device, requires_grad=requires_grad)
    members = rows.members([piece.numel() for piece in cut(g_D)])
    for value in (None, torch.randn(D, dtype=dtype, device=device)):
        yield ops.project, theta_d, (scale, rows.index, value, dtype)
        yield in_pieces(ops.project_segment_sum), g_D, (scale, *members, value)
        if device.type == "cpu":
            yield in_pieces(ops.project_scatter), g_D, (scale, rows.index, value)
    for algorithm, version in (("uniform", 1), ("balanced", 1), ("balanced", 2)):
        yield ops.project_seeded, theta_d, (scale, algorithm, version, 100, 5, [3, 40, 50, 74], dtype)
        if device.type == "cpu" or algorithm == "balanced":
            yield in_pieces(ops.project_seeded_scatter), g_D, (scale, algorithm, version, 100, 5, [3, 40, 50, 74])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(device, requires_grad):
    for operator, value, rest in arguments(device, torch.float32, requires_grad):
        if isinstance(operator, torch._ops.OpOverloadPacket):
            torch.library.opcheck(operator, (value, *rest))
        else:
            pieces = [piece.detach().requires_grad_(requires_grad) for piece in cut(value)]
            torch.library.opcheck(operator.of, (pieces, *rest))
    index = torch.zeros(97, dtype=torch.int32, device=device)
    for algorithm, version in (("uniform", 1), ("balanced", 2)):
        torch.library.opcheck(ops.fill_index, (index, algorithm, version, 200, 11, 1, 3))
    torch.library.opcheck(ops.column_members, (index, 3, [90, 0, 7]))


def test_operators_differentiate_when_called_directly(device):
    for operator, value, rest in arguments(device):
        assert torch.autograd.gradcheck(lambda v, operator=operator, rest=rest: operator(v, *rest), value), operator


def with_values(device, D, d, acc):
    """theta_d, scale, index and value, in the dtype of sums `acc`."""
    theta_d, scale = torch.randn(d, dtype=acc, device=device), torch.rand(d, dtype=acc, device=device)
    index = torch.randint(0, d, (D,), dtype=torch.int32, device=device)
    return theta_d, scale, index, torch.randn(D, dtype=acc, device=device)


@pytest.mark.parametrize(("D", "d"), [(0, 3), *SIZES])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("acc", [torch.float32, torch.float64])
def test_project_with_values(device, threads, D, d, dtype, acc):
    """theta_D[i] = T((theta_d[j] scale[j]) value[i]), to the bit, as PyTorch rounds; ones change nothing."""
    theta_d, scale, index, value = with_values(device, D, d, acc)
    for count in (1, 2):
        threads(count)
        expected = ((theta_d * scale)[index.long()] * value).to(dtype)
        assert torch.equal(ops.project(theta_d, scale, index, value, dtype), expected)
        strided = torch.stack([value, value])
        assert torch.equal(ops.project(theta_d, scale, index, strided.t()[:, 0], dtype), expected)
        plain = ops.project(theta_d, scale, index, None, dtype)
        assert torch.equal(ops.project(theta_d, scale, index, torch.ones_like(value), dtype), plain)


def transposes(device, scale, index, d):
    """The transposes of a device, as functions of g_D and the values: pairs that give the same bits, of a gradient in
    one piece and in several."""

    def scatter(pieces, value):
        return ops.project_scatter(pieces, scale, index, value)

    def segment_sum(pieces, value):
        members = ops.column_members(index, d, [len(piece) for piece in pieces])
        return ops.project_segment_sum(pieces, scale, *members, value)

    kinds = [segment_sum] if device.type == "cuda" else [scatter, segment_sum]
    return [
        (
            lambda g_D, value, of=kind: of([g_D], value),
            lambda g_D, value, of=kind: of(list(g_D.tensor_split([3, 3, 20])), value),
        )
        for kind in kinds
    ]


@pytest.mark.parametrize(("D", "d"), [(0, 3), *SIZES])
@pytest.mark.parametrize("dtype", EPS)
@pytest.mark.parametrize("acc", [torch.float32, torch.float64])
def test_transpose_with_values(device, threads, D, d, dtype, acc):
    _, scale, index, value = with_values(device, D, d, acc)
    g_D = torch.randn(D, device=device).to(dtype)
    members = torch.bincount(index.long(), minlength=d)
    expected = reference.project_transpose(g_D, scale, index, value)
    bound = reference.project_transpose(g_D.abs(), scale, index, value.abs()) * (members + 3) * EPS[acc]
    for pair in transposes(device, scale, index, d):
        results = []
        for count in (1, 2):
            threads(count)
            for transpose in pair:
                results.append(transpose(g_D, value))
                assert torch.equal(transpose(g_D, torch.ones_like(value)), transpose(g_D, None))
        assert all(torch.equal(g_d, results[0]) for g_d in results)
        assert results[0].dtype == acc and ((results[0].double() - expected).abs() <= bound).all()


def test_there_is_no_derivative_of_values(device):
    theta_d, scale, index, value = with_values(device, 20, 5, torch.float32)
    g_D = torch.randn(20, device=device, requires_grad=True)
    value.requires_grad_()
    for call in (
        lambda: ops.project(theta_d.requires_grad_(), scale, index, value, torch.float32),
        *(lambda of=of: of(g_D, value) for pair in transposes(device, scale, index, 5) for of in pair),
    ):
        with pytest.raises(RuntimeError, match="value: expected a tensor that requires no gradient"):
            call()
        with torch.no_grad():
            call()


def test_wrong_arguments_are_named(device):
    d = 5
    theta_d, scale = torch.randn(d, device=device), torch.rand(d, device=device)
    index = torch.arange(d, dtype=torch.int32, device=device)
    cases = [
        (
            lambda: ops.project(theta_d.int(), scale, index, None, torch.float32),
            "theta_d: expected dtype Float, got Int",
        ),
        (
            lambda: ops.project(theta_d, scale[1:], index, None, torch.float32),
            r"scale: expected shape \[5\], got \[4\]",
        ),
        (
            lambda: ops.project(theta_d, scale.double(), index, None, torch.float32),
            "scale: expected dtype Float, got Double",
        ),
        (lambda: ops.project(theta_d, scale, index.long(), None, torch.float32), "index: expected dtype Int, got Long"),
        (
            lambda: ops.project(theta_d, scale, index, None, torch.int32),
            "dtype: expected dtype Float, Double, Half or BFloat16",
        ),
    ]
    for value, message in (
        (scale[1:], r"value: expected shape \[5\], got \[4\]"),
        (scale[:, None], r"value: expected shape \[5\], got \[5, 1\]"),
        (scale.double(), "value: expected dtype Float, got Double"),
        (scale.half(), "value: expected dtype Float, got Half"),
    ):
        cases.append((lambda value=value: ops.project(theta_d, scale, index, value, torch.float32), message))
        cases += [
            (lambda value=value, transpose=transpose: transpose(theta_d, value), message)
            for transpose, _ in transposes(device, scale, index, d)
        ]
    cases += [
        (
            lambda: ops.project_segment_sum([theta_d], scale, index[1:], index, None),
            r"order: expected shape \[5\], got",
        ),
        (
            lambda: ops.project_segment_sum([theta_d], scale, index, index, None),
            r"offsets: expected shape \[6\], got \[5\]",
        ),
        (lambda: ops.column_members(index, 5, [2, 2]), r"sum\(lengths\): expected a value in \[5, 5\], got 4"),
        (lambda: ops.column_members(index, 5, [6, -1]), "length of a piece: expected a value in"),
        (lambda: ops.column_members(index, 5, []), "number of pieces: expected a value in"),
        (lambda: ops.column_members(index, 5, [5] + [0] * 1024), "number of pieces: expected a value in"),
        (lambda: ops.column_members(index, 0, [5]), "d: expected a value in"),
    ]
    if device.type == "cpu":  # on CUDA, an index out of range stops the kernel, as in PyTorch's own
        cases += [
            (lambda: ops.column_members(index, 4, [5]), r"index: expected values in \[0, 4\)"),
            (
                lambda: ops.project(theta_d, scale, index + 1, None, torch.float32),
                r"index: expected values in \[0, 5\)",
            ),
            (
                lambda: ops.project(theta_d, scale, index - 1, None, torch.float32),
                r"index: expected values in \[0, 5\)",
            ),
            (lambda: ops.project_scatter([theta_d], scale, index + 1, None), r"index: expected values in \[0, 5\)"),
            (lambda: ops.project_scatter([theta_d], scale, index[1:], None), r"index: expected shape \[5\], got \[4\]"),
            (
                lambda: ops.project_scatter([], scale, index, None),
                "number of tensors in grad_theta_D: expected a value in",
            ),
            (
                lambda: ops.project_scatter([theta_d[:2], theta_d[2:].double()], scale, index, None),
                "grad_theta_D: expected dtype Float, got Double",
            ),
            (
                lambda: ops.project_seeded(theta_d, scale, "peft", 1, 9, 0, [0, 9], torch.float32),
                "algorithm: expected 'uniform' or 'balanced', got 'peft'",
            ),
            (
                lambda: ops.project_seeded(theta_d, scale, "uniform", 1, 9, 0, [0, 10], torch.float32),
                r"stop of a range: expected a value in \[0, 9\], got 10",
            ),
            (
                lambda: ops.project_seeded_scatter([theta_d], scale, "uniform", 1, 9, 0, [0, 9]),
                r"len\(grad_theta_D\): expected a value in \[9, 9\], got 5",
            ),
            (
                lambda: ops.project_seeded(theta_d, scale, "uniform", 2, 9, 0, [0, 9], torch.float32),
                r"version: expected a value in \[1, 1\], got 2",
            ),
        ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()


def test_projection_constructors_name_what_is_wrong():
    cases = [
        (lambda: ul.UniformProjection(0, 3), r"UniformProjection: D: expected an integer in \[1, \d+\], got 0"),
        (lambda: ul.BalancedProjection(10, 2.5), "BalancedProjection: d: expected an integer"),
        (lambda: ul.UniformProjection(10, 3, seed=-1), r"seed: expected an integer in \[0, 2\^63\), got -1"),
        (lambda: ul.BalancedProjection(10, 3, version=3), r"version: expected one of \(1, 2\), got 3"),
        (lambda: ul.OneHotProjection([0, 3], 3), r"index: expected values in \[0, 3\), got values in \[0, 3\]"),
        (lambda: ul.OneHotProjection(torch.rand(3), 3), "index: expected a non-empty integer vector"),
        (lambda: ul.UniformProjection(10, 3)(torch.zeros(4)), r"theta_d: expected a floating tensor of shape \[3\]"),
        (lambda: ul.UniformProjection(10, 3).columns(5, 11), "rows: expected 0 <= start <= stop <= 10, got 5, 11"),
    ]
    for call, message in cases:
        with pytest.raises(ul.UniLoRAError, match=message):
            call()


def test_bytes_kept_an_element(device):
    P = ul.UniformProjection(36864, 4096)
    rows = P.restrict(device)
    P.transpose(torch.randn(P.D, device=device))
    assert rows.nbytes <= (8 * P.D + 4 * P.d + 4 if device.type == "cuda" else 4 * P.D)
    for kind in KINDS:
        P = kind(36864, 4096, materialize=False)
        P(torch.randn(P.d, device=device))
        assert P.restrict(device).nbytes == 0
        P.transpose(torch.randn(P.D, device=device))
        listed = device.type == "cuda" and kind is ul.UniformProjection
        assert P.restrict(device).nbytes == (4 * P.D + 4 * P.d + 4 if listed else 0)
