"""DDP, FSDP2, tensor parallelism and distributed checkpoints, on 2 and 4 processes, against one process."""

import json
import time

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from distributed_checks import CHECKS, ON_FOUR, main
from distributed_common import WITH_HEAD
from models import Tower

import unilora_ext as ul

CASES = [(check, size) for size in (2, 4) for check in CHECKS if size == 4 or check not in ON_FOUR]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, shared):
    """What came of every check on every process, by world size: one start of the processes a size."""
    results = {}
    for size in (2, 4):
        folder, seed = tmp_path_factory.mktemp(f"world{size}"), int(torch.seed() % 2**31)
        started = time.perf_counter()
        context = mp.spawn(main, args=(size, str(folder), str(shared), seed), nprocs=size, join=False)
        for process in context.processes:
            process.join(max(0, 300 - (time.perf_counter() - started)))
            process.kill()
        print(f"{size} processes, seed {seed}: {time.perf_counter() - started:.0f} s")
        results[size] = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return results


@pytest.mark.parametrize(("check", "size"), CASES)
def test_as_one_process(outcomes, check, size):
    for rank, outcome in enumerate(outcomes[size]):
        assert outcome.get(check, "not reached: a check before it failed") == "passed", f"rank {rank}"


@pytest.mark.parametrize("kind", ["ours", "torch"])
def test_a_distributed_checkpoint_loads_in_one_process(outcomes, shared, kind):
    model = Tower().double()
    adapter = ul.attach(model, WITH_HEAD)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=shared / "dcp" / kind, no_dist=True)
    model.load_state_dict(state)
    x = torch.arange(56).view(8, 7) % 50
    torch.testing.assert_close(model(x), torch.load(shared / "dcp" / kind / "y.pt"), rtol=1e-11, atol=1e-11)
    if kind == "ours":
        assert torch.equal(ul.load(Tower().double(), shared / "dcp" / "adapter").theta_d, adapter.theta_d)
