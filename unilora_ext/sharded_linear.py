"""Linear layers sharded by torch.distributed.tensor.parallel: every process computes its slice of W and of the factors.

With W [m, n] on N processes, process p holds

    ColwiseParallel   W_p = W[m0:m1, :]    B_p = B[m0:m1, :], A        y_p = x W_p^T + b_p + s (x A^T) B_p^T
    RowwiseParallel   W_p = W[:, n0:n1]    B, A_p = A[:, n0:n1]        y = sum_p x_p W_p^T + s (x_p A_p^T) B^T, + b

and projects the rows of P of B_p and A_p alone. Its gradient of theta_d is a term of a sum: one all-reduce of d numbers
a step gives it. Layers that are not sharded do the same work on every process, and do not go through that sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from unilora_ext.errors import UniLoRAError
from unilora_ext.functional import autocast_dtype
from unilora_ext.layout import Layout, Slot
from unilora_ext.linear import UniLoRALinear

__all__ = ["GradientSum", "UniLoRAShardedLinear", "problem_of"]


class _SumGradient(torch.autograd.Function):
    """The identity; its backward is a sum over the processes of a mesh."""

    @staticmethod
    def forward(ctx, theta_d, group):
        ctx.group = group
        return theta_d.view_as(theta_d)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


@dataclass(frozen=True)
class GradientSum:
    """theta_d -> theta_d; in the backward, its gradient [d] is summed over the processes of `mesh`."""

    mesh: DeviceMesh

    def __call__(self, theta_d: Tensor) -> Tensor:
        return _SumGradient.apply(theta_d, self.mesh.get_group())

    def broadcast_(self, theta_d: Tensor) -> None:
        """Sends theta_d of the first process to the others, as ``parallelize_module`` does with the weights."""
        sent = theta_d.to(self.mesh.device_type)
        dist.broadcast(sent, group=self.mesh.get_group(), group_src=0)
        theta_d.copy_(sent)

    def __deepcopy__(self, memo: dict) -> GradientSum:
        return self  # a process group cannot be copied


def problem_of(linear: nn.Linear) -> str | None:
    """Why the layer's DTensor weight cannot be adapted; None: it can."""
    mesh, placements = linear.weight.device_mesh, linear.weight.placements
    if mesh.ndim != 1 or placements not in ((Shard(0),), (Shard(1),)):
        return (
            f"expected a weight sharded by ColwiseParallel or RowwiseParallel on one mesh, got {placements} on {mesh}"
        )
    dim = placements[0].dim
    start, stop = _local_range(linear.weight.shape[dim], mesh)
    local = linear.weight.to_local().shape[dim]
    if local != stop - start:
        return f"expected positions [{start}, {stop}) of dimension {dim} here, as torch.chunk gives, got {local}"
    return None


class UniLoRAShardedLinear(UniLoRALinear):
    """A linear layer under ``ColwiseParallel`` or ``RowwiseParallel``, with a Uni-LoRA update.

    Shape: a DTensor x [..., in_features] -> y [..., out_features], sharded over the outputs (column-wise) or a sum over
    the processes (row-wise), as ``nn.Linear`` gives; the hooks of the parallel style convert it on both sides.
    """

    @classmethod
    def local_slot(cls, linear: nn.Module, layout: Layout, slot_id: int) -> Slot:
        mesh, by_rows = linear.weight.device_mesh, linear.weight.placements == (Shard(1),)
        local = _local_range(layout.shapes[slot_id][by_rows], mesh)
        return layout.slot(slot_id, **{"inputs" if by_rows else "outputs": local}, reduction=GradientSum(mesh))

    @property
    def _by_rows(self) -> bool:
        """RowwiseParallel: the inputs are spread over the processes."""
        return self.weight.placements[0].dim == 1

    def forward(self, input: Tensor) -> Tensor:
        x, state = self._laid_out(input), self._unilora
        # Column-wise, every process adds what its outputs give to the gradient of the same x.
        local_x = x.to_local() if self._by_rows else x.to_local(grad_placements=[Partial()])
        weight, bias = self.weight.to_local(), self._local_bias()
        if state.original is not None or not state.vector.enabled:
            return self._spread(F.linear(local_x, weight, bias), x)
        update = self._update(self.weight.device, autocast_dtype(x.device, self.weight.dtype))
        if self._dropping():
            y, dropped = F.linear(local_x, weight, bias), F.dropout(local_x, state.dropout)
            return self._spread(update.added(y, dropped), x)
        return self._spread(update.linear(local_x, weight, bias), x)

    def _laid_out(self, x: Any) -> DTensor:
        """x with its last dimension spread as that of W is."""
        if not isinstance(x, DTensor):
            raise UniLoRAError(
                f"{self}: x: expected a DTensor, as the hooks of ColwiseParallel and RowwiseParallel give, "
                f"got {type(x).__name__}"
            )
        wanted: Placement = Shard(x.ndim - 1) if self._by_rows else Replicate()
        last = x.placements[0]
        if last == wanted or (self._by_rows and last == Shard(-1)):
            return x
        return x.redistribute(placements=[wanted])

    def _local_bias(self) -> Tensor | None:
        if self.bias is None or (self._by_rows and self.weight.device_mesh.get_local_rank() != 0):
            return None  # row-wise, y is a sum: one process adds b
        return self.bias.to_local()

    def _spread(self, y: Tensor, x: DTensor) -> DTensor:
        """The local y as a DTensor [..., out_features]; its size is said, since it may not divide evenly."""
        placement = Partial() if self._by_rows else Shard(y.ndim - 1)
        return _from_local(y, (*x.shape[:-1], self.out_features), self.weight.device_mesh, placement)

    def delta_weight(self) -> Tensor:
        """s B A [m, n], in float32 (float64 for a float64 weight), sharded as the weight is."""
        return _from_local(super().delta_weight(), self.weight.shape, self.weight.device_mesh, *self.weight.placements)


def _local_range(size: int, mesh: DeviceMesh) -> tuple[int, int]:
    """Positions [start, stop) that this process holds of a dimension sharded over `mesh` (as ``torch.chunk`` does)."""
    chunk = -(-size // mesh.size())
    start = min(mesh.get_local_rank() * chunk, size)
    return start, min(start + chunk, size)


def _from_local(local: Tensor, shape: Any, mesh: DeviceMesh, placement: Placement) -> DTensor:
    shape = torch.Size(shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [placement], run_check=False, shape=shape, stride=stride)
