"""Transformers' Trainer with an adapter: two learning rates, small checkpoints, exact resume."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from unilora_ext.adapter import saved_tensors
from unilora_ext.checkpoint import read
from unilora_ext.cli import checkpoints
from unilora_ext.cli.data import Row
from unilora_ext.cli.errors import RunError
from unilora_ext.cli.model import Classifier, device_of
from unilora_ext.cli.progress import Progress
from unilora_ext.cli.scoring import Score, score
from unilora_ext.cli.settings import Settings

__all__ = ["AdapterTrainer"]


class AdapterTrainer(Trainer):
    """Trains theta_d and the head of a classifier.

    Args:
        classifier: what is trained.
        training: rows to train on.
        validation: rows scored after each epoch; the adapter of the best one is kept.
        settings: of the run.
        metadata: kept with every saved adapter.
        adapter_folder: where the best adapter so far is.
        folder: of the checkpoints.
    """

    def __init__(
        self,
        classifier: Classifier,
        training: Sequence[Row],
        validation: Sequence[Row],
        settings: Settings,
        metadata: dict[str, Any],
        adapter_folder: Path,
        folder: Path,
    ) -> None:
        self.classifier, self.settings, self.validation = classifier, settings, validation
        self.adapter_metadata, self.adapter_folder, self.checkpoint_folder = metadata, adapter_folder, folder
        number = {label: i for i, label in enumerate(classifier.labels)}
        encoded = classifier.tokenizer(
            [row.text for row in training], truncation=True, max_length=classifier.max_length
        )
        examples = [
            {**{key: values[i] for key, values in encoded.items()}, "labels": number[row.label]}
            for i, row in enumerate(training)
        ]
        self.steps_an_epoch = -(-len(examples) // settings.batch_size)
        super().__init__(
            model=classifier.model,
            args=training_arguments(settings, folder, self.steps_an_epoch * settings.epochs),
            train_dataset=examples,
            eval_dataset=list(validation),
            data_collator=DataCollatorWithPadding(classifier.tokenizer),
        )
        self.remove_callback(PrinterCallback)
        self.progress = Progress(self.steps_an_epoch, settings.epochs, settings.best)
        self.add_callback(self.progress)
        self.add_callback(_SaveBetweenEpochs(settings.save_steps, self.steps_an_epoch))
        self.loss_sum, self.loss_rows = 0.0, 0  # of the current epoch; kept in each checkpoint

    # -- optimizer and order ------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW with theta_d and the head at their own learning rates; vectors of the head do not decay."""
        if self.optimizer is None:
            adapter, settings = self.classifier.adapter, self.settings
            head = [p for p in self.model.parameters() if p.requires_grad and p is not adapter.theta_d]
            groups = [
                {"params": [adapter.theta_d], "lr": settings.lr_theta, "weight_decay": settings.weight_decay},
                {
                    "params": [p for p in head if p.ndim > 1],
                    "lr": settings.lr_head,
                    "weight_decay": settings.weight_decay,
                },
                {"params": [p for p in head if p.ndim <= 1], "lr": settings.lr_head, "weight_decay": 0.0},
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler:
        lengths = [len(example["input_ids"]) for example in self.train_dataset]
        return LengthSampler(
            lengths,
            self.settings.batch_size,
            self.settings.seed,
            lambda: self.state.global_step // self.steps_an_epoch,
        )

    # -- losses and scores --------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = len(inputs["labels"])
        loss = super().training_step(model, inputs, *args, **kwargs)
        value = loss.item()
        if not math.isfinite(value):
            raise RunError(
                f"training diverged in step {self.state.global_step + 1}: the loss is {value}. "
                f"Lower --lr-theta (now {self.settings.lr_theta}) or --lr-head (now {self.settings.lr_head})"
            )
        self.loss_sum, self.loss_rows = self.loss_sum + value * rows, self.loss_rows + rows
        self.progress.step(value, rows)
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the validation rows exactly as ``unilora evaluate`` does."""
        result: Score = score(self.classifier, self.validation)
        metrics = {
            "eval_accuracy": result.accuracy,
            "eval_loss": result.loss,
            "train_loss": self.loss_sum / self.loss_rows,
        }
        self.loss_sum, self.loss_rows = 0.0, 0
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """Losses and accuracy of each finished epoch; restored by a resume."""
        return [
            {
                "epoch": round(entry["epoch"]),
                "step": entry["step"],
                "train_loss": entry["train_loss"],
                "validation_loss": entry["eval_loss"],
                "validation_accuracy": entry["eval_accuracy"],
            }
            for entry in self.state.log_history
            if "eval_accuracy" in entry
        ]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter instead of the model."""
        self.classifier.adapter.save(Path(output_dir or self.args.output_dir) / "adapter", self.adapter_metadata)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        step = self.state.global_step
        checkpoint = self.checkpoint_folder / f"checkpoint-{step}"
        checkpoints.unmark(checkpoint)
        super()._save_checkpoint(model, trial, *args, **kwargs)
        checkpoints.mark_complete(checkpoint, {"loss_sum": self.loss_sum, "loss_rows": self.loss_rows})
        if self.state.best_global_step == step:
            self.publish()
        checkpoints.prune(self.checkpoint_folder, keep={step, self.state.best_global_step or step})

    def publish(self) -> None:
        """Makes the adapter in the model the run's best one."""
        self.classifier.adapter.save(self.adapter_folder, self.adapter_metadata)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        facts = checkpoints.read_marker(Path(resume_from_checkpoint))
        assert facts is not None, "only whole checkpoints are resumed"
        self.loss_sum, self.loss_rows = facts["loss_sum"], facts["loss_rows"]
        self._restore(Path(resume_from_checkpoint))

    def load_best(self) -> None:
        """Puts the best adapter into the model, and where the best one is kept."""
        self._restore(self.checkpoint_folder / f"checkpoint-{self.state.best_global_step}")
        self.publish()

    def _restore(self, checkpoint: Path) -> None:
        """Reads theta_d and the head of a checkpoint into the model."""
        file, adapter = read(checkpoint / "adapter"), self.classifier.adapter
        with torch.no_grad():
            adapter.theta_d.copy_(file.theta_d)
            for name, tensor in saved_tensors(adapter.model, adapter.config).items():
                tensor.copy_(file.modules_to_save[name])


def training_arguments(settings: Settings, folder: Path, steps: int) -> TrainingArguments:
    """The Trainer's arguments of a run of `steps` steps."""
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size,
        num_train_epochs=settings.epochs,
        optim="adamw_torch",
        learning_rate=settings.lr_theta,
        lr_scheduler_type=schedules[settings.schedule],
        warmup_steps=math.ceil(settings.warmup * steps),
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="no",  # losses are kept by the epoch, and shown by the progress bar
        metric_for_best_model=settings.best,
        greater_is_better=settings.best == "accuracy",
        seed=settings.seed,
        use_cpu=device_of(settings.device).type == "cpu",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device_of(settings.device).type != "cpu",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # theta_d lives on one device; DataParallel would copy it
    return arguments


class _SaveBetweenEpochs(TrainerCallback):
    """A checkpoint every so many steps, but not where the end of an epoch makes one."""

    def __init__(self, every: int, steps_an_epoch: int) -> None:
        self.every, self.steps_an_epoch = every, steps_an_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every == 0 and step % self.steps_an_epoch != 0:
            control.should_save = True


class LengthSampler(Sampler[int]):
    """Random batches of rows of like length, so that little is padding.

    The order is a function of seed and epoch alone, which a resumed run needs.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows a batch.
        seed: of the order.
        epoch: says the epoch that begins.
    """

    POOL = 50  # batches that are sorted together

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed}/{self.epoch()}")
        order, size = list(range(len(self.lengths))), self.batch_size
        generator.shuffle(order)
        batches = []
        for start in range(0, len(order), size * self.POOL):
            pool = sorted(order[start : start + size * self.POOL], key=lambda i: -self.lengths[i])
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        last = [batches.pop()] if len(batches[-1]) < size else []  # a short batch stays the last one
        generator.shuffle(batches)
        return iter([i for batch in batches + last for i in batch])
