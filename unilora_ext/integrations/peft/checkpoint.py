"""PEFT's UniLora checkpoints, out and in: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from unilora_ext.adapter import Adapter
from unilora_ext.checkpoint import take_theta_d
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AdapterFileError, AttachError, UniLoRAError, shown
from unilora_ext.export import PREFIX, common_record, exact_targets, write_folder
from unilora_ext.functional import accumulator_dtype
from unilora_ext.integrations.peft.folder import config_path, present_modules, read_record, read_tensors
from unilora_ext.integrations.peft.vectors import are_column_scales
from unilora_ext.loading import attach_saved, fitting_plan
from unilora_ext.projections import Projection
from unilora_ext.record import conform
from unilora_ext.targets import Target

__all__ = ["from_peft", "to_peft"]

THETA_D = "base_model.unilora_theta_d"


class _Record(msgspec.Struct):
    """What ``adapter_config.json`` must say; PEFT knows more fields, and the defaults of those left out."""

    r: int = 1
    theta_d_length: int = 1
    proj_seed: int = 0
    unilora_dropout: float = 0.0
    init_theta_d_bound: float = 0.0
    bias: str = "none"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None


def to_peft(adapter: Adapter, folder: str | Path) -> None:
    """Writes an adapter as a checkpoint of PEFT's UniLora: ``peft.PeftModel.from_pretrained`` computes the same.

    Args:
        adapter: attached with ``projection="peft"`` and no alpha.
        folder: made if it is missing.

    Raises:
        UniLoRAError: another projection, or a scaling other than 1: PEFT's UniLora has neither, but
            ``adapter.export_lora`` writes such an adapter as plain LoRA. Or a layer is not linear, or used under two
            names. Nothing is written.
    """
    config = adapter.config
    if config.projection != "peft":
        raise UniLoRAError(
            f"to_peft: projection: expected 'peft', got '{config.projection}', whose index PEFT cannot make; "
            "adapter.export_lora(folder) writes it as plain LoRA"
        )
    if config.scaling != 1.0:
        raise UniLoRAError(
            f"to_peft: scaling: expected 1 (PEFT's UniLora has no alpha), got {config.scaling:g}; "
            "adapter.export_lora(folder) writes it as plain LoRA"
        )
    for name, layer in adapter.layers.items():
        if not layer.is_linear:
            kind = adapter.attachment.classes[name].__name__
            raise UniLoRAError(
                f"to_peft: '{name}': expected a linear layer (PEFT's UniLora has no other), got {kind}; "
                "adapter.export_lora(folder) writes it as plain LoRA"
            )
    tensors = {THETA_D: adapter.theta_d}
    tensors |= {PREFIX + name: tensor for name, tensor in adapter.modules_to_save().items()}
    record = {
        **common_record(adapter),
        "peft_type": "UNILORA",
        "theta_d_length": adapter.projection.d,
        "proj_seed": config.seed,
        "unilora_dropout": config.dropout,
        "init_theta_d_bound": 0.02 if config.init_bound is None else config.init_bound,
        "init_weights": True,
        "save_indices": False,
    }
    write_folder(adapter, folder, record, tensors)


def from_peft(model: nn.Module, folder: str | Path) -> Adapter:
    """Attaches a checkpoint of PEFT's UniLora to a plain model: the same matrices, without PEFT's layers.

    PEFT must be installed: its own rules say which modules the checkpoint adapts. Where this fails the model
    is unchanged.

    Args:
        model: the model that PEFT wrapped, as it was before.
        folder: written by ``save_pretrained`` of a PEFT model, or by :func:`to_peft`.

    Returns:
        The adapter, with ``projection="peft"``; theta_d is trainable, as after :func:`unilora_ext.attach`.

    Raises:
        AdapterFileError: the folder is incomplete or damaged, not of a UniLora, or of what has no counterpart here
            (trained biases, an index other than the seed's), or its tensors are not those of the model's modules.
        AttachError: the model has no such modules, or they cannot be adapted.
        UniLoRAError: PEFT is missing or too old, or a layer is used under two names.
    """
    folder = Path(folder)
    theirs = _read_config(folder)
    tensors = read_tensors(folder)
    theta_d = take_theta_d(folder, tensors, THETA_D, theirs.theta_d_length)
    names = _targeted_names(model, folder, theirs)
    try:
        config = _convert(model, names, theirs)
    except UniLoRAError as error:
        raise type(error)(f"{folder}: does not fit this {type(model).__name__}: {error}") from error
    plan = fitting_plan(model, folder, config, names)
    for target in plan.targets:
        if not target.adapted_class.is_linear:
            kind = type(target.module).__name__
            raise AttachError(f"{folder}: '{target.name}' ({kind}) cannot be adapted by PEFT's UniLora")
    _take_index(folder, tensors, plan.targets, config.r, plan.projection)
    theta_d = theta_d.to(accumulator_dtype(plan.targets[0].like().dtype))  # float32, float64 in a float64 model
    return attach_saved(plan, folder, theta_d, {}, tensors)


def need_peft() -> None:
    """Checks that PEFT is installed and has UniLora.

    Raises:
        UniLoRAError: it is not, or it has none.
    """
    try:
        import peft.tuners.unilora  # noqa: F401
    except ImportError as error:
        raise UniLoRAError(f"expected the package peft, 0.21 or later, got none or an older one ({error})") from error


def _read_config(folder: Path) -> Any:
    """A ``peft.UniLoraConfig``."""
    need_peft()
    import peft

    path = config_path(folder)
    conform(read_record(folder, "UNILORA"), _Record, path)
    try:
        config = peft.UniLoraConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever PEFT does with what a file says
        raise AdapterFileError(f"{path}: expected the configuration of a PEFT UniLora ({error!r})") from error
    if config.bias != "none":
        raise AdapterFileError(f"{path}: bias: expected 'none' (biases are not trained here), got {shown(config.bias)}")
    if not config.target_modules:
        raise AdapterFileError(f"{path}: target_modules: expected names or a pattern, got {config.target_modules!r}")
    return config


def _targeted_names(model: nn.Module, folder: Path, theirs: Any) -> list[str]:
    """The modules that PEFT would adapt, by PEFT's own rules, in ``named_modules()`` order."""
    from peft.tuners.tuners_utils import check_target_module_exists

    try:
        return [name for name, _ in model.named_modules() if name and check_target_module_exists(theirs, name)]
    except Exception as error:  # an expression that is none, say
        raise AdapterFileError(f"{folder}: adapter_config.json: PEFT's rules for modules fail: {error!r}") from error


def _convert(model: nn.Module, names: list[str], theirs: Any) -> UniLoRAConfig:
    if not names:
        raise AttachError(f"target_modules: expected modules that match {theirs.target_modules}, found none")
    return UniLoRAConfig(
        r=theirs.r,
        d=theirs.theta_d_length,
        target_modules=exact_targets(model, names),
        projection="peft",
        seed=theirs.proj_seed,
        dropout=theirs.unilora_dropout,
        init_bound=theirs.init_theta_d_bound,
        modules_to_save=present_modules(model, theirs.modules_to_save or ()),
    )


def _take_index(
    folder: Path, tensors: dict[str, Tensor], targets: Sequence[Target], r: int, projection: Projection
) -> None:
    """Takes the index and scales of ``save_indices=True`` out of `tensors`; they must be those of the seed."""
    if not any(".unilora_indices_" in name or ".unilora_scales_" in name for name in tensors):
        return
    start = 0
    for target in targets:
        for letter, shape in (("A", (r, target.n)), ("B", (target.m, r))):
            columns = projection.index[start : start + shape[0] * shape[1]].long().view(shape)
            start += columns.numel()
            indices = tensors.pop(f"{target.name}.unilora_indices_{letter}", None)
            scales = tensors.pop(f"{target.name}.unilora_scales_{letter}", None)
            if indices is None or not torch.equal(indices.long(), columns):
                raise AdapterFileError(
                    f"{folder}: '{target.name}': unilora_indices_{letter}: expected the index of seed "
                    f"{projection.seed}, got {'none' if indices is None else 'another'}; peft.PeftModel loads it"
                )
            if scales is None or not are_column_scales(scales, projection.scale[columns]):
                raise AdapterFileError(
                    f"{folder}: '{target.name}': unilora_scales_{letter}: expected 1 / sqrt(n_j), "
                    f"got {'none' if scales is None else 'others'}; peft.PeftModel loads it"
                )
