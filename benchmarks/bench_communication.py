"""Bytes that a training step on two processes gives to collectives: exact, whatever the machine.

The adapted layers of a model, one after the other, under DDP and FSDP2 (each layer and the whole), float32.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import Options, Row
from rivals import adapted
from shapes import MINILM, ROBERTA_LARGE, Model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic

import unilora_ext as ul

PROCESSES = 2
RIVALS = ("unilora_ext", "peft-unilora", "peft-lora")


def run(options: Options) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_measure, args=(folder,), nprocs=PROCESSES)
        return torch.load(Path(folder, "rows.pt"))


def _measure(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    rows: list[Row] = []
    for size in (MINILM, ROBERTA_LARGE):
        for engine, measure in (("DDP", _ddp), ("FSDP2", _fsdp)):
            for rival in RIVALS:
                case = {"bench": "communication", "model": size.name, "D": size.D, "d": size.d, "rival": rival}
                rows.append({**case, "engine": engine, "processes": PROCESSES, **measure(rival, size)})
                dist.barrier()
    if rank == 0:
        torch.save(rows, Path(folder, "rows.pt"))
    dist.destroy_process_group()


def _layers(rival: str, size: Model) -> nn.Module:
    def make() -> nn.Module:
        return nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n in size.modules))

    return adapted(rival, make, [str(i) for i in range(len(size.modules))], size.r, size.d)


def _ddp(rival: str, size: Model) -> Row:
    return _step(DistributedDataParallel(_layers(rival, size)), size)


def _fsdp(rival: str, size: Model) -> Row:
    model = _layers(rival, size)
    inner = model if rival == "unilora_ext" else model.base_model.model
    try:
        for i in range(len(size.modules)):
            fully_shard(inner[i])
        ul.distributed.fully_shard(model) if rival == "unilora_ext" else fully_shard(model)
    except (
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # a vector that every layer registers cannot be sharded twice
        return {"reduced_bytes": None, "gathered_bytes": None, "error": f"{type(error).__name__}: {error}"}
    return _step(model, size)


def _step(model: nn.Module, size: Model) -> Row:
    with Traffic() as traffic:
        model(torch.randn(2, size.modules[0][1])).square().mean().backward()
    reduced = traffic.bytes.get("allreduce", []) + traffic.bytes.get("reduce_scatter", [])
    return {"reduced_bytes": sum(reduced), "gathered_bytes": sum(traffic.bytes.get("allgather", []))}
