"""PEFT's UniLora models on this package's operators."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.unilora import UniLoraLayer, UniLoraModel
from peft.tuners.unilora.layer import Linear
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from unilora_ext.errors import AttachError
from unilora_ext.functional import autocast_dtype
from unilora_ext.integrations.peft.buffers import ComputedBuffers, Segment
from unilora_ext.integrations.peft.vectors import AdapterVector, Vectors, layers_of, read_vector

__all__ = ["accelerate", "accelerated_layers"]

_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accelerate(model: peft.PeftModel) -> peft.PeftModel:
    """Lets a PEFT UniLora model compute by this package's operators, in place.

    One projection serves all layers of an adapter in a forward pass, a layer with one active adapter is one fused
    matmul, and the int64 index and the scale of every element are dropped: 4 bytes an element are kept instead of 12
    (8 on CUDA, once gradients are wanted). Everything of PEFT goes on to work, under the same parameter names and in
    the same files: several adapters, added before or after, set_adapter, disable_adapter, merging, unloading,
    save_pretrained, from_pretrained. So does ``adapter_names``, an adapter for each row of a batch, which PEFT itself
    leaves out for UniLora without a word. PEFT's own code runs where a layer cannot be fused (several active adapters,
    dropout, quantised or offloaded base layers), with the same projection.

    With a float16 or bfloat16 base PEFT rounds each scale to that type; here it stays float32, so values there agree
    to that type's precision.

    Args:
        model: from ``peft.get_peft_model`` or ``peft.PeftModel.from_pretrained``, with UniLora adapters. One that is
            accelerated already is returned as it is.

    Returns:
        `model`. :func:`accelerated_layers` tells which of its layers were changed.

    Raises:
        AttachError: another kind of model or layer; the model is unchanged.
        UniLoRAError: an adapter's buffers are not loaded or not those of a Uni-LoRA; the model is unchanged.
    """
    if not isinstance(model, peft.PeftModel):
        raise AttachError(f"accelerate: model: expected a peft.PeftModel, got {type(model).__name__}")
    tuner = model.base_model
    if type(tuner) not in (UniLoraModel, AcceleratedModel):
        raise AttachError(f"accelerate: model: expected a UniLora tuner, got {type(tuner).__name__}")
    for name, layer in _unilora_layers(tuner).items():
        if type(layer) not in (Linear, AcceleratedLinear):
            raise AttachError(f"accelerate: '{name}': expected PEFT's UniLora Linear, got {type(layer).__name__}")
    if type(tuner) is UniLoraModel:
        found = {name: layers_of(tuner, name) for name in model.peft_config}
        read = {name: read_vector(layers, name) for name, layers in found.items() if layers}
        vectors = Vectors()
        tuner.__class__ = AcceleratedModel
        tuner.take_over(vectors)
        for name, vector in read.items():
            vectors.install(name, vector, found[name])
    return model


def accelerated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that :func:`accelerate` changed, by name: ``len(accelerated_layers(model))`` counts them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AcceleratedLinear)}


def _unilora_layers(model: nn.Module) -> dict[str, UniLoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, UniLoraLayer)}


class AcceleratedModel(UniLoraModel):
    """PEFT's tuner; adapters that are added later are accelerated too."""

    _vectors: Vectors
    _hooks: list[torch.utils.hooks.RemovableHandle]

    def take_over(self, vectors: Vectors) -> None:
        """Prepares a PEFT tuner whose class was changed to this one."""
        self._vectors, self._hooks = vectors, []
        for module in (self, self.model):  # the tuner calls its model's forward; generate() calls the model itself
            self._hooks.append(module.register_forward_pre_hook(vectors.begin))
            self._hooks.append(module.register_forward_hook(vectors.end, always_call=True))
        self._take_over_layers()

    def _take_over_layers(self) -> None:
        for layer in _unilora_layers(self).values():
            if type(layer) is Linear:
                layer.__class__ = AcceleratedLinear
                layer.take_over(self._vectors)

    @functools.wraps(UniLoraModel.inject_adapter)
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._take_over_layers()
        self._vectors.forget(adapter_name)  # read before the next forward, when its weights are loaded

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Where PEFT prepares a forward or generate() with `adapter_names`: a name for each row, or ``"__base__"``."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_rows(names)
        rows = Rows(names, {1, *(kwargs.get(each) or 1 for each in ("num_beams", "num_return_sequences"))})
        wrappers = [module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        hooks = [module.register_forward_pre_hook(rows.give, with_kwargs=True) for module in wrappers]
        self._vectors.rows = rows
        try:
            yield
        finally:
            self._vectors.rows = None
            for hook in hooks:
                hook.remove()

    def _check_rows(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError("adapter_names: expected a model in evaluation mode, got one in training")
        layers = _unilora_layers(self).values()
        known = {"__base__", *(name for layer in layers for name in layer.unilora_indices_A)}
        if isinstance(names, str) or not known.issuperset(names):
            raise ValueError(f"adapter_names: expected a list of names in {sorted(known)}, got {names}")
        if any(layer.merged for layer in layers):
            raise ValueError("adapter_names: expected no merged adapter: call unmerge_adapter first")
        used = {*names, *self.active_adapters} - {"__base__"}
        for where, module in self.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and not used.issubset(module._adapters):
                # PEFT would give some rows the base's module, or another adapter's
                raise ValueError(
                    f"adapter_names: expected '{where}' in modules_to_save of every adapter that is named or active, "
                    f"it is not in those of {sorted(used.difference(module._adapters))}"
                )

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for hook in self._hooks:
            hook.remove()
        return model


class AcceleratedLinear(Linear):
    """PEFT's UniLora layer with its factors from the shared projection.

    Attributes:
        vectors: the model's vectors, by adapter.
        slot_ids: this layer's slot in each.
    """

    vectors: Vectors
    slot_ids: dict[str, int]
    other_param_names = (*Linear.other_param_names, "slot_ids")  # PEFT cleans these up with an adapter

    def take_over(self, vectors: Vectors) -> None:
        """Prepares a PEFT layer whose class was changed to this one."""
        self.vectors, self.slot_ids = vectors, {}
        for buffers in self._buffer_dicts():
            buffers.__class__ = ComputedBuffers
            buffers.take_over(self.weight.device, vectors.forget)

    def use(self, name: str, slot_id: int, vector: AdapterVector) -> None:
        """From now on the adapter's factors are those of a slot of `vector`."""
        self.slot_ids[name] = slot_id
        layout = vector.layout
        (m, n), r = layout.shapes[slot_id], layout.r
        start_A, start_B = layout.range_of_A(slot_id)[0], layout.range_of_B(slot_id)[0]
        segments = [
            (start_A, (r, n), "indices"),
            (start_B, (m, r), "indices"),
            (start_A, (r, n), "scales"),
            (start_B, (m, r), "scales"),
        ]
        for buffers, segment in zip(self._buffer_dicts(), segments, strict=True):
            buffers.compute(name, Segment(vector.projection, *segment))

    def _buffer_dicts(self) -> list[Any]:
        return [self.unilora_indices_A, self.unilora_indices_B, self.unilora_scales_A, self.unilora_scales_B]

    def _get_lora_matrices(self, adapter: str, cast_to_fp32: bool = False) -> tuple[Tensor, Tensor]:
        vector = self.vectors.by_adapter.get(adapter)
        if vector is None:
            return super()._get_lora_matrices(adapter, cast_to_fp32)
        dtype = torch.float32 if cast_to_fp32 else vector.theta_d.dtype
        update = vector.update(self.slot_ids[adapter], self.weight.device, dtype)
        return update.A, update.B

    def _by_row(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Each row of x [rows, ..., n] with the adapter of its name."""
        y = self.base_layer(x)
        for name in dict.fromkeys(names):
            if name in self.unilora_indices_A:  # else "__base__", or an adapter without this layer
                A, B = self._get_lora_matrices(name)
                mine = torch.tensor([i for i, each in enumerate(names) if each == name], device=x.device)
                update = F.linear(F.linear(x[mine].to(A.dtype), A), B)
                y = y.index_add(0, mine, update.to(y.dtype))
        return y

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.vectors.rows is not None and not self.disable_adapters:
            return self._by_row(x, self.vectors.rows.of(x)).to(x.dtype)
        adapter = None if args or kwargs else self._fusable_adapter(x)
        if adapter is None:
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight
        dtype = autocast_dtype(x.device, weight.dtype)
        update = self.vectors.by_adapter[adapter].update(self.slot_ids[adapter], weight.device, dtype)
        return update.linear(x, weight, base.bias).to(x.dtype)

    def _fusable_adapter(self, x: Tensor) -> str | None:
        """The one adapter that is active, where nothing but a plain matmul is asked for."""
        if self.disable_adapters or self.merged:
            return None
        active = [name for name in self.active_adapters if name in self.unilora_indices_A]
        if len(active) != 1 or active[0] not in self.vectors.by_adapter:
            return None
        dropout = self.unilora_dropout[active[0]]
        if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0:
            return None
        return active[0] if _is_plain(self.base_layer, x) else None


class Rows:
    """The adapter of each row of a batch.

    Args:
        names: by row.
        copies: how many times in turn generate() may take each row.
    """

    def __init__(self, names: Sequence[str], copies: set[int]) -> None:
        self.names, self.copies = list(names), copies

    def of(self, x: Tensor) -> list[str]:
        """The names by row of x [rows, ...].

        Raises:
            ValueError: x has another number of rows.
        """
        copies = len(x) // max(len(self.names), 1)
        if copies not in self.copies or copies * len(self.names) != len(x):
            raise ValueError(f"adapter_names: expected a name for each of {len(x)} rows, got {len(self.names)} names")
        return [name for name in self.names for _ in range(copies)]

    def give(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Forward pre-hook of what PEFT itself computes by names."""
        return args, {**kwargs, "adapter_names": self.of(args[0])}


def _is_plain(base: nn.Module, x: Tensor) -> bool:
    """Whether calling `base` is x W^T + b and nothing else, in a type that the operator has."""
    if type(base) not in (nn.Linear, Conv1D) or "forward" in base.__dict__:
        return False
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return False
    weight = base.weight
    return (
        type(weight) in (nn.Parameter, Tensor)
        and weight.dtype in _FUSED_DTYPES
        and weight.device == x.device
        and autocast_dtype(x.device, x.dtype) == autocast_dtype(x.device, weight.dtype)
    )
