"""What test_distributed.py runs in every process: each check is a function, compared with one process doing all."""

import copy
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from models import Tower, tokens
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import unilora_ext as ul
from unilora_ext.distributed import Traffic

CONFIG = ul.UniLoRAConfig(r=3, d=40, target_modules=["up", "down"], seed=5, init_bound=0.5)
WITH_HEAD = ul.UniLoRAConfig(**{**vars(CONFIG), "modules_to_save": ["head"]})
UNEVEN = dict(hidden=21, depth=3)  # 21, 22, 23 and 12 features on 2 and 4 processes
FEW = dict(hidden=5, depth=1)  # 5 features on 4 processes: 2, 2, 1, 0


def loss_of(model, x):
    return model(x).float().square().mean() if next(model.parameters()).dtype.itemsize < 4 else model(x).square().mean()


def mine(x, group=None):
    return x.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def pair(config=CONFIG, dtype=torch.float64, prepare=lambda model: model, **shape):
    """A whole attached model, and the same one prepared, attached where the generators of the processes differ; with
    the adapter of each."""
    whole = Tower(**shape).to(dtype)
    plain = prepare(copy.deepcopy(whole))
    whole_adapter = ul.attach(whole, config)
    state = torch.get_rng_state()
    torch.manual_seed(1000 + dist.get_rank())
    adapter = ul.attach(plain, config)
    torch.set_rng_state(state)
    return whole, whole_adapter, plain, adapter


def same_start(whole_adapter, adapter):
    """The first process's theta_d in the whole model too."""
    start = adapter.theta_d.detach().clone()
    dist.broadcast(start, 0)
    with torch.no_grad():
        whole_adapter.theta_d.copy_(start)


def shard(model, **options):
    """fully_shard by block, as large models are."""
    for block in model.blocks:
        torch_fully_shard(block, **options)
    return ul.distributed.fully_shard(model, **options)


def close(got, expected, tolerance=1e-11):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def equal_everywhere(tensor):
    others = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(others, tensor.detach().contiguous())
    assert all(torch.equal(tensor, other) for other in others)


# ---- data parallel --------------------------------------------------------------------------------------------------


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


def refused(words, call):
    try:
        call()
    except ul.UniLoRAError as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"expected an error that says: {words}")


# ---- tensor parallel ------------------------------------------------------------------------------------------------


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
    held = sum(len(group.rows) for group in adapter.vector._groups.values())
    sharded = sum(whole_adapter.vector.slots[i].stop - whole_adapter.vector.slots[i].start for i in (0, 1, 4, 5))
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


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_adapter_folder(folder):
    """Adapter.save by one process of a sharded model: the bytes that one process alone writes."""
    whole, whole_adapter, model, adapter = pair(WITH_HEAD)
    shard(model)
    same_start(whole_adapter, adapter)
    if dist.get_rank() == 0:
        adapter.save(folder / "sharded")
        whole_adapter.save(folder / "alone")
    dist.barrier()
    assert files(folder / "sharded") == files(folder / "alone")
    again = Tower().double()
    again.load_state_dict({k: v for k, v in whole.state_dict().items() if k != "unilora.theta_d"})
    loaded = ul.load(again, folder / "sharded")
    shard(again)
    x = tokens(8)
    close(again(mine(x)).detach(), mine(whole(x)).detach())
    assert torch.equal(loaded.theta_d, adapter.theta_d)


def check_distributed_checkpoint(folder):
    """torch.distributed.checkpoint, and an adapter folder: what 2 processes save is loaded by 4 (and 1, see the test)."""
    path = folder / "dcp"
    x = torch.arange(56).view(8, 7) % 50
    for helper in (True, False):
        saved = path / ("ours" if helper else "torch")
        model = pair(WITH_HEAD)[2]
        if helper:
            shard(model)
        else:
            for part in (*model.blocks, model):
                torch_fully_shard(part)
        if dist.get_world_size() == 2:
            dcp.save(get_model_state_dict(model), checkpoint_id=saved)
            y = [torch.empty(4, 5, dtype=torch.float64) for _ in range(2)]
            dist.all_gather(y, model(mine(x)).detach())
            if dist.get_rank() == 0:
                torch.save(torch.cat(y), saved / "y.pt")
            if helper and dist.get_rank() == 0:
                ul.get_adapter(model).save(path / "adapter")
            continue
        expected = torch.load(saved / "y.pt")
        assert not torch.equal(model(mine(x)), mine(expected))
        for part in (model, *model.blocks):
            part.reshard()
        state = get_model_state_dict(model)
        assert "unilora.theta_d" in state
        dcp.load(state, checkpoint_id=saved)
        set_model_state_dict(model, state)
        close(model(mine(x)).detach(), mine(expected))
        if helper:
            fresh = Tower().double()
            loaded = ul.load(fresh, path / "adapter")
            shard(fresh)
            assert torch.equal(loaded.theta_d, ul.get_adapter(model).theta_d)
            assert torch.equal(fresh.head.weight, model.head.weight)


CHECKS = {name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")}

ON_FOUR = ("hsdp", "tensor_and_data_parallel")  # a mesh of 2 x 2


def main(rank, size, folder, shared, seed):
    """Runs all checks in one process of `size`; writes what came of each to ``<folder>/<rank>.json``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    outcome = {}
    for name, check in CHECKS.items():
        if size < 4 and name in ON_FOUR:
            continue
        torch.manual_seed(seed)
        try:
            print(f"[{rank}/{size}] {name}", check(Path(shared if name == "distributed_checkpoint" else folder)) or "")
            outcome[name] = "passed"
        except Exception:
            outcome[name] = traceback.format_exc()
            break  # the processes may be out of step now
        finally:
            sys.stdout.flush()
            Path(folder, f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()
