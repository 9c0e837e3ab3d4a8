"""Every projection on several processes: each check runs in every process, and compares with one process doing all."""

import torch
import torch.distributed as dist
from check_tensor_parallel import parallel
from distributed_common import close, equal_everywhere, loss_of, mine, pair, shard
from models import tokens
from torch.distributed.device_mesh import init_device_mesh

import unilora_ext as ul
from unilora_ext.family import FAMILY

OPTIONS = {
    "vblora": {"num_vectors": 9},
    "tinylora": {"u": 5},
    "fourierft": {"n_frequency": 7},
}
FREE = {"uniform", "balanced", "peft", "local", "nonuniform", "countsketch", "gaussian", "fastfood"}


def config(name):
    return ul.UniLoRAConfig(
        r=3,
        d=40 if name in FREE else None,
        target_modules=["up", "down"],
        projection=name,
        seed=5,
        projection_options=OPTIONS.get(name, {}),
    )


def same_numbers(whole_adapter, adapter):
    """Random values of all that is trained, those of the first process everywhere."""
    with torch.no_grad():
        for name, parameter in adapter.trained.items():
            value = torch.randn_like(parameter)
            dist.broadcast(value, 0)
            parameter.copy_(value)
            whole_adapter.trained[name].copy_(value)


def same_gradients(whole_adapter, adapter):
    for name, parameter in adapter.trained.items():
        close(parameter.grad, whole_adapter.trained[name].grad, 1e-9)
        equal_everywhere(parameter.grad)


def in_whole_batches(prepare):
    """A step of every projection, the batch dealt out to the processes."""
    for name in FAMILY:
        whole, whole_adapter, model, adapter = pair(config(name))
        same_numbers(whole_adapter, adapter)
        prepare(model, adapter)
        x = tokens(8)
        loss_of(whole, x).backward()
        loss_of(model, mine(x)).backward()
        same_gradients(whole_adapter, ul.get_adapter(model))


def check_family_replicated(folder):
    in_whole_batches(lambda model, adapter: ul.distributed.replicate(adapter))


def check_family_fsdp(folder):
    in_whole_batches(lambda model, adapter: shard(model))


def check_family_tensor_parallel(folder):
    """Sharded blocks around a whole one: outputs, gradients, and the file that is saved."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in FAMILY:
        whole, whole_adapter, model, adapter = pair(config(name), prepare=parallel(mesh), hidden=21)
        for parameter in adapter.trained.values():
            equal_everywhere(parameter)
        same_numbers(whole_adapter, adapter)
        x = tokens(8)
        y, expected = model(x), whole(x)
        close(y, expected)
        y.square().mean().backward()
        expected.square().mean().backward()
        same_gradients(whole_adapter, adapter)
        if dist.get_rank() == 0:
            adapter.save(folder / name)
            for part, value in ul.read(folder / name).parts.items():
                if part in adapter.trained:
                    assert torch.equal(value, adapter.trained[part])
