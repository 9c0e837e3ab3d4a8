"""The adapter file: one folder, d + 1 numbers.

``adapter.json``
    format version, projection (name, version of its algorithm, seed), d, D, r, scaling, layout of theta_D, names and
    shapes of the adapted modules with their fingerprint, the configuration, the names, sizes and SHA-256 of the
    tensor files, and a checksum of all this.
``theta_d-<hash>.safetensors``
    theta_d.
``modules_to_save-<hash>.safetensors``
    the modules trained whole, where there are any.

The JSON is the only entry: it is replaced last and in one step, and names tensor files by their content. So a folder
always holds one whole adapter, whenever a save is interrupted. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from unilora_ext import _C
from unilora_ext.adapter import Adapter, _attach, named_slots, plan, saved_tensors
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AdapterFileError, AttachError, UniLoRAError
from unilora_ext.projections import projection_class
from unilora_ext.sharded_tensors import copy_, full, is_writer, settle

__all__ = ["AdapterFile", "load", "read", "save"]

ENTRY = "adapter.json"
FORMAT = "unilora_ext adapter"
FORMAT_VERSION = 1
LAYOUTS = {  # by Projection.a_first
    False: "per module in named_modules order: vec_row(B [m, r]), vec_row(A [r, n])",
    True: "per module in named_modules order: vec_row(A [r, n]), vec_row(B [m, r])",
}
_TENSOR_FILES = ("theta_d", "modules_to_save")


@dataclass(frozen=True)
class AdapterFile:
    """A checked adapter folder.

    Attributes:
        folder: where it was read from.
        record: the content of ``adapter.json``.
        config: the configuration it was trained with.
        theta_d: [d], on the CPU.
        modules_to_save: tensors by full name, on the CPU.
    """

    folder: Path
    record: Mapping[str, Any]
    config: UniLoRAConfig
    theta_d: Tensor
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


def save(adapter: Adapter, folder: str | Path, metadata: dict[str, Any] | None = None) -> None:
    """Writes an adapter to `folder`; see :meth:`Adapter.save`."""
    settle(adapter.model)
    config, projection = adapter.config, adapter.projection
    modules = [[name, slot.m, slot.n] for name, slot in named_slots(adapter)]
    tensors = {
        "theta_d": {"theta_d": adapter.theta_d},
        "modules_to_save": adapter.modules_to_save(),
    }
    contents = {kind: _safetensors_bytes(part) for kind, part in tensors.items() if part}
    if not all(is_writer(tensor) for part in tensors.values() for tensor in part.values()):
        return  # this process had to be there to gather the tensors; another one writes
    record: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": _C.version,
        "projection": projection.spec(),
        "d": projection.d,
        "D": projection.D,
        "r": config.r,
        "scaling": config.scaling,
        "layout": LAYOUTS[projection.a_first],
        "modules": modules,
        "fingerprint": _digest(modules),
        "config": asdict(config),
        "base_model": getattr(getattr(adapter.model, "config", None), "_name_or_path", None) or None,
        "metadata": metadata or {},
        "files": {
            kind: {
                "name": f"{kind}-{_sha256(data)[:8]}.safetensors",
                "bytes": len(data),
                "sha256": _sha256(data),
            }
            for kind, data in contents.items()
        },
    }
    record["checksum"] = _digest(record)
    text = json.dumps(record, indent=2).encode() + b"\n"

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, data in contents.items():
        replace_file(folder / record["files"][kind]["name"], data)
    replace_file(folder / ENTRY, text)
    kept = {entry["name"] for entry in record["files"].values()}
    for kind in _TENSOR_FILES:
        for path in (*folder.glob(f"{kind}-*.safetensors"), *folder.glob(f".{kind}-*.tmp")):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: full(t).cpu().contiguous().clone() for name, t in tensors.items()})


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of spacing and key order."""
    return _sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def replace_file(path: Path, data: bytes) -> None:
    """Writes beside, flushes to the disk, then renames: `path` is the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# ---- read -----------------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> AdapterFile:
    """Reads and checks an adapter folder; no model is needed.

    Raises:
        AdapterFileError: the folder is missing, incomplete, truncated, changed by hand, foreign or newer.
    """
    folder = Path(folder)
    record = _read_record(folder)
    config = _read_config(folder, record)
    tensors = {kind: _read_tensors(folder, record["files"][kind]) for kind in record["files"]}
    theta_d = tensors["theta_d"].get("theta_d")
    if theta_d is None or tuple(theta_d.shape) != (record["d"],) or not theta_d.is_floating_point():
        got = "no tensor 'theta_d'" if theta_d is None else f"{theta_d.dtype} of shape {list(theta_d.shape)}"
        raise AdapterFileError(f"{folder}: theta_d: expected a floating tensor of shape [{record['d']}], got {got}")
    return AdapterFile(folder, record, config, theta_d, tensors.get("modules_to_save", {}))


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / ENTRY
    if not path.is_file():
        hint = " (it holds a PEFT adapter)" if (folder / "adapter_config.json").is_file() else ""
        raise AdapterFileError(f"{folder}: expected a Uni-LoRA adapter folder with {ENTRY}, found none{hint}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path}: expected JSON, the file is truncated or damaged ({error})") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        got = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise AdapterFileError(f"{path}: expected format '{FORMAT}', got {got!r}")
    if record.get("format_version") != FORMAT_VERSION:
        raise AdapterFileError(
            f"{path}: expected format version {FORMAT_VERSION}, got {record.get('format_version')!r}; "
            f"it was written by unilora_ext {record.get('library_version')}, this is {_C.version}"
        )
    stated = record.pop("checksum", None)
    if stated != _digest(record):
        raise AdapterFileError(f"{path}: the content does not match its checksum: it was changed after it was saved")
    return record


def _read_config(folder: Path, record: dict[str, Any]) -> UniLoRAConfig:
    """The configuration, and agreement of the record with itself (a writer's mistake, since the checksum holds)."""
    try:
        config = UniLoRAConfig(**record["config"])
        projection, modules = record["projection"], record["modules"]
        algorithm = projection_class(projection["name"])
        agree = {
            "projection.version": (projection["version"], algorithm.version),
            "projection.name": (projection["name"], config.projection),
            "projection.seed": (projection["seed"], config.seed),
            "layout": (record["layout"], LAYOUTS[algorithm.a_first]),
            "d": (record["d"], config.d),
            "r": (record["r"], config.r),
            "scaling": (record["scaling"], config.scaling),
            "D": (record["D"], sum((m + n) * config.r for _, m, n in modules)),
            "fingerprint": (record["fingerprint"], _digest(modules)),
            "files.theta_d": ("theta_d" in record["files"], True),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(f"{folder / ENTRY}: incomplete or malformed: {error!r}") from error
    for name, (got, expected) in agree.items():
        if got != expected:
            raise AdapterFileError(f"{folder / ENTRY}: {name}: expected {expected!r}, got {got!r}")
    return config


def _read_tensors(folder: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / Path(entry["name"]).name
    if not path.is_file():
        raise AdapterFileError(f"{path}: expected this file, as {ENTRY} says; it is missing")
    data = path.read_bytes()
    if len(data) != entry["bytes"]:
        raise AdapterFileError(f"{path}: expected {entry['bytes']} bytes, got {len(data)}: truncated or overwritten")
    if _sha256(data) != entry["sha256"]:
        raise AdapterFileError(f"{path}: the content does not match its SHA-256 in {ENTRY}: changed or damaged")
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise AdapterFileError(f"{path}: expected safetensors: {error}") from error


# ---- load -----------------------------------------------------------------------------------------------------------


def load(model: nn.Module, folder: str | Path) -> Adapter:
    """Attaches the adapter of `folder` to a model.

    Args:
        model: the model the adapter was trained on, or one with the same modules. It must have no adapter yet.
        folder: written by :meth:`Adapter.save`.

    Returns:
        The adapter; theta_d is trainable, as after :func:`unilora_ext.attach`.

    Raises:
        AdapterFileError: the folder is damaged or foreign, or its modules are not the model's: the message lists the
            differences.
        AttachError: the model has an adapter already, or modules_to_save that are on the meta device.
        In every case the model is unchanged.
    """
    file = read(folder)
    try:
        targets, config, projection = plan(model, file.config)
        saved = saved_tensors(model, config)
    except UniLoRAError as error:
        raise type(error)(f"{file.folder}: does not fit this {type(model).__name__}: {error}") from error
    check_same(
        file.folder,
        "adapted modules",
        dict((n, [m, k]) for n, m, k in file.modules),
        {t.name: [t.m, t.n] for t in targets},
    )
    if list(file.modules) != [(t.name, t.m, t.n) for t in targets]:
        raise AdapterFileError(f"{file.folder}: the model has the adapter's modules in another order")
    check_same(file.folder, "modules_to_save", shapes_of(file.modules_to_save), shapes_of(saved))
    check_memory(file.folder, saved)

    held = targets[0].held()
    device = torch.device("cpu") if held.is_meta else held.device
    adapter = _attach(model, config, targets, projection, file.theta_d.to(device))
    with torch.no_grad():
        for name, tensor in saved.items():
            copy_(tensor, file.modules_to_save[name])
    return adapter


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in tensors.items()}


def check_memory(folder: Path, saved: Mapping[str, Tensor]) -> None:
    """Whether modules_to_save can take their trained values.

    Raises:
        AttachError: one is on the meta device, or offloaded.
    """
    for name, tensor in saved.items():
        if tensor.is_meta:
            raise AttachError(
                f"{folder}: modules_to_save: '{name}' is on the meta device, or offloaded, and cannot hold its trained "
                "values: give the model memory and its weights first (to_empty, load_state_dict), then load the adapter"
            )


def check_same(folder: Path, what: str, stored: dict[str, list[int]], found: dict[str, list[int]]) -> None:
    """Compares shapes by name, of a folder and of a model.

    Raises:
        AdapterFileError: a list of the differences.
    """
    differences = [
        f"'{name}': in the adapter {shape}, not in the model" for name, shape in stored.items() if name not in found
    ]
    differences += [
        f"'{name}': in the model {shape}, not in the adapter" for name, shape in found.items() if name not in stored
    ]
    differences += [
        f"'{name}': in the adapter {shape}, in the model {found[name]}"
        for name, shape in stored.items()
        if name in found and shape != found[name]
    ]
    if differences:
        shown = "\n  ".join(differences[:20]) + ("\n  ..." if len(differences) > 20 else "")
        raise AdapterFileError(f"{folder}: {what} differ in {len(differences)} places:\n  {shown}")
