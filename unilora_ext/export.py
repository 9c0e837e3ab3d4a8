"""PEFT's file format: an adapter written as plain LoRA, for PEFT, vLLM and llama.cpp."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from unilora_ext.attachment import Attached, base_model_of
from unilora_ext.errors import UniLoRAError, naming
from unilora_ext.files import locked, replace_file, sweep
from unilora_ext.sharded_tensors import full, is_writer, reshard

__all__ = ["ADAPTER_FILES", "PREFIX", "common_record", "exact_targets", "export_lora", "lora_of", "write_folder"]

logger = logging.getLogger("unilora_ext")

PREFIX = "base_model.model."
"""What PEFT puts before a tensor's name in the model."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
"""What PEFT reads, in the order in which they are written."""
_LEFTOVER = re.compile(r"\.(adapter_model|adapter_config)-[0-9a-f]{8}\.tmp")
"""What killed processes leave of the two files."""


def export_lora(adapter: Attached, folder: str | Path) -> None:
    """Writes the update as a LoRA adapter of rank r: the same B A, nothing is approximated.

    Args:
        adapter: attached, merged or not.
        folder: gets ``adapter_model.safetensors`` (``<module>.lora_A.weight`` [r, n], ``<module>.lora_B.weight``
            [m, r], float32, or what PEFT has for other kinds; and modules_to_save) and
            ``adapter_config.json`` (lora_alpha = scaling r).

    Raises:
        UniLoRAError: a layer is used under two names, PEFT has no such LoRA of a layer (a convolution with groups,
            dilation or another padding than zeros), or the projection makes dense updates; nothing is written.

    PEFT loads all of it. vLLM and llama.cpp's converter refuse an adapter with modules_to_save.
    """
    write_folder(adapter, folder, *lora_of(adapter))


def lora_of(adapter: Attached) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What :func:`export_lora` writes: the record and the tensors.

    Raises:
        UniLoRAError: there is no such LoRA.
    """
    reshard(adapter.model)
    config, tensors = adapter.config, {}
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            with naming(name):
                tensors |= {f"{PREFIX}{name}.{key}": tensor for key, tensor in layer.plain_lora().items()}
    for name, tensor in adapter.modules_to_save().items():
        tensors[PREFIX + name] = tensor
    alpha = config.r if config.alpha is None else config.alpha
    parameters = [f"{name}.{part}" for name, layer in adapter.layers.items() for part in layer.target_parameters]
    record = {
        **common_record(adapter),
        "peft_type": "LORA",
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # PEFT and vLLM declare an integer
        "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT has none of parameters
    }
    if parameters:
        record["target_parameters"] = parameters
    return record, tensors


def common_record(adapter: Attached) -> dict[str, Any]:
    """What ``adapter_config.json`` says of every kind of adapter."""
    config, model = adapter.config, adapter.model
    return {
        "base_model_name_or_path": base_model_of(model),
        "r": config.r,
        "bias": "none",
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in adapter.layers.values()),
        "target_modules": exact_targets(
            model, [n for n, layer in adapter.layers.items() if not layer.target_parameters]
        ),
        "modules_to_save": list(config.modules_to_save) or None,
        "task_type": _task_type(model),
        "inference_mode": True,
    }


def exact_targets(model: torch.nn.Module, names: list[str]) -> list[str] | str:
    """target_modules that match these full names and no others: the names, or, since a name matches as an ending too,
    a regular expression where one of them is the ending of another module's name.

    Raises:
        UniLoRAError: a layer is used under two names. PEFT replaces it under one of them; here both are adapted.
    """
    chosen = set(names)
    adapted = {id(model.get_submodule(name)): name for name in names}
    for name, module in model.named_modules(remove_duplicate=False):
        if adapted.get(id(module), name) != name:
            raise UniLoRAError(
                f"'{adapted[id(module)]}': expected a layer of one name, since PEFT adapts it under one name only; "
                f"got one that is '{name}' too"
            )
    others = (name for name, _ in model.named_modules() if name and name not in chosen)
    if any(_has_ending(other, chosen) for other in others):
        return "|".join(map(re.escape, names))
    return names


def _has_ending(name: str, endings: set[str]) -> bool:
    """Whether what follows one of the dots in `name` is in `endings`."""
    while "." in name:
        name = name.partition(".")[2]
        if name in endings:
            return True
    return False


def write_folder(adapter: Attached, folder: str | Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes ``adapter_model.safetensors``, then ``adapter_config.json``, each in one step."""
    whole = {name: full(tensor).cpu().contiguous().clone() for name, tensor in tensors.items()}
    if not all(map(is_writer, (adapter.theta_d, *adapter.modules_to_save().values()))):
        return  # this process had to be there to gather the tensors; another one writes
    if moved := adapter.moved_statistics():
        logger.warning(
            "%s: the running statistics of BatchNorm moved in training, and PEFT's format has no place for them (%d "
            "buffers, such as '%s'): the exported adapter will compute with those of the base model",
            folder,
            len(moved),
            next(iter(moved)),
        )
    folder, data = Path(folder), safetensors.torch.save(whole, {"format": "pt"})
    with locked(folder) as alone:
        for name, content in zip(ADAPTER_FILES, (data, json.dumps(record, indent=2).encode() + b"\n"), strict=True):
            replace_file(folder / name, content)
        sweep(folder, _LEFTOVER, (), alone)


def _task_type(model: torch.nn.Module) -> str | None:
    """PEFT's name for a Transformers model class."""
    endings = {
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    }
    return next((task for end, task in endings.items() if type(model).__name__.endswith(end)), None)
