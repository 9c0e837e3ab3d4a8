"""DDP, FSDP2, HSDP: each check runs in every process, and compares with one process doing all."""

import copy
from dataclasses import replace

import torch
import torch.distributed as dist
from distributed_common import (
    CONFIG,
    WITH_HEAD,
    close,
    equal_everywhere,
    loss_of,
    mine,
    pair,
    refused,
    same_start,
    shard,
)
from models import Tower, tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic

import unilora_ext as ul


def check_ddp(folder):
    """theta_d is the one thing DDP reduces, and its gradient that of the whole batch; with accumulation too."""
    whole, whole_adapter, model, adapter = pair(dtype=torch.float32)
    ddp, sizes = DistributedDataParallel(model), []
    same_start(whole_adapter, adapter)

    def counted(group, bucket):
        sizes.append(bucket.buffer().nbytes)
        work = dist.all_reduce(bucket.buffer(), group=group, async_op=True).get_future()
        return work.then(lambda done: done.value()[0] / dist.get_world_size())

    ddp.register_comm_hook(None, counted)
    first, second = tokens(8), tokens(16)
    for x in (first, second):
        loss_of(whole, x).backward()
        with Traffic() as traffic:
            loss_of(ddp, mine(x)).backward()
        assert traffic.bytes["allreduce"] == sizes[-1:]  # beside the layout of the buckets, once
    close(adapter.theta_d.grad, whole_adapter.theta_d.grad, 1e-6)
    assert sizes == [4 * 40] * 2
    adapter.theta_d.grad = None
    with ddp.no_sync():
        loss_of(ddp, mine(first)).backward()
    loss_of(ddp, mine(second)).backward()
    close(adapter.theta_d.grad, whole_adapter.theta_d.grad, 1e-6)
    assert sizes == [4 * 40] * 3
    equal_everywhere(adapter.theta_d.grad)
    return f"DDP reduces {sizes[-1]} bytes a step, d = 40"


def check_fsdp_gradient_and_traffic(folder):
    """Weights sharded, theta_d whole and equal; d numbers reduced, and nothing for the frozen weights."""
    whole, whole_adapter, model, adapter = pair(dtype=torch.float32)
    shard(model)
    same_start(whole_adapter, adapter)
    equal_everywhere(adapter.theta_d)
    assert type(adapter.theta_d) is torch.nn.Parameter and isinstance(model.blocks[0].up.weight, DTensor)
    x = tokens(8)
    with Traffic() as forward:
        y = model(mine(x))
    with Traffic() as backward:
        y.square().mean().backward()
    expected = whole(x)
    expected.square().mean().backward()
    close(y, mine(expected), 1e-5)
    close(adapter.theta_d.grad, whole_adapter.theta_d.grad, 1e-6)
    assert set(forward.bytes) == {"allgather"} and set(backward.bytes) == {"allgather", "allreduce"}
    assert backward.bytes["allreduce"] == [4 * 40]
    assert all(p.grad is None for p in model.parameters() if p is not adapter.theta_d)
    gathered = sum(forward.bytes["allgather"] + backward.bytes["allgather"])
    return f"FSDP2 reduces {backward.bytes['allreduce'][0]} bytes a step (d = 40), gathers {gathered} of weights"


def check_fsdp_steps(folder):
    """Accumulation with and without gradient sync, clipping and AdamW, with a head trained whole: as one process."""
    whole, whole_adapter, model, adapter = pair(WITH_HEAD)
    shard(model)
    same_start(whole_adapter, adapter)
    assert type(model.head.weight) is torch.nn.Parameter
    models = (whole, model)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in models]
    for step in range(3):
        batches = [tokens(8) for _ in range(3)]
        for k, x in enumerate(batches):
            model.set_requires_gradient_sync(k == 2 or step == 1)
            loss_of(whole, x).backward()
            loss_of(model, mine(x)).backward()
        norms = [torch.nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 1e-3) for m in models]
        close(norms[1], norms[0])
        close(adapter.theta_d.grad, whole_adapter.theta_d.grad)
        close(model.head.weight.grad, whole.head.weight.grad)
        with torch.no_grad():  # an evaluation between backward and step must not leave an old theta_d behind
            model(mine(batches[0]))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        x = tokens(8)
        close(model(mine(x)).detach(), mine(whole(x)).detach(), 1e-9)
    equal_everywhere(adapter.theta_d)
    original = copy.deepcopy(model.head.weight.detach())
    with adapter.disable(), whole_adapter.disable():
        assert not torch.equal(model.head.weight, original)
        close(model(mine(x)).detach(), mine(whole(x)).detach())
    assert torch.equal(model.head.weight, original)


def check_fsdp_activation_checkpointing(folder):
    """Activation checkpointing of both kinds recomputes the same factors inside sharded blocks."""
    whole, whole_adapter, model, adapter = pair()
    shard(model, reshard_after_forward=True)
    same_start(whole_adapter, adapter)
    x = tokens(8)
    loss_of(whole, x).backward()
    for mode in ("reentrant", "non-reentrant"):
        adapter.theta_d.grad, model.checkpointing = None, mode
        loss_of(model, mine(x)).backward()
        close(adapter.theta_d.grad, whole_adapter.theta_d.grad)


def check_fsdp_mixed_precision(folder):
    """bfloat16 weights and activations; theta_d, its gradient and its reduction stay float32."""
    whole, whole_adapter, model, adapter = pair(dtype=torch.float32)
    same = copy.deepcopy(whole).bfloat16()
    shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16))
    same_start(whole_adapter, adapter)
    same_adapter = ul.get_adapter(same)
    same_adapter.vector.float()
    with torch.no_grad():
        same_adapter.theta_d.copy_(whole_adapter.theta_d)
    x = tokens(8)
    with Traffic() as traffic:
        y = model(mine(x))
        y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16 and adapter.theta_d.dtype == adapter.theta_d.grad.dtype == torch.float32
    assert traffic.bytes["allreduce"] == [4 * 40]
    assert torch.equal(y, mine(same(x)))
    same(mine(x)).float().square().mean().backward()
    mean = same_adapter.theta_d.grad.clone()
    dist.all_reduce(mean)
    close(adapter.theta_d.grad, mean / dist.get_world_size(), 1e-6)


def check_fsdp_from_meta(folder):
    """Built on meta, attached, sharded, then given memory and weights: theta_d is not lost on the way."""
    whole = Tower().double()
    with torch.device("meta"):
        model = Tower().double()
    adapter = ul.attach(model, CONFIG)
    start = adapter.theta_d.detach().clone()
    shard(model)
    model.to_empty(device="cpu")
    assert torch.equal(adapter.theta_d, start)
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, whole.state_dict(), options=options)
    assert isinstance(model.blocks[0].up.weight, DTensor) and torch.equal(adapter.theta_d, start)
    whole_adapter = ul.attach(whole, CONFIG)
    same_start(whole_adapter, adapter)
    x = tokens(8)
    loss_of(whole, x).backward()
    loss_of(model, mine(x)).backward()
    close(adapter.theta_d.grad, whole_adapter.theta_d.grad)


def check_fsdp_by_torch_alone(folder):
    """torch's fully_shard without ours: theta_d is sharded too, gathered and reduce-scattered; saved whole."""
    whole, whole_adapter, model, adapter = pair(WITH_HEAD, dtype=torch.float32)
    with torch.no_grad():  # a sharded parameter is put together from what each process drew
        start = adapter.theta_d.clone()
        dist.broadcast(start, 0)
        adapter.theta_d.copy_(start)
        whole_adapter.theta_d.copy_(start)
    for block in model.blocks:
        torch_fully_shard(block)
    torch_fully_shard(model)
    assert isinstance(adapter.theta_d, DTensor)
    x = tokens(8)
    with Traffic() as traffic:
        y = model(mine(x))
        y.square().mean().backward()
    expected = whole(x)
    expected.square().mean().backward()
    close(y, mine(expected), 1e-5)
    close(adapter.theta_d.grad.full_tensor(), whole_adapter.theta_d.grad, 1e-6)
    size = dist.get_world_size()
    padded = [-(-rows // size) * size * rest for rows, rest in ((40, 1), (5, 12), (5, 1))]  # theta_d and the head
    assert traffic.bytes["reduce_scatter"] == [4 * sum(padded)]
    with torch.no_grad():
        model(x)
    adapter.save(folder / "native")
    dist.barrier()
    saved = ul.read(folder / "native")
    assert torch.equal(saved.theta_d, start) and torch.equal(saved.modules_to_save["head.weight"], whole.head.weight)
    with torch.no_grad():
        factors = model.blocks[1].up.lora_factors()
    close(factors[0], whole.blocks[1].up.lora_factors()[0].detach(), 1e-6)
    refused("theta_d is sharded by fully_shard", model.blocks[1].up.lora_factors)
    refused("sharded by fully_shard", adapter.disable)
    refused("sharded by fully_shard", adapter.merge)


def check_hsdp(folder):
    """A mesh of two dimensions: the mean goes over both."""
    size = dist.get_world_size()
    whole, whole_adapter, model, adapter = pair(WITH_HEAD)
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    shard(model, mesh=mesh)
    same_start(whole_adapter, adapter)
    equal_everywhere(adapter.theta_d)
    x = tokens(8)
    loss_of(whole, x).backward()
    loss_of(model, mine(x)).backward()
    close(adapter.theta_d.grad, whole_adapter.theta_d.grad)
    close(model.head.bias.grad, whole.head.bias.grad)


def check_replicate(folder):
    """replicate() alone: data parallel without a wrapper; refused a second time; taken off by detach()."""
    whole, whole_adapter, model, adapter = pair(WITH_HEAD)
    ul.distributed.replicate(adapter)
    same_start(whole_adapter, adapter)
    for _ in range(2):
        x = tokens(8)
        loss_of(whole, x).backward()
        loss_of(model, mine(x)).backward()
    close(adapter.theta_d.grad, whole_adapter.theta_d.grad)
    close(model.head.bias.grad, whole.head.bias.grad)
    refused("replicated already", lambda: ul.distributed.replicate(adapter))
    head = model.head
    adapter.detach()
    head.requires_grad_().weight.grad = None
    with Traffic() as traffic:
        loss_of(model, x).backward()
    assert not traffic.bytes and head.weight.grad is not None

    whole, whole_adapter, model, adapter = pair()  # beside torch's fully_shard, told to leave theta_d alone
    for part in (*model.blocks, model):
        torch_fully_shard(part, ignored_params={adapter.theta_d})
    ul.distributed.replicate(adapter)
    same_start(whole_adapter, adapter)
    loss_of(whole, x).backward()
    loss_of(model, mine(x)).backward()
    close(adapter.theta_d.grad, whole_adapter.theta_d.grad)


def check_grow(folder):
    """A longer theta_d on all processes, where replicate() keeps it equal; refused beside DDP."""
    for prepare in (ul.distributed.replicate, lambda adapter: shard(adapter.model)):
        whole, whole_adapter, model, adapter = pair()
        prepare(adapter)
        optimizer, x = torch.optim.AdamW([adapter.theta_d], lr=1e-2), tokens(8)
        loss_of(model, mine(x)).backward()
        optimizer.step()
        adapter.grow(80, optimizer)
        whole_adapter.detach()
        whole_adapter = ul.attach(whole, replace(CONFIG, d=80))
        same_start(whole_adapter, adapter)
        loss_of(whole, x).backward()
        loss_of(model, mine(x)).backward()
        close(adapter.theta_d.grad, whole_adapter.theta_d.grad)
        optimizer.step()
        equal_everywhere(adapter.theta_d)
    _, _, model, adapter = pair()
    DistributedDataParallel(model)
    refused("DistributedDataParallel", lambda: adapter.grow(80))
    assert adapter.theta_d.shape == (40,)


def check_fsdp_refusals(folder):
    """Wrong orders are errors that say the right one, and change nothing."""
    sharded = Tower()
    for block in sharded.blocks:
        torch_fully_shard(block)
    refused("sharded by fully_shard already: attach before", lambda: ul.attach(sharded, CONFIG))
    torch_fully_shard(sharded)
    with torch.no_grad():
        sharded(tokens())  # which leaves the weights of the root whole
    refused("sharded by fully_shard already", lambda: ul.attach(sharded, ul.UniLoRAConfig(target_modules=["head"])))
    assert not hasattr(sharded, "unilora")
    refused("has no Uni-LoRA adapter", lambda: ul.distributed.fully_shard(Tower()))
    _, _, model, _ = pair(WITH_HEAD)
    torch_fully_shard(model.head)
    refused("'head.weight' is trained and was sharded", lambda: ul.distributed.fully_shard(model))
    assert not isinstance(model, FSDPModule)
    _, _, model, adapter = pair()
    shard(model)
    refused("merge: the weight is sharded by fully_shard", adapter.merge)
    refused("detach: the model is sharded by fully_shard", adapter.detach)
    assert isinstance(model.blocks[0].up, ul.UniLoRALinear) and not adapter.merged
