"""Tensors that are spread over processes (DTensor), beside plain ones; PyTorch's DTensor is imported by its users."""

from __future__ import annotations

import sys

from torch import Tensor, nn

__all__ = ["copy_", "exchange_", "full", "is_sharded", "is_writer", "managed_by_fsdp", "reshard"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a ``torch.distributed.tensor.DTensor``."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def managed_by_fsdp(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to `module` or to a part of it: its parameters come and go, and what is
    written to them may be lost."""
    return any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules())


def reshard(model: nn.Module) -> None:
    """Puts the parameters that ``fully_shard`` manages to rest, as DTensors: after an evaluation the root's are still
    whole, in a copy."""
    for part in model.modules():
        if getattr(part, "_is_fsdp_managed_module", False) and hasattr(part, "reshard"):
            part.reshard()


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, detached; for a DTensor a collective: every process of its mesh must call."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor.detach()


def is_writer(tensor: Tensor) -> bool:
    """Whether this process writes `tensor` to a file: for a DTensor, the first of its mesh alone."""
    return not is_sharded(tensor) or not any(tensor.device_mesh.get_coordinate())


def copy_(target: Tensor, value: Tensor) -> None:
    """``target.data.copy_(value)``; a DTensor takes its shard of a whole `value`."""
    if is_sharded(target) and not is_sharded(value):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(device=target.device, dtype=target.dtype)
        # src_data_rank=None: every process has the value, so nothing is sent
        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    target.data.copy_(value)


def exchange_(target: Tensor, value: Tensor) -> Tensor:
    """Puts `value` into `target` and returns what was there."""
    if is_sharded(target):  # an assignment to .data of a DTensor does not reach its shard
        before = target.detach().clone()
        copy_(target, value)
    else:
        before, target.data = target.data, value
    return before
