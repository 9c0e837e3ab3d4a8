"""Streams, graphs, several devices, and memory that is aligned to its elements alone."""

import pytest
import torch
from models import Tower, tokens

import unilora_ext as ul

pytestmark = pytest.mark.cuda

CONFIG = ul.UniLoRAConfig(r=2, d=40, target_modules=["up", "down"], seed=5, init_bound=0.5)


def adapted(dtype=torch.float32, device="cuda", **options):
    model = Tower().to(device, dtype)
    return model, ul.attach(model, ul.UniLoRAConfig(**{**vars(CONFIG), **options}))


def step(model, adapter, x):
    """(y, gradient of theta_d)"""
    adapter.theta_d.grad = None
    y = model(x)
    y.float().square().sum().backward()
    return y.detach().clone(), adapter.theta_d.grad.clone()


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("projection", ["uniform", "balanced"])
def test_made_on_one_stream_and_used_on_others(projection, materialize):
    x = tokens().cuda()
    torch.cuda.synchronize()
    model, adapter = adapted(projection=projection, materialize=materialize)
    streams = [torch.cuda.Stream() for _ in range(3)]
    with torch.cuda.stream(streams[0]):
        streams[0].wait_stream(torch.cuda.default_stream())
        first = step(model, adapter, x)  # makes index, scale and order here
        model.eval()
        with torch.no_grad():
            evaluated = model(x)
    streams[0].synchronize()
    for stream in streams[1:]:
        with torch.cuda.stream(stream), torch.no_grad():
            assert torch.equal(model(x), evaluated)
            adapter.theta_d.mul_(1)
        model.train()
        with torch.cuda.stream(stream):
            again = step(model, adapter, x)
        stream.synchronize()
        assert all(map(torch.equal, again, first))
        model.eval()


@pytest.mark.parametrize("materialize", [True, False])
@pytest.mark.parametrize("projection", ["uniform", "balanced"])
def test_a_captured_step(projection, materialize):
    """Forward and backward in one CUDA graph, replayed for other inputs and another theta_d."""
    model, adapter = adapted(projection=projection, materialize=materialize)
    x = tokens().cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, adapter, x)
    torch.cuda.current_stream().wait_stream(side)
    adapter.theta_d.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = model(x)
        y.square().sum().backward()
    for _ in range(2):
        x.copy_(tokens())
        with torch.no_grad():
            adapter.theta_d.normal_()
        adapter.theta_d.grad.zero_()
        graph.replay()
        replayed = y.clone(), adapter.theta_d.grad.clone()
        gradient = adapter.theta_d.grad
        eager = step(model, adapter, x)
        adapter.theta_d.grad = gradient
        torch.testing.assert_close(replayed, eager)


def test_a_capture_without_a_warm_up_is_an_error():
    model, adapter = adapted()
    x = tokens().cuda()
    with (
        pytest.raises(ul.UniLoRAError, match="Run forward and backward once before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        model(x)
    assert all(torch.isfinite(t).all() for t in step(model, adapter, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("r", [1, 3, 16])
@pytest.mark.parametrize("tokens", [1, 5, 40, 300])
def test_memory_that_is_aligned_to_its_elements_alone(dtype, r, tokens):
    """All operands at every offset give the bits of aligned ones."""
    m, n = 72, 136
    x, W, A, B, b, dy = (
        torch.randn(shape, device="cuda").to(dtype)
        for shape in ((tokens, n), (m, n), (r, n), (m, r), (m,), (tokens, m))
    )

    def shifted(t, offset):
        return torch.cat([t.new_zeros(offset), t.flatten()])[offset:].view(t.shape)

    def result(offset):
        leaves = [shifted(t, offset).requires_grad_() for t in (x, A, B)]
        y = ul.lora_linear(leaves[0], W, b, *leaves[1:], 0.5)
        return y, *torch.autograd.grad(y, leaves, shifted(dy, offset))

    aligned = result(0)
    for offset in (1, 2, 3, 4):
        for got, expected in zip(result(offset), aligned, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-2)


def test_two_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model, adapter = adapted(device="cpu")
    expected = step(model, adapter, x := tokens())
    for device in ("cuda:0", "cuda:1"):  # the current device is the first, all along
        model.to(device)
        got = step(model, adapter, x.to(device))
        torch.testing.assert_close([t.cpu() for t in got], list(expected), rtol=1e-4, atol=1e-4)
