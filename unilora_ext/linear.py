"""Linear layers with a Uni-LoRA update: y = x W^T + b + s (x A^T) B^T, A and B rebuilt from a shared vector.

A layer whose weight is a plain floating tensor computes all of it in one operator. Any other linear map (a quantised
layer, say) computes y = x W^T + b in its own way, and the update is added to that (:func:`updated_class`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilora_ext import ops
from unilora_ext.config import UniLoRAConfig, default_d
from unilora_ext.errors import UniLoRAError
from unilora_ext.merging import MergeableLayer
from unilora_ext.projections import Projection, make_projection
from unilora_ext.sharded_tensors import is_sharded
from unilora_ext.shared_vector import Part, SharedVector, Slot
from unilora_ext.uncalled import be_called

__all__ = ["LayerState", "UniLoRALayer", "UniLoRALinear", "UniLoRAUpdate", "initial_theta_d", "updated_class"]


@dataclass
class LayerState:
    """What a linear layer needs beside its own weight. Held outside the module tree: the vector is registered once.

    Attributes:
        vector: the shared vector.
        slot_id: this layer's slot in it.
        scaling: s.
        dropout: probability with which an input of the LoRA path is zeroed in training.
        original: while merged, the weight as it was.
        merged_sums: while merged, what tells whether the weight was written since.
    """

    vector: SharedVector
    slot_id: int
    scaling: float
    dropout: float
    original: Tensor | None = None
    merged_sums: tuple[Tensor, Tensor] | None = None

    @property
    def slot(self) -> Slot:
        return self.vector.slots[self.slot_id]


class UniLoRALayer(MergeableLayer):
    """The update, as a mixin in front of a linear layer class whose parameters it leaves as they are. This one is for
    layers with a plain floating ``weight`` and a ``bias``."""

    _unilora: LayerState
    bias: Tensor | None

    def dense_weight(self) -> Tensor:
        """W as [m, n], whatever the layout of ``weight``."""
        return self.weight

    def factors_like(self) -> tuple[torch.device, torch.dtype]:
        """Where the layer computes, and in which dtype if nothing else says so."""
        return self.weight.device, self.weight.dtype

    @classmethod
    def local_part(cls, linear: nn.Module, slot: Slot) -> Part:
        """What this process holds of the factors of `linear`."""
        return slot.part()

    @property
    def r(self) -> int:
        """Rank of the update."""
        return self._unilora.slot.r

    @property
    def scaling(self) -> float:
        """s = alpha / r."""
        return self._unilora.scaling

    def lora_factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A [r, n] and B [m, r], differentiable in theta_d, in `dtype` (default: that of ``weight``; float32 where
        that is not a floating one)."""
        state = self._unilora
        device, own = self.factors_like()
        return state.vector.fresh_factors(state.slot_id, device, dtype or own)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of what this process holds of W, from the projection of the running forward."""
        state = self._unilora
        return state.vector.factors(state.slot_id, self.factors_like()[0], dtype)

    def forward(self, input: Tensor) -> Tensor:
        x, state, weight = input, self._unilora, self.weight
        if is_sharded(weight):
            raise UniLoRAError(
                f"{self}: expected a whole weight here, got a DTensor: attach after parallelize_module, and call the "
                "model that fully_shard was given, not a part of it"
            )
        if state.original is not None or not state.vector.enabled:
            return super().forward(x)
        if self._dropping():
            return self._updated(super().forward(x), x)
        dtype = ops.autocast_dtype(x.device, weight.dtype)
        A, B = state.vector.factors(state.slot_id, weight.device, dtype)
        return ops.lora_linear(x, self.dense_weight(), self.bias, A, B, state.scaling)

    def _dropping(self) -> bool:
        return self.training and self._unilora.dropout > 0

    def _updated(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's own y with the update of x."""
        if not isinstance(y, Tensor):
            raise UniLoRAError(f"{self}: expected a layer that returns a tensor, got {type(y).__name__}")
        A, B = self._factors(y.dtype)
        x = F.dropout(x, self._unilora.dropout) if self._dropping() else x
        return ops.lora_update(y, x, A, B, self._unilora.scaling)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """s B A [m, n], in float32 (float64 for a float64 weight)."""
        state = self._unilora
        device, dtype = self.factors_like()
        part = state.vector.parts[state.slot_id]
        A, B = state.vector.fresh_factors(state.slot_id, device, ops.accumulator_dtype(dtype), part)
        with ops.without_autocast(device):
            return (B @ A).mul_(self.scaling)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}"


class UniLoRAUpdate(UniLoRALayer):
    """The mixin for any other linear map: y is the layer's own, the update is added in place, in the dtype of y.

    The layer cannot be merged: its weight is not a matrix to add to (a quantised one would have to be rounded anew).
    """

    def factors_like(self) -> tuple[torch.device, torch.dtype]:
        theta_d = self._unilora.vector.theta_d
        held = next(chain(self.parameters(), self.buffers()), theta_d)
        return held.device, ops.accumulator_dtype(theta_d.dtype)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        own_forward = super(UniLoRALayer, self).forward
        y = own_forward(*args, **kwargs)
        if not self._unilora.vector.enabled:
            return y
        # by name, x is the first argument under whatever name the layer has for it
        x = args[0] if args else next(iter(signature(own_forward).bind(**kwargs).arguments.values()))
        return self._updated(y, x)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        _, _, *state = super().__reduce_ex__(protocol)
        return _new_updated, (type(self).__bases__[1],), *state  # pickle does not find a class made by updated_class

    def merge(self) -> None:
        """Always an error.

        Raises:
            UniLoRAError: the layer has no plain weight.
        """
        raise UniLoRAError(
            f"merge: expected a plain floating weight, got a {type(self).__bases__[1].__name__}: keep the adapter "
            "attached, or load it on the model in full precision and merge there"
        )


@cache
def updated_class(layer_class: type[nn.Module]) -> type[UniLoRAUpdate]:
    """`layer_class`, a linear map of its own kind, with the update added to what it returns."""
    return type(f"UniLoRA{layer_class.__name__}", (UniLoRAUpdate, layer_class), {"__doc__": UniLoRAUpdate.__doc__})


def _new_updated(layer_class: type[nn.Module]) -> UniLoRAUpdate:
    adapted_class = updated_class(layer_class)
    return adapted_class.__new__(adapted_class)


class UniLoRALinear(UniLoRALayer, nn.Linear):
    """A drop-in ``nn.Linear`` with a frozen weight and a Uni-LoRA update.

    Made by :func:`unilora_ext.attach` it shares the model's vector. Made by hand it has a vector of its own:

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        r: rank.
        d: length of theta_d; None: the paper's ratio D / d, D = (in_features + out_features) r.
        projection: ``"uniform"``, ``"balanced"`` or ``"peft"``, or a :class:`~unilora_ext.projections.Projection` of D
            rows.
        seed: of the projection.
        alpha: s = alpha / r; None: s = 1.
        dropout: on the LoRA path, in training.
        init_bound: theta_d starts uniform in [-init_bound, init_bound].

    Shape: x [..., in_features] -> y [..., out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._own_vector(**lora)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **lora: Any) -> UniLoRALinear:
        """The same layer around the weight and bias of `linear`, which are shared and frozen, not copied.

        Args:
            linear: an ``nn.Linear``.
            **lora: r, d, projection, seed, alpha, dropout, init_bound, as in the constructor.
        """
        if type(linear) is not nn.Linear:
            raise UniLoRAError(f"from_linear: expected a torch.nn.Linear, got {type(linear).__name__}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight, layer.bias = linear.weight, linear.bias
        layer._own_vector(**lora)
        return layer.train(linear.training)

    def _own_vector(
        self,
        *,
        r: int = 4,
        d: int | None = None,
        projection: str | Projection = "uniform",
        seed: int = 0,
        alpha: float | None = None,
        dropout: float = 0.0,
        init_bound: float = 0.02,
    ) -> None:
        given = isinstance(projection, Projection)
        config = UniLoRAConfig(
            r=r, d=d, seed=seed, alpha=alpha, dropout=dropout, init_bound=init_bound,
            projection="uniform" if given else projection,
        )  # fmt: skip
        slot = Slot(0, self.out_features, self.in_features, r)
        if not given:
            projection = make_projection(config.projection, slot.stop, d or default_d(slot.stop), seed)
        if slot.stop != projection.D or (given and d not in (None, projection.d)):
            raise UniLoRAError(
                f"UniLoRALinear: projection: expected D = (in_features + out_features) r = {slot.stop} "
                f"and d = {d or 'any'}, got {projection}"
            )
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        theta_d = initial_theta_d(projection.d, self.weight, init_bound)
        self.vector = SharedVector(theta_d, projection, [replace(slot, a_first=projection.a_first)])
        self._unilora = LayerState(self.vector, 0, config.scaling, config.dropout)
        self.register_forward_hook(be_called)

    @property
    def theta_d(self) -> nn.Parameter:
        """[d]: the trainable vector (of the whole model, for a layer made by ``attach``)."""
        return self._unilora.vector.theta_d

    @property
    def projection(self) -> Projection:
        """P, of the same vector."""
        return self._unilora.vector.projection


def initial_theta_d(d: int, like: Tensor, bound: float) -> Tensor:
    """theta_d uniform in [-bound, bound] from PyTorch's global CPU generator, on the device of `like` (the CPU for a
    meta tensor): float32, float64 for a float64 `like`."""
    theta_d = torch.empty(d, dtype=ops.accumulator_dtype(like.dtype), device="cpu").uniform_(-bound, bound)
    return theta_d if like.is_meta else theta_d.to(like.device)
