"""Transformers' Trainer with an adapter: two learning rates, small checkpoints, exact resume, one or more processes.

A step is the same on any number of processes and parts: its rows are dealt out to them, and their losses are divided by
what the whole step learns. Transformers divides by what each process holds, and leaves classifiers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

import unilora_ext as ul
from unilora_ext.attachment import exchanged_tensors
from unilora_ext.checkpoint import read
from unilora_ext.cli import checkpoints, distributed, growth
from unilora_ext.cli.encoding import IGNORED
from unilora_ext.cli.errors import RunError
from unilora_ext.cli.model import TaskModel, device_of, first_line, learning_rates
from unilora_ext.cli.progress import Progress
from unilora_ext.cli.sampling import LengthSampler, Shares, blank
from unilora_ext.cli.settings import Settings

__all__ = ["AdapterTrainer"]


class AdapterTrainer(Trainer):
    """Trains theta_d, and the head of a classifier.

    Args:
        task: what is trained.
        training: rows to train on.
        validation: rows scored after each epoch; the adapter of the best one is kept.
        settings: of the run.
        metadata: kept with every saved adapter.
        adapter_folder: where the best adapter so far is.
        folder: of the checkpoints.
    """

    def __init__(
        self,
        task: TaskModel,
        training: Sequence[Any],
        validation: Sequence[Any],
        settings: Settings,
        metadata: dict[str, Any],
        adapter_folder: Path,
        folder: Path,
    ) -> None:
        self.task, self.settings, self.validation = task, settings, validation
        self.figure = task.figure if settings.best == "loss" else settings.best
        self.adapter_metadata, self.adapter_folder, self.checkpoint_folder = metadata, adapter_folder, folder
        examples = task.examples(training)
        self.lengths = [task.length(example) for example in examples]
        self.steps_an_epoch = -(-len(examples) // settings.batch_size)
        super().__init__(
            model=task.model,
            args=training_arguments(settings, folder, self.steps_an_epoch * settings.epochs),
            train_dataset=[*examples, blank(examples, self.lengths)],
            eval_dataset=list(validation),
            data_collator=task.collator(),
        )
        self.model_accepts_loss_kwargs = True  # so that the labels of a step are counted, for compute_loss() below
        self.remove_callback(PrinterCallback)
        self.progress = Progress(self.steps_an_epoch, settings.epochs, settings.best, self.figure, task.speed_unit)
        self.add_callback(self.progress)
        self.add_callback(_SaveBetweenEpochs(settings.save_steps, self.steps_an_epoch))
        self.loss_sum, self.loss_rows = 0.0, 0  # of the epoch, in this process; the sums are kept in each checkpoint

    # -- optimizer and order ------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW with theta_d, trained parts of the projection and the head at their own learning rates; vectors of the
        head do not decay."""
        if self.optimizer is None:
            adapter, settings = self.task.adapter, self.settings
            trained, rates = adapter.trained, learning_rates(settings, adapter)
            own = {id(parameter) for parameter in trained.values()}
            decay = settings.weight_decay if settings.weight_decay_head is None else settings.weight_decay_head
            head = [p for p in self.model.parameters() if p.requires_grad and id(p) not in own]
            groups = [
                *(
                    {"params": [parameter], "lr": rates[name], "weight_decay": settings.weight_decay}
                    for name, parameter in trained.items()
                ),
                {
                    "params": [p for p in head if p.ndim > 1],
                    "lr": settings.lr_head,
                    "weight_decay": decay,
                },
                {"params": [p for p in head if p.ndim <= 1], "lr": settings.lr_head, "weight_decay": 0.0},
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind([group for group in groups if group["params"]], **options)
        return self.optimizer

    def get_train_dataloader(self) -> DataLoader:
        """This process's share of each step."""
        order = LengthSampler(
            self.lengths,
            self.settings.batch_size,
            self.settings.seed,
            lambda: self.state.global_step // self.steps_an_epoch,
        )
        return DataLoader(
            self.train_dataset,
            batch_sampler=Shares(order, self.settings.gradient_accumulation, blank=len(self.lengths)),
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    # -- losses and scores --------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The part of the step's mean loss that these rows make up, times the processes: gradients are averaged over
        them."""
        total = self.task.loss_sum(model, inputs)
        learnt = int((inputs["labels"] != IGNORED).sum())
        value = (total.detach() / max(learnt, 1)).item()
        if not math.isfinite(value):
            raise self._diverged("loss", value)
        self.loss_sum, self.loss_rows = self.loss_sum + value * learnt, self.loss_rows + learnt
        rows = int((inputs["labels"] != IGNORED).view(len(inputs["labels"]), -1).any(-1).sum())
        self.progress.step(value if learnt else None, rows, self._tokens(inputs))
        return total * distributed.world_size() / num_items_in_batch

    def _diverged(self, figure: str, value: float) -> RunError:
        rates = f"--lr-theta (now {learning_rates(self.settings, self.task.adapter)['theta_d']:g})"
        if self.task.adapter.config.modules_to_save:
            rates += f" or --lr-head (now {self.settings.lr_head})"
        step = self.state.global_step + (figure == "loss")  # of a step at work, or after it
        return RunError(f"training diverged in step {step}: the {figure} is {value}. Lower {rates}")

    @staticmethod
    def _tokens(inputs: dict[str, Any]) -> int:
        mask = inputs.get("attention_mask")
        counted = inputs.get("input_ids", inputs["labels"])  # an image counts as one
        return counted.numel() if mask is None else int(mask.sum())

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the validation rows as ``unilora evaluate`` does, each process a part of them."""
        mine = self.validation[distributed.rank() :: distributed.world_size()]
        *sums, loss_sum, loss_rows = distributed.sums([*self.task.sums(mine), self.loss_sum, self.loss_rows])
        result = self.task.score_of(sums)
        if not math.isfinite(result.loss):
            raise self._diverged("validation loss", result.loss)
        metrics = {
            f"eval_{self.figure}": getattr(result, self.figure),
            "eval_loss": result.loss,
            "train_loss": loss_sum / loss_rows,
            **({"eval_d": self.task.adapter.config.d} if self.settings.d == growth.AUTO else {}),
        }
        self.loss_sum, self.loss_rows = 0.0, 0
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.settings.d == growth.AUTO:
            self._grow_if_stalled(metrics[f"eval_{self.settings.best}"])
        return metrics

    def _grow_if_stalled(self, value: float) -> None:
        best, more = self.state.best_metric, self.state.global_step < self.state.max_steps
        if best is None or not more or (value > best if self.args.greater_is_better else value < best):
            return
        grown = growth.grow(self.task.adapter, self.optimizer.optimizer, self.lr_scheduler)
        if grown is not None:
            self.progress.note(f"validation {self.settings.best} has not improved: {grown}")

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """Losses, figure and, where it grows, d of each finished epoch; restored by a resume."""
        figure = self.figure
        return [
            {
                "epoch": round(entry["epoch"]),
                "step": entry["step"],
                "train_loss": entry["train_loss"],
                "validation_loss": entry["eval_loss"],
                f"validation_{figure}": entry[f"eval_{figure}"],
                **({"d": entry["eval_d"]} if "eval_d" in entry else {}),
            }
            for entry in self.state.log_history
            if "eval_loss" in entry
        ]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The adapter instead of the model."""
        if distributed.is_first():
            folder = Path(output_dir or self.args.output_dir) / "adapter"
            self.task.adapter.save(folder, self.adapter_metadata, resumable=True)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        step = self.state.global_step
        checkpoint = self.checkpoint_folder / f"checkpoint-{step}"
        loss_sum, loss_rows = distributed.sums([self.loss_sum, self.loss_rows])
        if distributed.is_first():
            checkpoints.unmark(checkpoint)
        try:
            super()._save_checkpoint(model, trial, *args, **kwargs)
        except RuntimeError as error:  # torch.save's, of a full disk
            raise RunError(f"{checkpoint}: expected to write it, got: {first_line(error)}") from error
        distributed.barrier()  # each process keeps the state of its random generators
        if distributed.is_first():
            checkpoints.mark_complete(checkpoint, {"loss_sum": loss_sum, "loss_rows": loss_rows})
            if self.state.best_global_step == step:
                self.publish()
            checkpoints.prune(self.checkpoint_folder, keep={step, self.state.best_global_step or step})

    def publish(self) -> None:
        """Makes the adapter in the model the run's best one."""
        self.task.adapter.save(self.adapter_folder, self.adapter_metadata)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        facts = checkpoints.read_marker(Path(resume_from_checkpoint))
        assert facts is not None, "only whole checkpoints are resumed"
        if distributed.is_first():
            self.loss_sum, self.loss_rows = facts["loss_sum"], facts["loss_rows"]
        self._restore(Path(resume_from_checkpoint))

    def load_best(self) -> None:
        """Puts the best adapter into the model, and where the best one is kept."""
        self._restore(self.checkpoint_folder / f"checkpoint-{self.state.best_global_step}")
        self.publish()

    def _restore(self, checkpoint: Path) -> None:
        """Reads what is trained from a checkpoint into the model, with the d that it had there."""
        file, adapter = read(checkpoint / "adapter"), self.task.adapter
        if file.theta_d.numel() > adapter.config.d:
            adapter.grow(file.theta_d.numel())
        elif file.theta_d.numel() < adapter.config.d:  # the best one, after the training
            adapter = ul.load(adapter.detach(), checkpoint / "adapter")
            self.task = replace(self.task, adapter=adapter)
        with torch.no_grad():
            for name, tensor in {"theta_d": file.theta_d, **adapter.projection.restored(file.parts)}.items():
                adapter.trained[name].copy_(tensor)
            originals = adapter.attachment.saved_originals  # of running statistics that had not moved
            for name, tensor in exchanged_tensors(adapter.model, adapter.config).items():
                tensor.copy_(file.modules_to_save.get(name, originals[name]))


def training_arguments(settings: Settings, folder: Path, steps: int) -> TrainingArguments:
    """The Trainer's arguments of a run of `steps` steps."""
    schedules = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size // (settings.gradient_accumulation * distributed.world_size()),
        gradient_accumulation_steps=settings.gradient_accumulation,
        average_tokens_across_devices=True,
        ddp_find_unused_parameters=False,  # theta_d and the head take part in every forward pass
        num_train_epochs=settings.epochs,
        optim="adamw_torch",
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=schedules[settings.schedule],
        warmup_steps=math.ceil(settings.warmup * steps),
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="no",  # losses are kept by the epoch, and shown by the progress bar
        metric_for_best_model=settings.best,
        greater_is_better=settings.best != "loss",
        seed=settings.seed,
        use_cpu=device_of(settings.device).type == "cpu",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device_of(settings.device).type != "cpu",
        **(_checkpointing() if settings.gradient_checkpointing else {}),
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # theta_d lives on one device; DataParallel would copy it
    return arguments


def _checkpointing() -> dict[str, Any]:
    """Not the reentrant kind: DDP would see theta_d's gradient twice."""
    prefix = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {f"{prefix}_checkpointing": True, f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}


class _SaveBetweenEpochs(TrainerCallback):
    """A checkpoint every so many steps, but not where the end of an epoch makes one."""

    def __init__(self, every: int, steps_an_epoch: int) -> None:
        self.every, self.steps_an_epoch = every, steps_an_epoch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every == 0 and step % self.steps_an_epoch != 0:
            control.should_save = True
