"""One run: the same protocol for every method."""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from math import ceil
from typing import Any

import torch
from methods import FIRST, METHODS, Adapted
from tasks import TASKS, Rows, loss
from torch import nn

__all__ = ["Run", "perform"]

WARMUP = 0.06
EVALUATION_BATCH = 64


@dataclass(frozen=True, order=True)
class Run:
    """What is run; two of the same give the same row.

    Attributes:
        task, method: names of :data:`TASKS` and :data:`METHODS`.
        r: rank.
        d: length of theta_d; None: the method's own.
        start: bound of the start of theta_d; None: the method's own.
        rate: peak learning rate of what is trained beside the head.
        seed: of rows, order, head, start and P.
    """

    task: str
    method: str
    r: int
    d: int | None
    start: float | None
    rate: float
    seed: int


def perform(run: Run, device: str = "cpu") -> dict[str, Any]:
    """Trains with AdamW (linear warm-up over 6 % of the steps, linear decay), then scores once.

    Returns:
        the run's row: what was run, sizes, accuracies and mean losses, and CPU seconds.
    """
    began = time.process_time()
    task, method = TASKS[run.task], METHODS[run.method]
    model = task.model(run.seed)
    adapted = method.adapt(model, task, run.seed, run.r, run.d, run.start)
    model = adapted.model.to(device)
    own = {id(p) for parameters, _ in adapted.groups for p in parameters}
    if not own:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(any(part in task.head for part in name.split(".")))
    head = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
    groups = [{"params": parameters, "lr": run.rate * factor} for parameters, factor in adapted.groups]
    groups += [{"params": head, "lr": task.head_rate}] if head else []
    growth = 1
    if method.grows:  # the run's rate is that of its d
        growth = FIRST
        groups[0]["lr"] *= growth**0.5
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    training, validation, test = task.split(run.seed)
    steps = task.epochs * ceil(len(training) / task.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _height(step, steps))
    order = random.Random(run.seed)
    last, path, losses = 0.0, [], []
    training_began = time.process_time()
    for epoch in range(task.epochs):
        last = 0.0
        path.append(adapted.numbers)
        for inputs, labels in training.batches(task.batch, order):
            total, _, learnt = loss(model, _on(inputs, device), labels.to(device))
            (total / learnt).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            last += total.item() / learnt * task.epochs / steps
        if growth > 1 and epoch + 1 < task.epochs:
            losses.append(score(model, validation, device)["loss"])
            if losses[-1] > min(losses):
                growth //= 4
                _grow(adapted, optimizer, schedule)
    trained = time.process_time()
    validated, tested = score(model, validation, device), score(model, test, device)
    return {
        **asdict(run),
        "D": adapted.D or None,
        "numbers": adapted.numbers,
        "path": " ".join(map(str, path)) if method.grows else None,
        "bytes": adapted.stored,
        "steps": steps,
        "training_loss": round(last, 5),
        **{f"validation_{name}": value for name, value in validated.items()},
        **{f"test_{name}": value for name, value in tested.items()},
        "training_seconds": round(trained - training_began, 1),
        "seconds": round(time.process_time() - began, 1),
    }


@torch.no_grad()
def score(model: nn.Module, rows: Rows, device: str) -> dict[str, float]:
    """Accuracy and mean cross-entropy."""
    total, right, learnt = 0.0, 0, 0
    for inputs, labels in rows.batches(EVALUATION_BATCH):
        part = loss(model, _on(inputs, device), labels.to(device))
        total, right, learnt = total + part[0].item(), right + part[1], learnt + part[2]
    return {"accuracy": round(right / learnt, 5), "loss": round(total / learnt, 5)}


def _grow(adapted: Adapted, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LambdaLR) -> None:
    """theta_d of four times as many numbers, that move theta_D as before."""
    adapter = adapted.adapter
    adapter.grow(4 * adapter.projection.d, optimizer)
    schedule.base_lrs[0] /= 2
    optimizer.param_groups[0]["lr"] /= 2


def _height(step: int, steps: int) -> float:
    rise = ceil(WARMUP * steps)
    return (step + 1) / rise if step < rise else (steps - step) / (steps - rise)


def _on(inputs: dict[str, torch.Tensor], device: str) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}
