"""One adapted linear layer, forward and backward, over the frozen layer: what an adapter costs a layer.

Every rival is a module with a frozen weight; the input needs a gradient, as inside a model. The projection is not
part of it (it runs once a step for all layers): unilora_ext's layer is given its factors. The layer is called, not the
model around it, whose hooks too run once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Options, Row, measure, rows_of, threads
from rivals import adapted
from torch import nn

from unilora_ext.updates import LowRankUpdate

# n = m, tokens, r
CASES = [(1024, tokens, 4) for tokens in (16, 64, 256, 1024)] + [(1024, 256, 64), (384, 1024, 4), (384, 1024, 16)]
KINDS = ("frozen", "unilora_ext", "peft-unilora", "peft-lora")
OPERATORS = "unilora_ext, the operators alone"


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    for width, tokens, r in CASES:
        x = torch.randn(tokens, width, device=options.device, dtype=dtype, requires_grad=True)
        grad = torch.randn(tokens, width, device=options.device, dtype=dtype)
        steps: dict[str, Callable[[], Any]] = {}
        saved: dict[str, int] = {}
        for kind in KINDS:
            layer = adapted(kind, partial(One, width), ["linear"], r, 2 * width * r // 16)
            layer = layer.to(options.device, dtype)
            steps[kind] = _step(layer, kind, x, grad)
            saved[kind] = saved_bytes(layer, x)
            if kind == "unilora_ext":
                steps[OPERATORS] = _operators(layer.linear, x, grad)
        for count in options.threads if options.device == "cpu" else (None,):
            with threads(count or torch.get_num_threads()):
                case: Row = {"n": width, "m": width, "tokens": tokens, "r": r, "threads": count}
                for row in rows_of("lora_linear", case, measure(steps, options), "frozen"):
                    rows.append({**row, "saved_bytes": saved.get(row["rival"])})
    return rows


def _step(model: nn.Module, kind: str, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], Any]:
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    layer = next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "linear")
    if kind == "unilora_ext":
        model(x)  # the first forward watches which layers ask for their update
        factors = tuple(f.detach().requires_grad_() for f in layer.lora_factors())
        update = LowRankUpdate(*factors, layer.scaling)
        wanted, model.unilora.update = [x, *factors], lambda *of: update
    return lambda: torch.autograd.grad(layer(x), wanted, grad)


def _operators(linear: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> Callable[[], Any]:
    """The two operators and nothing else: what PyTorch's autograd and the layer's Python add is not in it."""
    weight, bias = linear.weight, linear.bias
    A, B = (factor.detach() for factor in linear.lora_factors())
    operators = torch.ops.unilora

    @torch.no_grad()
    def call() -> None:
        _, h = operators.lora_linear(x, weight, bias, A, B, 1.0)
        operators.lora_linear_backward(grad, x, h, weight, A, B, 1.0, True, True, True)

    return call


def saved_bytes(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes that autograd keeps from the layer's forward to its backward, without x and the layer's own parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, *layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(kept.values())
