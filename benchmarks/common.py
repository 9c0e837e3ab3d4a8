"""What every benchmark shares: rivals measured in turn, honest statistics, rows with the machine they came from.

A benchmark is a module ``bench_<stem>.py`` with ``run(options) -> list of rows``. Rivals of one case are called in
turn, one call each, round after round in a random order, so that a change of the machine's speed hits all alike. A time
is the median of the rounds, with the 20th and 80th percentile; what is quoted are ratios of times from the same rounds.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import unilora_ext as ul

RESULTS = Path(__file__).resolve().parent / "results"

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What the command line chooses.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        seconds: aimed at for one case, all rivals together.
        threads: numbers of threads, on the CPU.
    """

    device: str = "cpu"
    seconds: float = 3.0
    threads: tuple[int, ...] = (1, 2)


def measure(
    rivals: Mapping[str, Callable[[], Any]], options: Options, *, least: int = 7, most: int = 200
) -> dict[str, list[float]]:
    """Milliseconds of each call, rivals in turn, in a new order each round: what one leaves in the caches for the next
    is spread over all.

    Args:
        rivals: by name. Each is called twice to warm up.
        options: device and time to spend.
        least, most: bounds of the number of rounds.
    """
    for call in rivals.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in rivals}
    order = random.Random(0)
    deadline = time.perf_counter() + options.seconds
    while len(next(iter(times.values()))) < least or (
        time.perf_counter() < deadline and len(next(iter(times.values()))) < most
    ):
        for name in order.sample(list(rivals), len(rivals)):
            times[name].append(_milliseconds(rivals[name], options.device))
    return times


def _milliseconds(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        _flush_cuda_cache()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _flush_cuda_cache(held: list[torch.Tensor] = []) -> None:  # noqa: B006  one buffer for all calls
    """Writes 256 MiB: what the last call left in L2 is gone."""
    if not held:
        held.append(torch.empty(256 << 20, dtype=torch.int8, device="cuda"))
    held[0].zero_()


def rows_of(bench: str, case: Row, times: Mapping[str, list[float]], against: str) -> Iterator[Row]:
    """A row for each rival; `ratio` is its median over that of the rival `against`."""
    base = statistics.median(times[against])
    for name, values in times.items():
        ordered = sorted(values)
        yield {
            "bench": bench,
            **case,
            "rival": name,
            "median_ms": round(statistics.median(ordered), 4),
            "p20_ms": round(ordered[len(ordered) // 5], 4),
            "p80_ms": round(ordered[len(ordered) * 4 // 5], 4),
            "rounds": len(ordered),
            "against": against,
            "ratio": round(statistics.median(ordered) / base, 4),
        }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(options: Options) -> Row:
    """Where the rows come from."""
    versions = {"unilora_ext": ul.__version__, "torch": torch.__version__, "python": platform.python_version()}
    for name in ("peft", "transformers"):
        try:
            versions[name] = __import__(name).__version__
        except ImportError:
            versions[name] = None
    on_gpu = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _cpu_name(),
        "cores": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "versions": versions,
        "cuda": torch.version.cuda if on_gpu else None,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    command = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None


def write(rows: list[Row], name: str, options: Options, folder: Path = RESULTS) -> list[Path]:
    """``<name>-<device>.json`` (machine and rows) and ``.csv`` (rows); returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}-{options.device}"
    document = {"machine": machine(options), "rows": rows}
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(stem.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return [stem.with_suffix(".json"), stem.with_suffix(".csv")]
