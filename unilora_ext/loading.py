"""Loading an adapter into a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from unilora_ext.adapter import Adapter
from unilora_ext.attaching import Plan
from unilora_ext.attachment import whole_tensors
from unilora_ext.checkpoint import read
from unilora_ext.config import UniLoRAConfig
from unilora_ext.errors import AdapterFileError, AttachError, UniLoRAError
from unilora_ext.functional import accumulator_dtype
from unilora_ext.sharded_tensors import copy_

__all__ = ["Fit", "load"]


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
        {t.name: [t.m, t.n] for t in fit.plan.targets},
    )
    if names != [t.name for t in fit.plan.targets]:
        raise AdapterFileError(f"{file.folder}: the model has the adapter's modules in another order")
    return fit.attach(file.theta_d, file.parts, file.modules_to_save)


@dataclass(frozen=True)
class Fit:
    """What an adapter of a folder will be in a model that is not changed yet.

    Attributes:
        folder: for messages.
        plan: to attach it.
        whole: the model's tensors of modules_to_save, by full name.
    """

    folder: Path
    plan: Plan
    whole: dict[str, Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        folder: Path,
        config: UniLoRAConfig,
        whole_names: Sequence[str] | None,
        version: int | None = None,
    ) -> Fit:
        """The fit of a configuration; `whole_names` and `version` as in :meth:`unilora_ext.attaching.Plan.of`.

        Raises:
            UniLoRAError: the configuration does not fit the model.
        """
        try:
            return cls(folder, Plan.of(model, config, whole_names, version), whole_tensors(model, config))
        except UniLoRAError as error:
            raise type(error)(f"{folder}: does not fit this {type(model).__name__}: {error}") from error

    @property
    def accumulator_dtype(self) -> torch.dtype:
        """In which theta_d of a new adapter is: float32, float64 in a float64 model."""
        return accumulator_dtype(self.plan.targets[0].like().dtype)

    def attach(self, theta_d: Tensor, parts: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Adapter:
        """Changes the model.

        Args:
            theta_d: [d].
            parts: what the projection keeps beside it.
            tensors: of modules_to_save, by full name.

        Raises:
            AdapterFileError: `parts` are not those of the projection, or `tensors` not the model's by name, shape and
                type.
            AttachError: modules_to_save are on the meta device.
        """
        try:
            trained = self.plan.projection.restored(parts)
        except UniLoRAError as error:
            raise AdapterFileError(f"{self.folder}: {error}") from error
        check_same(self.folder, "modules_to_save", shapes_of(tensors), shapes_of(self.whole))
        for name, tensor in tensors.items():
            expected, got = self.whole[name].dtype, tensor.dtype
            if got != expected and not (got.is_floating_point and expected.is_floating_point):
                raise AdapterFileError(
                    f"{self.folder}: modules_to_save: '{name}': expected {expected}, as in the model, got {got}"
                )
        check_memory(self.folder, self.whole)
        like = self.plan.targets[0].like()
        device = torch.device("cpu") if like.is_meta else like.device
        adapter = self.plan.attach({k: t.to(device) for k, t in {"theta_d": theta_d, **trained}.items()})
        try:
            with torch.no_grad():
                for name, tensor in self.whole.items():
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
