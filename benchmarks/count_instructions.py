#!/usr/bin/env python3
"""Instructions an element of the projection's CPU kernels, by valgrind's callgrind: the same on a busy machine.

Writes results/instructions.json. Valgrind knows AVX2 and not AVX-512: the counts are those of the AVX2 version.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from common import RESULTS, Options, machine
from limits import build

FUNCTIONS = {
    "plain_gather": "forward, plain loop: int64 index, scale at each element",
    "stored_gather": "forward, stored index",
    "uniform_gather": "forward, uniform index computed on the way",
    "balanced_gather": "forward, balanced index computed on the way",
    "plain_segment_sum": "backward, plain loop: segment-sum through a stored order",
    "stored_scatter": "backward, stored index",
}


def main() -> int:
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "instructions"
        build("instructions.cpp", program)
        for name in FUNCTIONS:
            out = Path(folder) / name
            command = [
                "valgrind",
                "--tool=callgrind",
                f"--toggle-collect={name}",
                f"--callgrind-out-file={out}",
                program,
                name,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            total = int(re.search(r"^(?:totals|summary): (\d+)", out.read_text(), re.M)[1])
            counts[name] = round(total / int(done.stdout), 2)
            print(f"{counts[name]:8.2f}  {name:<18} {FUNCTIONS[name]}", flush=True)
    rows = [{"kernel": name, "what": FUNCTIONS[name], "instructions_per_element": n} for name, n in counts.items()]
    document = {"machine": machine(Options()), "rows": rows}
    (RESULTS / "instructions.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
