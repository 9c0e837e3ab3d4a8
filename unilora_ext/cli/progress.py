"""The progress bar of a training run: loss and speed; one line an epoch stays."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from unilora_ext.cli import distributed

__all__ = ["Progress"]


class Progress(ProgressCallback):
    """Transformers' bar, with the smoothed loss and the speed.

    Args:
        steps_an_epoch: optimizer steps.
        epochs: of the run.
        criterion: the validation figure that tells the best epoch.
        figure: what is shown beside the loss.
        unit: of the speed shown: ``samples`` or ``tokens``.
    """

    def __init__(self, steps_an_epoch: int, epochs: int, criterion: str, figure: str, unit: str) -> None:
        super().__init__()
        self.steps_an_epoch, self.epochs = steps_an_epoch, epochs
        self.loss: float | None = None
        self.done, self.seconds = {"samples": 0, "tokens": 0}, 0.0
        self.criterion, self.best = criterion, None
        self.figure, self.unit = figure, unit
        self.processes = distributed.world_size()

    def speed(self, unit: str) -> float | None:
        """Training speed of all processes, which work on equal shares; evaluation and padding left out."""
        return self.processes * self.done[unit] / self.seconds if self.seconds else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_terminal = sys.stderr.isatty()
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if on_terminal else 20,  # a log file does not need every step
            leave=False,
            disable=not state.is_world_process_zero,
        )
        self.current_step = state.global_step
        self.best = state.best_metric

    def close(self) -> None:
        """Takes the bar away where an error has ended the training: the message has its own line."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def step(self, loss: float | None, rows: int, tokens: int) -> None:
        """Told by the trainer in each forward pass: the mean loss (None: of nothing), and what went through it."""
        if loss is not None:
            self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self.done["samples"] += rows
        self.done["tokens"] += tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        if state.is_world_process_zero:
            text = f"loss {self.loss:.4f}, {self.speed(self.unit):.0f} {self.unit}/s"
            self.training_bar.set_postfix_str(text, refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        value = metrics[f"eval_{self.criterion}"]
        better = self.best is None or (value > self.best if self.criterion == "accuracy" else value < self.best)
        self.best = value if better else self.best
        self.training_bar.clear()
        print(
            f"epoch {state.global_step // self.steps_an_epoch}/{self.epochs}: "
            f"training loss {metrics['train_loss']:.4f}, validation loss {metrics['eval_loss']:.4f}, "
            f"validation {self.figure} {metrics[f'eval_{self.figure}']:.4f}{' (best so far)' if better else ''}",
            flush=True,
        )
        self.training_bar.refresh()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: :meth:`on_evaluate` prints the epoch's line."""
