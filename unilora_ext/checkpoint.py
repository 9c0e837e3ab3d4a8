"""The adapter file: one folder, d + 1 numbers.

``adapter.json``
    format version, projection (name, version of its algorithm, seed), d, D, r, scaling, layout of theta_D, names and
    shapes of the adapted modules with their fingerprint, the configuration, the names, sizes and SHA-256 of the
    tensor files, and a checksum of all this.
``theta_d-<hash>.safetensors``
    theta_d.
``modules_to_save-<hash>.safetensors``
    the modules trained whole, and running statistics of frozen BatchNorm layers that training moved, where there are
    any.

The JSON is the only entry: it is replaced last and in one step, and names tensor files by their content. So a folder
always holds one whole adapter, whenever a save is interrupted. Writers take turns. A reader takes no lock: where a file
is gone because a writer has replaced the adapter meanwhile, it looks again. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from unilora_ext._native import _C
from unilora_ext.attachment import Attached, base_model_of
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AdapterFileError
from unilora_ext.files import locked, open_file, read_all, replace_file, sweep
from unilora_ext.projections import projection_class
from unilora_ext.record import ENTRY, FORMAT, FORMAT_VERSION, check_json, digest, parse
from unilora_ext.sharded_tensors import full, is_writer, reshard

__all__ = ["AdapterFile", "read", "save"]

THETA_D_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WRITTEN = re.compile(
    r"(theta_d|modules_to_save)-[0-9a-f]{8,64}\.safetensors"
    r"|\.(adapter|(theta_d|modules_to_save)-[0-9a-f]{8,64})-[0-9a-f]{8}\.tmp"
)
"""Names of what save() writes, and of what it leaves when it is killed."""
_LOOKS = 100
"""Adapters that may be replaced in turn while one is read."""


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter folder.

    Attributes:
        folder: where it was read from.
        record: the content of ``adapter.json``.
        config: the configuration it was trained with.
        theta_d: [d], on the CPU.
        parts: what the projection keeps beside it, on the CPU.
        modules_to_save: tensors by full name, running statistics that training moved among them, on the CPU.
    """

    folder: Path
    record: Mapping[str, Any]
    config: UniLoRAConfig
    theta_d: Tensor
    parts: dict[str, Tensor]
    modules_to_save: dict[str, Tensor]

    @property
    def metadata(self) -> dict[str, Any]:
        """What the application gave to ``Adapter.save``."""
        return self.record["metadata"]

    @property
    def modules(self) -> list[tuple[str, int, int]]:
        """(name, m, n) of the adapted modules."""
        return [(name, m, n) for name, m, n in self.record["modules"]]


# ---- save -----------------------------------------------------------------------------------------------------------


def save(
    adapter: Attached, folder: str | Path, metadata: dict[str, Any] | None = None, resumable: bool = False
) -> None:
    """Writes an adapter to `folder`; see :meth:`Adapter.save`."""
    folder, metadata = Path(folder), {} if metadata is None else metadata
    check_json(metadata, "save: metadata")
    reshard(adapter.model)
    record = _describe(adapter, metadata)
    tensors = {
        "theta_d": {"theta_d": adapter.theta_d, **_stored_parts(adapter, resumable)},
        "modules_to_save": adapter.modules_to_save() | adapter.moved_statistics(),
    }
    contents = {kind: _safetensors_bytes(part, _header(record)) for kind, part in tensors.items() if part}
    if not all(is_writer(tensor) for part in tensors.values() for tensor in part.values()):
        return  # this process had to be there to gather the tensors; another one writes
    names, text = _encode(record, contents, folder)
    with locked(folder) as alone:
        if any(_holds_another(folder / names[kind], data) for kind, data in contents.items()):
            names, text = _encode(record, contents, folder, digits=64)
        for kind, data in contents.items():
            replace_file(folder / names[kind], data)
        replace_file(folder / ENTRY, text)
        sweep(folder, _WRITTEN, names.values(), alone)


def _describe(adapter: Attached, metadata: dict[str, Any]) -> dict[str, Any]:
    """The record, but for the files."""
    config, projection = adapter.config, adapter.projection
    modules = [[name, m, n] for name, (m, n) in zip(adapter.layers, adapter.vector.layout.shapes, strict=True)]
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": _C.version,
        "projection": projection.spec(),
        "d": projection.d,
        "D": projection.D,
        "r": config.r,
        "scaling": config.scaling,
        "layout": projection.order.value,
        "modules": modules,
        "fingerprint": digest(modules),
        "config": asdict(config),
        "base_model": base_model_of(adapter.model),
        "metadata": metadata,
    }


def _stored_parts(adapter: Attached, resumable: bool) -> dict[str, Tensor]:
    """What the projection keeps beside theta_d."""
    trained = {name: full(t) for name, t in adapter.trained.items() if name != "theta_d"}
    return adapter.projection.stored(trained, resumable)


def _encode(
    record: dict[str, Any], contents: Mapping[str, bytes], folder: Path, digits: int = 8
) -> tuple[dict[str, str], bytes]:
    """The names of the tensor files, with so many digits of their SHA-256, and ``adapter.json``, which was read back.

    Raises:
        UniLoRAError: it would not be read.
    """
    sums = {kind: hashlib.sha256(data).hexdigest() for kind, data in contents.items()}
    names = {kind: f"{kind}-{sums[kind][:digits]}.safetensors" for kind in contents}
    files = {kind: {"name": names[kind], "bytes": len(data), "sha256": sums[kind]} for kind, data in contents.items()}
    whole = {**record, "files": files}
    text = json.dumps({**whole, "checksum": digest(whole)}, indent=2, ensure_ascii=False) + "\n"
    data = text.encode("utf-8", "backslashreplace")  # of a lone surrogate: JSON's own escape
    parse(data, folder / ENTRY)
    return names, data


def _holds_another(path: Path, data: bytes) -> bool:
    """Whether there is a file of this name with other content: another adapter may need it, or it is damaged."""
    return path.exists() and not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data)


def _header(record: Mapping[str, Any]) -> dict[str, str]:
    """What a tensor file says of itself: how its theta_D is made, not who made it where, so that equal tensors have
    equal files. One entry: safetensors keeps no order."""
    told = ("format", "format_version", "projection", "d", "D", "r", "scaling", "layout", "fingerprint")
    return {"unilora_ext": json.dumps({name: record[name] for name in told}, separators=(",", ":"))}


def _safetensors_bytes(tensors: Mapping[str, Tensor], header: dict[str, str]) -> bytes:
    return safetensors.torch.save({name: full(t).cpu().contiguous().clone() for name, t in tensors.items()}, header)


# ---- read -----------------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> AdapterFile:
    """Reads and checks an adapter folder; no model is needed.

    Raises:
        AdapterFileError: the folder is missing, incomplete, truncated, changed by hand, foreign or newer.
    """
    folder = Path(folder)
    entry = folder / ENTRY
    for _ in range(_LOOKS):
        with _open_entry(folder) as file:
            record, config = parse(read_all(entry, file), entry)
            try:
                return AdapterFile(folder, record, config, *_read_tensors(folder, record))
            except AdapterFileError:
                if _is_still(entry, file.fileno()):
                    raise
    raise AdapterFileError(f"{folder}: expected one adapter, got {_LOOKS} in turn while the first one was read")


def _open_entry(folder: Path) -> BinaryIO:
    hint = " (it holds a PEFT adapter)" if os.path.isfile(folder / "adapter_config.json") else ""
    return open_file(folder / ENTRY, f"{folder}: expected a Uni-LoRA adapter folder with {ENTRY}, found none{hint}")


def _is_still(path: Path, descriptor: int) -> bool:
    """Whether `path` is the file that is open: no other can have its inode meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _read_tensors(folder: Path, record: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(theta_d, the projection's parts, modules_to_save)"""
    kinds = {kind: _read_tensor_file(folder, entry) for kind, entry in record["files"].items()}
    theta_d = take_theta_d(folder, kinds["theta_d"], "theta_d", record["d"])
    parts, expected = kinds["theta_d"], projection_class(record["projection"]["name"]).stored_names
    if not set(parts).issubset(expected):
        raise AdapterFileError(
            f"{folder}: expected {sorted({'theta_d', *expected})} in the file of theta_d, got also "
            f"{sorted(set(parts).difference(expected))}"
        )
    return theta_d, parts, kinds.get("modules_to_save", {})


def _read_tensor_file(folder: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / entry["name"]
    with open_file(path, f"{path}: expected this file, as {ENTRY} says; it is missing") as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry["bytes"]:
            raise AdapterFileError(f"{path}: expected {entry['bytes']} bytes, got {size}: truncated or overwritten")
        data = read_all(path, file)
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise AdapterFileError(f"{path}: the content does not match its SHA-256 in {ENTRY}: changed or damaged")
    return parse_tensors(data, path)


def parse_tensors(data: bytes, path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, on the CPU.

    Raises:
        AdapterFileError: it is no such file, or of types that this torch has not.
    """
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise AdapterFileError(f"{path}: expected safetensors, the file is truncated or damaged ({error})") from error


def take_theta_d(folder: Path, tensors: dict[str, Tensor], name: str, d: int) -> Tensor:
    """Takes theta_d out of the tensors of a file.

    Raises:
        AdapterFileError: there is none, or it is not a floating vector of length d that operators take.
    """
    theta_d = tensors.pop(name, None)
    if theta_d is None or tuple(theta_d.shape) != (d,) or theta_d.dtype not in THETA_D_DTYPES:
        got = "no such tensor" if theta_d is None else f"{theta_d.dtype} of shape {list(theta_d.shape)}"
        raise AdapterFileError(
            f"{folder}: {name}: expected float16, bfloat16, float32 or float64 of shape [{d}], got {got}"
        )
    return theta_d
