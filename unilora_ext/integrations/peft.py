"""PEFT's file format: an adapter written as plain LoRA, for PEFT, vLLM and llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from unilora_ext.adapter import Adapter
from unilora_ext.checkpoint import replace_file
from unilora_ext.ops import accumulator_dtype
from unilora_ext.sharded_tensors import full, is_writer, settle

__all__ = ["export_lora"]

_PREFIX = "base_model.model."


def export_lora(adapter: Adapter, folder: str | Path) -> None:
    """Writes the update as a LoRA adapter of rank r: the same B A, nothing is approximated.

    Args:
        adapter: attached, merged or not.
        folder: gets ``adapter_model.safetensors`` (``<module>.lora_A.weight`` [r, n], ``<module>.lora_B.weight``
            [m, r], float32, and modules_to_save) and ``adapter_config.json`` (lora_alpha = scaling r).
    """
    settle(adapter.model)
    config, tensors = adapter.config, {}
    writes = all(map(is_writer, (adapter.theta_d, *adapter.modules_to_save().values())))
    with torch.no_grad():
        for name, layer in adapter.layers.items():
            A, B = layer.lora_factors(accumulator_dtype(layer.weight.dtype))
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = A, B
    for name, tensor in adapter.modules_to_save().items():
        tensors[_PREFIX + name] = tensor
    stored_transposed = any(layer.dense_weight() is not layer.weight for layer in adapter.layers.values())
    record = {
        "peft_type": "LORA",
        "base_model_name_or_path": getattr(getattr(adapter.model, "config", None), "_name_or_path", None),
        "r": config.r,
        "lora_alpha": config.scaling * config.r,
        "lora_dropout": config.dropout,
        "bias": "none",
        "fan_in_fan_out": stored_transposed,
        "target_modules": list(adapter.layers),
        "modules_to_save": list(config.modules_to_save) or None,
        "task_type": _task_type(adapter.model),
        "inference_mode": True,
    }
    data = safetensors.torch.save(_plain(tensors), {"format": "pt"})
    if not writes:
        return  # this process had to be there to gather the tensors; another one writes
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "adapter_model.safetensors", data)
    replace_file(folder / "adapter_config.json", json.dumps(record, indent=2).encode() + b"\n")


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: full(t).cpu().contiguous().clone() for name, t in tensors.items()}


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
