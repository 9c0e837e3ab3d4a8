"""A linear map with an update from a shared vector: y = its own + x dW^T."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unilora_ext.errors import UniLoRAError
from unilora_ext.functional import accumulator_dtype
from unilora_ext.layout import Layout, Slot
from unilora_ext.shared_vector import SharedVector
from unilora_ext.updates import LowRankUpdate, Update

__all__ = ["LayerState", "UniLoRALayer", "updated_class"]


@dataclass
class LayerState:
    """What a linear layer needs beside its own weight. Held outside the module tree: the vector is registered once.

    Attributes:
        vector: the shared vector.
        slot_id: this layer's number in it.
        dropout: probability with which an input of the update's path is zeroed in training.
        original: while merged, the weights as they were, by name.
        merged_sums: while merged, what tells whether they were written since.
    """

    vector: SharedVector
    slot_id: int
    dropout: float
    original: dict[str, Tensor] | None = None
    merged_sums: dict[str, tuple[Tensor, Tensor]] | None = None


class UniLoRALayer(nn.Module):
    """The update, as a mixin in front of any linear map, whose parameters it leaves as they are: y is the layer's own,
    the update is added in place, in the dtype of y."""

    _unilora: LayerState
    fan_in_fan_out: ClassVar[bool] = False  # whether ``weight`` is stored [n, m]
    is_linear: ClassVar[bool] = True  # x [..., n] -> [..., m], of one matrix
    takes_dense: ClassVar[bool] = True  # whether an update may be one without factors

    @property
    def target_parameters(self) -> tuple[str, ...]:
        """The parameters by which PEFT's LoRA names this layer as a target; none: by its own name."""
        return ()

    @classmethod
    def local_slot(cls, linear: nn.Module, layout: Layout, slot_id: int) -> Slot:
        """What this process holds of the update of `linear`."""
        return layout.slot(slot_id)

    def update_like(self) -> tuple[torch.device, torch.dtype]:
        """Where the layer computes, and the dtype of its update if nothing else says so."""
        theta_d = self._unilora.vector.theta_d
        own = next(chain(self.parameters(), self.buffers()), theta_d)
        return own.device, accumulator_dtype(theta_d.dtype)

    @property
    def r(self) -> int:
        """Rank of the update."""
        return self._unilora.vector.layout.r

    @property
    def scaling(self) -> float:
        """s = alpha / r."""
        return self._unilora.vector.scaling

    @property
    def merged(self) -> bool:
        """Whether the update is folded into ``weight``."""
        return self._unilora.original is not None

    def lora_factors(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """A [r, n] and B [m, r], differentiable in theta_d, in `dtype` (default: that of ``weight``; float32 where
        that is not a floating one).

        Raises:
            UniLoRAError: the projection makes dense updates, which have no factors.
        """
        device, own = self.update_like()
        update = self._unilora.vector.fresh_update(self._unilora.slot_id, device, dtype or own)
        if not isinstance(update, LowRankUpdate):
            raise UniLoRAError(
                f"lora_factors: expected a low-rank update, got the dense one of "
                f"'{self._unilora.vector.projection.name}', which merge() can fold into the weights"
            )
        return update.A, update.B

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """The update [m, n] of what this process holds, in float32 (float64 for a float64 weight)."""
        state = self._unilora
        device, dtype = self.update_like()
        slot = state.vector.slots[state.slot_id]
        return state.vector.fresh_update(state.slot_id, device, accumulator_dtype(dtype), slot).dense()

    def plain_lora(self) -> dict[str, Tensor]:
        """The factors as PEFT's LoRA names them below the layer, in float32 (float64 for a float64 weight).

        Raises:
            UniLoRAError: PEFT's LoRA of such a layer is another function, or the update has no factors.
        """
        A, B = self.lora_factors(accumulator_dtype(self.update_like()[1]))
        shapes = self.plain_lora_shapes(self, len(B), A.shape[1], len(A))
        return {name: factor.reshape(shape) for (name, shape), factor in zip(shapes.items(), (A, B), strict=True)}

    @classmethod
    def plain_lora_shapes(cls, layer: nn.Module, m: int, n: int, r: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of PEFT's A, then B, of a layer that this class adapts: those of A [r, n] and B [m, r].

        Raises:
            UniLoRAError: PEFT's LoRA of such a layer is another function.
        """
        return {"lora_A.weight": (r, n), "lora_B.weight": (m, r)}

    def _update(self, device: torch.device, dtype: torch.dtype) -> Update:
        """The update of what this process holds, from the projection of the running forward."""
        return self._unilora.vector.update(self._unilora.slot_id, device, dtype)

    def _dropping(self) -> bool:
        return self.training and self._unilora.dropout > 0

    def _added(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's own y with the update of x."""
        if not isinstance(y, Tensor):
            raise UniLoRAError(f"{self}: expected a layer that returns a tensor, got {type(y).__name__}")
        update = self._update(self.update_like()[0], y.dtype)
        return update.added(y, F.dropout(x, self._unilora.dropout) if self._dropping() else x)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        own_forward = super().forward
        y = own_forward(*args, **kwargs)
        if not self._unilora.vector.enabled:
            return y
        # by name, x is the first argument under whatever name the layer has for it
        x = args[0] if args else next(iter(signature(own_forward).bind(**kwargs).arguments.values()))
        if self.training and x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
            raise UniLoRAError(
                f"{self}: in training, expected a gradient through the layer to its input, got an output without one: "
                "what lies below would learn nothing. (bitsandbytes packs 4-bit weights on a CPU for inference in the "
                "first evaluation without gradients: load the model anew, and train before the first evaluation)"
            )
        return self._added(y, x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        make, arguments, *state = super().__reduce_ex__(protocol)
        mixin, *bases = type(self).__bases__
        if len(bases) == 1 and type(self) is updated_class(bases[0], mixin):  # pickle does not find such a class
            make, arguments = _new_updated, (bases[0], mixin)
        return make, arguments, *state


def updated_class(layer_class: type[nn.Module], mixin: type[nn.Module] = UniLoRALayer) -> type[UniLoRALayer]:
    """`layer_class`, of its own kind, with a mixin in front: always the same class. With the usual mixin, the update of
    a linear map is added to what it returns; with a subclass of what `layer_class` adapts, to what its ``super()``
    returns."""
    return _updated_class(layer_class, mixin)


@cache
def _updated_class(layer_class: type[nn.Module], mixin: type[nn.Module]) -> type[UniLoRALayer]:
    own = layer_class if issubclass(mixin, UniLoRALayer) else mixin
    return type(f"UniLoRA{own.__name__}", (mixin, layer_class), {"__doc__": UniLoRALayer.__doc__})


def _new_updated(layer_class: type[nn.Module], mixin: type[nn.Module]) -> UniLoRALayer:
    adapted_class = updated_class(layer_class, mixin)
    return adapted_class.__new__(adapted_class)
