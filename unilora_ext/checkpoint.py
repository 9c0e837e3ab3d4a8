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
always holds one whole adapter, whenever a save is interrupted. Writers take turns. A reader takes no lock: where a file
is gone because a writer has replaced the adapter meanwhile, it looks again. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from unilora_ext import _C
from unilora_ext.adapter import Adapter, _attach, named_slots, plan, saved_tensors
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AdapterFileError, AttachError, UniLoRAError
from unilora_ext.files import locked, open_file, read_all, replace_file, sweep
from unilora_ext.ops import accumulator_dtype
from unilora_ext.projections import Projection
from unilora_ext.record import ENTRY, FORMAT, FORMAT_VERSION, LAYOUTS, check_json, digest, parse
from unilora_ext.sharded_tensors import copy_, full, is_writer, settle
from unilora_ext.targets import Target

__all__ = ["AdapterFile", "load", "read", "save"]

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
    folder, metadata = Path(folder), {} if metadata is None else metadata
    check_json(metadata, "save: metadata")
    settle(adapter.model)
    record = _describe(adapter, metadata)
    tensors = {
        "theta_d": {"theta_d": adapter.theta_d},
        "modules_to_save": adapter.modules_to_save(),
    }
    contents = {kind: _safetensors_bytes(part) for kind, part in tensors.items() if part}
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


def _describe(adapter: Adapter, metadata: dict[str, Any]) -> dict[str, Any]:
    """The record, but for the files."""
    config, projection = adapter.config, adapter.projection
    modules = [[name, slot.m, slot.n] for name, slot in named_slots(adapter)]
    return {
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
        "fingerprint": digest(modules),
        "config": asdict(config),
        "base_model": _base_model(adapter.model),
        "metadata": metadata,
    }


def _base_model(model: nn.Module) -> str | None:
    """What a Transformers model calls itself: for people. A path that is not Unicode is shown as far as it is."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    return str(name).encode(errors="replace").decode() if name else None


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
    text = json.dumps({**whole, "checksum": digest(whole)}, indent=2).encode() + b"\n"
    parse(text, folder / ENTRY)
    return names, text


def _holds_another(path: Path, data: bytes) -> bool:
    """Whether there is a file of this name with other content: another adapter may need it, or it is damaged."""
    return path.exists() and not (path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data)


def _safetensors_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: full(t).cpu().contiguous().clone() for name, t in tensors.items()})


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


def _read_tensors(folder: Path, record: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """(theta_d, modules_to_save)"""
    kinds = {kind: _read_tensor_file(folder, entry) for kind, entry in record["files"].items()}
    theta_d = take_theta_d(folder, kinds["theta_d"], "theta_d", record["d"])
    if kinds["theta_d"]:
        raise AdapterFileError(f"{folder}: expected theta_d alone in its file, got also {sorted(kinds['theta_d'])}")
    return theta_d, kinds.get("modules_to_save", {})


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


# ---- load -----------------------------------------------------------------------------------------------------------


def load(model: nn.Module, folder: str | Path) -> Adapter:
    """Attaches the adapter of `folder` to a model, which is unchanged where that fails.

    Args:
        model: the model the adapter was trained on, or one with the same modules. It must have no adapter yet.
        folder: written by :meth:`Adapter.save`.

    Returns:
        The adapter; theta_d is trainable, as after :func:`unilora_ext.attach`.

    Raises:
        AdapterFileError: the folder is damaged or foreign, or its modules are not the model's: the message lists the
            differences.
        AttachError: the model has an adapter already, or modules_to_save that are on the meta device.
    """
    file = read(folder)
    names = [name for name, _, _ in file.modules]
    # The names stand for an expression, which may match for ever. Where the configuration has names, they are compared.
    whole_names = names if file.config.pattern is not None else None
    fit = Fit.of(model, file.folder, file.config, whole_names, file.record["projection"]["version"])
    check_same(
        file.folder,
        "adapted modules",
        dict((n, [m, k]) for n, m, k in file.modules),
        {t.name: [t.m, t.n] for t in fit.targets},
    )
    if names != [t.name for t in fit.targets]:
        raise AdapterFileError(f"{file.folder}: the model has the adapter's modules in another order")
    return fit.attach(file.theta_d, file.modules_to_save)


@dataclass(frozen=True)
class Fit:
    """What an adapter of a folder will be in a model that is not changed yet.

    Attributes:
        model: to adapt.
        folder: for messages.
        targets, config, projection: see :func:`unilora_ext.adapter.plan`.
        saved: the model's tensors of modules_to_save, by full name.
    """

    model: nn.Module
    folder: Path
    targets: list[Target]
    config: UniLoRAConfig
    projection: Projection
    saved: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        folder: Path,
        config: UniLoRAConfig,
        whole_names: Sequence[str] | None,
        version: int | None = None,
    ) -> Fit:
        """The fit of a configuration; `whole_names` and `version` as in :func:`unilora_ext.adapter.plan`.

        Raises:
            UniLoRAError: the configuration does not fit the model.
        """
        try:
            targets, config, projection = plan(model, config, whole_names, version)
            return cls(model, folder, targets, config, projection, saved_tensors(model, config))
        except UniLoRAError as error:
            raise type(error)(f"{folder}: does not fit this {type(model).__name__}: {error}") from error

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """In which theta_d of a new adapter is: float32, float64 in a float64 model."""
        return accumulator_dtype(self.targets[0].held().dtype)

    def attach(self, theta_d: Tensor, tensors: Mapping[str, Tensor]) -> Adapter:
        """Changes the model.

        Args:
            theta_d: [d].
            tensors: of modules_to_save, by full name.

        Raises:
            AdapterFileError: `tensors` are not the model's by name, shape and type.
            AttachError: modules_to_save are on the meta device.
        """
        check_same(self.folder, "modules_to_save", shapes_of(tensors), shapes_of(self.saved))
        for name, tensor in tensors.items():
            expected, got = self.saved[name].dtype, tensor.dtype
            if got != expected and not (got.is_floating_point and expected.is_floating_point):
                raise AdapterFileError(
                    f"{self.folder}: modules_to_save: '{name}': expected {expected}, as in the model, got {got}"
                )
        check_memory(self.folder, self.saved)
        held = self.targets[0].held()
        device = torch.device("cpu") if held.is_meta else held.device
        adapter = _attach(self.model, self.config, self.targets, self.projection, theta_d.to(device))
        try:
            with torch.no_grad():
                for name, tensor in self.saved.items():
                    copy_(tensor, tensors[name])
        except BaseException:  # no memory, an interrupt
            adapter.detach()
            raise
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
