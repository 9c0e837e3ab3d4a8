"""theta_d of PEFT adapters as shared vectors: one projection for all layers of an adapter in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unilora_ext.errors import UniLoRAError
from unilora_ext.layout import Layout, Order
from unilora_ext.projections import OneHotProjection, Projection
from unilora_ext.shared_vector import SharedVector

__all__ = ["AdapterVector", "Vectors", "are_column_scales", "layers_of", "read_vector"]


class AdapterVector(SharedVector):
    """A shared vector whose theta_d stays where PEFT keeps it, and is looked up there each time: PEFT replaces the
    parameter when it loads or casts an adapter.

    Args:
        parameters: PEFT's ``unilora_theta_d``, by adapter name.
        name: of the adapter.
        projection: P.
        layout: of the adapter's layers, in their order.
    """

    def __init__(self, parameters: nn.ParameterDict, name: str, projection: Projection, layout: Layout) -> None:
        super().__init__(None, projection, layout)
        self.parameters_by_name, self.name = parameters, name

    @property
    def theta_d(self) -> Tensor:
        return self.parameters_by_name[self.name]

    def _layers(self, model: nn.Module) -> list[tuple[int, torch.device, torch.dtype]]:
        layers = []
        for layer in layers_of(model, self.name):
            weight = layer.weight
            dtype = weight.dtype if weight.is_floating_point() else self.theta_d.dtype
            layers.append((layer.slot_ids[self.name], weight.device, dtype))
        return layers


class Vectors:
    """The vectors of a model's adapters, shared by its layers. A vector is forgotten when PEFT writes to the adapter's
    buffers, and read anew from them before the next forward; until then the layers compute PEFT's way."""

    def __init__(self) -> None:
        self.by_adapter: dict[str, AdapterVector] = {}
        self.changed: set[str] = set()
        self.rows: Any = None  # the adapter of each row, while a batch has several

    def forget(self, name: str) -> None:
        self.by_adapter.pop(name, None)
        self.changed.add(name)

    def install(self, name: str, vector: AdapterVector, layers: Sequence[Any]) -> None:
        """Lets `layers`, in the order of the vector's slots, compute with it."""
        self.by_adapter[name] = vector
        for slot_id, layer in enumerate(layers):
            layer.use(name, slot_id, vector)
        self.changed.discard(name)

    def begin(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        for name in sorted(self.changed):
            layers = layers_of(model, name)
            if layers:
                self.install(name, read_vector(layers, name), layers)
            self.changed.discard(name)  # deleted
        for vector in self.by_adapter.values():
            vector.begin(model, args)

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model, called when its forward raises too."""
        for vector in self.by_adapter.values():
            vector.end(model, args, output)


def layers_of(model: nn.Module, name: str) -> list[Any]:
    """The UniLora layers of an adapter, in PEFT's order."""
    from peft.tuners.unilora import UniLoraLayer

    return [m for m in model.modules() if isinstance(m, UniLoraLayer) and name in m.unilora_indices_A]


def read_vector(layers: Sequence[Any], name: str) -> AdapterVector:
    """The vector of an adapter from PEFT's buffers, which are not changed.

    Raises:
        UniLoRAError: buffers on the meta device, an index out of range, or floating scales that are not 1 / sqrt(n_j).
    """
    parameters = layers[0].unilora_theta_d
    indices, scales = [], []
    for layer in layers:
        for part in (layer.unilora_indices_A, layer.unilora_indices_B):
            if part[name].is_meta:
                raise UniLoRAError(f"adapter '{name}': expected loaded buffers, got some on the meta device")
            indices.append(part[name].flatten().int().cpu())
        scales += [part[name].flatten().cpu() for part in (layer.unilora_scales_A, layer.unilora_scales_B)]
    projection = OneHotProjection(torch.cat(indices), parameters[name].numel())
    # PEFT casts the scales to the dtype of the base weight: of a quantised one, uint8, and zeros are left of them. The
    # index says what they were.
    if all(part.is_floating_point() for part in scales):
        _check_scales(projection, torch.cat([part.float() for part in scales]), name)
    shapes = tuple((layer.out_features, layer.in_features) for layer in layers)
    return AdapterVector(parameters, name, projection, Layout(shapes, layers[0].r[name], Order.A_B))


def _check_scales(projection: Projection, got: Tensor, name: str) -> None:
    expected = projection.scale[projection.index]
    if not are_column_scales(got, expected):
        worst = int((got - expected).abs().argmax())
        raise UniLoRAError(
            f"adapter '{name}': scales: expected 1 / sqrt(n_j), {expected[worst]:g} at position {worst} of theta_D; "
            f"got {got[worst]:g}"
        )


def are_column_scales(got: Tensor, expected: Tensor) -> bool:
    """Whether PEFT's scales are the `expected` ones (float32), which it keeps in the dtype of the base weight."""
    if got.shape != expected.shape:
        return False
    rounded = (expected.to(dtype).float() for dtype in (torch.float32, torch.bfloat16, torch.float16))
    return any(torch.allclose(got.float(), each, rtol=1e-5, atol=0) for each in rounded)
