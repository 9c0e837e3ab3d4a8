"""PEFT's adapter folders, read without PEFT: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from unilora_ext.checkpoint import parse_tensors
from unilora_ext.errors import AdapterFileError, shown
from unilora_ext.export import ADAPTER_FILES, PREFIX
from unilora_ext.files import open_file, read_all
from unilora_ext.record import parse_json

__all__ = ["config_path", "present_modules", "read_record", "read_tensors"]


def config_path(folder: Path) -> Path:
    """The file with the configuration."""
    return folder / ADAPTER_FILES[1]


def read_record(folder: Path, peft_type: str) -> dict[str, Any]:
    """What ``adapter_config.json`` says.

    Raises:
        AdapterFileError: there is none, it is damaged, or of another type of adapter.
    """
    path = config_path(folder)
    record = parse_json(_content(folder, path), path)
    kind = record.get("peft_type") if isinstance(record, dict) else None
    if kind != peft_type:
        raise AdapterFileError(f"{path}: peft_type: expected '{peft_type}', got {shown(kind)}")
    return record


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by name, without ``base_model.model.``, on the CPU.

    Raises:
        AdapterFileError: there is no file of them, or it is damaged.
    """
    path = folder / ADAPTER_FILES[0]
    tensors = parse_tensors(_content(folder, path), path)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def present_modules(model: nn.Module, endings: Sequence[str]) -> list[str]:
    """Those names of modules_to_save that the model has: PEFT writes the usual heads of a task in any case."""
    present = [name for name, _ in model.named_modules()]
    return [each for each in endings if any(name == each or name.endswith("." + each) for name in present)]


def _content(folder: Path, path: Path) -> bytes:
    with open_file(path, f"{folder}: expected a PEFT checkpoint with {path.name}, found none") as file:
        return read_all(path, file)
