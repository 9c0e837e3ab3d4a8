"""Tensor parallelism: each check runs in every process, and compares with one process doing all."""

import copy

import torch
import torch.distributed as dist
from distributed_common import (
    CONFIG,
    WITH_HEAD,
    close,
    equal_everywhere,
    files,
    loss_of,
    pair,
    refused,
    same_start,
    shard,
)
from models import Tower, tokens
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from traffic import Traffic

import unilora_ext as ul

UNEVEN = dict(hidden=21, depth=3)  # 21, 22, 23 and 12 features on 2 and 4 processes
FEW = dict(hidden=5, depth=1)  # 5 features on 4 processes: 2, 2, 1, 0


def parallel(mesh, blocks=(0, 2), **row):
    plan = {}
    for i in blocks:
        plan |= {f"blocks.{i}.up": ColwiseParallel(), f"blocks.{i}.down": RowwiseParallel(**row)}
    return lambda model: parallelize_module(model, mesh, plan)


def check_tensor_parallel(folder):
    """Sharded blocks around a whole one: outputs and the gradient as in one process, from local rows of P alone."""
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,))
    whole, whole_adapter, model, adapter = pair(prepare=parallel(mesh), **UNEVEN)
    equal_everywhere(adapter.theta_d)
    same_start(whole_adapter, adapter)
    x = tokens(8)
    for _ in range(2):  # accumulated
        y = model(x)
        with Traffic() as traffic:
            y.square().mean().backward()
        expected = whole(x)
        expected.square().mean().backward()
        close(y, expected)
        close(adapter.theta_d.grad, whole_adapter.theta_d.grad)
    d_sums = [n for n in traffic.bytes["allreduce"] if n == 8 * 40]
    assert len(d_sums) == 1, traffic.bytes
    held = sum(len(group.restriction) for group in adapter.vector._groups.values())
    sharded = sum(stop - start for start, stop in map(whole_adapter.vector.layout.range_of, (0, 1, 4, 5)))
    rest, kept = adapter.projection.D - sharded, 2 * 12 * 3 * 2  # whole A of `up` [3, 12], whole B of `down` [12, 3]
    assert held <= rest + kept + -(-(sharded - kept) // size) + 2 * 2 * 3, (held, rest, kept)

    for mode in ("reentrant", "non-reentrant"):
        adapter.theta_d.grad, model.checkpointing = None, mode
        whole_adapter.theta_d.grad = None
        loss_of(whole, x).backward()
        loss_of(model, x).backward()
        close(adapter.theta_d.grad, whole_adapter.theta_d.grad)
    model.checkpointing = None

    y = model(x).detach()
    close(model.blocks[0].down.lora_factors()[0].detach(), whole.blocks[0].down.lora_factors()[0].detach())
    adapter.merge()
    close(model(x).detach(), y)
    adapter.unmerge()
    assert torch.equal(model(x).detach(), y)
    with adapter.disable(), whole_adapter.disable():
        close(model(x), whole(x))
    close(copy.deepcopy(model)(x).detach(), y)
    if dist.get_rank() == 0:
        for each, name in ((adapter, "tp"), (whole_adapter, "whole")):
            each.save(folder / name)
    dist.barrier()
    assert files(folder / "tp") == files(folder / "whole")
    state = torch.get_rng_state()
    again = parallel(mesh)(Tower(**UNEVEN).double())
    torch.set_rng_state(state)
    assert torch.equal(ul.load(again, folder / "tp").theta_d, adapter.theta_d)
    layer = adapter.detach().blocks[0].up
    assert type(layer) is torch.nn.Linear
    return f"tensor parallel sums {d_sums[0]} bytes a step (d = 40, float64); {held} of {rest + sharded} rows of P"


def check_tensor_parallel_layouts(folder):
    """Fewer features than processes; a row-wise bias; sequence-sharded output; a layer alone; dropout; autocast."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = tokens(8, 8)

    def row_with_bias(model):
        return parallelize_module(model, mesh, {"blocks.0.up": RowwiseParallel(input_layouts=Replicate())})

    for prepare, shape in (
        (row_with_bias, FEW),
        (parallel(mesh, (0,)), FEW),
        (parallel(mesh, (0,), output_layouts=Shard(1)), dict(hidden=8, depth=1)),
    ):
        whole, whole_adapter, model, adapter = pair(prepare=prepare, **shape)
        if shape is not FEW:  # what comes out is spread over the sequence, and gathered again
            model.blocks[0].down.register_forward_hook(
                lambda module, args, y: DTensor.from_local(y, mesh, [Shard(1)]).full_tensor()
            )
        same_start(whole_adapter, adapter)
        close(model(x), whole(x))
        loss_of(whole, x).backward()
        loss_of(model, x).backward()
        close(adapter.theta_d.grad, whole_adapter.theta_d.grad)
    h = torch.randn(4, 12, dtype=torch.float64)
    close(model.blocks[0].up(h), mine_last(whole.blocks[0].up(h)))
    h = torch.randn(4, 8, 8, dtype=torch.float64)
    everywhere = distribute_tensor(h, mesh, [Replicate()])  # where the layer's style expects a shard
    h = everywhere.full_tensor()
    close(model.blocks[0].down.forward(everywhere).full_tensor(), whole.blocks[0].down(h))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.float()(x), whole.float()(x), rtol=0.05, atol=0.05)

    config = ul.UniLoRAConfig(**{**vars(CONFIG), "dropout": 0.5})
    _, _, model, adapter = pair(config, prepare=parallel(mesh, (0,)), hidden=8, depth=1)
    y = model(x)
    y.sum().backward()
    assert not torch.equal(model(x), y) and adapter.theta_d.grad.abs().sum() > 0
    equal_everywhere(adapter.theta_d.grad)
    assert torch.equal(model.eval()(x), model(x))


def check_tensor_parallel_head(folder):
    """A module trained whole and sharded: its gradient, its file, and switching it off."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def prepare(model):
        parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
        return parallel(mesh)(model)

    whole, whole_adapter, model, adapter = pair(WITH_HEAD, prepare=prepare, **UNEVEN | {"classes": 8})
    same_start(whole_adapter, adapter)
    x = tokens(8)
    close(model(x), whole(x))
    loss_of(whole, x).backward()
    loss_of(model, x).backward()
    close(model.head.weight.grad.full_tensor(), whole.head.weight.grad)
    with torch.no_grad():
        for each in (model, whole):
            each.head.bias += 1
    adapter.save(folder / "head")
    adapter.export_lora(folder / "lora")
    dist.barrier()
    if dist.get_rank() == 0:
        whole_adapter.save(folder / "whole_head")
        whole_adapter.export_lora(folder / "whole_lora")
        assert files(folder / "head") == files(folder / "whole_head")
        assert files(folder / "lora") == files(folder / "whole_lora")
    with adapter.disable(), whole_adapter.disable():
        close(model(x), whole(x))
    y = model(x).detach()
    close(y, whole(x).detach())
    plain = Tower(**UNEVEN | {"classes": 8}).double()
    plain.load_state_dict({k: v for k, v in whole.state_dict().items() if k != "unilora.theta_d"})
    again = prepare(plain)
    torch.nn.init.zeros_(again.head.bias)
    ul.load(again, folder / "head")
    close(again(x).detach(), y)


def mine_last(y):
    return y.chunk(dist.get_world_size(), -1)[dist.get_rank()]


def check_tensor_parallel_refusals(folder):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    late = Tower()
    ul.attach(late, CONFIG)
    refused("attach after parallelize_module", lambda: parallel(mesh)(late)(tokens()))
    model = parallel(mesh)(Tower())
    ul.attach(model, CONFIG)
    up = model.blocks[0].up
    refused("x: expected a DTensor", lambda: type(up).forward(up, torch.randn(2, 12)))


def check_tensor_and_data_parallel(folder):
    """2 x 2: tensor parallel inside, FSDP2 outside."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "tp"))
    whole, whole_adapter, model, adapter = pair(prepare=parallel(mesh["tp"]), **UNEVEN | {"hidden": 20})
    shard(model, mesh=mesh["dp"])
    same_start(whole_adapter, adapter)
    x = tokens(8)
    for _ in range(2):
        y = model(x.chunk(2)[mesh["dp"].get_local_rank()])
        y.square().mean().backward()
        expected = whole(x)
        expected.square().mean().backward()
        close(y, expected.chunk(2)[mesh["dp"].get_local_rank()])
        close(adapter.theta_d.grad, whole_adapter.theta_d.grad)
    equal_everywhere(adapter.theta_d.grad)
