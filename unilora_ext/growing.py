"""A longer theta_d in the middle of training.

Where the columns of P split (:meth:`Projection.parents`), theta_d' of d' = k d numbers gives the same theta_D for
theta'[j'] = theta[j] scale[j] / scale'[j'], j the parent of j': the adapter is one of d', drawn from the same seed.

The gradient of a column is scale[j] times the sum over its n[j] rows, which are random ones. What is known of a child's
is its share of that sum, E[g'[j'] | g[j]] = (scale'[j'] n'[j']) / (scale[j] n[j]) g[j]. The square of a sum of numbers
of random sign grows with n, E[g'[j']^2] = (scale'[j']^2 n'[j']) / (scale[j]^2 n[j]) E[g[j]^2]: the same where P is
isometric. An optimizer's moments are carried over by these factors.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from unilora_ext.attachment import Attached
from unilora_ext.config import make_projection
from unilora_ext.errors import UniLoRAError
from unilora_ext.projections.indexed import IndexedProjection
from unilora_ext.sharded_tensors import managed_by_fsdp

__all__ = ["grow"]

_FIRST = ("exp_avg", "grad_avg", "momentum_buffer")
"""Means and sums of gradients, as the optimizers of torch and Transformers name them."""
_SECOND = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "variance")
"""Of their squares."""
_OF_STEPS = {"square_avg": "momentum_buffer", "RMS": "exp_avg"}
"""Beside the key: a mean of gradients over the root of their squares (RMSprop; Transformers' Adafactor)."""


@torch.inference_mode(False)
@torch.no_grad()
def grow(adapter: Attached, d: int, optimizer: Optimizer | None = None) -> None:
    """Makes theta_d longer; see :meth:`Adapter.grow`."""
    _check_alone(adapter)
    config, vector = replace(adapter.config, d=d), adapter.vector
    old, theta_d = vector.projection, vector.theta_d
    parents = old.parents(d)
    new = make_projection(config, vector.layout, weights=_no_weights, version=old.version)
    state = _state_of(theta_d, optimizer)
    split = _Split.of(old, new, parents)
    carried = split.state(state, theta_d, optimizer)
    vector.replace(new, split.applied(theta_d, split.value))
    state.update(carried)
    adapter.attachment.config = config


def _check_alone(adapter: Attached) -> None:
    if adapter.merged:
        raise UniLoRAError("grow: the update is merged into the weights; call unmerge() first")
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not adapter.attachment.replicated and (together or managed_by_fsdp(adapter.model)):
        raise UniLoRAError(
            "grow: expected one process, or theta_d replicated by unilora_ext.distributed: DistributedDataParallel and "
            "torch's fully_shard keep the length that theta_d had. Grow before they wrap the model, and before "
            "init_process_group"
        )


def _no_weights(module: int) -> Tensor:
    raise AssertionError("a projection whose columns split is made from a seed alone")


def _state_of(theta_d: Tensor, optimizer: Optimizer | None) -> dict[str, Any]:
    """What the optimizer keeps of theta_d.

    Raises:
        UniLoRAError: theta_d is not among its parameters, or another one keeps something of theta_d.
    """
    if optimizer is not None:
        if not isinstance(optimizer, Optimizer):
            raise UniLoRAError(f"grow: optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if not any(p is theta_d for group in optimizer.param_groups for p in group["params"]):
            raise UniLoRAError(f"grow: optimizer: expected one of theta_d, got a {type(optimizer).__name__} without it")
    given = {} if optimizer is None else optimizer.state.get(theta_d, {})
    if _others(theta_d, given):
        gc.collect()  # what was deleted
        for other in _others(theta_d, given):
            raise UniLoRAError(
                f"grow: optimizer: expected the one that has trained theta_d, got "
                f"{'None' if optimizer is None else 'another one'}: an optimizer keeps {list(other)} of theta_d. "
                "Give that one, or delete it"
            )
    return given


def _others(theta_d: Tensor, given: dict[str, Any]) -> list[dict[str, Any]]:
    """All states of theta_d but the given one. A fused step with such a state would write beyond it."""
    states = [holder.get(theta_d) for holder in gc.get_referrers(theta_d) if isinstance(holder, dict)]
    return [state for state in states if isinstance(state, dict) and state and state is not given]


class _Split(NamedTuple):
    """Columns that are split. Factors are float64 [d'] on the CPU, finite for columns without rows, too.

    Attributes:
        parents: int64 [d'], the column that each new one is a part of.
        value: factor of theta_d.
        first: of a mean of gradients.
        second: of a mean of their squares.
    """

    parents: Tensor
    value: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, old: IndexedProjection, new: IndexedProjection, parents: Tensor) -> _Split:
        n, scale = new.counts.double(), new.column_scale()
        of_parent = torch.zeros(old.d, dtype=n.dtype, device="cpu").index_add(0, parents, n)[parents]
        scale_of_parent = old.column_scale()[parents]
        share = _ratio(n, of_parent)
        value, scaled = _ratio(scale_of_parent, scale), _ratio(scale, scale_of_parent)
        return cls(parents, value, scaled * share, scaled**2 * share)

    def applied(self, tensor: Tensor, factor: Tensor) -> Tensor:
        """[d] -> float64 [d']."""
        return tensor.double()[self.parents.to(tensor.device)] * factor.to(tensor.device)

    def state(self, state: Mapping[str, Any], theta_d: Tensor, optimizer: Optimizer | None) -> dict[str, Tensor]:
        """What changes in an optimizer's state of theta_d.

        Raises:
            UniLoRAError: it has something that is neither a number nor a plain tensor of a known meaning.
        """
        root = self.second.sqrt()
        factors = {**dict.fromkeys(_FIRST, self.first), **dict.fromkeys(_SECOND, self.second), "exp_inf": root}
        factors |= {name: _ratio(self.first, root) for sign, name in _OF_STEPS.items() if sign in state}
        carried = {}
        for name, value in state.items():
            if value is None or isinstance(value, (int, float)) or getattr(value, "ndim", None) == 0:
                continue  # steps and rates, which are of all numbers
            plain = type(value) is Tensor and value.is_floating_point() and value.shape == theta_d.shape
            if not plain or name not in factors:
                raise UniLoRAError(
                    f"grow: optimizer: expected numbers, and floating tensors of shape {list(theta_d.shape)} named "
                    f"{', '.join(factors)}; got '{name}' ({type(value).__name__}) of {type(optimizer).__name__}, "
                    "which cannot be carried over. Delete the optimizer, grow, and make a new one"
                )
            carried[name] = self.applied(value, factors[name]).to(value.dtype)
        return carried


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is."""
    return torch.where(b > 0, a / b, 0.0)
