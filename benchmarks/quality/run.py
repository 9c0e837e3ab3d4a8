#!/usr/bin/env python3
"""Makes the runs that answer the questions of docs/quality.md.

    python benchmarks/quality/run.py [QUESTION ...] [--task TASK] [--jobs 2] [--hours 8] [--device cpu]

A row is written as each run ends, and a run that has a row is not made again: interrupt it and start it anew as you
like. It stops before the runs of all questions together have taken `--hours` CPU hours.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from protocol import Run, perform
from questions import QUESTIONS, Choice
from rows import Rows
from tasks import TASKS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="question", help=f"{', '.join(QUESTIONS)}; default: all")
    parser.add_argument("--task", choices=TASKS, help="of this task alone")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--hours", type=float, default=8.0, help="CPU hours of all rows together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.questions) - set(QUESTIONS))
    if unknown:
        parser.error(f"question: expected some of {', '.join(QUESTIONS)}; got {', '.join(unknown)}")
    choices = [asked for name in arguments.questions or QUESTIONS for asked in QUESTIONS[name]()]
    choices = [asked for asked in choices if arguments.task in (None, asked.task)]
    rows, going, began = Rows(), {}, time.perf_counter()
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn"), _alone) as pool:
        while True:
            within = rows.seconds < arguments.hours * 3600
            if not within and not going:
                print(f"stopped: the rows have taken {rows.seconds / 3600:.2f} CPU hours", flush=True)
                return 1
            for run in _missing(choices, rows) if within else ():
                if len(going) >= arguments.jobs:
                    break
                if run not in going.values():
                    going[pool.submit(perform, run, arguments.device)] = run
            if not going:
                return 0
            done: set[Future] = wait(going, return_when=FIRST_COMPLETED).done
            for future in done:
                run = going.pop(future)
                row = future.result()
                rows.append(row)
                left = sum(1 for _ in _missing(choices, rows))
                print(
                    f"{time.perf_counter() - began:6.0f} s  {run.task} {run.method} r {run.r} d {run.d} "
                    f"rate {run.rate:g} seed {run.seed}: validation {row['validation_accuracy']:.4f}, "
                    f"test {row['test_accuracy']:.4f}, {row['seconds']:.0f} CPU-s; {left} to go as far as is known",
                    flush=True,
                )


def _alone() -> None:
    """A worker: one thread, and silent libraries."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _missing(choices: list[Choice], rows: Rows) -> Iterator[Run]:
    """Runs without a row, each once, in the questions' order."""
    wanted = dict.fromkeys(run for asked in choices for run in asked.wanted(rows))
    yield from (run for run in wanted if run not in rows)


if __name__ == "__main__":
    sys.exit(main())
