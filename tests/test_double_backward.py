"""Derivatives of derivatives: forces in a potential, gradient penalties. Against finite differences and dense ones."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

import unilora_ext as ul
from unilora_ext import functional, reference

operators = torch.ops.unilora


def draw(*shapes, device="cpu"):
    return [torch.randn(*shape, dtype=torch.float64, device=device).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("leading", [(), (3,), (2, 0), (2, 2)])
@pytest.mark.parametrize("raw", [False, True])
def test_lora_linear(device, leading, raw):
    tensors = draw((*leading, 4), (3, 4), (3,), (2, 4), (3, 2), device=device)
    function = (lambda *t: operators.lora_linear(*t, 0.7)[0]) if raw else (lambda *t: ul.lora_linear(*t, 0.7))
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("raw", [False, True])
def test_lora_update(device, raw):
    tensors = draw((2, 3), (2, 4), (2, 4), (3, 2), device=device)
    function = (
        (lambda *t: operators.lora_update(*t, -0.7)[0])
        if raw
        else (lambda y, *t: functional.lora_update(y * 1, *t, -0.7))
    )
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)])
@pytest.mark.parametrize("with_weight", [True, False])
def test_lora_linear_backward(device, needs, with_weight):
    """As a function of all it is made from, twice: h is x A^T."""
    grad_y, x, weight, A, B = draw((3, 4), (3, 5), (4, 5), (2, 5), (4, 2), device=device)

    def backward(grad_y, x, A, B, weight=None):
        h = (x @ A.T).detach()
        grads = operators.lora_linear_backward(grad_y, x, h, weight, A, B, 0.5, *map(bool, needs))
        return tuple(g for g, need in zip(grads, needs, strict=True) if need)

    tensors = [grad_y, x, A, B, *([weight] if with_weight else [])]
    assert torch.autograd.gradcheck(backward, tensors)
    assert torch.autograd.gradgradcheck(backward, tensors)


class Dense(nn.Linear):
    """Not plain to attach(): the update is added to what it computes."""


def potential(kind):
    layer = nn.Linear if kind == "fused" else Dense
    return nn.Sequential(layer(3, 8), nn.Tanh(), layer(8, 6), nn.SiLU(), layer(6, 1)).double()


def force_gradient(model, parameter, x):
    """Gradient of a loss on the forces -dE/dx, whose own cotangent is a constant."""
    x = x.clone().requires_grad_()
    (force,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return torch.autograd.grad((force**2).sum() + force.sum(), parameter)[0]


def dense_force_gradient(model, adapter, x):
    """The same by plain PyTorch: dense weights from P as a matrix."""
    P = adapter.projection.dense().to(x.device)
    theta_d = adapter.theta_d.detach().clone().requires_grad_()
    theta_D, weights = P @ theta_d, {}
    layout = adapter.vector.layout
    for i, ((name, layer), (m, n)) in enumerate(zip(adapter.layers.items(), layout.shapes, strict=True)):
        B, A = theta_D[slice(*layout.range_of_B(i))], theta_D[slice(*layout.range_of_A(i))]
        weights[f"{name}.weight"] = layer.weight.detach() + layer.scaling * B.view(m, -1) @ A.view(-1, n)
    plain = adapter.detach()
    return force_gradient(lambda x: torch.func.functional_call(plain, weights, x), theta_d, x)


@pytest.mark.parametrize("kind", ["fused", "update", "computed", "exported"])
def test_forces_in_a_potential(device, kind):
    model = potential(kind if kind == "update" else "fused").to(device)
    config = ul.UniLoRAConfig(
        r=2, d=11, init_bound=0.5, projection="balanced", materialize=False if kind == "computed" else None, alpha=3.0
    )
    if kind == "computed" and device.type == "cuda":
        pytest.skip("rows are stored there")
    adapter = ul.attach(model, config)
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    if kind == "exported":
        exported = torch.export.export(model, (x,)).module()
        theta_d = dict(exported.named_parameters())["0.unilora.theta_d"]
        actual = force_gradient(exported, theta_d, x)
    else:
        actual = force_gradient(model, adapter.theta_d, x)
    expected = dense_force_gradient(model, adapter, x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def test_a_penalty_on_the_gradient_of_theta_d(device):
    """Against the slope of the penalty, one number of theta_d at a time."""
    model = potential("fused").to(device)
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=7, init_bound=0.5))
    x, theta_d = torch.randn(4, 3, dtype=torch.float64, device=device), adapter.theta_d
    (gradient,) = torch.autograd.grad(model(x).square().mean(), theta_d, create_graph=True)
    (actual,) = torch.autograd.grad(gradient.square().sum(), theta_d)

    def penalty(value):
        other = copy.deepcopy(model)
        with torch.no_grad():
            ul.get_adapter(other).theta_d.copy_(value)
        loss = other(x).square().mean()
        return torch.autograd.grad(loss, ul.get_adapter(other).theta_d)[0].square().sum()

    step = 1e-6
    for j in range(theta_d.numel()):
        move = torch.zeros_like(theta_d).index_fill_(0, torch.tensor(j, device=device), step)
        slope = (penalty(theta_d.detach() + move) - penalty(theta_d.detach() - move)) / (2 * step)
        torch.testing.assert_close(actual[j], slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", ["project", "project_scatter", "project_segment_sum", "seeded", "seeded_scatter"])
def test_forward_mode_of_a_projection_is_an_error(device, form):
    if device.type == "cuda" and form in ("project_scatter", "seeded_scatter"):
        pytest.skip("operators of the CPU")
    D, d = 12, 5
    P = ul.UniformProjection(D, d, seed=3)
    scale, seeded = P.scale.to(device), ("uniform", 1, D, 3, [0, D])
    index, order, offsets = P.index.to(device), *(t.to(device) for t in P.restrict("cpu").members())
    vector, value = torch.randn(d if form in ("project", "seeded") else D, device=device), torch.rand(D, device=device)
    calls = {
        "project": lambda v: operators.project(v, scale, index, value, torch.float32),
        "project_scatter": lambda v: operators.project_scatter([v[:7], v[7:]], scale, index, value),
        "project_segment_sum": lambda v: operators.project_segment_sum([v], scale, order, offsets, value),
        "seeded": lambda v: operators.project_seeded(v, scale, *seeded, torch.float32),
        "seeded_scatter": lambda v: operators.project_seeded_scatter([v], scale, *seeded),
    }
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
        calls[form](forward_ad.make_dual(vector, torch.ones_like(vector)))


@pytest.mark.parametrize("name", ["lora_linear", "lora_update", "lora_linear_backward"])
def test_forward_mode_is_an_error(device, name):
    x, weight, A, B, y = (t.detach() for t in draw((3, 5), (4, 5), (2, 5), (4, 2), (3, 4), device=device))
    arguments = {
        "lora_linear": (x, weight, None, A, B, 1.0),
        "lora_update": (y, x, A, B, 1.0),
        "lora_linear_backward": (y, x, x @ A.T, weight, A, B, 1.0, True, True, True),
    }[name]
    with forward_ad.dual_level():
        dual = tuple(forward_ad.make_dual(t, torch.ones_like(t)) if t is x else t for t in arguments)
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
            getattr(operators, name)(*dual)


def test_the_update_in_place_refuses_a_derivative(device):
    y, x, A, B = draw((3, 4), (3, 5), (2, 5), (4, 2), device=device)
    with pytest.raises(RuntimeError, match="lora_update_: has no derivative"):
        operators.lora_update_(y.detach(), x, A, B, 1.0)
    expected = reference.lora_linear(x, x.new_zeros(4, 5), None, A, B, 1.0) + y
    with torch.no_grad():
        operators.lora_update_(y, x, A, B, 1.0)
    torch.testing.assert_close(y, expected)
