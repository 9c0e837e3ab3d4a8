"""PEFT's UniLora checkpoints, out and in: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from unilora_ext.adapter import Adapter, _attach, plan, saved_tensors
from unilora_ext.checkpoint import check_memory, check_same, shapes_of
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AdapterFileError, AttachError, UniLoRAError
from unilora_ext.integrations.peft.export import PREFIX, common_record, exact_targets, write_folder
from unilora_ext.integrations.peft.vectors import are_column_scales
from unilora_ext.ops import accumulator_dtype
from unilora_ext.projections import Projection
from unilora_ext.targets import Target

__all__ = ["from_peft", "to_peft"]

THETA_D = "base_model.unilora_theta_d"


def to_peft(adapter: Adapter, folder: str | Path) -> None:
    """Writes an adapter as a checkpoint of PEFT's UniLora: ``peft.PeftModel.from_pretrained`` computes the same.

    Args:
        adapter: attached with ``projection="peft"`` and no alpha.
        folder: made if it is missing.

    Raises:
        UniLoRAError: another projection, or a scaling other than 1: PEFT's UniLora has neither, but
            ``adapter.export_lora`` writes such an adapter as plain LoRA. Or a layer is used under two names. Nothing
            is written.
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
    tensors = {THETA_D: adapter.theta_d}
    tensors |= {PREFIX + name: tensor for name, tensor in adapter.modules_to_save().items()}
    record = {
        **common_record(adapter),
        "peft_type": "UNILORA",
        "theta_d_length": adapter.projection.d,
        "proj_seed": config.seed,
        "unilora_dropout": config.dropout,
        "init_theta_d_bound": config.init_bound,
        "init_weights": True,
        "save_indices": False,
    }
    write_folder(adapter, folder, record, tensors)


def from_peft(model: nn.Module, folder: str | Path) -> Adapter:
    """Attaches a checkpoint of PEFT's UniLora to a plain model: the same matrices, without PEFT's layers.

    PEFT must be installed: its own rules say which modules the checkpoint adapts.

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
        In every case the model is unchanged.
    """
    folder = Path(folder)
    theirs = _read_config(folder)
    tensors = _read_tensors(folder)
    theta_d = _take_theta_d(folder, tensors, theirs.theta_d_length)
    names = _targeted_names(model, theirs)
    try:
        targets, config, projection = plan(model, _convert(model, names, theirs))
        saved = saved_tensors(model, config)
    except UniLoRAError as error:
        raise type(error)(f"{folder}: does not fit this {type(model).__name__}: {error}") from error
    if [target.name for target in targets] != names:
        raise AdapterFileError(
            f"{folder}: target_modules: expected the modules that PEFT would adapt, {names}; "
            f"got {[target.name for target in targets]}"
        )
    _take_index(folder, tensors, targets, config.r, projection)
    check_same(folder, "tensors of modules_to_save", shapes_of(tensors), shapes_of(saved))
    check_memory(folder, saved)

    weight = targets[0].module.weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    adapter = _attach(model, config, targets, projection, theta_d.to(device, accumulator_dtype(weight.dtype)))
    with torch.no_grad():
        for name, tensor in saved.items():
            tensor.data.copy_(tensors[name])
    return adapter


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

    path = folder / "adapter_config.json"
    if not path.is_file():
        raise AdapterFileError(f"{folder}: expected a PEFT checkpoint with {path.name}, found none")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        kind = record.get("peft_type")
        if kind != "UNILORA":
            raise AdapterFileError(f"{path}: peft_type: expected 'UNILORA', got {kind!r}")
        config = peft.UniLoraConfig.from_pretrained(str(folder))
    except AdapterFileError:
        raise
    except (UnicodeDecodeError, ValueError, TypeError, AttributeError) as error:
        raise AdapterFileError(f"{path}: expected the configuration of a PEFT UniLora ({error})") from error
    if config.bias != "none":
        raise AdapterFileError(f"{path}: bias: expected 'none' (biases are not trained here), got {config.bias!r}")
    if not config.target_modules:
        raise AdapterFileError(f"{path}: target_modules: expected names or a pattern, got {config.target_modules!r}")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by name, without ``base_model.model.``."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise AdapterFileError(f"{folder}: expected a PEFT checkpoint with {path.name}, found none")
    try:
        tensors = safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterFileError(f"{path}: expected safetensors, the file is truncated or damaged ({error})") from error
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def _take_theta_d(folder: Path, tensors: dict[str, Tensor], d: int) -> Tensor:
    theta_d = tensors.pop(THETA_D, None)
    if theta_d is None or tuple(theta_d.shape) != (d,) or not theta_d.is_floating_point():
        got = "no such tensor" if theta_d is None else f"{theta_d.dtype} of shape {list(theta_d.shape)}"
        raise AdapterFileError(f"{folder}: {THETA_D}: expected a floating tensor of shape [{d}], got {got}")
    return theta_d


def _targeted_names(model: nn.Module, theirs: Any) -> list[str]:
    """The modules that PEFT would adapt, by PEFT's own rules, in ``named_modules()`` order."""
    from peft.tuners.tuners_utils import check_target_module_exists

    return [name for name, _ in model.named_modules() if name and check_target_module_exists(theirs, name)]


def _convert(model: nn.Module, names: list[str], theirs: Any) -> UniLoRAConfig:
    if not names:
        raise AttachError(f"target_modules: expected modules that match {theirs.target_modules}, found none")
    present = [name for name, _ in model.named_modules()]
    # PEFT names the usual heads of a task whether the model has them or not.
    whole = [m for m in theirs.modules_to_save or () if any(n == m or n.endswith("." + m) for n in present)]
    return UniLoRAConfig(
        r=theirs.r,
        d=theirs.theta_d_length,
        target_modules=exact_targets(model, names),
        projection="peft",
        seed=theirs.proj_seed,
        dropout=theirs.unilora_dropout,
        init_bound=theirs.init_theta_d_bound,
        modules_to_save=whole,
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
