"""theta_D = P theta_d, forward and backward, on the sizes of three models.

Rivals: PEFT's UniLora rebuilding all factors of the model with its own layers; the plain PyTorch expression with
index_select, whose backward is index_add, eager and compiled. Limits: a copy of theta_D; on one thread of
the CPU, the random accesses to the table alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import Options, Row, measure, rows_of, threads
from limits import READS, UPDATES, calls
from rivals import peft_factors
from shapes import MODELS, Model
from torch import Tensor

import unilora_ext as ul


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    for model in MODELS:
        for count in options.threads if options.device == "cpu" else (None,):
            with threads(count or torch.get_num_threads()):
                rows += _case(model, count, options)
    return rows


def _case(model: Model, count: int | None, options: Options) -> list[Row]:
    D, d, device = model.D, model.d, options.device
    case: Row = {"model": model.name, "D": D, "d": d, "threads": count}
    theta_d = torch.empty(d, device=device).uniform_(-0.02, 0.02).requires_grad_()
    g_D = torch.randn(D, device=device)
    copied = torch.empty_like(g_D)

    forward: dict[str, Callable[[], Any]] = {"copy of theta_D": lambda: copied.copy_(g_D)}
    backward: dict[str, Callable[[], Any]] = dict(forward)
    for name, P in _projections(D, d, options):
        forward[name] = lambda P=P: P(theta_d)
        backward[name] = lambda P=P: P.transpose(g_D)
    P = ul.UniformProjection(D, d)
    forward["unilora_ext uniform, bfloat16"] = lambda: P(theta_d, torch.bfloat16)
    half = g_D.bfloat16()
    backward["unilora_ext uniform, bfloat16"] = lambda: P.transpose(half)

    if count == 1:
        limits = calls(P.index, d)
        forward.update({name: call for name, call in limits.items() if name == READS})
        backward.update({name: call for name, call in limits.items() if name == UPDATES})

    index, scale = P.index.long().to(device), P.scale.to(device)
    for name, expression in (
        ("torch index_select", plain),
        ("torch.compile index_select", torch.compile(plain, dynamic=False)),
    ):
        forward[name] = lambda expression=expression: expression(theta_d, scale, index)
        output = expression(theta_d, scale, index)
        backward[name] = _backward_of(output, theta_d, g_D)

    peft_theta_d, rebuild, _ = peft_factors(model)
    factors = rebuild()
    grads = list(g_D.cpu().split([f.numel() for f in factors]))
    grads = [g.view_as(f) for g, f in zip(grads, factors, strict=True)]
    forward["PEFT UniLora"] = rebuild
    backward["PEFT UniLora"] = _backward_of(factors, peft_theta_d, grads)

    rows: list[Row] = []
    for name, rivals in (("forward", forward), ("backward", backward)):
        times = measure(rivals, options)
        rows += rows_of("projection", {**case, "pass": name}, times, "copy of theta_D")
    return rows


def _projections(D: int, d: int, options: Options) -> list[tuple[str, ul.Projection]]:
    kinds = [("uniform", ul.UniformProjection), ("balanced", ul.BalancedProjection)]
    made = [(f"unilora_ext {name}", kind(D, d)) for name, kind in kinds]
    if options.device == "cpu":
        made += [(f"unilora_ext {name}, computed", kind(D, d, materialize=False)) for name, kind in kinds]
    return made


def plain(theta_d: Tensor, scale: Tensor, index: Tensor) -> Tensor:
    """The projection in one line of PyTorch."""
    return (theta_d * scale).index_select(0, index)


def _backward_of(output: Any, of: Tensor, grad: Any) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(output, of, grad, retain_graph=True)
