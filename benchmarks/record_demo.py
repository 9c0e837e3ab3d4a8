#!/usr/bin/env python3
"""Keeps the figures of finished runs of ``unilora demo`` in results/, and renews the tables.

Of the first folder the whole report and the picture are kept, of the others the accuracies: ``unilora demo``,
``unilora demo --seed 1 --output demo-1``, then ``python benchmarks/record_demo.py unilora-demo demo-1``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import tables
from common import RESULTS, Options, machine


def main(*folders: str) -> int:
    reports = [Path(folder) / "report" for folder in folders or ["unilora-demo"]]
    read = [[json.loads((report / name).read_text()) for name in ("demo.json", "metrics.json")] for report in reports]
    demo, metrics = read[0]
    document = {"machine": machine(Options()), "demo": demo, "results": metrics["results"], "timing": metrics["timing"]}
    document["seeds"] = [
        {
            "seed": of_seed["results"]["settings"]["seed"],
            "accuracy": figures["accuracy"],
            "frozen": figures["frozen"]["accuracy"],
            "seconds": figures["seconds"],
        }
        for figures, of_seed in read
    ]
    settings = document["results"]["settings"]
    for name in ("model", "data", "test", "validation"):  # paths of the machine it ran on
        settings.pop(name, None)
    (RESULTS / "demo.json").write_text(json.dumps(document, indent=1) + "\n")
    shutil.copyfile(reports[0] / "report.png", RESULTS / "demo.png")
    for path in (RESULTS / "demo.json", RESULTS / "demo.png", *tables.renew()):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
