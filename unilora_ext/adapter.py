"""Attaching one trainable vector to a model, and what can be done with it then."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from unilora_ext.config import UniLoRAConfig, default_d
from unilora_ext.errors import AttachError, UniLoRAError
from unilora_ext.linear import LayerState, UniLoRALayer, initial_theta_d, updated_class
from unilora_ext.merging import check_load, warn_merged
from unilora_ext.projections import Projection, make_projection
from unilora_ext.sharded_tensors import exchange_, managed_by_fsdp
from unilora_ext.shared_vector import SharedVector, Slot
from unilora_ext.targets import Target, find_modules, find_targets
from unilora_ext.uncalled import CallWatch, Handle, keep_called

__all__ = ["Adapter", "attach", "get_adapter"]

logger = logging.getLogger("unilora_ext")

CHILD = "unilora"
"""Name under which a model holds its :class:`SharedVector`: ``state_dict`` has ``unilora.theta_d``."""


@dataclass
class Attachment:
    """What attach() did to a model, to be undone by detach(). Names, not modules: it survives a deep copy."""

    config: UniLoRAConfig
    requires_grad: dict[str, bool]  # of every parameter, before
    classes: dict[str, type[nn.Module]]  # of every adapted layer, before
    saved_originals: dict[str, Tensor]  # parameters and buffers of modules_to_save, before
    handles: list[Handle] = field(default_factory=list)
    theta_d_trained: bool = True  # theta_d.requires_grad before merge()
    replicated: bool = False  # what is trained is whole on every process, see distributed.replicate


def plan(
    model: nn.Module, config: UniLoRAConfig, whole_names: Sequence[str] | None = None, version: int | None = None
) -> tuple[list[Target], UniLoRAConfig, Projection]:
    """All that attach() will need, checked, with the model untouched.

    Args:
        model: to adapt.
        config: what attach() was given.
        whole_names: as in :func:`~unilora_ext.targets.find_targets`.
        version: of the index algorithm; None: the newest.

    Raises:
        AttachError: the configuration does not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise AttachError(f"attach: model: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(config, UniLoRAConfig):
        raise AttachError(f"attach: config: expected a UniLoRAConfig, got {type(config).__name__}")
    if isinstance(model, nn.Linear):
        raise AttachError("attach: the model itself is a linear layer: use UniLoRALinear.from_linear(model, ...)")
    if hasattr(model, CHILD):
        raise AttachError(f"attach: {type(model).__name__} has an adapter (or another attribute '{CHILD}') already")
    targets = find_targets(model, config.target_modules, config.modules_to_save, whole_names)
    D = sum((t.m + t.n) * config.r for t in targets)
    if config.d is None:
        config = replace(config, d=default_d(D))
        logger.warning("d was not given: taking d = %d for D = %d (D / d = %.1f)", config.d, D, D / config.d)
    if config.d > D:
        raise AttachError(
            f"attach: d: expected at most D = {D}, the number of LoRA values of the {len(targets)} target modules at "
            f"r = {config.r}; got {config.d}"
        )
    return targets, config, make_projection(config.projection, D, config.d, config.seed, config.materialize, version)


def attach(model: nn.Module, config: UniLoRAConfig) -> Adapter:
    """Adapts a model in place: the targets become :class:`UniLoRALinear`, everything else is frozen.

    The target modules keep their identity, parameters, names and hooks: only their class changes, so the model's
    ``state_dict`` gains one entry, ``unilora.theta_d``, and loses none.

    Args:
        model: any ``nn.Module``; on the meta device too.
        config: see :class:`UniLoRAConfig`.

    Returns:
        The adapter. ``adapter.theta_d`` is the trainable vector; ``model.parameters()`` yields it once.

    Raises:
        AttachError: the configuration does not fit the model, which is then unchanged.
    """
    targets, config, projection = plan(model, config)
    return _attach(
        model,
        config,
        targets,
        projection,
        initial_theta_d(config.d, targets[0].held(), config.init_bound),
    )


def _attach(
    model: nn.Module, config: UniLoRAConfig, targets: list[Target], projection: Projection, theta_d: Tensor
) -> Adapter:
    """The change itself; nothing in it can fail for a reason that plan() has not excluded."""
    slots: list[Slot] = []
    for target in targets:
        slots.append(Slot(slots[-1].stop if slots else 0, target.m, target.n, config.r, projection.a_first))
    parts = [t.adapted_class.local_part(t.module, slot) for t, slot in zip(targets, slots, strict=True)]
    for reduction in {part.reduction for part in parts} - {None}:
        reduction.agree(theta_d)
    vector = SharedVector(theta_d, projection, slots, parts)
    attachment = Attachment(
        config=config,
        requires_grad={name: p.requires_grad for name, p in model.named_parameters()},
        classes={t.name: type(t.module) for t in targets},
        saved_originals={name: t.detach().clone() for name, t in saved_tensors(model, config).items()},
    )
    vector.attachment = attachment

    model.requires_grad_(False)
    for _, module in find_modules(model, config.modules_to_save, "modules_to_save"):
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    for slot_id, target in enumerate(targets):
        set_class(target.module, target.adapted_class)
        target.module._unilora = LayerState(vector, slot_id, config.scaling, config.dropout)
    setattr(model, CHILD, vector)
    attachment.handles += [
        *keep_called(model, attachment.classes),
        model.register_forward_pre_hook(vector.begin),
        model.register_forward_hook(vector.end, always_call=True),
        model.register_load_state_dict_pre_hook(check_load),
        model.register_state_dict_pre_hook(warn_merged),
        CallWatch(model, vector),
    ]
    return Adapter(model)


def set_class(module: nn.Module, adapted_class: type[nn.Module]) -> None:
    """Changes the class of a module, also where Accelerate's hooks hold on to the forward of the old one."""
    module.__class__ = adapted_class
    if "_old_forward" in module.__dict__:
        module._old_forward = adapted_class.forward.__get__(module)


def saved_tensors(model: nn.Module, config: UniLoRAConfig) -> dict[str, Tensor]:
    """Parameters and persistent buffers of modules_to_save, by their full names."""
    tensors: dict[str, Tensor] = {}
    for name, module in find_modules(model, config.modules_to_save, "modules_to_save"):
        for key, value in module.state_dict(prefix=name + ".", keep_vars=True).items():
            tensors.setdefault(key, value)
    return tensors


def get_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model that has one (after a deep copy, say).

    Raises:
        AttachError: it has none.
    """
    if not isinstance(getattr(model, CHILD, None), SharedVector):
        raise AttachError(f"get_adapter: {type(model).__name__} has no Uni-LoRA adapter")
    return Adapter(model)


class Adapter:
    """A handle on the adapter of a model; all state is in the model.

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
        vector = getattr(self.model, CHILD, None)
        if not isinstance(vector, SharedVector):
            raise AttachError("this adapter was detached from its model")
        return vector

    @property
    def _attachment(self) -> Attachment:
        return self.vector.attachment

    @property
    def config(self) -> UniLoRAConfig:
        """The configuration, with `d` filled in."""
        return self._attachment.config

    @property
    def theta_d(self) -> nn.Parameter:
        """[d]: the trainable vector."""
        return self.vector.theta_d

    @property
    def projection(self) -> Projection:
        """P [D, d]."""
        return self.vector.projection

    @property
    def layers(self) -> dict[str, UniLoRALayer]:
        """The adapted layers by name, in the order of theta_D."""
        return {name: self.model.get_submodule(name) for name in self._attachment.classes}

    @property
    def merged(self) -> bool:
        """Whether the update is folded into the weights."""
        return any(layer.merged for layer in self.layers.values())

    def modules_to_save(self) -> dict[str, Tensor]:
        """Trained parameters and buffers of the modules that are trained whole, by their full names."""
        return saved_tensors(self.model, self.config) if self.vector.enabled else self._attachment.saved_originals

    def __repr__(self) -> str:
        return f"Adapter({self.projection}, r={self.config.r}, layers={len(self.vector.slots)}, merged={self.merged})"

    # -- on and off ---------------------------------------------------------------------------------------------------

    def disable(self) -> _Disabled:
        """Switches the adapter off: the model computes what it did before attach(), original modules_to_save included.

        Switches off at once; used as a context manager it switches on again at the end, unless the adapter was off
        before::

            with adapter.disable():
                base_logits = model(**batch).logits

        Raises:
            UniLoRAError: the adapter is merged, or the original modules_to_save are not known: they were on the meta
                device in attach().
        """
        if self.merged:
            raise UniLoRAError("disable: the update is merged into the weights; call unmerge() first")
        if self.vector.enabled:
            self._swap_saved()
            self.vector.enabled = False
            return _Disabled(self, was_enabled=True)
        return _Disabled(self, was_enabled=False)

    def enable(self) -> None:
        """Switches the adapter on again after :meth:`disable`."""
        if not self.vector.enabled:
            self._swap_saved()
            self.vector.enabled = True

    def _swap_saved(self) -> None:
        """Exchanges the values of modules_to_save with those from before attach() (or back)."""
        originals = self._attachment.saved_originals
        self._check_originals()
        if originals and managed_by_fsdp(self.model) and not self._attachment.replicated:
            raise UniLoRAError(
                "modules_to_save are sharded by fully_shard and cannot be exchanged: "
                "unilora_ext.distributed.fully_shard leaves them whole"
            )
        for name, tensor in saved_tensors(self.model, self.config).items():
            other = originals[name].to(device=tensor.device, dtype=tensor.dtype)
            originals[name] = exchange_(tensor, other)

    def _check_originals(self) -> None:
        """Whether the values of modules_to_save from before attach() are known."""
        for name, tensor in saved_tensors(self.model, self.config).items():
            if self._attachment.saved_originals[name].is_meta and not tensor.is_meta:
                raise UniLoRAError(
                    f"modules_to_save: the values of '{name}' from before attach() are not known: it was on the meta "
                    "device then. Give the model its weights first (to_empty, load_state_dict), then attach; "
                    "detach(merge=True) goes on with the values that it has"
                )

    # -- merging ------------------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Folds the update into the weights: W + s B A, rounded once. theta_d is frozen until :meth:`unmerge`.

        The weights as they were are kept, so that unmerge() is exact; ``detach(merge=True)`` drops them.

        Raises:
            UniLoRAError: merged or disabled already, a weight shared with another module, one that is computed anew in
                every forward (pruned, parametrized), or a sum that is not finite; nothing is then merged.
        """
        if self.merged:
            raise UniLoRAError("merge: the adapter is merged already")
        if not self.vector.enabled:
            raise UniLoRAError("merge: the adapter is disabled; call enable() first")
        self._check_weights_unshared()
        layers = self.layers
        try:
            for name, layer in layers.items():
                with _naming(name):
                    layer.merge()
        except BaseException:
            for layer in layers.values():
                if layer.merged:
                    layer.restore_weight()
            raise
        self._attachment.theta_d_trained = self.theta_d.requires_grad
        self.theta_d.requires_grad_(False)

    def _check_weights_unshared(self) -> None:
        owners: dict[int, str] = {}
        adapted = {id(layer.weight): name for name, layer in self.layers.items() if hasattr(layer, "weight")}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            key = id(parameter)
            if key in adapted and owners.setdefault(key, name) != name:
                raise UniLoRAError(
                    f"merge: the weight of '{adapted[key]}' is shared by '{owners[key]}' and '{name}': "
                    "merging would change both"
                )

    def unmerge(self) -> None:
        """Puts the weights back exactly as they were before :meth:`merge`.

        Raises:
            UniLoRAError: not merged, or a weight was written since, which would be lost; nothing is then changed.
        """
        if not self.merged:
            raise UniLoRAError("unmerge: the adapter is not merged")
        layers = self.layers
        for name, layer in layers.items():
            with _naming(name):
                layer.check_unmerge()
        for layer in layers.values():
            layer.restore_weight()
        self.theta_d.requires_grad_(self._attachment.theta_d_trained)

    def detach(self, merge: bool = False) -> nn.Module:
        """Takes the adapter off and returns the plain model.

        Args:
            merge: False: the model is exactly as before attach(), flags and modules_to_save included. True: the
                weights keep the update and modules_to_save their trained values.

        Raises:
            UniLoRAError: the model is sharded by ``fully_shard``; a layer was parametrized after attach(); or what
                :meth:`merge`, :meth:`unmerge` and :meth:`disable` raise. Nothing is then detached.
        """
        if managed_by_fsdp(self.model):
            raise UniLoRAError(
                "detach: the model is sharded by fully_shard; disable() switches the adapter off, and a saved adapter "
                "can be loaded into a whole model"
            )
        for name, layer in self.layers.items():
            if is_parametrized(layer) and type(layer) is not updated_class(self._attachment.classes[name]):
                raise UniLoRAError(
                    f"detach: '{name}' was parametrized after attach() and is a {type(layer).__name__} now: call "
                    "torch.nn.utils.parametrize.remove_parametrizations first"
                )
        if merge:
            self.enable()
            if not self.merged:
                self.merge()
        else:
            self._check_originals()
            if self.merged:
                self.unmerge()
            self.disable()
        vector, attachment = self.vector, self._attachment
        for name, layer in self.layers.items():
            del layer._unilora
            set_class(layer, attachment.classes[name])
        for handle in attachment.handles:
            handle.remove()
        delattr(self.model, CHILD)
        for name, parameter in self.model.named_parameters():
            if name in attachment.requires_grad:
                parameter.requires_grad_(attachment.requires_grad[name])
        vector.theta_d.grad = None
        return self.model

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, metadata: dict[str, Any] | None = None) -> None:
        """Writes the adapter: d + 1 numbers, and modules_to_save if any. See :mod:`unilora_ext.checkpoint`.

        Args:
            folder: made if it is missing. An adapter in it is replaced in one step: whenever the process is killed,
                the folder holds the old adapter or the new one, whole.
            metadata: JSON values kept with the adapter, free for the application.

        Raises:
            UniLoRAError: JSON would change the metadata (keys that are not strings, infinite numbers, ...; a tuple is
                read back as a list), or the index of the projection has no seed. Nothing is written.
            OSError: the folder cannot be written; it then holds what it held.

        Processes that save into one folder take turns; a reader beside them gets a whole adapter, old or new.
        With several processes one of them calls this. Where torch's own ``fully_shard`` or ``parallelize_module``
        shards theta_d or modules_to_save, the processes of one such group call it, and its first one writes.
        """
        from unilora_ext.checkpoint import save

        save(self, folder, metadata)

    def export_lora(self, folder: str | Path) -> None:
        """Writes the same update as a plain LoRA adapter in PEFT's format, exact. See :mod:`.integrations.peft`."""
        from unilora_ext.integrations.peft import export_lora

        export_lora(self, folder)


class _Disabled:
    """Returned by :meth:`Adapter.disable`: puts the adapter back as it was when its ``with`` block ends."""

    def __init__(self, adapter: Adapter, was_enabled: bool) -> None:
        self._adapter, self._was_enabled = adapter, was_enabled

    def __enter__(self) -> Adapter:
        return self._adapter

    def __exit__(self, *exc: object) -> None:
        if self._was_enabled:
            self._adapter.enable()


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Adds the name of the layer to an error."""
    try:
        yield
    except UniLoRAError as error:
        raise UniLoRAError(f"{error} (layer '{layer}')") from None


def named_slots(adapter: Adapter) -> Iterator[tuple[str, Slot]]:
    """(name, slot) of every adapted layer, in the order of theta_D."""
    return zip(adapter.layers, adapter.vector.slots, strict=True)
