"""The Walsh-Hadamard transform of rows of n numbers, 64 MiB in all, beside a copy and the plain PyTorch form."""

from __future__ import annotations

import torch
from common import Options, Row, measure, rows_of, threads
from torch import Tensor

import unilora_ext.functional  # noqa: F401  registers the operators

NUMBERS = 1 << 24
LENGTHS = (1 << 4, 1 << 8, 1 << 12, 1 << 16, 1 << 20, 1 << 24)


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    for count in options.threads if options.device == "cpu" else (None,):
        with threads(count or torch.get_num_threads()):
            for n in LENGTHS:
                x = torch.randn(NUMBERS // n, n, device=options.device)
                copied = torch.empty_like(x)
                rivals = {
                    "copy": lambda x=x, copied=copied: copied.copy_(x),
                    "unilora_ext": lambda x=x: torch.ops.unilora.hadamard(x),
                    "torch, level by level": lambda x=x: plain(x),
                }
                rows += rows_of("hadamard", {"n": n, "threads": count}, measure(rivals, options, least=5), "copy")
    return rows


def plain(x: Tensor) -> Tensor:
    """Sums and differences of halves, log2 n times over all of x."""
    n, width = x.shape[-1], 1
    y = x
    while width < n:
        pairs = y.view(-1, n // (2 * width), 2, width)
        y = torch.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], dim=2)
        width *= 2
    return y.reshape(x.shape) * n**-0.5
