"""The training of ``unilora finetune``: what needs PyTorch and Transformers."""

from __future__ import annotations

import json
import platform
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import unilora_ext as ul
from unilora_ext.checkpoint import replace_file
from unilora_ext.cli import checkpoints, report, sizes
from unilora_ext.cli.model import Classifier, attach, device_of, load_classifier, metadata
from unilora_ext.cli.scoring import Score, score
from unilora_ext.cli.settings import Settings
from unilora_ext.cli.trainer import AdapterTrainer

if TYPE_CHECKING:
    from unilora_ext.cli.finetune import Rows

__all__ = ["prepare", "train"]


def prepare(settings: Settings, labels: list[str]) -> Classifier:
    """The model with a new adapter; writes nothing."""
    device_of(settings.device)
    transformers.set_seed(settings.seed)
    config = {
        "r": settings.r,
        "d": settings.d,
        "target_modules": settings.target_modules,
        "projection": settings.projection,
        "seed": settings.seed,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
    }
    return attach(settings.model, labels, config, settings.max_length)


def train(settings: Settings, classifier: Classifier, rows: Rows, output: Path, started: float) -> dict[str, Any]:
    """Trains to the end from the last whole checkpoint, scores the best adapter, writes the report."""
    folder, facts = output / "checkpoints", metadata(classifier, settings)
    trainer = AdapterTrainer(classifier, rows.training, rows.validation, settings, facts, output / "adapter", folder)
    _print_plan(settings, classifier, rows, trainer.steps_an_epoch)
    resumed = checkpoints.latest(folder)
    if resumed is not None:
        print(f"going on from {resumed}")
    trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    trainer.load_best()
    seconds = time.perf_counter() - started

    # The saved adapter in a model built anew: the numbers that `unilora evaluate` will give.
    saved, _ = load_classifier(output / "adapter", settings.model, settings.device)
    scores = {"validation": score(saved, rows.validation), "test": score(saved, rows.test) if rows.test else None}
    best = next(epoch for epoch in trainer.epochs if epoch["step"] == trainer.state.best_global_step)
    metrics = {
        "results": {
            "best_epoch": best["epoch"],
            "best_step": best["step"],
            **{name: value.asdict() if value else None for name, value in scores.items()},
            "epochs": trainer.epochs,
            "labels": rows.labels,
            "rows": {"training": len(rows.training), "validation": len(rows.validation), "test": len(rows.test)},
            "sizes": sizes.model_sizes(saved, output / "adapter"),
            "settings": settings.deterministic(),
        },
        "timing": {
            "training_seconds": seconds,
            "samples_per_second": trainer.progress.rows_a_second,
            "resumed_from": None if resumed is None else resumed.name,
        },
        "environment": {
            "unilora_ext": ul.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": str(trainer.args.device),
            "threads": torch.get_num_threads(),
        },
    }
    metrics = json.loads(json.dumps(metrics))  # tuples become lists, as in the file
    (output / "report").mkdir(exist_ok=True)
    report.draw(metrics["results"], output / "report" / "report.png")
    # Last: its presence says that the run is complete.
    replace_file(output / "report" / "metrics.json", json.dumps(metrics, indent=2).encode() + b"\n")
    _print_end(settings, output, best["epoch"], scores, metrics)
    return metrics


def _print_plan(settings: Settings, classifier: Classifier, rows: Rows, steps: int) -> None:
    adapter = classifier.adapter
    head = sum(t.numel() for t in adapter.modules_to_save().values())
    names = adapter.config.target_modules
    print(
        f"model     {settings.model} ({type(classifier.model).__name__})\n"
        f"rows      {len(rows.training):,} training, {len(rows.validation):,} validation, {len(rows.test):,} test\n"
        f"labels    {', '.join(rows.labels[:8])}{', ...' if len(rows.labels) > 8 else ''}\n"
        f"adapter   {names if isinstance(names, str) else ', '.join(names)} in {len(adapter.layers)} modules, "
        f"r = {adapter.config.r}: D = {adapter.projection.D:,} LoRA values from d = {adapter.config.d:,}; "
        f"trained whole: {', '.join(adapter.config.modules_to_save)} ({head:,})\n"
        f"training  {settings.epochs} epochs of {steps} steps of {settings.batch_size} rows, learning rates "
        f"{settings.lr_theta:g} (theta_d) and {settings.lr_head:g} (head), seed {settings.seed}, "
        f"on {device_of(settings.device)}",
        flush=True,
    )


def _print_end(
    settings: Settings, output: Path, epoch: int, scores: dict[str, Score | None], metrics: dict[str, Any]
) -> None:
    print(f"\nbest adapter: epoch {epoch}, in {output / 'adapter'}")
    for name, value in scores.items():
        if value is not None:
            print(f"  {name:<10} accuracy {value.accuracy!r} ({value.correct} of {value.rows}), loss {value.loss!r}")
    print(sizes.table(metrics["results"]["sizes"]))
    print(f"report: {output / 'report' / 'metrics.json'}, {output / 'report' / 'report.png'}")
    data = settings.test or str(output / "validation.csv")
    print(
        "the same number in a new process:\n"
        f"  unilora evaluate --adapter {shlex.quote(str(output / 'adapter'))} --data {shlex.quote(data)}",
        flush=True,
    )
