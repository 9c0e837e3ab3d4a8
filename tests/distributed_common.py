"""Shared by the checks that test_distributed.py runs in several processes."""

import copy

import torch
import torch.distributed as dist
from models import Tower
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import unilora_ext as ul

CONFIG = ul.UniLoRAConfig(r=3, d=40, target_modules=["up", "down"], seed=5, init_bound=0.5)
WITH_HEAD = ul.UniLoRAConfig(**{**vars(CONFIG), "modules_to_save": ["head"]})


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


def refused(words, call):
    try:
        call()
    except ul.UniLoRAError as error:
        assert words in str(error), str(error)
    else:
        raise AssertionError(f"expected an error that says: {words}")


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
