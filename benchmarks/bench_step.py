"""Whole training steps of an encoder: forward, backward and AdamW, same batches; peak memory in a process of its own.

Models: the shape of all-MiniLM-L6-v2, and of a 12-layer, 768-wide encoder, with random weights.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import Options, Row, measure, rows_of, threads
from rivals import adapted
from torch import Tensor, nn

ENCODERS = {
    "6 x 384 (MiniLM)": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "12 x 768": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
}
KINDS = ("unilora_ext", "peft-unilora", "peft-lora")
BATCH, LENGTH, R = 16, 40, 4


def encoder(name: str) -> nn.Module:
    """A BERT encoder for two classes with random weights."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(vocab_size=8000, **ENCODERS[name]))


def step_of(name: str, kind: str, device: str) -> Callable[[], Any]:
    """One training step of theta_d (or the LoRA factors)."""
    width, layers = ENCODERS[name]["hidden_size"], ENCODERS[name]["num_hidden_layers"]
    D = 2 * layers * 2 * width * R
    model = adapted(kind, lambda: encoder(name), ["query", "value"], R, D // 18)
    return step_with(model, [p for p in model.parameters() if p.requires_grad], device)


def step_with(model: nn.Module, trained: Sequence[Tensor], device: str) -> Callable[[], Any]:
    """A step of forward, backward and AdamW on one batch of random tokens."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 8000, (BATCH, LENGTH), generator=generator).to(device)
    labels = torch.randint(0, 2, (BATCH,), generator=generator).to(device)

    def step() -> None:
        model.zero_grad()
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()

    return step


def run(options: Options) -> list[Row]:
    rows: list[Row] = []
    for name in ENCODERS:
        for count in options.threads[-1:] if options.device == "cpu" else (None,):
            with threads(count or torch.get_num_threads()):
                steps = {kind: step_of(name, kind, options.device) for kind in KINDS}
                times = measure(steps, options, least=5)
            case: Row = {"model": name, "batch": BATCH, "length": LENGTH, "r": R, "threads": count}
            for row in rows_of("step", case, times, "peft-lora"):
                row["steps_per_second"] = round(1e3 / row["median_ms"], 3)
                row["peak_bytes"] = peak_bytes(name, row["rival"], options.device)
                rows.append(row)
    return rows


def peak_bytes(name: str, kind: str, device: str) -> int:
    """Peak memory of three steps in a fresh process: resident on the CPU, allocated on a GPU."""
    command = [sys.executable, str(Path(__file__).resolve()), name, kind, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resident_peak() -> int:
    """Most resident bytes of this process. (getrusage's figure would count the parent's, before exec.)"""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"^VmHWM:\s*(\d+) kB", status, re.M)[1]) * 1024


if __name__ == "__main__":
    of_step = step_of(*sys.argv[1:4])
    for _ in range(3):
        of_step()
    print(torch.cuda.max_memory_allocated() if sys.argv[3] == "cuda" else resident_peak())
