"""The experts of a mixture in Transformers: the matrices of all of them in two parameters, with an update."""

from __future__ import annotations

from inspect import signature
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilora_ext.errors import UniLoRAError
from unilora_ext.functional import accumulator_dtype, autocast_dtype
from unilora_ext.fused import FusedLayer
from unilora_ext.layer import UniLoRALayer, updated_class
from unilora_ext.updates import LowRankUpdate

__all__ = ["ExpertsLayer", "adapted_experts", "problem_of", "shape_of", "stacks_experts"]


class ExpertsLayer(FusedLayer):
    """The update, as a mixin in front of E experts that Transformers runs by ``use_experts_implementation``: y is the
    sum of the chosen experts' down(act(up(x))) by their routing weights.

    Each expert has an A [r, n] and a B [m, r] for each of its two projections. All of them are one module in theta_D,
    an update [M, N] of which only blocks on the diagonal are used: M = E (m_up + m_down), N = E (n_up + n_down), with
    the B of all experts' up below each other, then those of down; the A side by side in the same order.

    While attached it takes the place of the implementation that the configuration names: each expert runs on its own
    tokens, product and update in one operator. Sums over experts are in float32.
    """

    is_linear = takes_dense = False
    _names: ClassVar[dict[bool, tuple[str, str]]] = {
        True: ("gate_up_proj", "down_proj"),
        False: ("up_proj", "down_proj"),
    }

    @property
    def weight_names(self) -> tuple[str, str]:
        """The parameters of the two projections."""
        return self._names[self.has_gate]

    @property
    def weight(self) -> Tensor:
        """The one of down, for what is the same for both: device and dtype."""
        return self.down_proj

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        own_forward = super(UniLoRALayer, self).forward
        if self.merged or not self._unilora.vector.enabled:
            return own_forward(*args, **kwargs)
        x, chosen, shares = signature(own_forward).bind(*args, **kwargs).arguments.values()
        up, down = self._updates(self._update(x.device, autocast_dtype(x.device, self.weight.dtype)))
        y = torch.zeros(x.shape, dtype=accumulator_dtype(x.dtype), device=x.device)
        for expert in chosen[chosen < self.num_experts].unique().tolist():  # beyond them: no expert, as in its own loop
            token, choice = torch.where(chosen == expert)
            h = self._linear(x[token], 0, expert, up[expert])
            h = self._linear(self._apply_gate(h) if self.has_gate else self.act_fn(h), 1, expert, down[expert])
            y.index_add_(0, token, (h * shares[token, choice, None]).to(y.dtype))
        return y.to(x.dtype)

    def _linear(self, x: Tensor, part: int, expert: int, update: LowRankUpdate) -> Tensor:
        """x [..., n] through a projection of an expert, with its update: [..., m]."""
        name = self.weight_names[part]
        weight = getattr(self, name)[expert]
        weight = weight.T if self.is_transposed else weight
        x = x.to(weight.dtype)  # some gates give float32
        bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
        if self._dropping():
            return update.added(F.linear(x, weight, bias), F.dropout(x, self._unilora.dropout))
        return update.linear(x, weight, bias)

    def _updates(self, update: LowRankUpdate) -> list[list[LowRankUpdate]]:
        """The updates of each projection, by expert."""
        shapes, experts = _shapes_of(self), self.num_experts
        of_A = update.A.split([experts * n for _, n in shapes], 1)
        of_B = update.B.split([experts * m for m, _ in shapes])
        by_projection = []
        for (m, n), A, B in zip(shapes, of_A, of_B, strict=True):
            As = A.reshape(self.r, experts, n).transpose(0, 1).contiguous().unbind()
            Bs = B.view(experts, m, self.r).unbind()
            by_projection.append([LowRankUpdate(*AB, update.scaling) for AB in zip(As, Bs, strict=True)])
        return by_projection

    def weight_updates(self) -> dict[str, Tensor]:
        state, dtype = self._unilora, accumulator_dtype(self.weight.dtype)
        updates = self._updates(state.vector.fresh_update(state.slot_id, self.weight.device, dtype))
        deltas = (torch.stack([update.dense() for update in of_part]) for of_part in updates)
        return {
            name: delta.transpose(1, 2) if self.is_transposed else delta
            for name, delta in zip(self.weight_names, deltas, strict=True)
        }

    def delta_weight(self) -> Tensor:
        """None: the update is of many matrices, see :meth:`weight_updates`.

        Raises:
            UniLoRAError: always.
        """
        raise UniLoRAError("delta_weight: expected a layer with one matrix; weight_updates() has those of the experts")

    @property
    def target_parameters(self) -> tuple[str, ...]:
        return tuple(name for name in self._parameters if name in self.weight_names)

    @classmethod
    def plain_lora_shapes(cls, layer: nn.Module, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        raise UniLoRAError("expected a layer with one A and one B; PEFT's LoRA of experts is one of their parameters")

    def plain_lora(self) -> dict[str, Tensor]:
        A, B = self.lora_factors(accumulator_dtype(self.weight.dtype))
        updates = dict(zip(self.weight_names, self._updates(LowRankUpdate(A, B, self.scaling)), strict=True))
        tensors, wrappers = {}, ""
        for name in reversed(self.target_parameters):  # PEFT wraps a module for each, the last one outermost
            tensors[f"{wrappers}lora_A.weight"] = torch.cat([update.A for update in updates[name]])  # [E r, n]
            tensors[f"{wrappers}lora_B.weight"] = torch.stack([u.B for u in updates[name]], 2).flatten(1)  # [m, r E]
            wrappers += "base_layer."
        return tensors


def stacks_experts(module: nn.Module) -> bool:
    """Whether a module has experts that ``use_experts_implementation`` of Transformers runs."""
    cls = type(module)
    stated = all(
        hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "num_experts", "down_proj")
    )
    return stated and cls.__module__.startswith("transformers.") and hasattr(cls.forward, "__wrapped__")


def adapted_experts(module: nn.Module) -> type[UniLoRALayer]:
    """The class that adapts it."""
    return updated_class(type(module), ExpertsLayer)


def problem_of(module: nn.Module) -> str | None:
    """Why stacked experts cannot be adapted; None: they can."""
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over processes"
    if getattr(module, "has_post_expert_norm", False):
        return "it has a norm after each expert"
    for name in ExpertsLayer._names[module.has_gate]:
        weight = getattr(module, name, None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 3:
            return f"expected '{name}' as a parameter of three dimensions"
        if not weight.is_floating_point() or len(weight) != module.num_experts:
            return (
                f"expected '{name}' as {module.num_experts} floating matrices, got {list(weight.shape)} {weight.dtype}"
            )
    return None


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(M, N) of the update of all experts, see :class:`ExpertsLayer`."""
    shapes = _shapes_of(module)
    return module.num_experts * sum(m for m, _ in shapes), module.num_experts * sum(n for _, n in shapes)


def _shapes_of(module: nn.Module) -> list[tuple[int, int]]:
    """(m, n) of an expert's two projections."""
    stored = [getattr(module, name).shape[1:] for name in ExpertsLayer._names[module.has_gate]]
    return [tuple(shape[::-1] if module.is_transposed else shape) for shape in stored]
