"""Loading an adapter into a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from unilora_ext.adapter import Adapter
from unilora_ext.attaching import Inside, Plan, inner_model
from unilora_ext.attachment import running_statistics, whole_tensors
from unilora_ext.checkpoint import read
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AdapterFileError, AttachError, UniLoRAError
from unilora_ext.sharded_tensors import copy_

__all__ = ["attach_saved", "fitting_plan", "load", "model_with"]


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
    model, entry = model_with(model, names)
    # The names stand for an expression, which may match for ever. Where the configuration has names, they are compared.
    whole_names = names if file.config.pattern is not None else None
    plan = fitting_plan(model, file.folder, file.config, whole_names, file.record["projection"]["version"], entry)
    check_same(
        file.folder,
        "adapted modules",
        dict((n, [m, k]) for n, m, k in file.modules),
        {t.name: [t.m, t.n] for t in plan.targets},
    )
    if names != [t.name for t in plan.targets]:
        raise AdapterFileError(f"{file.folder}: the model has the adapter's modules in another order")
    return attach_saved(plan, file.folder, file.theta_d, file.parts, file.modules_to_save)


def model_with(model: nn.Module, names: Collection[str]) -> Inside:
    """The model that has modules of these names, and what is called for a forward pass of it: `model`, or, where that
    has not all of them, the Transformers model in it that has."""
    inside = inner_model(model)
    return inside if inside and not _has(model, names) and _has(inside.model, names) else Inside(model, model)


def _has(model: nn.Module, names: Collection[str]) -> bool:
    return {name for name, _ in model.named_modules()}.issuperset(names)


def fitting_plan(
    model: nn.Module,
    folder: Path,
    config: UniLoRAConfig,
    whole_names: Sequence[str] | None,
    version: int | None = None,
    entry: nn.Module | None = None,
) -> Plan:
    """The plan for the configuration of a folder; the other arguments as in :meth:`Plan.of`.

    Raises:
        UniLoRAError: the configuration does not fit the model; the message names the folder.
    """
    try:
        return Plan.of(model, config, whole_names, version, entry)
    except UniLoRAError as error:
        raise type(error)(f"{folder}: does not fit this {type(model).__name__}: {error}") from error


def attach_saved(
    plan: Plan, folder: Path, theta_d: Tensor, parts: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> Adapter:
    """Changes the model of a plan.

    Args:
        plan: that fits the folder.
        folder: for messages.
        theta_d: [d].
        parts: what the projection keeps beside it.
        tensors: of modules_to_save, by full name, and running statistics where training moved them.

    Raises:
        AdapterFileError: `parts` are not those of the projection, or `tensors` not the model's by name, shape and type.
        AttachError: modules_to_save are on the meta device.
    """
    statistics = running_statistics(plan.model, plan.config)
    whole = whole_tensors(plan.model, plan.config) | {name: t for name, t in statistics.items() if name in tensors}
    try:
        trained = plan.projection.restored(parts)
    except UniLoRAError as error:
        raise AdapterFileError(f"{folder}: {error}") from error
    check_same(folder, "modules_to_save", shapes_of(tensors), shapes_of(whole))
    for name, tensor in tensors.items():
        expected, got = whole[name].dtype, tensor.dtype
        if got != expected and not (got.is_floating_point and expected.is_floating_point):
            raise AdapterFileError(
                f"{folder}: modules_to_save: '{name}': expected {expected}, as in the model, got {got}"
            )
    check_memory(folder, whole)
    like = plan.targets[0].like()
    device = torch.device("cpu") if like.is_meta else like.device
    adapter = plan.attach({name: t.to(device) for name, t in {"theta_d": theta_d, **trained}.items()})
    try:
        with torch.no_grad():
            for name, tensor in whole.items():
                copy_(tensor, tensors[name])
    except BaseException:  # no memory, an interrupt
        adapter.detach()
        raise
    return adapter


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(t.shape) for name, t in tensors.items()}


def check_memory(folder: Path, whole: Mapping[str, Tensor]) -> None:
    """Whether modules_to_save can take their trained values.

    Raises:
        AttachError: one is on the meta device, or offloaded.
    """
    for name, tensor in whole.items():
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
