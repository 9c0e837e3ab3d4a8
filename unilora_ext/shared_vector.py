"""The one trainable vector of a model, and the one projection of a forward pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from unilora_ext import ops
from unilora_ext.errors import UniLoRAError
from unilora_ext.projections import Projection, Rows
from unilora_ext.projections.rows import faking
from unilora_ext.sharded_tensors import full, is_sharded

__all__ = ["Part", "Reduction", "SharedVector", "Slot"]

_MODULE_CALL = nn.Module._call_impl.__code__
"""What calls a module's hooks and its forward."""

Factors = tuple[Tensor, Tensor]
"""(A [r, n], B [m, r])"""

_NONE: dict[int, Factors] = {}


@dataclass(frozen=True)
class Slot:
    """Where a layer's factors lie in theta_D: vec_row(B [m, r]), then vec_row(A [r, n]) (paper, section 3.1); with
    `a_first`, A before B (PEFT)."""

    start: int
    m: int
    n: int
    r: int
    a_first: bool = False

    @property
    def stop(self) -> int:
        return self.start + (self.m + self.n) * self.r

    def part(
        self,
        outputs: tuple[int, int] | None = None,
        inputs: tuple[int, int] | None = None,
        reduction: Reduction | None = None,
    ) -> Part:
        """The factors of a slice of W: rows [m0, m1) of B and columns [n0, n1) of A; None: all of them."""
        m0, m1 = outputs or (0, self.m)
        n0, n1 = inputs or (0, self.n)
        start_A = self.start if self.a_first else self.start + self.m * self.r
        start_B = self.start + self.r * self.n if self.a_first else self.start
        of_A = [(start_A + k * self.n + n0, start_A + k * self.n + n1) for k in range(self.r)]
        of_B = [(start_B + m0 * self.r, start_B + m1 * self.r)]
        ranges = _joined([*of_A, *of_B] if self.a_first else [*of_B, *of_A])
        return Part(tuple(ranges), m1 - m0, n1 - n0, self.r, self.a_first, reduction)


class Reduction(Protocol):
    """What processes that hold parts of one layer do together. Hashable."""

    def __call__(self, theta_d: Tensor) -> Tensor:
        """theta_d; in the backward, its gradient is summed over the processes."""

    def agree(self, theta_d: Tensor) -> None:
        """Overwrites theta_d with that of the first process."""


@dataclass(frozen=True)
class Part:
    """What one process holds of a layer's factors: all of them, or those of its slice of W.

    Attributes:
        ranges: the positions in theta_D of B [m, r], then of A [r, n]; with `a_first`, of A, then of B.
        m, n: shape of the slice of W.
        r: rank.
        reduction: of the processes that hold the other parts; None where this part is the whole.
    """

    ranges: tuple[tuple[int, int], ...]
    m: int
    n: int
    r: int
    a_first: bool = False
    reduction: Reduction | None = None

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the two factors as they lie in theta_D."""
        A, B = (self.r, self.n), (self.m, self.r)
        return (A, B) if self.a_first else (B, A)

    def factors(self, first: Tensor, second: Tensor) -> Factors:
        """(A, B) from the two as they lie in theta_D."""
        return (first, second) if self.a_first else (second, first)


@dataclass(frozen=True)
class _Group:
    """The parts that are projected together, by slot, in order, and their rows of P."""

    parts: dict[int, Part]
    rows: Rows


_Place = tuple[torch.device, Reduction | None]
"""What the parts of one projection have in common: the device and the reduction of the gradient."""


_Kind = tuple[torch.device, torch.dtype, bool]
"""Of factors: device, dtype, and whether they have gradients. A forward may ask for both (reentrant checkpointing)."""


@dataclass
class _Step:
    """theta_D in one forward of the model.

    Attributes:
        keeps: whether what it makes without gradients may serve the next forward.
        last: the forward before, if that keeps something.
        made: the factors by kind, then by slot.
        values: theta_d [d], of which all that may be kept is made: a copy, taken when a layer asks for the first time
            (a hook that runs before may write).
    """

    keeps: bool = False
    last: _Step | None = None
    made: dict[_Kind, dict[int, Factors]] = field(default_factory=dict)
    values: Tensor | None = None

    def look_at(self, theta_d: Tensor) -> None:
        """Takes the values of theta_d. The last forward serves only if all d are what they were, compared one by one:
        no write can escape that."""
        if self.values is None:
            if self.last is not None and _same(self.last.values, theta_d):
                self.values = self.last.values
            else:
                self.last = None  # first: another thread may find the values
                self.values = _ordinary_copy(theta_d)

    def made_last(self, kind: _Kind) -> dict[int, Factors]:
        """The factors of this kind that the last forward left, by slot."""
        return _NONE if self.last is None else self.last.made.get(kind, _NONE)

    def kept(self) -> _Step | None:
        """What the next forward may use; None: nothing."""
        made = {kind: factors for kind, factors in list(self.made.items()) if not kind[-1]}
        return _Step(made=made, values=self.values) if self.keeps and made else None


class SharedVector(nn.Module):
    """theta_d, its projection and, while the model's forward runs, theta_D.

    The model calls :meth:`begin` and :meth:`end` around its forward (they are its hooks). In between, the first layer
    that asks projects for all layers of its device. What an evaluation without gradients has projected serves the next
    one (the tokens of a text) as long as theta_d has the same values, which are compared: a write to theta_d by any
    means is seen by the next forward. A layer that runs outside (a sub-module called alone, a recomputation under
    activation checkpointing) projects its own rows of P: the same values and gradients.

    PyTorch leaves out :meth:`end` where the forward ends in a KeyboardInterrupt or another exception that is no
    ``Exception``. So what it projected is used only where the call of the model is on the stack.

    Attributes:
        theta_d: [d], float32, or float64 in a float64 model: the trainable vector.
        projection: P.
        slots: where each layer's factors lie in theta_D.
        parts: what this process holds of each.
        enabled: whether the layers add their update.
        asked: while not None, the slots that ask for their factors outside a traced graph are put in it.
    """

    def __init__(
        self,
        theta_d: Tensor | None,
        projection: Projection,
        slots: Sequence[Slot],
        parts: Sequence[Part] | None = None,
    ) -> None:
        super().__init__()
        if theta_d is not None:  # None: a subclass finds it elsewhere
            self.theta_d = nn.Parameter(theta_d)
        self.projection = projection
        self.slots = tuple(slots)
        self.parts = tuple(slot.part() for slot in slots) if parts is None else tuple(parts)
        self.enabled = True
        self.asked: set[int] | None = None
        self._forget()

    def forward(self, x: Any) -> Any:
        """The identity, so that a model that chains its children (``nn.Sequential``) may hold one."""
        return x

    # -- the forward pass of the model --------------------------------------------------------------------------------

    def begin(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        if ops.graph_is_traced():
            self._traced = self._trace_all() if self.enabled else None
            return
        if faking():
            return  # fakes are not kept: each layer projects its own rows
        if self._groups is None:
            self._groups = self._group_by_place(model)
        last, self._kept = self._kept, None
        self._step = _Step(keeps=True, last=last) if self._may_keep(model) else _Step()
        call = sys._getframe(1)
        while call is not None and call.f_code is not _MODULE_CALL:
            call = call.f_back
        self._call = call

    def end(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model, called when its forward raises too."""
        step = self._step
        self._step = self._call = self._traced = None
        self._kept = None if step is None else step.kept()

    def _may_keep(self, model: nn.Module) -> bool:
        """Whether this is an evaluation, and theta_d plain numbers of which nothing is differentiated."""
        if model.training or torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return False
        if type(self.theta_d) not in (Tensor, nn.Parameter) or self.theta_d.is_meta:
            return False
        # A CUDA graph that is captured must not compare, nor read what is kept when it is replayed.
        return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())

    def factors(self, slot_id: int, device: torch.device, dtype: torch.dtype) -> Factors:
        """The factors of one layer (of this process's part of it), differentiable in theta_d."""
        if torch.compiler.is_compiling():
            return self._traced_factors(slot_id, device, dtype)
        if (asked := self.asked) is not None:
            asked.add(slot_id)
        step, kind = self._step, (device, dtype, torch.is_grad_enabled())
        if step is not None and self._is_running():
            found = step.made.get(kind, _NONE).get(slot_id)
            if found is not None or (found := self._project_together(step, slot_id, kind)) is not None:
                return found
        if ops.graph_is_traced():
            return self._traced_factors(slot_id, device, dtype)
        return self.fresh_factors(slot_id, device, dtype, self.parts[slot_id])

    def _project_together(self, step: _Step, slot_id: int, kind: _Kind) -> Factors | None:
        """The factors of a layer, made with those of all layers of its place; None: it was not there before."""
        device, dtype, with_gradients = kind
        place = device, self.parts[slot_id].reduction
        group = None if (groups := self._groups) is None else groups.get(place)
        if group is None or slot_id not in group.parts:
            self._groups = None  # the layer has moved to another device: look again at the next forward
            return None
        if step.keeps and not with_gradients:
            step.look_at(self.theta_d)
            factors = step.made_last(kind)
            if slot_id not in factors:
                factors = _ordinary_projected(step.values, group, place, dtype)
        else:
            factors = _projected(self._theta_d(), group, place, dtype)
        step.made.setdefault(kind, {}).update(factors)
        return factors[slot_id]

    def fresh_factors(
        self, slot_id: int, device: torch.device, dtype: torch.dtype, part: Part | None = None
    ) -> Factors:
        """The factors of one layer, projected now: all of them, whatever this process holds, or those of `part`."""
        part = self.slots[slot_id].part() if part is None else part
        if ops.graph_is_traced():
            return self._trace({slot_id: part}, part.reduction, device, dtype)[slot_id]
        group = _Group({slot_id: part}, self.projection.rows(device, part.ranges))
        return _projected(self._theta_d(), group, (device, part.reduction), dtype)[slot_id]

    def _traced_factors(self, slot_id: int, device: torch.device, dtype: torch.dtype) -> Factors:
        """:meth:`factors` in a graph that torch.compile or torch.export traces. Where the graph is that of the whole
        model, :meth:`begin` has projected for all; nothing is changed here, which checkpointed parts may not do."""
        part = self.parts[slot_id]
        if self._traced is not None and device == self.theta_d.device:
            A, B = self._traced[part.reduction][slot_id]
            return A.to(dtype), B.to(dtype)
        return self.fresh_factors(slot_id, device, dtype, part)

    def _trace_all(self) -> dict[Reduction | None, dict[int, Factors]]:
        """All factors in the dtype of the sums; rounded to another later, they are what the operator gives."""
        together: dict[Reduction | None, dict[int, Part]] = {}
        for slot_id, part in enumerate(self.parts):
            together.setdefault(part.reduction, {})[slot_id] = part
        dtype = ops.accumulator_dtype(self.theta_d.dtype)
        return {r: self._trace(parts, r, self.theta_d.device, dtype) for r, parts in together.items()}

    def _trace(
        self, parts: dict[int, Part], reduction: Reduction | None, device: torch.device, dtype: torch.dtype
    ) -> dict[int, Factors]:
        theta_d = self._theta_d().to(device)
        factors = ops.project_traced(
            theta_d if reduction is None else reduction(theta_d),
            self.projection,
            tuple(_joined([bounds for part in parts.values() for bounds in part.ranges])),
            [shape for part in parts.values() for shape in part.shapes],
            dtype,
        )
        return _by_slot(parts, factors)

    def _is_running(self) -> bool:
        """Whether the forward that :meth:`begin` began is still running, in this thread."""
        call, frame = self._call, sys._getframe(1)
        while frame is not None and frame is not call:
            frame = frame.f_back
        return frame is not None

    def _theta_d(self) -> Tensor:
        if not is_sharded(self.theta_d):
            return self.theta_d
        if torch.is_grad_enabled():
            raise UniLoRAError(
                "theta_d is sharded by fully_shard, and whole only while the forward of the model runs: a layer called "
                "alone has no gradient to give. unilora_ext.distributed.fully_shard keeps theta_d whole"
            )
        return full(self.theta_d)

    def _group_by_place(self, model: nn.Module) -> dict[_Place, _Group]:
        members: dict[_Place, set[int]] = {}
        for slot_id, device in self._devices(model):
            members.setdefault((device, self.parts[slot_id].reduction), set()).add(slot_id)
        groups = {}
        for place, slot_ids in members.items():
            parts = {slot_id: self.parts[slot_id] for slot_id in sorted(slot_ids)}
            ranges = _joined([bounds for part in parts.values() for bounds in part.ranges])
            groups[place] = _Group(parts, self.projection.rows(place[0], ranges))
        return groups

    def _devices(self, model: nn.Module) -> Iterator[tuple[int, torch.device]]:
        """(slot, device) of this vector's layers in `model`."""
        for module in model.modules():
            state = module.__dict__.get("_unilora")
            if state is not None and state.vector is self:
                yield state.slot_id, module.factors_like()[0]

    # -- what must not outlive a move or a copy -----------------------------------------------------------------------

    def _forget(self) -> None:
        self._step: _Step | None = None  # while the model's forward runs
        self._call: FrameType | None = None  # of the model, meanwhile
        self._kept: _Step | None = None  # between two
        self._groups: dict[_Place, _Group] | None = None
        self._traced: dict[Reduction | None, dict[int, Factors]] | None = None  # while the model's forward is traced

    def _apply(self, fn, recurse: bool = True):
        def moved(tensor: Tensor) -> Tensor:
            """To the device that `fn` moves to, values kept (to_empty() is for the weights), and not narrowed with the
            weights: small steps would be lost in 16 bits."""
            target = fn(tensor)
            return target if tensor.is_meta else tensor.to(target.device, ops.accumulator_dtype(target.dtype))

        super()._apply(moved, recurse)
        self._forget()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(key := prefix + "theta_d")
        if isinstance(stored, Tensor) and stored.is_floating_point():  # with assign=True its dtype would stay
            state_dict[key] = stored.to(ops.accumulator_dtype(stored.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        passing = dict.fromkeys(("_step", "_call", "_kept", "_groups", "_traced"))
        return {**self.__dict__, **passing}

    def extra_repr(self) -> str:
        return f"d={self.projection.d}, projection={self.projection}, layers={len(self.slots)}"


def _projected(theta_d: Tensor, group: _Group, place: _Place, dtype: torch.dtype) -> dict[int, Factors]:
    device, reduction = place
    theta_d = theta_d.to(device)
    if reduction is not None:
        theta_d = reduction(theta_d)
    shapes = [shape for part in group.parts.values() for shape in part.shapes]
    return _by_slot(group.parts, ops.project_factors(theta_d, group.rows, shapes, dtype))


@torch.inference_mode(False)
@torch.no_grad()
def _ordinary_projected(theta_d: Tensor, group: _Group, place: _Place, dtype: torch.dtype) -> dict[int, Factors]:
    """:func:`_projected` without gradients; in inference mode too, ordinary tensors that may outlive it."""
    return _projected(theta_d, group, place, dtype)


@torch.inference_mode(False)
@torch.no_grad()
def _ordinary_copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _by_slot(parts: dict[int, Part], factors: Sequence[Tensor]) -> dict[int, Factors]:
    """The factors of each slot from all of them as they lie in theta_D."""
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return {i: part.factors(first, second) for (i, part), (first, second) in zip(parts.items(), pairs, strict=True)}


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges with neighbours merged and empty ones left out; the order is kept."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return joined
