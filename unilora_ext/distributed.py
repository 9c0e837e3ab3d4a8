"""Data-parallel training of an adapter: what is frozen may be sharded, what is trained is small and stays whole.

One process a device, started by ``torchrun``. ``DistributedDataParallel`` needs nothing of this. With FSDP2::

    adapter = ul.attach(model, config)
    for block in model.layers:
        torch.distributed.fsdp.fully_shard(block)
    ul.distributed.fully_shard(model)                    # last, in place of torch's

The weights are sharded; theta_d (and modules_to_save) are on every process, in float32 whatever the mixed-precision
policy. A step communicates the weights and d numbers: the gradient of theta_d.

Tensor parallelism needs nothing of this either: ``parallelize_module`` first, then ``attach`` (then ``fully_shard``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unilora_ext.adapter import Adapter, get_adapter
from unilora_ext.errors import UniLoRAError
from unilora_ext.sharded_tensors import is_sharded

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import FSDPModule

__all__ = ["fully_shard", "replicate"]


def fully_shard(
    model: nn.Module,
    *,
    mesh: DeviceMesh | None = None,
    ignored_params: Iterable[nn.Parameter] = (),
    **options: Any,
) -> FSDPModule:
    """``torch.distributed.fsdp.fully_shard`` of an attached model, with all that is trained replicated.

    Call torch's own ``fully_shard`` on the blocks first, then this on the model.

    Args:
        model: the model given to :func:`unilora_ext.attach`.
        mesh: of the data-parallel processes, 1-D (FSDP) or 2-D (HSDP); default: all processes.
        ignored_params: further parameters to leave alone, as in torch.
        **options: as in torch: reshard_after_forward, mp_policy, offload_policy, ...

    Returns:
        model.

    Raises:
        AttachError: the model has no adapter.
        UniLoRAError: a trained parameter is sharded already; nothing is then changed.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as torch_fully_shard

    adapter = get_adapter(model)
    _check_whole(model)
    if mesh is None:
        accelerator = torch.accelerator.current_accelerator()
        mesh = init_device_mesh(accelerator.type if accelerator else "cpu", (dist.get_world_size(),))
    trained = [p for p in model.parameters() if p.requires_grad]
    torch_fully_shard(model, mesh=mesh, ignored_params={*trained, *ignored_params}, **options)
    if mesh.device_type != "cpu":  # torch moves what it shards, and leaves the rest where it is
        for parameter in trained:
            parameter.data = parameter.data.to(mesh.device_type)
    replicate(adapter, mesh)
    return model


def replicate(adapter: Adapter, group: dist.ProcessGroup | DeviceMesh | None = None) -> None:
    """Keeps all that is trained (theta_d and modules_to_save) equal on all processes, without a wrapper.

    The values of the first process are sent to the others now. From now on every backward ends with a mean of the
    gradients over the processes: d numbers are reduced. Gradients may be accumulated over several backwards, clipped
    and given to any optimizer, as in one process.

    Args:
        adapter: attached, the same on all processes.
        group: the data-parallel processes; a mesh of several dimensions stands for all of them. Default: all processes.

    Raises:
        UniLoRAError: replicated already, or a trained parameter is sharded by ``fully_shard``; nothing is then changed.
    """
    attachment = adapter.attachment
    if attachment.replicated:
        raise UniLoRAError("replicate: this adapter is replicated already")
    _check_whole(adapter.model)
    groups = [group] if group is None or isinstance(group, dist.ProcessGroup) else group.get_all_groups()
    for parameter in adapter.model.parameters():
        if parameter.requires_grad:
            for each in groups:
                dist.broadcast(_local(parameter), group=each, group_src=0)
            attachment.handles.append(parameter.register_post_accumulate_grad_hook(_Mean(groups)))
    attachment.replicated = True


class _Mean:
    """Post-accumulate hook: the mean of a gradient over the processes of all groups.

    What was accumulated before is equal on all processes already, and so is its own mean: the mean of the sum is right
    after any number of backwards.
    """

    def __init__(self, groups: list[dist.ProcessGroup | None]) -> None:
        self.groups = groups

    def __call__(self, parameter: Tensor) -> None:
        gradient = _local(parameter.grad)
        for group in self.groups:
            dist.all_reduce(gradient, group=group)
            gradient /= dist.get_world_size(group)


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a part, where tensor parallelism shards a module of modules_to_save."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def _check_whole(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if not getattr(module, "_is_fsdp_managed_module", False):
            continue
        for key, parameter in module.named_parameters(prefix=name, recurse=False):
            if parameter.requires_grad and is_sharded(parameter):
                raise UniLoRAError(
                    f"'{key}' is trained and was sharded by torch's fully_shard: expected it whole; call torch's on "
                    "the blocks without it (or with ignored_params), unilora_ext.distributed.fully_shard on the model"
                )
