"""Layers with a plain weight, which the update can be folded into; a linear one is one operator,
y = x (W + dW)^T + b."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from unilora_ext.errors import UniLoRAError
from unilora_ext.functional import autocast_dtype
from unilora_ext.layer import UniLoRALayer
from unilora_ext.sharded_tensors import exchange_, is_sharded, managed_by_fsdp

__all__ = ["FusedLayer", "check_load", "warn_merged"]

_MERGED = "unilora_merged"
"""Marks a layer that was merged in the metadata of a ``state_dict``."""


class FusedLayer(UniLoRALayer):
    """The update, as a mixin in front of a layer with a plain floating ``weight``, which it can be folded into. For a
    linear layer with a ``bias``, product and update are one operator; other kinds say what the update of their y is
    (:meth:`_updated`)."""

    weight: Tensor
    bias: Tensor | None
    weight_names: ClassVar[tuple[str, ...]] = ("weight",)
    """What the update is folded into."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """What the update is folded into, by name."""
        return {name: getattr(self, name) for name in self.weight_names}

    def weight_updates(self) -> dict[str, Tensor]:
        """What :meth:`merge` adds to each of :attr:`weights`, in float32 (float64 for a float64 weight)."""
        return {"weight": self.as_weight(self.delta_weight(), self.weight)}

    @classmethod
    def as_matrix(cls, weight: Tensor) -> Tensor:
        """A ``weight`` of this kind of layer as W [m, n], a view."""
        return weight

    @classmethod
    def as_weight(cls, matrix: Tensor, weight: Tensor) -> Tensor:
        """The reverse of :meth:`as_matrix`: [m, n] in the shape of `weight`, a view."""
        return matrix

    def update_like(self) -> tuple[torch.device, torch.dtype]:
        return self.weight.device, self.weight.dtype

    def forward(self, input: Tensor) -> Tensor:
        x, state, weight = input, self._unilora, self.weight
        if is_sharded(weight):
            raise UniLoRAError(
                f"{self}: expected a whole weight here, got a DTensor: attach after parallelize_module, and call the "
                "model that fully_shard was given, not a part of it"
            )
        if state.original is not None or not state.vector.enabled:
            return super(UniLoRALayer, self).forward(x)
        return self._updated(x)

    def _updated(self, x: Tensor) -> Tensor:
        """y of x, with the update."""
        if self._dropping():
            return self._added(super(UniLoRALayer, self).forward(x), x)
        weight = self.weight
        update = self._update(weight.device, autocast_dtype(x.device, weight.dtype))
        return update.linear(x, self.as_matrix(weight), self.bias)

    @torch.no_grad()
    def merge(self) -> None:
        """Folds the update into ``weight``, rounded once; the weight as it was is kept for :meth:`unmerge`.

        Raises:
            UniLoRAError: merged already; the weight is sharded by fully_shard, computed anew in every forward, or on
                the meta device; or the sum is not finite. The weight is then unchanged.
        """
        if self.merged:
            raise UniLoRAError("merge: this layer is merged already; call unmerge() first")
        if managed_by_fsdp(self):
            raise UniLoRAError(
                "merge: the weight is sharded by fully_shard: save the adapter, load it into a whole model"
            )
        if not self._weights_are_stored():
            raise UniLoRAError(
                "merge: the weight is computed anew in every forward (torch.nn.utils.prune, weight_norm, spectral_norm "
                "or parametrize): the update would be lost. Make it a plain parameter first (prune.remove, "
                "remove_weight_norm, remove_parametrizations)"
            )
        weights = self.weights
        if any(weight.is_meta for weight in weights.values()):
            raise UniLoRAError("merge: the weight has no values here: it is on the meta device, or offloaded")
        merged = {}
        for name, delta in self.weight_updates().items():
            weight = weights[name]
            merged[name] = (weight.to(delta.dtype) + delta).to(weight.dtype)
            if not torch.isfinite(merged[name]).all() and torch.isfinite(weight).all():
                raise UniLoRAError(f"merge: weight + update is not finite in {weight.dtype}")
        self._unilora.merged_sums = {name: _bit_sums(weight) for name, weight in merged.items()}
        self._unilora.original = {name: exchange_(weights[name], weight) for name, weight in merged.items()}

    def unmerge(self) -> None:
        """Puts the weight back exactly as it was before :meth:`merge`.

        Raises:
            UniLoRAError: not merged, or the weight was written since, which would be lost. The weight is then
                unchanged.
        """
        self.check_unmerge()
        self.restore_weight()

    def check_unmerge(self) -> None:
        """Raises what :meth:`unmerge` would."""
        if not self.merged:
            raise UniLoRAError("unmerge: this layer is not merged")
        if not self._weights_are_as_merged():
            raise UniLoRAError(
                "unmerge: the weight was written after merge(), and what was written would be lost; "
                "detach(merge=True) keeps the weights as they are"
            )

    def restore_weight(self) -> None:
        """:meth:`unmerge` without its checks."""
        state = self._unilora
        for name, weight in self.weights.items():
            exchange_(weight, state.original[name].to(device=weight.device, dtype=weight.dtype))
        state.original = state.merged_sums = None

    def _weights_are_stored(self) -> bool:
        """Whether the weights are what they were registered as, not made from other tensors by a hook or a property."""
        return all(name in self._parameters or name in self._buffers for name in self.weight_names)

    def _weights_are_as_merged(self) -> bool:
        if not self._weights_are_stored() or any(weight.is_meta for weight in self.weights.values()):
            return False
        sums = self._unilora.merged_sums
        return all(all(map(torch.equal, _bit_sums(weight), sums[name])) for name, weight in self.weights.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedLayer:
        as_merged = self.merged and self._weights_are_as_merged()
        super()._apply(fn, recurse)
        if as_merged and not any(weight.is_meta for weight in self.weights.values()):  # a cast is not a write
            self._unilora.merged_sums = {name: _bit_sums(weight) for name, weight in self.weights.items()}
        return self

    # -- state_dict ---------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][_MERGED] = True

    def check_load(self, state_dict: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]) -> None:
        """Whether a weight fits the state of this layer: with the update where it is merged, without it where not.

        Raises:
            UniLoRAError: it does not.
        """
        stored = metadata.get(_MERGED, False)
        loaded = next((prefix + name for name in self.weight_names if prefix + name in state_dict), None)
        if loaded is None or stored == self.merged:
            return
        if stored:
            raise UniLoRAError(
                f"load_state_dict: '{loaded}' was saved while merged and has the update in it, which this layer "
                "would add once more: save it after unmerge(), or load it into the model without an adapter"
            )
        raise UniLoRAError(
            f"load_state_dict: '{loaded}' would replace a weight that has the update merged into it: call "
            "unmerge() first, or detach(merge=True) for a weight that has it too"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        self.check_load(state_dict, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def check_load(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """``load_state_dict`` pre-hook of a model: :meth:`FusedLayer.check_load` of all layers, before the first
    tensor is written. Inside a larger model the metadata is not at hand here, and each layer checks its own."""
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is None and prefix:
        return
    for name, layer in model.named_modules():
        if isinstance(layer, FusedLayer):
            layer.check_load(state_dict, f"{prefix}{name}.", (metadata or {}).get(prefix + name, {}))


def warn_merged(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """``state_dict`` pre-hook of a model."""
    if any(isinstance(layer, FusedLayer) and layer.merged for layer in model.modules()):
        warnings.warn(
            "state_dict() of a merged model: its weights have the update in them, and a model with an adapter that "
            "loads them adds it once more. unmerge() first, or detach(merge=True) for a plain model",
            stacklevel=4,
        )


def _bit_sums(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the bits of a weight, read as integers, over its first dimension and its last (of [m, n]: [n] and [m]),
    int64, on the CPU. A write changes them; where and in which order they are summed does not."""
    weight = weight.detach().to_local() if is_sharded(weight) else weight.detach()
    bits = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    return bits.sum(0).cpu(), bits.sum(-1).cpu()
