"""The one trainable vector of a model, and the one projection of a forward pass."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Variable, forward_ad
from torch.autograd.graph import get_gradient_edge

from unilora_ext.errors import UniLoRAError
from unilora_ext.functional import accumulator_dtype, autocast_dtype, graph_is_traced
from unilora_ext.layout import Layout, Order, Range, Reduction, Slot, joined
from unilora_ext.projections import Projection, Restriction
from unilora_ext.projections.base import faking
from unilora_ext.sharded_tensors import full, is_sharded
from unilora_ext.updates import Update

__all__ = ["SharedVector"]

logger = logging.getLogger("unilora_ext")

_MODULE_CALL = nn.Module._call_impl.__code__
"""What calls a module's hooks and its forward."""

_NONE: dict[int, Update] = {}

_Kind = tuple[torch.device, torch.dtype, int, bool]
"""Of updates: device, dtype, the stream that makes them and alone may read them without waiting, and whether they have
gradients. A forward may ask for both (reentrant checkpointing)."""


@dataclass(frozen=True)
class _Group:
    """Slots that are projected together, by number, in order, and their rows of P."""

    slots: dict[int, Slot]
    restriction: Restriction
    reduction: Reduction | None


@dataclass
class _Step:
    """theta_D in one forward of the model.

    Attributes:
        keeps: whether what it makes without gradients may serve the next forward.
        last: the forward before, if that keeps something.
        made: the updates by kind, then by slot.
        values: theta_d and the trained parts, of which all that may be kept is made: copies, taken when a layer asks
            for the first time (a hook that runs before may write).
    """

    keeps: bool = False
    last: _Step | None = None
    made: dict[_Kind, dict[int, Update]] = field(default_factory=dict)
    values: tuple[Tensor, ...] | None = None

    def look_at(self, values: tuple[Tensor, ...]) -> None:
        """Takes the values of theta_d and the trained parts. The last forward serves only if all are what they were,
        compared one by one: no write can escape that."""
        if self.values is None:
            if self.last is not None and all(map(_same, self.last.values, values)):
                self.values = self.last.values
            else:
                self.last = None  # first: another thread may find the values
                self.values = _kept(lambda: tuple(tensor.clone() for tensor in values))

    def made_last(self, kind: _Kind) -> dict[int, Update]:
        """The updates of this kind that the last forward left, by slot."""
        return _NONE if self.last is None else self.last.made.get(kind, _NONE)

    def kept(self) -> _Step | None:
        """What the next forward may use; None: nothing."""
        made = {kind: updates for kind, updates in list(self.made.items()) if not kind[-1]}
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
        projection: P. Its trained parts are parameters of this module, under their names.
        layout: of theta_D.
        slots: what this process holds of each layer.
        scaling: s of every layer.
        enabled: whether the layers add their update.
        asked: while not None, the slots that ask for their update outside a traced graph are put in it.

    Args:
        start: ``theta_d`` and the trained parts; None: a subclass finds theta_d elsewhere.
        projection, layout, slots, scaling: as above; slots None: all of every layer.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor] | None,
        projection: Projection,
        layout: Layout,
        slots: Sequence[Slot] | None = None,
        scaling: float = 1.0,
    ) -> None:
        super().__init__()
        for name, value in (start or {}).items():
            self.register_parameter(name, nn.Parameter(value))
        self.projection, self.layout, self.scaling = projection, layout, scaling
        self.slots = tuple(layout.slot(i) for i in range(len(layout))) if slots is None else tuple(slots)
        self.enabled = True
        self.asked: set[int] | None = None
        self._forget()

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """All that is trained: theta_d, and the projection's trained parts."""
        return {"theta_d": self.theta_d, **{name: getattr(self, name) for name in self.projection.trained}}

    def _values(self) -> tuple[Tensor, ...]:
        """theta_d and the trained parts."""
        return (self.theta_d, *(getattr(self, name) for name in self.projection.trained))

    def replace(self, projection: Projection, theta_d: Tensor) -> None:
        """Goes on with another P, and the values of `theta_d` [projection.d] in the same parameter, which loses its
        gradient. The backward of a forward from before raises."""
        parameter = self.theta_d
        theta_d = theta_d.to(accumulator_dtype(parameter.dtype))
        in_between = theta_d.to(torch.float32 if theta_d.dtype == torch.float64 else torch.float64)
        if parameter.requires_grad:
            get_gradient_edge(parameter).node.register_prehook(_outdated)
        parameter.grad = None
        # A graph that is still there keeps what accumulates the gradient, for the old length. PyTorch makes another one
        # where the dtype changes, not where the length does.
        parameter.data = in_between
        parameter.data = theta_d
        self.projection = projection
        self._forget()

    def forward(self, x: Any) -> Any:
        """The identity, so that a model that chains its children (``nn.Sequential``) may hold one."""
        return x

    # -- the forward pass of the model --------------------------------------------------------------------------------

    def begin(self, model: nn.Module, args: Any) -> None:
        """Forward pre-hook of the model."""
        if graph_is_traced():
            if self.enabled and _for_onnx():
                raise UniLoRAError(
                    "torch.onnx.export: ONNX has no operator for the projection: export the plain model with the "
                    "update in it, which detach(merge=True) returns"
                )
            self._traced = self._trace_all(model) if self.enabled and self._together else None
            return
        self._keep_wide()
        if faking():
            return  # fakes are not kept: each layer projects its own rows
        if self._groups is None and self._together:
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

    def _keep_wide(self) -> None:
        """Takes a narrower dtype back that something wrote into ``.data`` (trainers do so on quantised models): small
        steps would be lost in 16 bits. The values from before are still there, if nothing else was written."""
        for name, parameter in self.trained.items():
            if (wide := accumulator_dtype(parameter.dtype)) is parameter.dtype:
                self._wide[name] = parameter.data
                continue
            last = self._wide.get(name)
            same = last is not None and last.shape == parameter.shape and last.device == parameter.device
            unchanged = same and torch.equal(last.to(parameter.dtype), parameter.data)
            logger.warning(
                "%s was cast to %s: it is trained in %s, where small steps are not lost", name, parameter.dtype, wide
            )
            parameter.data = last if unchanged else parameter.data.to(wide)

    @property
    def _together(self) -> bool:
        """Whether layers are projected together: all dense updates at once would be as large as the model."""
        return self.layout.order is not Order.DENSE

    def _may_keep(self, model: nn.Module) -> bool:
        """Whether this is an evaluation, and theta_d plain numbers of which nothing is differentiated."""
        if model.training or torch.is_grad_enabled() or forward_ad._current_level >= 0:
            return False
        if any(type(t) not in (Tensor, nn.Parameter) or t.is_meta for t in self._values()):
            return False
        # A CUDA graph that is captured must not compare, nor read what is kept when it is replayed.
        return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())

    def update(self, slot_id: int, device: torch.device, dtype: torch.dtype) -> Update:
        """The update of one layer (of this process's slice of it), differentiable in all that is trained."""
        if torch.compiler.is_compiling():
            return self._traced_update(slot_id, device, dtype)
        if (asked := self.asked) is not None:
            asked.add(slot_id)
        step = self._step
        if step is None or not self._is_running():
            if graph_is_traced():
                return self._traced_update(slot_id, device, dtype)
            step = self._recomputation()
        if step is not None:
            kind = device, dtype, _stream(device), torch.is_grad_enabled()
            found = step.made.get(kind, _NONE).get(slot_id)
            if found is not None or (found := self._project_together(step, slot_id, kind)) is not None:
                return found
        return self.fresh_update(slot_id, device, dtype, self.slots[slot_id])

    def _project_together(self, step: _Step, slot_id: int, kind: _Kind) -> Update | None:
        """The update of a layer, made with those of all layers of its place; None: it was not there before."""
        device, dtype, _, with_gradients = kind
        place = device, self.slots[slot_id].reduction
        group = None if (groups := self._groups) is None else groups.get(place)
        if group is None or slot_id not in group.slots:
            self._groups = None  # the layer has moved to another device: look again at the next forward
            return None
        if step.keeps and not with_gradients:
            step.look_at(self._values())
            updates = step.made_last(kind)
            if slot_id not in updates:
                updates = _kept(lambda: self._projected(step.values, group, dtype))
        else:
            updates = self._projected(self._whole_values(), group, dtype)
        step.made.setdefault(kind, {}).update(updates)
        return updates[slot_id]

    def _projected(self, values: Sequence[Tensor], group: _Group, dtype: torch.dtype) -> dict[int, Update]:
        theta_d, *trained = (_moved(tensor, group.restriction.device, group.reduction) for tensor in values)
        shapes = [shape for slot in group.slots.values() for shape in slot.shapes]
        return self._by_slot(group.slots, group.restriction.matrices(theta_d, shapes, dtype, trained))

    def fresh_update(self, slot_id: int, device: torch.device, dtype: torch.dtype, slot: Slot | None = None) -> Update:
        """The update of one layer, projected now: all of it, whatever this process holds, or that of `slot`."""
        slot = self.layout.slot(slot_id) if slot is None else slot
        if graph_is_traced():
            return self._trace({slot_id: slot}, slot.reduction, device, dtype)[slot_id]
        group = _Group({slot_id: slot}, self.projection.restrict(device, slot.ranges), slot.reduction)
        return self._projected(self._whole_values(), group, dtype)[slot_id]

    def _traced_update(self, slot_id: int, device: torch.device, dtype: torch.dtype) -> Update:
        """:meth:`update` in a graph that torch.compile or torch.export traces. Where the graph is that of the whole
        model, :meth:`begin` has projected for all; nothing is changed here, which checkpointed parts may not do."""
        slot = self.slots[slot_id]
        if self._traced is not None and slot_id in self._traced and device == self.theta_d.device:
            matrices = self._traced[slot_id]
            # From the dtype of the sums, rounding to the layer's gives what the operator would; from another, it would
            # round twice, or not be undone.
            if matrices[0].dtype in (dtype, accumulator_dtype(self.theta_d.dtype)):
                return slot.update([matrix.to(dtype) for matrix in matrices], self.scaling)
        return self.fresh_update(slot_id, device, dtype, slot)

    def _trace_all(self, model: nn.Module) -> dict[int, Sequence[Tensor]]:
        """The matrices of all layers in `model`, in the dtype in which each computes, by slot."""
        together: dict[tuple[Reduction | None, torch.dtype], dict[int, Slot]] = {}
        for slot_id, device, dtype in self._layers(model):
            slot = self.slots[slot_id]
            together.setdefault((slot.reduction, autocast_dtype(device, dtype)), {})[slot_id] = slot
        matrices: dict[int, Sequence[Tensor]] = {}
        for (reduction, dtype), slots in together.items():
            in_order = {slot_id: slots[slot_id] for slot_id in sorted(slots)}
            matrices |= self._trace_matrices(in_order, reduction, self.theta_d.device, dtype)
        return matrices

    def _trace_matrices(
        self, slots: dict[int, Slot], reduction: Reduction | None, device: torch.device, dtype: torch.dtype
    ) -> dict[int, Sequence[Tensor]]:
        theta_d, *trained = (_moved(tensor, device, reduction) for tensor in self._whole_values())
        shapes = [shape for slot in slots.values() for shape in slot.shapes]
        matrices = self.projection.matrices_in_graph(theta_d, _ranges_of(slots), shapes, dtype, trained)
        return _split_by_slot(slots, matrices)

    def _trace(
        self, slots: dict[int, Slot], reduction: Reduction | None, device: torch.device, dtype: torch.dtype
    ) -> dict[int, Update]:
        matrices = self._trace_matrices(slots, reduction, device, dtype)
        return {i: slot.update(matrices[i], self.scaling) for i, slot in slots.items()}

    def _by_slot(self, slots: dict[int, Slot], matrices: Sequence[Tensor]) -> dict[int, Update]:
        parts = _split_by_slot(slots, matrices)
        return {i: slot.update(parts[i], self.scaling) for i, slot in slots.items()}

    def _recomputation(self) -> _Step | None:
        """The step of the layers that a backward pass computes anew (activation checkpointing): one projection for all
        of them, while theta_d and the trained parts are not written. None: no backward pass is running."""
        task = torch._C._current_graph_task_id()
        if task < 0:
            return None
        state = task, *((id(tensor), tensor._version) for tensor in self._values())
        if self._anew is None or self._anew[0] != state:
            self._anew = state, _Step()
            Variable._execution_engine.queue_callback(self._end_recomputation)
        return self._anew[1]

    def _end_recomputation(self) -> None:
        self._anew = None

    def _is_running(self) -> bool:
        """Whether the forward that :meth:`begin` began is still running, in this thread."""
        call, frame = self._call, sys._getframe(1)
        while frame is not None and frame is not call:
            frame = frame.f_back
        return frame is not None

    def _whole_values(self) -> tuple[Tensor, ...]:
        values = self._values()
        if not any(map(is_sharded, values)):
            return values
        if torch.is_grad_enabled():
            raise UniLoRAError(
                "theta_d is sharded by fully_shard, and whole only while the forward of the model runs: a layer called "
                "alone has no gradient to give. unilora_ext.distributed.fully_shard keeps theta_d whole"
            )
        return tuple(map(full, values))

    def _group_by_place(self, model: nn.Module) -> dict[tuple[torch.device, Reduction | None], _Group]:
        members: dict[tuple[torch.device, Reduction | None], set[int]] = {}
        for slot_id, device, _ in self._layers(model):
            members.setdefault((device, self.slots[slot_id].reduction), set()).add(slot_id)
        groups = {}
        for (device, reduction), slot_ids in members.items():
            slots = {slot_id: self.slots[slot_id] for slot_id in sorted(slot_ids)}
            groups[device, reduction] = _Group(slots, self.projection.restrict(device, _ranges_of(slots)), reduction)
        return groups

    def _layers(self, model: nn.Module) -> list[tuple[int, torch.device, torch.dtype]]:
        """(slot, device, dtype) of this vector's layers in `model`."""
        layers = []
        for module in model.modules():
            state = module.__dict__.get("_unilora")
            if state is not None and state.vector is self:
                layers.append((state.slot_id, *module.update_like()))
        return layers

    # -- what must not outlive a move or a copy -----------------------------------------------------------------------

    def _forget(self) -> None:
        self._step: _Step | None = None  # while the model's forward runs
        self._call: FrameType | None = None  # of the model, meanwhile
        self._anew: tuple[tuple[Any, ...], _Step] | None = None  # while a backward pass runs
        self._kept: _Step | None = None  # between two
        self._groups: dict[tuple[torch.device, Reduction | None], _Group] | None = None
        self._wide = {name: parameter.data for name, parameter in self._parameters.items()}  # as it was last
        # While the model's forward is traced:
        self._traced: dict[int, Sequence[Tensor]] | None = None

    def _apply(self, fn, recurse: bool = True):
        def moved(tensor: Tensor) -> Tensor:
            """To the device that `fn` moves to, values kept (to_empty() is for the weights), and not narrowed with the
            weights: small steps would be lost in 16 bits."""
            target = fn(tensor)
            return target if tensor.is_meta else tensor.to(target.device, accumulator_dtype(target.dtype))

        super()._apply(moved, recurse)
        self._forget()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for key in (prefix + name for name in ("theta_d", *self.projection.trained)):
            stored = state_dict.get(key)
            if isinstance(stored, Tensor) and stored.is_floating_point():  # with assign=True its dtype would stay
                state_dict[key] = stored.to(accumulator_dtype(stored.dtype))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        passing = dict.fromkeys(("_step", "_call", "_anew", "_kept", "_groups", "_traced"))
        return {**self.__dict__, **passing, "_wide": {}}

    def extra_repr(self) -> str:
        return f"d={self.projection.d}, projection={self.projection}, layers={len(self.slots)}"


def _outdated(gradients: Sequence[Tensor]) -> None:
    raise RuntimeError("unilora: theta_d was replaced by one of another length between the forward and its backward")


_Made = TypeVar("_Made")


@torch.inference_mode(False)
@torch.no_grad()
def _kept(make: Callable[[], _Made]) -> _Made:
    """What `make` makes, without gradients; in inference mode too, ordinary tensors that may outlive it."""
    return make()


def _moved(tensor: Tensor, device: torch.device, reduction: Reduction | None) -> Tensor:
    tensor = tensor.to(device)
    return tensor if reduction is None else reduction(tensor)


def _for_onnx() -> bool:
    """Whether the graph that is traced is for ``torch.onnx.export``, which says so of one of its two exporters only."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith("torch.onnx."):
        frame = frame.f_back
    return frame is not None


_for_onnx._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, which would import dynamo


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _ranges_of(slots: dict[int, Slot]) -> tuple[Range, ...]:
    return tuple(joined([bounds for slot in slots.values() for bounds in slot.ranges]))


def _split_by_slot(slots: dict[int, Slot], matrices: Sequence[Tensor]) -> dict[int, Sequence[Tensor]]:
    """The matrices of each slot from those of all, as they lie in theta_D."""
    start, parts = 0, {}
    for slot_id, slot in slots.items():
        stop = start + len(slot.shapes)
        parts[slot_id], start = matrices[start:stop], stop
    return parts
