"""A learning rate and a start that follow d: every d moves the LoRA matrices alike."""

import copy

import pytest
import torch
from models import Tower, tokens
from torch import nn

import unilora_ext as ul

FREE = ("uniform", "balanced", "peft", "local", "nonuniform", "countsketch", "gaussian", "fastfood", "identity")


def attached(projection, d, **changes):
    config = ul.UniLoRAConfig(
        r=3, d=None if projection == "identity" else d, target_modules=["up", "down"], projection=projection, **changes
    )
    model = Tower().double()
    return model, ul.attach(model, config)


def spread(x):
    return float(x.square().mean().sqrt())


@pytest.mark.parametrize("d", [12, 60, 297])
@pytest.mark.parametrize("projection", FREE)
def test_a_step_of_adam_moves_the_matrices_as_loras(projection, d):
    """And so does the step by the rate of LoRA alone, where columns are not divided by sqrt(n)."""
    model, adapter = attached(projection, d)
    rate = adapter.learning_rate(2e-3)
    optimizer = torch.optim.Adam([adapter.theta_d], lr=rate, eps=1e-30)
    before = adapter.projection(adapter.theta_d.detach())
    model(tokens()).square().sum().backward()
    optimizer.step()
    moved = spread(adapter.projection(adapter.theta_d.detach()) - before)
    assert 0.6 * 2e-3 < moved < 1.6 * 2e-3


def test_without_normalisation_the_rate_is_loras():
    _, adapter = attached("uniform", 20, projection_options={"normalize": False})
    assert adapter.learning_rate(2e-3) == 2e-3
    assert float(adapter.theta_d.detach().abs().max()) <= 0.005


@pytest.mark.parametrize("projection", [name for name in FREE if name != "identity"])
def test_theta_D_starts_alike_for_every_d(projection):
    sizes = [spread(adapter.projection(adapter.theta_d.detach())) for _, adapter in
             (attached(projection, d) for d in (30, 90, 297))]  # fmt: skip
    for size in sizes:
        assert 0.5 < size / (0.005 / 3**0.5) < 1.6
    _, adapter = attached(projection, 90, init_bound=0.3)
    assert 0.15 < float(adapter.theta_d.detach().abs().max()) <= 0.3


def test_the_default_is_of_the_inputs_width():
    wide = nn.Sequential(nn.Linear(400, 8), nn.Linear(8, 8), nn.Linear(600, 8))
    adapter = ul.attach(copy.deepcopy(wide), ul.UniLoRAConfig(r=2, d=64, target_modules=["0", "2"]))
    assert adapter.learning_rate() == pytest.approx(2 / 500 * (2 * (400 + 600 + 16) / 64) ** 0.5)
    adapter = ul.attach(wide, ul.UniLoRAConfig(r=2, d=32, target_modules=["1"]))
    assert adapter.learning_rate() == pytest.approx(2 / 128)
    assert adapter.learning_rates() == {"theta_d": adapter.learning_rate()}


def test_a_grown_vector_has_the_rate_of_its_d():
    _, adapter = attached("uniform", 30)
    before = adapter.learning_rate(), adapter.learning_rate(1e-3)
    adapter.grow(120)
    assert (adapter.learning_rate(), adapter.learning_rate(1e-3)) == pytest.approx((before[0] / 2, before[1] / 2))


def test_rates_that_are_the_projections_own():
    _, adapter = attached("vblora", None)
    assert adapter.learning_rates() == {"theta_d": 1e-3, "logits": 1e-2} and adapter.learning_rate() == 1e-3
    with pytest.raises(ul.UniLoRAError, match=r"lora_rate None for 'vblora'.*got 0\.002"):
        adapter.learning_rate(2e-3)


@pytest.mark.parametrize("rate", [0, -1.0, float("inf"), float("nan"), "1e-3", True])
def test_no_rate(rate):
    _, adapter = attached("uniform", 30)
    with pytest.raises(ul.UniLoRAError, match="lora_rate: expected a number > 0, got"):
        adapter.learning_rate(rate)
