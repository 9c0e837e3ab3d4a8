"""PyTorch's modes: what is kept of a projection from a use in one mode serves all later ones, and defaults that a
program sets (device, dtype) change nothing."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import unilora_ext as ul
from unilora_ext.projections.base import kept

KINDS = {
    "uniform": lambda: ul.UniformProjection(300, 17, seed=3),
    "uniform, computed": lambda: ul.UniformProjection(300, 17, seed=3, materialize=False),
    "balanced": lambda: ul.BalancedProjection(300, 17, seed=3),
    "peft": lambda: ul.PeftProjection(300, 17, seed=3),
    "onehot": lambda: ul.OneHotProjection([k * k % 17 for k in range(300)], 17),
}


@contextmanager
def setting(put, value, before):
    """A process-wide setting, put back afterwards."""
    put(value)
    try:
        yield
    finally:
        put(before)


MODES = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default device meta": lambda: setting(torch.set_default_device, "meta", None),
    "device context meta": lambda: torch.device("meta"),
    "default dtype float64": lambda: setting(torch.set_default_dtype, torch.float64, torch.float32),
    "default dtype float16": lambda: setting(torch.set_default_dtype, torch.float16, torch.float32),
    "deterministic algorithms": lambda: setting(torch.use_deterministic_algorithms, True, False),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


def test_nothing_is_kept_while_a_cuda_graph_is_captured(monkeypatch):
    """What would be made then lies in the graph's memory: an error that says what to do."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    made = []
    with pytest.raises(ul.UniLoRAError, match="Run forward and backward once before the capture"):
        kept(torch.device("cuda"), lambda: made.append(1))
    assert not made
    assert kept(torch.device("cpu"), lambda: 3) == 3


def adapted(materialize=None):
    model = network()
    config = ul.UniLoRAConfig(target_modules=["0", "2"], r=2, d=11, materialize=materialize, init_bound=0.5)
    return model, ul.attach(model, config)


def gradient(model, adapter, x, forward=None):
    """(y, gradient of theta_d) of one step of training."""
    adapter.theta_d.grad = None
    y = (forward or model)(x)
    y.square().sum().backward()
    return y.detach(), adapter.theta_d.grad


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_a_projection_first_used_in_a_mode(kind, mode):
    make = KINDS[kind]
    theta_d, g_D = torch.randn(17), torch.randn(300)
    with MODES[mode]():
        P = make()
        during = P(theta_d), P.transpose(g_D), P.index, P.counts, P.scale, P.dense()
    fresh = make()
    expected = fresh(theta_d), fresh.transpose(g_D), fresh.index, fresh.counts, fresh.scale, fresh.dense()
    after = P(theta_d), P.transpose(g_D), P.index, P.counts, P.scale, P.dense()
    for name, wanted, *got in zip(
        ("P", "P^T", "index", "counts", "scale", "dense"), expected, during, after, strict=True
    ):
        assert all(t.dtype == wanted.dtype and t.device == wanted.device and torch.equal(t, wanted) for t in got), name
    for t in (P.scale, P.column_scale(), *(t for t in [getattr(P.restrict("cpu"), "index", None)] if t is not None)):
        assert not t.is_inference()
    leaf = theta_d.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(P(leaf), leaf, g_D)[0], expected[1])


def test_members_first_made_in_inference_mode():
    rows = KINDS["uniform"]().restrict("cpu")
    with torch.inference_mode():
        rows.members()
    assert not any(t.is_inference() for t in rows.members())


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "inference mode"])
def test_attach_save_and_load_in_a_mode(mode, tmp_path):
    """Not in inference mode: no module's parameters that are made there can be trained."""
    x, model, loaded = torch.randn(5, 8), network(), network()
    with MODES[mode]():
        adapter = ul.attach(model, ul.UniLoRAConfig(target_modules=["0", "2"], r=2, d=11, init_bound=0.5))
        adapter.save(tmp_path)
        again = ul.load(loaded, tmp_path)
    for theta_d in (adapter.theta_d, again.theta_d):
        assert theta_d.dtype == torch.float32 and theta_d.device.type == "cpu"
        assert 0 < theta_d.abs().max() <= 0.5
    reference = network()
    of_reference = ul.attach(reference, ul.UniLoRAConfig(target_modules=["0", "2"], r=2, d=11))
    of_reference.theta_d.data.copy_(adapter.theta_d)
    assert torch.equal(model(x), reference(x)) and torch.equal(loaded(x), reference(x))


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_evaluation_in_a_mode_then_training(mode, materialize):
    x = torch.randn(5, 8)
    reference, of_reference = adapted(materialize)
    model, adapter = adapted(materialize)
    adapter.theta_d.data.copy_(of_reference.theta_d)
    expected = gradient(reference, of_reference, x)
    with MODES[mode]():
        model(x)
        model[0](x)  # a layer alone
        adapter.merge()
        adapter.unmerge()
    for got in (gradient(model, adapter, x), gradient(model, adapter, x, torch.compile(model, backend="aot_eager"))):
        for value, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


def test_compiled_evaluation_in_inference_mode_then_training():
    x = torch.randn(5, 8)
    model, adapter = adapted()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.inference_mode():
        compiled(x)
    expected = gradient(model, adapter, x)
    for forward in (compiled, torch.compile(model, backend="aot_eager")):
        for value, wanted in zip(gradient(model, adapter, x, forward), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_fake_tensors_before_and_after_real_ones(kind):
    """Fakes have shapes and no values: none is kept, and none of what is kept is mixed with them."""
    P, theta_d, g_D = KINDS[kind](), torch.randn(17), torch.randn(300)
    expected = KINDS[kind]()(theta_d)
    for _ in range(2):
        with FakeTensorMode():
            assert P(torch.empty(17)).shape == (300,) and P.transpose(torch.empty(300)).shape == (17,)
        assert torch.equal(P(theta_d), expected)
        assert P.transpose(g_D).isfinite().all()


def test_a_model_under_fake_tensors_before_and_after_real_ones():
    x = torch.randn(5, 8)
    (model, adapter), (reference, of_reference) = adapted(), adapted()
    of_reference.theta_d.data.copy_(adapter.theta_d)
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(torch.empty(5, 8)).shape == (5, 3)
        assert torch.equal(model(x), reference(x))


def test_a_model_with_layers_on_meta_and_on_the_cpu():
    """An error, where uninitialised numbers would come out."""
    for meta in ("0", "2"):
        model = network()
        model.get_submodule(meta).to("meta")
        ul.attach(model, ul.UniLoRAConfig(target_modules=["0", "2"], r=2, d=11))
        with pytest.raises(RuntimeError, match=r"weight: expected the device of x \(cpu\), got meta"):
            model(torch.randn(5, 8))
