#!/usr/bin/env python3
"""Keeps the figures and the picture of a finished ``unilora demo`` in results/, and renews the README.

unilora demo && python benchmarks/record_demo.py unilora-demo
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import tables
from common import RESULTS, Options, machine


def main(folder: str = "unilora-demo") -> int:
    report = Path(folder) / "report"
    demo, metrics = (json.loads((report / name).read_text()) for name in ("demo.json", "metrics.json"))
    document = {"machine": machine(Options()), "demo": demo, "results": metrics["results"], "timing": metrics["timing"]}
    settings = document["results"]["settings"]
    for name in ("model", "data", "test", "validation"):  # paths of the machine it ran on
        settings.pop(name, None)
    (RESULTS / "demo.json").write_text(json.dumps(document, indent=1) + "\n")
    shutil.copyfile(report / "report.png", RESULTS / "demo.png")
    for path in (RESULTS / "demo.json", RESULTS / "demo.png", *tables.renew()):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
