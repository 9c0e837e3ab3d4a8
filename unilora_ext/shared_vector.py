"""The one trainable vector of a model, and the one projection of a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unilora_ext import ops
from unilora_ext.projections import Projection, Rows

__all__ = ["SharedVector", "Slot"]

Factors = tuple[Tensor, Tensor]
"""(A [r, n], B [m, r])"""


@dataclass(frozen=True)
class Slot:
    """Where a layer's factors lie in theta_D: vec_row(B [m, r]), then vec_row(A [r, n]) (paper, section 3.1), or A
    before B (PEFT)."""

    start: int
    m: int
    n: int
    r: int
    a_first: bool = False

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the two factors as they lie in theta_D."""
        A, B = (self.r, self.n), (self.m, self.r)
        return (A, B) if self.a_first else (B, A)

    @property
    def stop(self) -> int:
        return self.start + (self.m + self.n) * self.r

    def factors(self, first: Tensor, second: Tensor) -> Factors:
        """(A, B) from the two as they lie in theta_D."""
        return (first, second) if self.a_first else (second, first)


@dataclass(frozen=True)
class _DeviceGroup:
    """The slots whose layers lie on one device, in order, and their rows of P."""

    slot_ids: tuple[int, ...]
    rows: Rows


class SharedVector(nn.Module):
    """theta_d, its projection and, while the model's forward runs, theta_D.

    The model calls :meth:`begin` and :meth:`end` around its forward (they are its hooks). In between, the first layer
    that asks projects for all layers of its device. Nothing is kept longer, so a write to theta_d by any means is
    seen by the next forward. A layer that runs outside (a sub-module called alone, a recomputation under activation
    checkpointing) projects its own rows of P: the same values and gradients.

    Attributes:
        theta_d: [d], float32, or float64 in a float64 model: the trainable vector.
        projection: P.
        slots: where each layer's factors lie in theta_D.
        enabled: whether the layers add their update.
    """

    def __init__(self, theta_d: Tensor | None, projection: Projection, slots: Sequence[Slot]) -> None:
        super().__init__()
        if theta_d is not None:  # None: a subclass finds it elsewhere
            self.theta_d = nn.Parameter(theta_d)
        self.projection = projection
        self.slots = tuple(slots)
        self.enabled = True
        self._forget()

    def forward(self, x: Any) -> Any:
        """The identity, so that a model that chains its children (``nn.Sequential``) may hold one."""
        return x

    # -- the forward pass of the model --------------------------------------------------------------------------------

    def begin(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        self._traced = torch.compiler.is_compiling()
        if not self._traced and self._groups is None:
            self._groups = self._group_by_device(model)
        self._step = {}

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model, called when its forward raises too."""
        self._step, self._traced = None, False

    def factors(self, slot_id: int, device: torch.device, dtype: torch.dtype) -> Factors:
        """The factors of one layer, differentiable in theta_d."""
        if torch.compiler.is_compiling():
            return self._traced_factors(slot_id, device, dtype)
        step, groups = self._step, self._groups
        if step is not None and groups is not None:
            group = groups.get(device)
            if group is not None and slot_id in group.slot_ids:
                # Under no_grad and outside it (reentrant checkpointing does both in one forward): one theta_D each.
                key = (device, dtype, torch.is_grad_enabled())
                if key not in step:
                    step[key] = self._project(group, device, dtype)
                return step[key][slot_id]
            self._groups = None  # the layer has moved to another device: look again at the next forward
        return self._project(self._alone(slot_id, device), device, dtype)[slot_id]

    def _project(self, group: _DeviceGroup, device: torch.device, dtype: torch.dtype) -> dict[int, Factors]:
        shapes = [shape for i in group.slot_ids for shape in self.slots[i].shapes]
        factors = ops.project_factors(self.theta_d.to(device), group.rows, shapes, dtype)
        pairs = zip(group.slot_ids, factors[::2], factors[1::2], strict=True)
        return {i: self.slots[i].factors(first, second) for i, first, second in pairs}

    def _traced_factors(self, slot_id: int, device: torch.device, dtype: torch.dtype) -> Factors:
        """:meth:`factors` in a graph that torch.compile or torch.export traces. Where the graph is that of the whole
        model, the first layer projects for all."""
        whole = self._traced and device == self.theta_d.device
        step = self._step if whole else {}
        key = (device, dtype, torch.is_grad_enabled())
        if key not in step:
            slots = self.slots if whole else self.slots[slot_id : slot_id + 1]
            factors = ops.project_traced(
                self.theta_d.to(device),
                self.projection,
                ((slots[0].start, slots[-1].stop),),
                [shape for slot in slots for shape in slot.shapes],
                dtype,
            )
            first = 0 if whole else slot_id
            step[key] = {first + k: slot.factors(*factors[2 * k : 2 * k + 2]) for k, slot in enumerate(slots)}
        return step[key][slot_id]

    def _alone(self, slot_id: int, device: torch.device) -> _DeviceGroup:
        slot = self.slots[slot_id]
        if len(self.slots) == 1:
            return _DeviceGroup((slot_id,), self.projection.rows(device))
        return _DeviceGroup((slot_id,), self.projection.rows(device, [(slot.start, slot.stop)]))

    def _group_by_device(self, model: nn.Module) -> dict[torch.device, _DeviceGroup]:
        members: dict[torch.device, list[int]] = {}
        for slot_id, device in self._places(model):
            members.setdefault(device, []).append(slot_id)
        groups = {}
        for device, slot_ids in members.items():
            slot_ids.sort()
            ranges = _joined([(self.slots[i].start, self.slots[i].stop) for i in slot_ids])
            groups[device] = _DeviceGroup(tuple(slot_ids), self.projection.rows(device, ranges))
        return groups

    def _places(self, model: nn.Module) -> Iterator[tuple[int, torch.device]]:
        """(slot, device) of this vector's layers in `model`."""
        for module in model.modules():
            state = module.__dict__.get("_unilora")
            if state is not None and state.vector is self:
                yield state.slot_id, module.factors_like()[0]

    # -- what must not outlive a move or a copy -----------------------------------------------------------------------

    def _forget(self) -> None:
        self._step: dict[tuple[torch.device, torch.dtype, bool], dict[int, Factors]] | None = None
        self._groups: dict[torch.device, _DeviceGroup] | None = None
        self._traced = False  # whether the model's forward is being traced, as a whole

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_step": None, "_groups": None, "_traced": False}

    def extra_repr(self) -> str:
        return f"d={self.projection.d}, projection={self.projection}, layers={len(self.slots)}"


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges with neighbours merged."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined
