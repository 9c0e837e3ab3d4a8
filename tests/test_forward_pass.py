"""One projection a forward pass, and the same values and gradients however the layers are reached."""

import copy
import threading

import pytest
import torch
from models import Tower, dense_update, tokens
from torch import nn

import unilora_ext as ul

CONFIG = ul.UniLoRAConfig(r=2, d=40, target_modules=["up", "down"], seed=5, init_bound=0.5)


def gradient(model, loss):
    adapter = ul.get_adapter(model)
    adapter.theta_d.grad = None
    loss.backward()
    return adapter.theta_d.grad.clone()


def test_one_projection_a_forward(projections):
    model, x = Tower(), tokens()
    adapter = ul.attach(model, CONFIG)
    for _ in range(3):
        model(x).sum().backward()
        with torch.no_grad():
            model(x)
    assert projections == [adapter.projection.D] * 6


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_activation_checkpointing(mode, dtype):
    model, x = Tower().to(dtype), tokens()
    ul.attach(model, CONFIG)
    y = model(x)
    expected = gradient(model, y.square().sum())
    model.checkpointing = mode
    again = model(x)
    assert torch.equal(again, y)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(gradient(model, again.square().sum()), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant"])
def test_one_projection_a_recomputation(projections, mode):
    """All layers that a backward pass computes anew share one, which is dropped when the pass ends; the next pass sees
    what was written to theta_d."""
    model, x = Tower().double(), tokens()
    adapter = ul.attach(model, CONFIG)
    model.checkpointing = mode
    for _ in range(2):
        expected = gradient_without_checkpointing(model, x)
        del projections[:]
        assert model(x).square().sum().backward() is None
        assert projections == [adapter.projection.D] * 2 and adapter.vector._anew is None
        torch.testing.assert_close(adapter.theta_d.grad, expected, rtol=1e-12, atol=1e-12)
        adapter.theta_d.data.add_(torch.randn_like(adapter.theta_d))


def gradient_without_checkpointing(model, x):
    mode, model.checkpointing = model.checkpointing, None
    value = gradient(model, model(x).square().sum())
    model.checkpointing, ul.get_adapter(model).theta_d.grad = mode, None
    return value


def test_a_write_inside_a_backward_pass_is_seen_by_later_recomputations():
    model, x = Tower().double(), tokens()
    adapter = ul.attach(model, CONFIG)
    model.checkpointing = "non-reentrant"
    y, seen, vector = model(x), [], adapter.vector

    def write(grad):
        seen.append(vector._recomputation())
        with torch.no_grad():
            adapter.theta_d.add_(1)
        seen.append(vector._recomputation())

    y.register_hook(write)
    y.sum().backward()
    before, after = seen
    assert before is not None and after is not None and before is not after and vector._recomputation() is None


def test_gradient_accumulation_and_evaluation_in_between():
    model, first, second = Tower().double(), tokens(), tokens()
    adapter = ul.attach(model, CONFIG)
    expected = gradient(model, model(first).square().sum()) + gradient(model, model(second).square().sum())
    adapter.theta_d.grad = None
    model(first).square().sum().backward()
    model.eval()
    with torch.no_grad():
        model(second)
    with torch.inference_mode():
        model(second)
    model.train()
    model(second).square().sum().backward()
    torch.testing.assert_close(adapter.theta_d.grad, expected, rtol=1e-12, atol=1e-12)


def test_two_forwards_before_one_backward():
    model, first, second = Tower().double(), tokens(), tokens()
    ul.attach(model, CONFIG)
    expected = gradient(model, model(first).sum()) + gradient(model, model(second).square().sum())
    both = model(first).sum() + model(second).square().sum()
    torch.testing.assert_close(gradient(model, both), expected, rtol=1e-12, atol=1e-12)


def test_a_sub_module_called_alone(projections):
    model = Tower().double()
    adapter = ul.attach(model, CONFIG)
    x = torch.randn(4, 12, dtype=torch.float64)
    seen = {}
    handle = model.blocks[1].register_forward_hook(lambda m, args, out: seen.update(inside=(args[0], out)))
    model(tokens())
    handle.remove()
    inside_x, inside_y = seen["inside"]
    assert torch.equal(model.blocks[1](inside_x), inside_y)

    del projections[:]
    model.blocks[1](x).square().sum().backward()
    assert projections == [stop - start for start, stop in map(adapter.vector.layout.range_of, (2, 3))]
    alone = adapter.theta_d.grad.clone()

    only = Tower().double()
    only.load_state_dict({k: v for k, v in model.state_dict().items() if k != "unilora.theta_d"})
    reference = ul.attach(only, CONFIG)
    with torch.no_grad():
        reference.theta_d.copy_(adapter.theta_d)
    only.forward = lambda x: only.blocks[1](x)
    only(x).square().sum().backward()
    torch.testing.assert_close(alone, reference.theta_d.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("write", ["data", "set_data", "copy", "optimizer"])
def test_every_write_to_theta_d_is_seen_by_the_next_forward(write):
    model, x = Tower(), tokens()
    adapter = ul.attach(model, CONFIG)
    y = model(x)
    value = torch.randn_like(adapter.theta_d)
    if write == "data":
        adapter.theta_d.data.copy_(value)
    elif write == "set_data":
        adapter.theta_d.data = value
    elif write == "copy":
        with torch.no_grad():
            adapter.theta_d.copy_(value)
    else:
        y.square().sum().backward()
        torch.optim.AdamW([adapter.theta_d], lr=0.1).step()
        value = adapter.theta_d.detach().clone()
    now = model(x)
    assert not torch.equal(now, y)
    fresh = copy.deepcopy(model)
    assert torch.equal(fresh(x), now) and torch.equal(adapter.theta_d, value)


def test_gradients_wanted_inside_a_forward_without_them():
    """A layer that runs under enable_grad while the model's forward runs under no_grad."""
    model, x = Tower(), tokens()
    adapter = ul.attach(model, CONFIG)
    block, inner = model.blocks[1], {}
    plain = block.forward

    def forward(x):
        with torch.enable_grad():
            inner["loss"] = plain(x.detach()).square().sum()
        return plain(x)

    block.forward = forward
    with torch.no_grad():
        model(x)
    inner["loss"].backward()
    assert adapter.theta_d.grad.abs().sum() > 0


def test_a_forward_that_raises_leaves_nothing_behind(projections):
    model, x = Tower(), tokens()
    adapter = ul.attach(model, CONFIG)
    y = model(x)
    with pytest.raises(IndexError):
        model(torch.tensor([[10**6]]))
    assert adapter.vector._step is None
    with torch.no_grad():
        adapter.theta_d.mul_(3)
    layer = model.blocks[0].up
    A, _ = layer.lora_factors()
    torch.testing.assert_close(A, copy.deepcopy(layer).lora_factors()[0])
    assert not torch.equal(model(x), y)


@pytest.mark.parametrize("write", ["data", "set_data", "copy"])
def test_an_interrupted_forward_leaves_nothing_stale(write, tmp_path):
    """PyTorch calls no hook after a KeyboardInterrupt: merge(), export and a part called alone must not care."""
    model, x = Tower(), torch.randn(4, 12)
    adapter = ul.attach(model, CONFIG)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(tokens())
    handle.remove()
    value = torch.randn_like(adapter.theta_d)
    if write == "data":
        adapter.theta_d.data.copy_(value)
    elif write == "set_data":
        adapter.theta_d.data = value
    else:
        with torch.no_grad():
            adapter.theta_d.copy_(value)
    expected = dense_update(model, adapter)
    block = copy.deepcopy(model.blocks[1])
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.delta_weight().double(), expected[name], rtol=1e-5, atol=1e-6)
        A, B = layer.lora_factors()
        torch.testing.assert_close((B @ A).double(), expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(model.blocks[1](x), block(x))
    weights = {name: layer.weight.detach().double() for name, layer in adapter.layers.items()}
    adapter.merge()
    for name, layer in adapter.layers.items():
        torch.testing.assert_close(layer.weight.double(), weights[name] + expected[name], rtol=1e-5, atol=1e-6)


def test_two_models_do_not_disturb_each_other():
    first, second, x = Tower(), Tower(), tokens()
    ul.attach(first, CONFIG)
    ul.attach(second, ul.UniLoRAConfig(r=3, d=30, target_modules=["up"], seed=6))
    alone = first(x), second(x)

    def run_second(*_):
        second(x)

    first.blocks[0].register_forward_hook(run_second)
    assert torch.equal(first(x), alone[0]) and torch.equal(second(x), alone[1])


def test_threads_share_one_model():
    model = Tower().eval()
    ul.attach(model, CONFIG)
    inputs = [tokens() for _ in range(8)]
    expected = [model(x).detach() for x in inputs]
    wrong = []

    def run(k):
        for _ in range(30):
            with torch.no_grad() if k % 2 else torch.enable_grad():
                if not torch.equal(model(inputs[k]).detach(), expected[k]):
                    wrong.append(k)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_model_on_several_devices(projections):
    """Half of the layers on meta: each device gets one projection, of its own rows."""
    model = Tower()
    adapter = ul.attach(model, CONFIG)
    cpu = copy.deepcopy(model)
    y = cpu.blocks[0](torch.ones(2, 12))
    model.blocks[1].to("meta")
    model.blocks[2].to("meta")

    def forward(x):
        first = model.blocks[0](x)
        return first, model.blocks[2](model.blocks[1](first.to("meta")))

    model.forward = forward
    del projections[:]
    first, second = model(torch.ones(2, 12))
    assert torch.equal(first, y) and second.is_meta
    sizes = [stop - start for start, stop in map(adapter.vector.layout.range_of, range(len(adapter.vector.layout)))]
    assert projections == [sum(sizes[:2]), sum(sizes[2:])]


def test_layers_that_move_later():
    """Moving the model, or a part of it, after the first forward."""
    model, x = Tower(), tokens()
    ul.attach(model, CONFIG)
    y = model(x)
    adapter = ul.get_adapter(model)
    for move in (lambda: model.to(torch.float64), lambda: model.to(torch.float32)):
        move()
        torch.testing.assert_close(model(x).float(), y, rtol=1e-5, atol=1e-5)
    assert adapter.theta_d.dtype == torch.float32
    model.blocks[2].to("meta")
    model.forward = lambda x: model.blocks[2](model.blocks[1](x).to("meta"))
    assert model(torch.ones(2, 12)).is_meta


def test_memory_for_a_model_built_on_meta():
    """to_empty() gives the weights memory; theta_d, which has values already, keeps them."""
    with torch.device("meta"):
        model = Tower()
    adapter = ul.attach(model, CONFIG)
    start = adapter.theta_d.detach().clone()
    model.to_empty(device="cpu")
    assert torch.equal(adapter.theta_d, start) and not model.blocks[0].up.weight.is_meta


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to("cpu", torch.bfloat16)])
@pytest.mark.parametrize("make", ["attach", "by hand"])
def test_theta_d_stays_wide_in_a_half_precision_model(cast, make):
    """Steps that 16 bits would lose, by a cast of the model before or after attach()."""
    if make == "attach":
        model, x = Tower().bfloat16(), tokens()
        theta_d = ul.attach(model, CONFIG).theta_d
    else:
        model, x = ul.UniLoRALinear(12, 20, d=40, dtype=torch.bfloat16, init_bound=0.5), torch.randn(3, 12)
        theta_d = model.theta_d
    start = theta_d.detach().clone()
    model(x.bfloat16() if make == "by hand" else x).float().sum().backward()
    gradient = theta_d.grad.clone()
    cast(model)
    assert next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    assert theta_d is (model.unilora if make == "attach" else model.vector).theta_d
    assert theta_d.dtype == theta_d.grad.dtype == start.dtype == torch.float32
    assert torch.equal(theta_d, start) and torch.equal(theta_d.grad, gradient)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(100):
            theta_d.add_(1e-5)
    torch.testing.assert_close(theta_d - start, torch.full_like(start, 1e-3), rtol=0.01, atol=0)
    model.double()
    assert theta_d.dtype == torch.float64
    model.half()
    assert theta_d.dtype == torch.float32
    assert all(p.dtype == torch.float32 for name, p in twin.named_parameters() if name.endswith("theta_d"))


@pytest.mark.parametrize("assign", [False, True])
def test_a_half_precision_state_dict_leaves_theta_d_wide(assign):
    model = Tower()
    adapter = ul.attach(model, CONFIG)
    state = {name: t.bfloat16() for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert adapter.theta_d.dtype == torch.float32 and adapter.theta_d.requires_grad
    assert torch.equal(adapter.theta_d, state["unilora.theta_d"].float())


def test_autocast_projects_once_in_its_dtype(projections):
    model, x = Tower(), tokens()
    adapter = ul.attach(model, CONFIG)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16 and projections == [adapter.projection.D]
    y.float().sum().backward()
    assert adapter.theta_d.grad.dtype == torch.float32 and adapter.theta_d.grad.abs().sum() > 0


def test_sequential_model():
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    x = torch.randn(4, 6)
    y = model(x)
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=10, target_modules="all-linear", init_bound=1.0))
    assert model(x).shape == (4, 3) and not torch.equal(model(x), y)
    adapter.detach()
    assert torch.equal(model(x), y)
