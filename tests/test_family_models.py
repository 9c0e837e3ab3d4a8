"""Every projection of the family in a model: forward, files, merging, training, compiling."""

import copy
import io

import pytest
import safetensors.torch
import torch
from models import Block, Tower, tokens
from test_family import by_name, each_case, random_seed

import unilora_ext as ul
from unilora_ext.layout import Order

each_name = pytest.mark.parametrize("case", list(by_name.values()), ids=str)


def tower(dtype=torch.float32) -> Tower:
    """A model with layers of several shapes."""
    model = Tower(12)
    model.blocks = torch.nn.ModuleList(Block(12, hidden) for hidden in (20, 24, 16))
    return model.to(dtype)


def adapted(case, model=None, **changes):
    """A model with an adapter whose numbers are random."""
    model = tower() if model is None else model
    adapter = ul.attach(model, case.config(3, random_seed(), target_modules=["up", "down"], **changes))
    with torch.no_grad():
        for tensor in adapter.trained.values():
            tensor.normal_(std=0.5)
    return model, adapter


def gradients(model, adapter, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return [tensor.grad for tensor in adapter.trained.values()]


@each_case
def test_layers_add_their_update(case):
    model, adapter = adapted(case, tower(torch.float64))
    x, P = tokens(), adapter.projection
    theta_d, *trained = (t.detach() for t in adapter.trained.values())
    theta_D, weights, start = P(theta_d, trained=trained), {}, 0
    for name, layer in adapter.layers.items():
        (m, n), r = layer.weight.shape, 3
        if P.order is Order.DENSE:
            dW, stop = theta_D[start : start + m * n].view(m, n), start + m * n
        else:
            stop = start + (m + n) * r
            first, second = (r * n, m * r) if P.order is Order.A_B else (m * r, r * n)
            parts = theta_D[start:stop].split([first, second])
            A, B = parts if P.order is Order.A_B else parts[::-1]
            dW = B.view(m, r) @ A.view(r, n)
        weights[name], start = layer.weight.detach() + dW, stop
    assert start == P.D
    y = model(x)
    plain = tower(torch.float64)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("unilora.")})
    for name, weight in weights.items():
        plain.get_submodule(name).weight.data = weight
    torch.testing.assert_close(y, plain(x))


@each_case
def test_save_and_load(case, tmp_path):
    base = tower()
    model, adapter = adapted(case, copy.deepcopy(base))
    adapter.save(tmp_path)
    again = ul.load(copy.deepcopy(base), tmp_path)
    for name, tensor in adapter.trained.items():
        assert torch.equal(again.trained[name], tensor), name
    assert again.projection.spec() == adapter.projection.spec()
    x = tokens()
    assert torch.equal(again.model(x), model(x))
    gradients(again.model, again, x)


@each_case
def test_merge_and_unmerge(case):
    model, adapter = adapted(case)
    x, before = tokens(), {name: layer.weight.clone() for name, layer in adapter.layers.items()}
    y = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    adapter.unmerge()
    assert all(torch.equal(layer.weight, before[name]) for name, layer in adapter.layers.items())
    assert torch.equal(model(x), y)
    plain = adapter.detach(merge=True)
    assert type(plain.blocks[0].up) is torch.nn.Linear
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-4)


@each_case
def test_export_as_lora(case, tmp_path):
    _, adapter = adapted(case)
    if adapter.projection.order is Order.DENSE:
        with pytest.raises(ul.UniLoRAError, match="low-rank"):
            adapter.export_lora(tmp_path)
        assert not list(tmp_path.iterdir())
        return
    adapter.export_lora(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    for name, layer in adapter.layers.items():
        A, B = (tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close(B @ A, layer.delta_weight())


@each_case
def test_training_lowers_the_loss(case):
    model = tower()
    adapter = ul.attach(model, case.config(3, random_seed(), target_modules=["up", "down"]))
    rates = adapter.learning_rates()
    optimizer = torch.optim.AdamW(
        [{"params": [t], "lr": rates[name]} for name, t in adapter.trained.items()], weight_decay=0.0
    )
    x, target, losses = tokens(16), torch.randint(5, (16,)), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), target)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
    assert all(t.grad.isfinite().all() for t in adapter.trained.values())
    assert losses[-1] < losses[0]


@each_name
def test_copies_of_a_model(case):
    model, adapter = adapted(case)
    x = tokens()
    y = model(x)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert {f"unilora.{name}" for name in adapter.trained} == {name for name in state if name.startswith("unilora.")}
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for other in (copy.deepcopy(model), torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)):
        assert torch.equal(other(x), y)
        with torch.no_grad():
            for tensor in ul.get_adapter(other).trained.values():
                tensor.mul_(0.5).add_(0.1)
        assert not torch.equal(other(x), y) and torch.equal(model(x), y)
        other.load_state_dict(state)
        assert torch.equal(other(x), y)


@each_name
@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
def test_activation_checkpointing(case, kind):
    model, adapter = adapted(case, tower(torch.float64))
    x = tokens()
    expected = gradients(model, adapter, x)
    model.checkpointing = kind
    for got, grad in zip(gradients(model, adapter, x), expected, strict=True):
        torch.testing.assert_close(got, grad)


@each_name
def test_compiled(case):
    torch.compiler.reset()
    model, adapter = adapted(case)
    x = tokens()
    y, expected = model(x), gradients(model, adapter, x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)
    for got, grad in zip(gradients(compiled, adapter, x), expected, strict=True):
        torch.testing.assert_close(got, grad, rtol=1e-4, atol=1e-4)


@each_name
def test_half_types(case):
    model, adapter = adapted(case, tower(torch.bfloat16))
    assert all(t.dtype == torch.float32 for t in adapter.trained.values())
    x = tokens()
    y = model(x)
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert all(g.isfinite().all() for g in gradients(model, adapter, x))

    model, adapter = adapted(case)
    expected = model(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        grads = gradients(model, adapter, x)
    torch.testing.assert_close(y.float(), expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)


@each_name
def test_one_layer_by_hand(case):
    options = {**case.options, **({"groups": 1} if "groups" in case.options else {})}
    linear = torch.nn.Linear(8, 12)
    layer = ul.UniLoRALinear.from_linear(linear, r=2, d=case.d, projection=case.name, projection_options=options)
    x = torch.randn(3, 8)
    layer(x).sum().backward()
    torch.testing.assert_close(layer(x), linear(x) + x @ layer.delta_weight().T, rtol=1e-4, atol=1e-5)


@pytest.mark.cuda
@each_case
def test_a_model_on_the_gpu(case):
    model, x = tower(), tokens()
    adapter = ul.attach(model, case.config(2, target_modules=["up", "down"]))
    y = model(x)
    loss = y.square().sum()
    expected = torch.autograd.grad(loss, list(adapter.trained.values()))
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), y, rtol=1e-3, atol=1e-4)
    got = torch.autograd.grad(model(x.cuda()).square().sum(), list(adapter.trained.values()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-2, atol=1e-3)
