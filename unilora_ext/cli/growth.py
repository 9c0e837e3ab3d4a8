"""``--d auto``: theta_d begins short, and grows where validation stalls."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from typing import Any

from torch import nn
from torch.optim import Optimizer

import unilora_ext as ul
from unilora_ext.attaching import Plan
from unilora_ext.cli.errors import CliError
from unilora_ext.projections import Projection, projection_class

__all__ = ["AUTO", "first_d", "grow", "last_d", "shortened"]

AUTO = "auto"
FACTOR = 4
"""By which theta_d grows."""
MOST_TIMES = 3
SHORTEST = 64


def shortened(model: nn.Module, config: ul.UniLoRAConfig) -> ul.UniLoRAConfig:
    """The configuration with the d that a run begins with.

    Raises:
        CliError: a projection whose columns do not split.
        AttachError: the configuration does not fit the model.
    """
    if projection_class(config.projection).parents is Projection.parents:
        raise CliError(
            f"--d auto: expected a projection whose columns split (uniform, balanced, countsketch), got "
            f"{config.projection}; give --d a number, or nothing"
        )
    D = Plan.of(model, replace(config, d=1)).layout.D
    return replace(config, d=first_d(ul.default_d(D)))


def first_d(last: int) -> int:
    """The d that grows to `last` in up to three steps of four times as many numbers, and no shorter than 64."""
    d = last
    for _ in range(MOST_TIMES):
        if d % FACTOR == 0 and d // FACTOR >= SHORTEST:
            d //= FACTOR
    return d


def last_d(adapter: ul.Adapter) -> int:
    """The d that it grows to."""
    return ul.default_d(adapter.projection.D)


def grow(adapter: ul.Adapter, optimizer: Optimizer, schedule: Any) -> str | None:
    """Makes theta_d longer, unless it has its full length: it moves theta_D as before.

    Args:
        adapter: in training.
        optimizer: of theta_d, at rates by `schedule`.
        schedule: torch's LambdaLR.

    Returns:
        What happened, in words.
    """
    before = adapter.config.d
    if before >= last_d(adapter):
        return None
    adapter.grow(FACTOR * before, optimizer)
    shorter = 1 / sqrt(FACTOR)  # as adapter.learning_rate() is
    for number, group in enumerate(optimizer.param_groups):
        if any(parameter is adapter.theta_d for parameter in group["params"]):
            schedule.base_lrs[number] *= shorter
            for name in ("lr", "initial_lr"):
                group[name] *= shorter
    return f"d {before:,} -> {adapter.config.d:,}"
