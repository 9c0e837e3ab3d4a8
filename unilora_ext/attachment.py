"""What an adapter is in a model: all of its state is there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AttachError
from unilora_ext.layer import UniLoRALayer
from unilora_ext.projections import Projection
from unilora_ext.shared_vector import SharedVector
from unilora_ext.targets import find_modules
from unilora_ext.uncalled import Handle

__all__ = [
    "CHILD",
    "CONTAINERS",
    "Attachment",
    "adapted_model",
    "attachment_of",
    "base_model_of",
    "exchanged_tensors",
    "holder_of",
    "running_statistics",
    "whole_tensors",
]

CHILD = "unilora"
"""Name under which a model holds its :class:`SharedVector`: ``state_dict`` has ``unilora.theta_d``."""
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules whose children are their elements: counted, indexed, called one after the other."""


@dataclass
class Attachment:
    """What attach() did to a model, to be undone by detach(). Names, not modules: it survives a deep copy."""

    config: UniLoRAConfig
    requires_grad: dict[str, bool]  # of every parameter, before
    classes: dict[str, type[nn.Module]]  # of every adapted layer, before
    saved_originals: dict[str, Tensor]  # all of exchanged_tensors(), before
    handles: list[Handle] = field(default_factory=list)
    trained_before_merge: dict[str, bool] = field(default_factory=dict)  # requires_grad of what is trained
    replicated: bool = False  # what is trained is whole on every process, see distributed.replicate


def holder_of(model: nn.Module) -> nn.Module:
    """The module that has the vector of a model as a child: the model, or the first module in it that is no container,
    which would take the vector for an element."""
    return next((part for part in model.modules() if not isinstance(part, CONTAINERS)), model)


def adapted_model(model: nn.Module) -> nn.Module:
    """The model that has the adapter: `model`, or a part of it, where `model` is a container (a SentenceTransformer,
    say) and attach() adapted the Transformers model in it."""
    if isinstance(model, CONTAINERS) and not isinstance(getattr(holder_of(model), CHILD, None), SharedVector):
        for part in model.modules():
            if isinstance(getattr(part, CHILD, None), SharedVector):
                return part
    return model


def attachment_of(model: nn.Module) -> tuple[SharedVector, Attachment]:
    """The shared vector of a model, and what attach() did.

    Raises:
        AttachError: the model has no adapter.
    """
    vector = getattr(holder_of(model), CHILD, None)
    if not isinstance(vector, SharedVector):
        raise AttachError(f"{type(model).__name__} has no Uni-LoRA adapter, or it was detached")
    return vector, vector.attachment


def whole_tensors(model: nn.Module, config: UniLoRAConfig) -> dict[str, Tensor]:
    """Parameters and persistent buffers of modules_to_save, by their full names."""
    tensors: dict[str, Tensor] = {}
    for name, module in find_modules(model, config.modules_to_save, "modules_to_save"):
        for key, value in module.state_dict(prefix=name + ".", keep_vars=True).items():
            tensors.setdefault(key, value)
    return tensors


def running_statistics(model: nn.Module, config: UniLoRAConfig) -> dict[str, Tensor]:
    """Persistent buffers of the BatchNorm layers (and InstanceNorm's, where it has some) outside modules_to_save, by
    their full names: a forward pass in training writes them, frozen or not."""
    whole = {id(tensor) for tensor in whole_tensors(model, config).values()}
    tensors: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, _NormBase):
            state = module.state_dict(prefix=name + "." if name else "", keep_vars=True)
            tensors |= {key: t for key, t in state.items() if not isinstance(t, nn.Parameter) and id(t) not in whole}
    return tensors


def exchanged_tensors(model: nn.Module, config: UniLoRAConfig) -> dict[str, Tensor]:
    """What has other values with the adapter than without it: modules_to_save, and running statistics."""
    return whole_tensors(model, config) | running_statistics(model, config)


def base_model_of(model: nn.Module) -> str | None:
    """What a Transformers model calls itself: for people. A path that is not Unicode is shown as far as it is."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name).encode(errors="replace").decode() if name else None


class Attached:
    """A model with an adapter, and a view of it.

    Attributes:
        model: the adapted model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def vector(self) -> SharedVector:
        """The model's shared vector.

        Raises:
            AttachError: the adapter was detached.
        """
        return attachment_of(self.model)[0]

    @property
    def attachment(self) -> Attachment:
        """What attach() did to the model."""
        return attachment_of(self.model)[1]

    @property
    def config(self) -> UniLoRAConfig:
        """The configuration, with `d` filled in."""
        return self.attachment.config

    @property
    def theta_d(self) -> nn.Parameter:
        """[d]: the trainable vector."""
        return self.vector.theta_d

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """theta_d and the projection's trained parts, by name: what is trained beside modules_to_save."""
        return self.vector.trained

    @property
    def projection(self) -> Projection:
        """P [D, d]."""
        return self.vector.projection

    @property
    def layers(self) -> dict[str, UniLoRALayer]:
        """The adapted layers by name, in the order of theta_D."""
        return {name: self.model.get_submodule(name) for name in self.attachment.classes}

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the weights."""
        return any(layer.merged for layer in self.layers.values())

    def modules_to_save(self) -> dict[str, Tensor]:
        """Trained parameters and buffers of the modules that are trained whole, by their full names."""
        return self._with_adapter(whole_tensors(self.model, self.config))

    def moved_statistics(self) -> dict[str, Tensor]:
        """Running statistics of frozen BatchNorm layers that are not what they were before attach(), by their full
        names: a forward pass in training moves them."""
        statistics, originals = running_statistics(self.model, self.config), self.attachment.saved_originals
        moved = {
            name: tensor
            for name, tensor in statistics.items()
            if not tensor.is_meta
            and (originals[name].is_meta or not torch.equal(originals[name].to(tensor), tensor.detach()))
        }
        return self._with_adapter(moved)

    def exchanged(self) -> dict[str, Tensor]:
        """:func:`exchanged_tensors`, as they are while the adapter is on."""
        return self._with_adapter(exchanged_tensors(self.model, self.config))

    def _with_adapter(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The values that tensors of the model have while the adapter is on."""
        return tensors if self.vector.enabled else {name: self.attachment.saved_originals[name] for name in tensors}
