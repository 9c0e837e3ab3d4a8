"""What can be done with the adapter of a model."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import Optimizer

from unilora_ext import checkpoint
from unilora_ext.attachment import CHILD, Attached, adapted_model, attachment_of, exchanged_tensors, holder_of
from unilora_ext.errors import UniLoRAError, naming, shown
from unilora_ext.export import export_lora
from unilora_ext.fused import FusedLayer
from unilora_ext.growing import grow
from unilora_ext.layer import updated_class
from unilora_ext.sharded_tensors import exchange_, managed_by_fsdp

__all__ = ["LORA_RATE", "Adapter", "get_adapter", "set_class"]

LORA_RATE = 2.0
"""Learning rate of a LoRA matrix under Adam, times the inputs of its layer."""
NARROW = 128
"""Inputs below which the rate rises no more."""


def set_class(module: nn.Module, adapted_class: type[nn.Module]) -> None:
    """Changes the class of a module, also where Accelerate's hooks hold on to the forward of the old one."""
    module.__class__ = adapted_class
    if "_old_forward" in module.__dict__:
        module._old_forward = adapted_class.forward.__get__(module)


def get_adapter(model: nn.Module) -> Adapter:
    """The adapter of a model that has one (after a deep copy, say); of a container, that of the model in it.

    Raises:
        AttachError: it has none.
    """
    model = adapted_model(model)
    attachment_of(model)
    return Adapter(model)


class Adapter(Attached):
    """A handle on the adapter of a model; all state is in the model.

    Attributes:
        model: the adapted model.
    """

    def __repr__(self) -> str:
        return f"Adapter({self.projection}, r={self.config.r}, layers={len(self.vector.slots)}, merged={self.merged})"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        config, projection = self.config, self.projection
        trained, all_numbers = self.get_nb_trainable_parameters()
        state = "merged" if self.merged else "on" if self.vector.enabled else "off"
        rows = {
            "model": type(self.model).__name__,
            "projection": f"{config.projection}, seed {config.seed}",
            "d, D": f"{projection.d:,}, {projection.D:,} (D / d = {projection.D / projection.d:.1f})",
            "rank, scaling": f"{config.r}, {config.scaling:g}",
            "layers": f"{len(self.vector.slots):,}",
            "trained whole": ", ".join(config.modules_to_save) or "nothing",
            "numbers trained": f"{trained:,} of {all_numbers:,}",
            "state": state,
        }
        cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
        return f"<table><caption>Uni-LoRA adapter</caption>{cells}</table>"

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers that are trained, all numbers of the model), counted as PEFT does: a tied weight once, packed 4-bit
        weights as what they stand for."""
        trained = everything = 0
        for parameter in self.model.parameters():
            numbers = parameter.numel()
            if type(parameter).__name__ == "Params4bit":
                numbers *= 2 * parameter.element_size()
            everything += numbers
            trained += numbers if parameter.requires_grad else 0
        return trained, everything

    def print_trainable_parameters(self) -> None:
        """Prints :meth:`get_nb_trainable_parameters`, in PEFT's words."""
        trained, everything = self.get_nb_trainable_parameters()
        share = 100 * trained / everything
        print(f"trainable params: {trained:,d} || all params: {everything:,d} || trainable%: {share:.4f}")

    # -- learning rates -----------------------------------------------------------------------------------------------

    def learning_rate(self, lora_rate: float | None = None) -> float:
        """The learning rate of theta_d under Adam, for an optimizer and a schedule that are good for LoRA at
        `lora_rate`: ``lora_rate * sqrt(D / d)``.

        Adam moves every number of theta_d by about its learning rate a step, and an entry of theta_D is one of theta_d
        over sqrt(D / d): with this rate the matrices A and B move as LoRA's do, whatever d is.

        Args:
            lora_rate: of a LoRA matrix; None: 2 / width, where width is the mean number of inputs of the adapted
                layers, at least 128; or the projection's own rate.

        Raises:
            UniLoRAError: `lora_rate` is no number > 0, or the projection has a rate of its own, to which LoRA's does
                not carry over.
        """
        return self.learning_rates(lora_rate)["theta_d"]

    def learning_rates(self, lora_rate: float | None = None) -> dict[str, float]:
        """:meth:`learning_rate` of theta_d, and of the projection's trained parts: by the names of :attr:`trained`."""
        own = dict(self.projection.learning_rates)
        if lora_rate is None:
            width = max(self.vector.layout.width, NARROW)
            return own or {"theta_d": LORA_RATE / width * self.projection.stretch}
        if own:
            raise UniLoRAError(
                f"learning_rate: expected lora_rate None for '{self.projection.name}', which has rates of its own, "
                f"{own}; got {lora_rate!r}"
            )
        if isinstance(lora_rate, bool) or not isinstance(lora_rate, (int, float)) or not 0 < lora_rate < math.inf:
            raise UniLoRAError(f"learning_rate: lora_rate: expected a number > 0, got {shown(lora_rate)}")
        return {"theta_d": lora_rate * self.projection.stretch}

    # -- on and off ---------------------------------------------------------------------------------------------------

    def disable(self) -> _Disabled:
        """Switches the adapter off: the model computes what it did before attach(), original modules_to_save and
        running statistics of BatchNorm included.

        Switches off at once; used as a context manager it switches on again at the end, unless the adapter was off
        before::

            with adapter.disable():
                base_logits = model(**batch).logits

        Raises:
            UniLoRAError: the adapter is merged, or the original modules_to_save or running statistics are not
                known: they were on the meta device in attach().
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
        """Exchanges the values of modules_to_save and running statistics with those from before attach() (or back)."""
        originals = self.attachment.saved_originals
        self._check_originals()
        if self.config.modules_to_save and managed_by_fsdp(self.model) and not self.attachment.replicated:
            raise UniLoRAError(
                "modules_to_save are sharded by fully_shard and cannot be exchanged: "
                "unilora_ext.distributed.fully_shard leaves them whole"
            )
        for name, tensor in exchanged_tensors(self.model, self.config).items():
            other = originals[name].to(device=tensor.device, dtype=tensor.dtype)
            originals[name] = exchange_(tensor, other)

    def _check_originals(self) -> None:
        """Whether the values of modules_to_save and running statistics from before attach() are known."""
        for name, tensor in exchanged_tensors(self.model, self.config).items():
            if self.attachment.saved_originals[name].is_meta and not tensor.is_meta:
                raise UniLoRAError(
                    f"expected the values of '{name}' from before attach(), which are not known: it was on the "
                    "meta device then. Give the model its weights first (to_empty, load_state_dict), then attach; "
                    "detach(merge=True) goes on with the values that it has"
                )

    # -- merging ------------------------------------------------------------------------------------------------------

    def merge(self) -> None:
        """Folds the update into the weights: W + s B A, rounded once. theta_d is frozen until :meth:`unmerge`.

        The weights as they were are kept, so that unmerge() is exact; ``detach(merge=True)`` drops them.

        Raises:
            UniLoRAError: merged or disabled already, a layer without a plain weight (a quantised one would have to be
                rounded anew), a weight shared with another module, one that is computed anew in
                every forward (pruned, parametrized), or a sum that is not finite; nothing is then merged.
        """
        if self.merged:
            raise UniLoRAError("merge: the adapter is merged already")
        if not self.vector.enabled:
            raise UniLoRAError("merge: the adapter is disabled; call enable() first")
        layers = self.layers
        for name, layer in layers.items():
            if not isinstance(layer, FusedLayer):
                kind, weight = self.attachment.classes[name].__name__, getattr(layer, "weight", None)
                if isinstance(weight, Tensor) and type(weight) is not nn.Parameter:
                    kind += f" with a weight of {type(weight).__name__}"
                raise UniLoRAError(
                    f"merge: expected a plain floating weight, got a {kind}: keep the adapter attached, or load it on "
                    f"the model in full precision and merge there (layer '{name}')"
                )
        self._check_weights_unshared()
        try:
            for name, layer in layers.items():
                with naming(name):
                    layer.merge()
        except BaseException:
            for layer in layers.values():
                if layer.merged:
                    layer.restore_weight()
            raise
        self.attachment.trained_before_merge = {name: t.requires_grad for name, t in self.trained.items()}
        for parameter in self.trained.values():
            parameter.requires_grad_(False)

    def _check_weights_unshared(self) -> None:
        owners: dict[int, str] = {}
        adapted = {id(weight): name for name, layer in self.layers.items() for weight in layer.weights.values()}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            key = id(parameter)
            if key in adapted and owners.setdefault(key, name) != name:
                raise UniLoRAError(
                    f"merge: the weight of '{adapted[key]}' is shared by '{owners[key]}' and '{name}': "
                    "merging would change both. Keep the adapter attached, or give each its own weight before attach()"
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
            with naming(name):
                layer.check_unmerge()
        for layer in layers.values():
            layer.restore_weight()
        for name, parameter in self.trained.items():
            parameter.requires_grad_(self.attachment.trained_before_merge[name])

    def detach(self, merge: bool = False) -> nn.Module:
        """Takes the adapter off and returns the plain model.

        Args:
            merge: False: the model is exactly as before attach(), flags, modules_to_save and the running statistics of
                BatchNorm included. True: the weights keep the update and these their trained values.

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
            if is_parametrized(layer) and type(layer) is not updated_class(self.attachment.classes[name]):
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
        vector, attachment = attachment_of(self.model)
        for name, layer in self.layers.items():
            del layer._unilora
            set_class(layer, attachment.classes[name])
        for handle in attachment.handles:
            handle.remove()
        delattr(holder_of(self.model), CHILD)
        for name, parameter in self.model.named_parameters():
            if name in attachment.requires_grad:
                parameter.requires_grad_(attachment.requires_grad[name])
        for parameter in vector.trained.values():
            parameter.grad = None
        return self.model

    # -- a longer theta_d ---------------------------------------------------------------------------------------------

    def grow(self, d: int, optimizer: Optimizer | None = None) -> None:
        """Makes theta_d longer in the middle of training: the model computes what it did, with more to train.

        Every column of P is split into d / d_before, drawn from the same seed, so that the adapter is one of `d` from
        here on, to save and load as any other. theta_d stays the same parameter. Its gradient is dropped, and graphs
        that were exported or captured before keep the old length.

        Args:
            d: a multiple of the length that theta_d has, at most D.
            optimizer: that trains theta_d, if it has made a step: its moments are carried over. Its learning rate
                stays: Adam moves every number of theta_d by about that, so with sqrt(d_before / d) of it the model
                moves as fast as before.

        Raises:
            UniLoRAError: another `d`; a projection whose columns do not split (`uniform`, `balanced` and `countsketch`
                do); the update is merged; the optimizer keeps what cannot be carried over, or it is not the one that
                keeps something of theta_d; or the model is trained by several processes, in another way than
                :func:`unilora_ext.distributed.replicate`, where all of them call this. Nothing is then changed.
        """
        grow(self, d, optimizer)

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, metadata: dict[str, Any] | None = None, resumable: bool = False) -> None:
        """Writes the adapter: d + 1 numbers, what the projection has of its own, modules_to_save if any, and the
        running statistics of frozen BatchNorm layers that training moved. See :mod:`unilora_ext.checkpoint`.

        Args:
            folder: made if it is missing. An adapter in it is replaced in one step: whenever the process is killed,
                the folder holds the old adapter or the new one, whole.
            metadata: JSON values kept with the adapter, free for the application.
            resumable: whether training must go on from it exactly, for a projection that could be saved smaller
                (VB-LoRA with ``save_only_topk``).

        Raises:
            UniLoRAError: JSON would change the metadata (keys that are not strings, infinite numbers, ...; a tuple is
                read back as a list), or the index of the projection has no seed. Nothing is written.
            OSError: the folder cannot be written; it then holds what it held.

        Processes that save into one folder take turns; a reader beside them gets a whole adapter, old or new.
        With several processes one of them calls this. Where torch's own ``fully_shard`` or ``parallelize_module``
        shards theta_d or modules_to_save, the processes of one such group call it, and its first one writes.
        """
        checkpoint.save(self, folder, metadata, resumable)

    def export_lora(self, folder: str | Path) -> None:
        """Writes the same update as a plain LoRA adapter in PEFT's format, exact. See :mod:`.integrations.peft`."""
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
