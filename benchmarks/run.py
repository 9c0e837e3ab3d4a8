#!/usr/bin/env python3
"""Runs the benchmarks, writes rows and pictures to results/, and renews the tables of the documentation.

    python benchmarks/run.py [projection hadamard family lora_linear attach step decode quantised communication]
                             [--device cpu]
                             [--seconds 3] [--threads 1 2]

All of it takes under ten minutes on two cores. The rivals need peft; the 4-bit base needs bitsandbytes and the demo's
data. ``unilora bench`` is the same from a source checkout.
"""

from __future__ import annotations

import argparse
import importlib
import time
import warnings

import pictures
import tables
from common import Options, write

BENCHES = ("projection", "hadamard", "family", "lora_linear", "attach", "step", "decode", "quantised", "communication")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", metavar="bench", help=f"{', '.join(BENCHES)}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--seconds", type=float, default=3.0, help="for one case, all rivals together")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="on the CPU")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.benches) - set(BENCHES))
    if unknown:
        parser.error(f"bench: expected some of {', '.join(BENCHES)}; got {', '.join(unknown)}")
    warnings.filterwarnings("ignore", category=UserWarning)  # the rivals' advice to their own users
    options = Options(arguments.device, arguments.seconds, tuple(arguments.threads))
    for name in arguments.benches or BENCHES:
        began = time.perf_counter()
        rows = importlib.import_module(f"bench_{name}").run(options)
        paths = write(rows, name, options)
        print(
            f"{name}: {len(rows)} rows in {time.perf_counter() - began:.0f} s -> {', '.join(map(str, paths))}",
            flush=True,
        )
    for path in (*pictures.draw(options.device), *tables.renew()):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
