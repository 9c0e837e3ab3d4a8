"""The training of ``unilora finetune``: what needs PyTorch and Transformers."""

from __future__ import annotations

import json
import platform
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

import unilora_ext as ul
from unilora_ext.cli import advice, checkpoints, distributed, growth, report, sizes
from unilora_ext.cli.base import check_known
from unilora_ext.cli.data import RunData, label_entropy, label_variance
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.files import as_json, encoded
from unilora_ext.cli.model import Score, TaskModel, device_of, learning_rates
from unilora_ext.cli.predict import describe
from unilora_ext.cli.settings import CAUSAL_LM, IMAGES, REGRESSION, Settings
from unilora_ext.cli.tasks import TASKS
from unilora_ext.cli.trainer import AdapterTrainer
from unilora_ext.files import replace_file

__all__ = ["prepare", "train"]


def prepare(settings: Settings, rows: RunData) -> tuple[TaskModel, RunData]:
    """The model with a new adapter, and the rows as it takes them; writes nothing."""
    device_of(settings.device)
    parts = settings.gradient_accumulation * distributed.world_size()
    if settings.batch_size % parts:
        raise CliError(
            f"--batch-size: expected a multiple of {parts}, processes x --gradient-accumulation, got "
            f"{settings.batch_size}"
        )
    if settings.d == growth.AUTO and distributed.world_size() > 1:
        raise CliError(f"--d auto: expected one process, got {distributed.world_size()}; give --d a number")
    transformers.set_seed(settings.seed)
    task = TASKS[settings.task].new(settings, rows.labels)
    if settings.gradient_checkpointing and not getattr(task.model, "supports_gradient_checkpointing", False):
        raise CliError(f"--gradient-checkpointing: {type(task.model).__name__} does not offer it")
    ready = {name: task.ready(part) for name in ("training", "validation", "test") if (part := getattr(rows, name))}
    if settings.task != IMAGES:
        texts = [example["input_ids"] for example in task.examples(ready["training"][0])]
        check_known(settings.data, task.tokenizer, texts)
    counts = {name: counted for name, (_, counted) in ready.items() if counted}
    return task, replace(rows, **{name: part for name, (part, _) in ready.items()}, counts=counts)


def train(settings: Settings, task: TaskModel, rows: RunData, output: Path, started: float) -> dict[str, Any]:
    """Trains to the end from the last whole checkpoint, scores the best adapter, writes the report.

    Returns:
        The content of ``metrics.json``; empty in the other processes than the first.
    """
    folder, facts = output / "checkpoints", task.metadata(settings)
    trainer = AdapterTrainer(task, rows.training, rows.validation, settings, facts, output / "adapter", folder)
    _print_plan(settings, task, rows, trainer.steps_an_epoch)
    resumed = distributed.from_first(checkpoints.latest(folder))
    if resumed is not None:
        print(f"going on from {resumed}")
    try:
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    finally:
        trainer.progress.close()
    processes = distributed.world_size()
    first = distributed.is_first()
    distributed.leave()
    if not first:
        return {}
    trainer.load_best()
    seconds = time.perf_counter() - started

    # The saved file around the base model as it was before: the numbers that `unilora evaluate` will give, with no
    # second model in memory.
    saved = replace(task, adapter=ul.load(task.adapter.detach(), output / "adapter"))
    parts = {"validation": rows.validation, "test": rows.test}
    scores = {name: saved.score(part) if part else None for name, part in parts.items()}
    before: dict[str, Score | None] = {}
    if settings.task == CAUSAL_LM:  # a classifier's head knows nothing before the training
        with saved.adapter.disable():
            before = {name: saved.score(part) if part else None for name, part in parts.items()}
    best = next(epoch for epoch in trainer.epochs if epoch["step"] == trainer.state.best_global_step)
    metrics = {
        "results": {
            "best_epoch": best["epoch"],
            "best_step": best["step"],
            **_asdicts(scores),
            **({"before": _asdicts(before), "data": rows.counts} if settings.task == CAUSAL_LM else {}),
            "epochs": trainer.epochs,
            "labels": rows.labels,
            "rows": {"training": len(rows.training), "validation": len(rows.validation), "test": len(rows.test)},
            "sizes": sizes.model_sizes(saved, output / "adapter"),
            "settings": settings.deterministic(),
        },
        "timing": {
            "training_seconds": seconds,
            "samples_per_second": trainer.progress.speed("samples"),
            "tokens_per_second": trainer.progress.speed("tokens"),
            "resumed_from": None if resumed is None else resumed.name,
        },
        "environment": {
            "unilora_ext": ul.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": str(trainer.args.device),
            "threads": torch.get_num_threads(),
            "processes": processes,
        },
    }
    metrics = json.loads(json.dumps(metrics))  # tuples become lists, as in the file
    (output / "report").mkdir(exist_ok=True)
    report.draw(metrics["results"], output / "report" / "report.png")
    # Last: its presence says that the run is complete.
    replace_file(output / "report" / "metrics.json", encoded(as_json(metrics)))
    _print_end(settings, output, best["epoch"], scores, before, metrics)
    if settings.task == CAUSAL_LM:
        start, end = before["validation"].loss, scores["validation"].loss
    else:
        guess = label_variance if settings.task == REGRESSION else label_entropy
        start, end = guess(rows.training), trainer.epochs[-1]["train_loss"]
    _warn(advice.hardly_learnt(settings.task, start, end, trainer.steps_an_epoch, settings.epochs))
    return metrics


def _warn(message: str | None) -> None:
    if message is not None:
        print(f"warning: {message}", flush=True)


def _asdicts(scores: dict[str, Score | None]) -> dict[str, dict[str, Any] | None]:
    return {name: score.asdict() if score else None for name, score in scores.items()}


def _print_plan(settings: Settings, task: TaskModel, rows: RunData, steps: int) -> None:
    adapter = task.adapter
    head = sum(t.numel() for t in adapter.modules_to_save().values())
    names, P = adapter.config.target_modules, adapter.projection
    own = {name: t.numel() for name, t in adapter.trained.items() if name != "theta_d"}
    parts = "".join(f" and {name} ({count:,})" for name, count in own.items())
    grows = f" that may grow to {growth.last_d(adapter):,}" if settings.d == growth.AUTO else ""
    whole = f"; trained whole: {', '.join(adapter.config.modules_to_save)} ({head:,})" if head else ""
    rates = [f"{rate:.4g} ({name})" for name, rate in learning_rates(settings, adapter).items()]
    rates += [f"{settings.lr_head:g} (head)"] * bool(head)
    print(
        f"model     {settings.model} ({type(task.model).__name__})\n"
        f"rows      {len(rows.training):,} training, {len(rows.validation):,} validation, {len(rows.test):,} test"
    )
    for name, counts in rows.counts.items():
        print(f"  {name:<10}  {describe(counts)}")
    if rows.labels:
        print(f"labels    {', '.join(rows.labels[:8])}{', ...' if len(rows.labels) > 8 else ''}")
    print(
        f"adapter   {names if isinstance(names, str) else ', '.join(names)} in {len(adapter.layers)} modules, "
        f"r = {adapter.config.r}: D = {P.D:,} values from d = {P.d:,}{grows}{parts}{whole}\n"
        f"training  {settings.epochs} epochs of {steps} steps of {settings.batch_size} rows, learning rate"
        f"{'s' if len(rates) > 1 else ''} {' and '.join(rates)}, seed {settings.seed}, on {device_of(settings.device)}",
        flush=True,
    )
    rate = learning_rates(settings, adapter)["theta_d"]
    _warn(advice.hardly_moves(rate, adapter.projection.stretch, adapter.learning_rate()))
    if settings.task != CAUSAL_LM:
        _warn(advice.few_steps(steps, settings.epochs))


def _print_end(
    settings: Settings,
    output: Path,
    epoch: int,
    scores: dict[str, Score | None],
    before: dict[str, Score | None],
    metrics: dict[str, Any],
) -> None:
    print(f"\nbest adapter: epoch {epoch}, in {output / 'adapter'}")
    for name, value in scores.items():
        if value is not None:
            print(f"  {name:<10} {value.line()}")
        if before.get(name) is not None:
            print(f"  {'':<10} without it: {before[name].line()}")
    print(sizes.table(metrics["results"]["sizes"]))
    print(f"report: {output / 'report' / 'metrics.json'}, {output / 'report' / 'report.png'}")
    own = [str(output / settings.validation_file)]  # which is in UTF-8, with commas
    data = own if settings.test is None else [settings.test, *settings.form.options()]
    command = ["unilora", "evaluate", "--adapter", str(output / "adapter"), "--data", *data]
    print(f"the same number in a new process:\n  {shlex.join(command)}", flush=True)
