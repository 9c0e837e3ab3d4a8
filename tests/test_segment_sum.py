"""The transpose by segment sums, which CUDA has, in graphs that are compiled: here with a stand-in for its kernel."""

import pytest
import torch
from models import Tower, tokens

import unilora_ext as ul
from unilora_ext.projections.indexed import StoredRows


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Stored rows give the members of their columns to a graph; calls of the kernel are counted."""
    calls = []

    def segment_sum(g_D, scale, order, offsets, value):
        calls.append(len(g_D))
        terms = g_D.to(scale.dtype) if value is None else g_D.to(scale.dtype) * value
        lengths = offsets.diff().long()
        return scale * torch.segment_reduce(terms[order.long()], "sum", lengths=lengths, unsafe=True)

    library = torch.library.Library("unilora", "IMPL")
    library.impl("project_segment_sum", segment_sum, "CPU")
    monkeypatch.setattr(StoredRows, "operands", lambda rows, dtype: (*rows._vectors(dtype), *rows.members()))
    yield calls
    library._destroy()


@pytest.mark.parametrize("projection", ["uniform", "vera"])
def test_a_compiled_model(as_on_cuda, projection):
    model = Tower()
    d = 40 if projection == "uniform" else None
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=d, target_modules=["up", "down"], projection=projection))
    with torch.no_grad():
        adapter.theta_d.normal_()
    x = tokens()
    y = model(x)
    (expected,) = torch.autograd.grad(y.square().sum(), adapter.theta_d)
    assert as_on_cuda == []
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    again = compiled(x)
    (got,) = torch.autograd.grad(again.square().sum(), adapter.theta_d)
    torch.testing.assert_close(again, y)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert as_on_cuda == [adapter.projection.D]


def test_an_exported_model(as_on_cuda):
    """Its graph is of operators alone."""
    model = Tower().eval()
    ul.attach(model, ul.UniLoRAConfig(r=2, d=40, target_modules=["up", "down"]))
    x = tokens()
    exported = torch.export.export(model, (x,))
    assert torch.equal(exported.module()(x), model(x))
    assert "unilora.project.default" in str(exported.graph) and "autograd_function" not in str(exported.graph)
