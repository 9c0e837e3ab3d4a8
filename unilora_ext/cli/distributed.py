"""The processes of a run that a launcher such as torchrun started. Without one, there is one process, and all is local.

Every process reads the data and holds the model; the first one alone prints and writes the run's files.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from unilora_ext.cli.errors import AgreedError, CliError, RunError
from unilora_ext.errors import UniLoRAError

__all__ = ["barrier", "from_first", "is_first", "join", "leave", "rank", "sums", "together", "world_size"]


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _joined() else 0


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def join(device: str) -> None:
    """Connects the processes, where a launcher started several (gloo on the CPU, NCCL on CUDA). The others than the
    first print nothing from here on."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not _joined():
        from accelerate import PartialState  # the Trainer's own way

        try:
            PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
        except (RuntimeError, ValueError) as error:
            raise CliError(
                f"WORLD_SIZE: expected a launcher's processes, such as torchrun's, got {os.environ['WORLD_SIZE']} and "
                f"no connection: {error}"
            ) from error
        if not is_first():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (to the end of the process)


def leave() -> None:
    """Parts the processes: none waits for another from here on."""
    if _joined():
        barrier()
        dist.destroy_process_group()


def barrier() -> None:
    """Waits until every process is here."""
    if _joined():
        dist.barrier()


def from_first(value: Any) -> Any:
    """The first process's value, in every process."""
    if not _joined():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def sums(values: Sequence[float]) -> list[float]:
    """Each number's sum over the processes, in order of their ranks: the same bits in every process."""
    if not _joined():
        return list(values)
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, list(values))
    return [sum(column) for column in zip(*gathered, strict=True)]


@contextmanager
def together() -> Iterator[None]:
    """An error of one process in this block ends them all, and the first one reports it.

    The block must not wait for other processes.

    Raises:
        AgreedError: in place of the error, in the processes that are to keep silent.
    """
    if not _joined():
        yield
        return
    mine: Exception | None = None
    try:
        yield
    except (UniLoRAError, RunError, OSError) as error:
        mine = error
    status = 0 if mine is None else 2 if isinstance(mine, UniLoRAError) else 1
    told: list[Any] = [None] * world_size()
    dist.all_gather_object(told, (status, str(mine)))
    first = next(((number, *told[number]) for number in range(len(told)) if told[number][0]), None)
    if first is None:
        return
    number, status, text = first
    silent = not is_first()
    leave()  # together too: a process whose connection breaks while it ends may be aborted
    if silent:
        raise AgreedError(status)
    if mine is not None:
        raise mine
    raise (CliError if status == 2 else RunError)(f"process {number}: {text}")
