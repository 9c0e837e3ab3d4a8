"""TRL's trainers with an adapter: ``peft_config=`` takes a :class:`~unilora_ext.UniLoRAConfig`, and the reference of
DPO and GRPO is the same model without its adapter, not a second copy of the weights::

    from unilora_ext.integrations.trl import DPOTrainer, GRPOTrainer, SFTTrainer

    trainer = SFTTrainer(model, train_dataset=rows, peft_config=ul.UniLoRAConfig(r=4, target_modules="all-linear"))

A model with an adapter may be given too; its reference is then the adapter as it is at the start (d numbers). TRL's own
``SFTTrainer`` takes such a model as well, and its ``DPOTrainer`` with ``ref_model=reference(model)``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
import trl
from torch import Tensor, nn
from transformers import set_seed
from trl.trainer.utils import create_model_from_path

from unilora_ext.adapter import Adapter, get_adapter
from unilora_ext.attaching import attach
from unilora_ext.attachment import exchanged_tensors
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AttachError, UniLoRAError
from unilora_ext.layer import UniLoRALayer

__all__ = ["DPOTrainer", "GRPOTrainer", "Reference", "SFTTrainer", "reference"]


class Reference(nn.Module):
    """A model as it was before it was trained. It has no weights of its own, and calls the model in evaluation mode
    without gradients.

    Args:
        model: with an adapter.
        values: of what is trained, by name, which it takes for the call; one that is left out stays as it is.
        enabled: whether the adapter acts.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, Tensor], enabled: bool) -> None:
        super().__init__()
        self._of = (model,)  # not a child: train(), to() and parameters() are the model's own
        self.values, self.enabled = values, enabled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model returns."""
        (model,) = self._of
        with _evaluating(model), self._without_training(get_adapter(model)):
            return model(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "forward":  # which TRL replaces by what it has made of the model's already
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_of" not in self.__dict__:  # not made yet
                raise
            return getattr(self._of[0], name)

    @contextmanager
    def _without_training(self, adapter: Adapter) -> Iterator[None]:
        """By other tensors, not by writes: a backward pass may still need the values."""
        trained, enabled = _trained(adapter), adapter.vector.enabled
        now = {name: trained[name].data for name in self.values}
        try:
            adapter.vector.enabled = self.enabled
            for name, value in self.values.items():
                trained[name].data = value.to(trained[name].device)
            yield
        finally:
            adapter.vector.enabled = enabled
            for name, value in now.items():
                trained[name].data = value


def reference(model: nn.Module, start: bool = False) -> Reference:
    """The reference of a model with an adapter, for ``DPOTrainer(ref_model=...)``.

    Args:
        model: with an adapter.
        start: whether it is the model with the adapter as it is now (one that was trained before, say); False: as it
            was before attach().

    Raises:
        AttachError: the model has no adapter.
    """
    adapter = get_adapter(model)
    values = _trained(adapter) if start else adapter.attachment.saved_originals
    return Reference(model, {name: value.detach().clone() for name, value in values.items()}, enabled=start)


def _trained(adapter: Adapter) -> dict[str, Tensor]:
    return {**adapter.trained, **exchanged_tensors(adapter.model, adapter.config)}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


# ---- trainers -------------------------------------------------------------------------------------------------------


class _Trainer:
    """A trainer of TRL whose ``peft_config`` may be a :class:`~unilora_ext.UniLoRAConfig`."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        call = signature(super().__init__).bind(model, *args, **kwargs)
        given = call.arguments
        new = isinstance(given.get("peft_config"), UniLoRAConfig)
        if new:
            given["model"] = _attached(given)
        ours = new or _has_adapter(given["model"])
        if ours:
            _check(given)
            self._prepare(given, start=not new)
        super().__init__(*call.args, **call.kwargs)
        if ours:
            self._finish()

    def _prepare(self, given: dict[str, Any], start: bool) -> None:
        """Changes the arguments; `start`: whether the adapter was there before."""

    def _finish(self) -> None:
        """What comes after the trainer was made."""


class SFTTrainer(_Trainer, trl.SFTTrainer):
    """``trl.SFTTrainer``; see the module."""


class DPOTrainer(_Trainer, trl.DPOTrainer):
    """``trl.DPOTrainer``, with :func:`reference` where no ``ref_model`` is given.

    Raises:
        UniLoRAError: ``precompute_ref_log_probs``, which keeps them by the reference's weights, or ``sync_ref_model``.
    """

    def _prepare(self, given: dict[str, Any], start: bool) -> None:
        if given.get("ref_model") is None:
            _refuse(given.get("args"), "sync_ref_model", "precompute_ref_log_probs")
            given["ref_model"] = reference(given["model"], start)


class GRPOTrainer(_Trainer, trl.GRPOTrainer):
    """``trl.GRPOTrainer``, with :func:`reference` where ``beta`` is not 0.

    Raises:
        UniLoRAError: ``sync_ref_model``, or ``use_vllm``, which would be given the weights without the update.
    """

    def _prepare(self, given: dict[str, Any], start: bool) -> None:
        arguments = given.get("args")
        _refuse(arguments, "sync_ref_model", "use_vllm")
        self._beta = 0.0 if arguments is None else arguments.beta
        self._reference = reference(given["model"], start) if self._beta else None
        if self._beta:  # TRL would load a second copy
            given["args"] = copy.copy(arguments)
            given["args"].beta = 0.0

    def _finish(self) -> None:
        if self._beta:
            self.beta = self.args.beta = self._beta
            self.ref_model = self._reference


def _attached(given: dict[str, Any]) -> nn.Module:
    """The model of a trainer's arguments, attached; `peft_config` is taken out of them."""
    config, model, arguments = given.pop("peft_config"), given["model"], given.get("args")
    if isinstance(model, str):
        options = dict(getattr(arguments, "model_init_kwargs", None) or {})
        if (quantisation := given.pop("quantization_config", None)) is not None:
            options["quantization_config"] = quantisation
        model = create_model_from_path(model, **options)
    if arguments is not None:
        set_seed(arguments.seed)  # as TRL does before it draws an adapter
    attach(model, config)
    return model


def _has_adapter(model: Any) -> bool:
    try:
        return isinstance(model, nn.Module) and get_adapter(model) is not None
    except AttachError:
        return False


def _check(given: dict[str, Any]) -> None:
    if given.get("peft_config") is not None:
        kind = type(given["peft_config"]).__name__
        raise UniLoRAError(f"peft_config: expected none for a model that has an adapter of unilora_ext, got a {kind}")
    head = given["model"].get_output_embeddings()
    if isinstance(head, UniLoRALayer):
        raise UniLoRAError(
            "target_modules: the output head is adapted, but TRL's trainers read its weight instead of calling it: "
            "leave it out"
        )


def _refuse(arguments: Any, *names: str) -> None:
    for name in names:
        if getattr(arguments, name, False):
            raise UniLoRAError(f"args.{name}: expected False with an adapter of unilora_ext, got True")
