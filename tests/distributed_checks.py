"""Runs the checks of check_*.py in one of several processes."""

import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import check_checkpoints
import check_data_parallel
import check_family
import check_tensor_parallel
import torch
import torch.distributed as dist

CHECKS = {
    name.removeprefix("check_"): function
    for module in (check_data_parallel, check_tensor_parallel, check_family, check_checkpoints)
    for name, function in vars(module).items()
    if name.startswith("check_")
}
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
