"""The members of columns, and the transpose by sums over them, which CUDA has, on the CPU: eager, in graphs that are
compiled, and exported ones."""

import pytest
import torch
from models import Tower, tokens
from torch.utils._python_dispatch import TorchDispatchMode

import unilora_ext as ul
from unilora_ext import reference
from unilora_ext.projections.indexed import IndexedRows


@pytest.mark.parametrize(("D", "d"), [(0, 3), (1, 1), (5, 9), (1000, 1), (1003, 17), (9001, 300)])
def test_column_members(device, threads, D, d):
    """To the bit, of one piece and of several, empty ones among them; where all rows are in one column, too."""
    for index in (torch.randint(0, d, (D,)), torch.full((D,), d - 1)):
        index = index.to(device, torch.int32)
        for lengths in ([D], [0, D], [D // 3, 0, D - D // 3], [1] * min(D, 1000) + [D - min(D, 1000)]):
            expected = reference.column_members(index, d, lengths)
            for count in (1, 2):
                threads(count)
                got = torch.ops.unilora.column_members(index, d, lengths)
                assert all(map(torch.equal, got, expected)), lengths


def test_members_are_kept_for_the_last_pieces(device):
    rows = ul.UniformProjection(300, 17, seed=1).restrict(device)
    of_one = rows.members()
    assert rows.members([300])[0] is of_one[0] and rows.members([100, 200])[0] is not of_one[0]
    for lengths in ([300], [100, 200]):
        got, expected = rows.members(lengths), reference.column_members(rows.index, 17, lengths)
        assert all(map(torch.equal, got, expected))


class Calls(TorchDispatchMode):
    """Number of pieces in each call of the operator."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.unilora.project_segment_sum.default:
            self.pieces.append(len(args[0]))
        return operator(*args, **(kwargs or {}))


@pytest.fixture
def as_on_cuda(monkeypatch):
    monkeypatch.setattr(IndexedRows, "by_members", True)


def gradient(model, adapter, x):
    (g_d,) = torch.autograd.grad(model(x).square().sum(), adapter.theta_d)
    return g_d


def adapted(projection="uniform", **options):
    model = Tower()
    d = None if projection == "vera" else 40
    config = ul.UniLoRAConfig(r=2, d=d, target_modules=["up", "down"], projection=projection, **options)
    adapter = ul.attach(model, config)
    with torch.no_grad():
        adapter.theta_d.normal_()
    return model, adapter


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("projection", ["uniform", "balanced"])
def test_an_eager_model(monkeypatch, projection, materialize):
    """From the layers' gradients as they lie, and from one vector where they are too many."""
    model, adapter = adapted(projection, materialize=materialize)
    x = tokens()
    expected = gradient(model, adapter, x)
    monkeypatch.setattr(IndexedRows, "by_members", True)
    for most, pieces in ((1024, 12), (11, 1)):
        monkeypatch.setattr("unilora_ext.projections.indexed._MOST_PIECES", most)
        with Calls() as calls:
            got = gradient(model, adapter, x)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert calls.pieces == ([] if projection == "balanced" and not materialize else [pieces])


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_activation_checkpointing(as_on_cuda, mode):
    model, adapter = adapted()
    x = tokens()
    expected = gradient(model, adapter, x)
    model.checkpointing = mode
    adapter.theta_d.grad = None
    model(x).square().sum().backward()
    torch.testing.assert_close(adapter.theta_d.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("projection", ["uniform", "vera"])
def test_a_compiled_model(as_on_cuda, projection):
    model, adapter = adapted(projection)
    x = tokens()
    y = model(x)
    expected = gradient(model, adapter, x)
    again = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(again, y)
    with Calls() as calls:
        (got,) = torch.autograd.grad(again.square().sum(), adapter.theta_d)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert calls.pieces == [1]


def test_an_exported_model(as_on_cuda):
    """Its graph is of operators alone."""
    model, _ = adapted()
    model.eval()
    x = tokens()
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
    assert "unilora.project.default" in str(exported.graph) and "autograd_function" not in str(exported.graph)
