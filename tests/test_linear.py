"""UniLoRALinear by itself: a drop-in nn.Linear with a vector of its own."""

import copy

import pytest
import torch
from torch import nn

import unilora_ext as ul


def dense(layer):
    """(A, B) from theta_d by the paper's formulas."""
    theta_D = layer.projection.dense() @ layer.theta_d.detach().double()
    m, n = layer.weight.shape
    return theta_D[m * layer.r :].view(layer.r, n), theta_D[: m * layer.r].view(m, layer.r)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,), ()])
@pytest.mark.parametrize("projection", ["uniform", "balanced"])
def test_is_the_linear_map_with_the_update(bias, shape, projection):
    layer = ul.UniLoRALinear(
        9, 13, bias=bias, dtype=torch.float64, r=3, d=20, seed=2, projection=projection, alpha=1.5, init_bound=1.0
    )
    A, B = dense(layer)
    x = torch.randn(*shape, 9, dtype=torch.float64)
    expected = nn.functional.linear(x, layer.weight + 0.5 * B @ A, layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert layer.projection.D == (9 + 13) * 3 and isinstance(layer, nn.Linear)


def test_called_by_keyword():
    """As nn.Linear, by the name `input`."""
    layer, x = ul.UniLoRALinear(6, 8, r=2, d=9, init_bound=1.0), torch.randn(3, 6)
    assert torch.equal(layer(input=x), layer(x))


def test_only_theta_d_is_trained():
    layer = ul.UniLoRALinear(1024, 1024, bias=True, r=4, d=4096, seed=0)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["vector.theta_d"]
    assert set(layer.state_dict()) == {"weight", "bias", "vector.theta_d"} and layer.theta_d.shape == (4096,)
    layer(torch.randn(2, 1024)).sum().backward()
    assert layer.weight.grad is None and layer.theta_d.grad.abs().sum() > 0


def test_gradcheck():
    layer = ul.UniLoRALinear(4, 3, dtype=torch.float64, r=2, d=5, init_bound=1.0)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def function(x, theta_d):
        return torch.func.functional_call(layer, {"vector.theta_d": theta_d}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.theta_d.detach().clone().requires_grad_()))


def test_from_linear_shares_the_weights():
    linear = nn.Linear(6, 8).eval()
    layer = ul.UniLoRALinear.from_linear(linear, r=2, d=7, seed=3)
    assert layer.weight is linear.weight and layer.bias is linear.bias and not linear.weight.requires_grad
    assert not layer.training and type(linear) is nn.Linear
    x = torch.randn(3, 6)
    A, B = dense(layer)
    torch.testing.assert_close(layer(x), linear(x) + (x @ A.float().T) @ B.float().T)
    with pytest.raises(ul.UniLoRAError, match=r"from_linear: expected a torch.nn.Linear, got Conv1d"):
        ul.UniLoRALinear.from_linear(nn.Conv1d(1, 1, 1))


def test_a_given_projection():
    P = ul.OneHotProjection(torch.randint(0, 5, (22,)), 5)
    layer = ul.UniLoRALinear(7, 4, r=2, projection=P)
    assert layer.projection is P and layer.theta_d.shape == (5,)
    with pytest.raises(ul.UniLoRAError, match=r"expected D = 24 rows for this layer and rank and d = any"):
        ul.UniLoRALinear(8, 4, r=2, projection=P)


def test_merge_and_unmerge():
    layer, x = ul.UniLoRALinear(6, 8, r=2, d=9, init_bound=1.0), torch.randn(5, 6)
    weight, y = layer.weight.clone(), layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), y)
    assert layer.merged
    layer.unmerge()
    assert torch.equal(layer.weight, weight) and torch.equal(layer(x), y)


def test_dropout_acts_on_the_update_alone_and_in_training_alone():
    layer = ul.UniLoRALinear(50, 8, r=2, d=9, dropout=0.5, init_bound=1.0)
    x = torch.randn(4000, 50)
    with torch.no_grad():
        base = nn.functional.linear(x, layer.weight, layer.bias)
        update = layer.eval()(x) - base
        assert torch.equal(layer(x), layer(x))
        layer.train()
        dropped = layer(x) - base
        assert not torch.allclose(dropped, update) and not torch.equal(layer(x), layer(x))
        # inputs are dropped with probability 1/2 and doubled: right in the mean over many drops
        mean = torch.stack([layer(x[:20]) - base[:20] for _ in range(4000)]).mean(0)
    assert (mean - update[:20]).abs().max() < 0.15 * update.abs().max()
    layer(x).sum().backward()
    assert layer.theta_d.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    layer = ul.UniLoRALinear(32, 16, dtype=dtype, r=2, d=20, init_bound=1.0)
    assert layer.theta_d.dtype == torch.float32
    x = torch.randn(7, 32).to(dtype)
    A, B = dense(layer)
    expected = nn.functional.linear(x.double(), layer.weight.double() + B @ A, layer.bias.double())
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).double(), expected, rtol=0.03, atol=0.03)


def test_copies():
    layer, x = ul.UniLoRALinear(6, 8, r=2, d=9), torch.randn(3, 6)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.theta_d is not layer.theta_d
    with torch.no_grad():
        twin.theta_d.add_(1)
    assert not torch.equal(twin(x), layer(x))


def test_same_seed_same_layer_other_seed_other_layer():
    def factors(seed):
        layer = ul.UniLoRALinear(6, 8, r=2, d=9, seed=seed)
        with torch.no_grad():
            layer.theta_d.copy_(torch.arange(9.0))
        return torch.cat([f.flatten() for f in layer.lora_factors()])

    assert torch.equal(factors(1), factors(1)) and not torch.equal(factors(1), factors(2))


def test_training_lowers_the_loss_to_a_reachable_target():
    """A target that theta_d can reach exactly is reached."""
    teacher = ul.UniLoRALinear(16, 16, r=2, d=16, seed=4, init_bound=1.0)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.theta_d.uniform_(-0.3, 0.3).add_(teacher.theta_d)
    x = torch.randn(256, 16)
    y = teacher(x).detach()
    optimizer = torch.optim.Adam([student.theta_d], lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = (student(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss < 1e-4 * y.square().mean()


@pytest.mark.cuda
def test_moves_to_the_gpu():
    layer, x = ul.UniLoRALinear(64, 48, r=4, d=100, init_bound=1.0), torch.randn(5, 64)
    y = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), y, rtol=1e-4, atol=1e-4)
