"""Files between numbers of processes: each check runs in every process."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_common import (
    WITH_HEAD,
    close,
    files,
    mine,
    pair,
    same_start,
    shard,
)
from models import Tower, tokens
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import unilora_ext as ul


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
    """torch.distributed.checkpoint, an adapter folder: what 2 processes save is loaded by 4 (and by 1, in the test)."""
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
