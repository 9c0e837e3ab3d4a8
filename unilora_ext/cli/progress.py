"""The progress of a training run: loss and speed in a bar, or in plain lines where no terminal shows one; one line an
epoch stays."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

from unilora_ext.cli import distributed

__all__ = ["Progress"]


SECONDS, SHARE = 10.0, 0.05
"""Between two lines in a log: at least so long, and at least that share of the steps."""


class _Lines:
    """What stands for the bar in a log file: a plain line now and then, without control characters.

    Args:
        total: steps of the run.
        initial: steps done before.
        disable: whether nothing is shown.
    """

    def __init__(self, total: int, initial: int, disable: bool) -> None:
        self.total, self.initial, self.disable = total, initial, disable
        self.done = self.shown = initial
        self.began = self.last = time.monotonic()
        self.text = ""

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        self.text = text

    def update(self, steps: int) -> None:
        self.done += steps
        now = time.monotonic()
        rare = now - self.last >= SECONDS and self.done - self.shown >= SHARE * self.total
        if self.disable or not rare or self.done == self.total:  # the epoch's line tells the end
            return
        self.last, self.shown = now, self.done
        left = (now - self.began) / (self.done - self.initial) * (self.total - self.done)
        share = f"{self.done / self.total:.0%}"
        print(
            f"step {self.done}/{self.total} ({share}): {self.text}, about {tqdm.format_interval(left)} left",
            file=sys.stderr,
            flush=True,
        )

    def clear(self) -> None:
        """Nothing: a line stays."""

    refresh = close = clear


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
        shown = {
            "total": state.max_steps,
            "initial": state.global_step,
            "disable": not state.is_world_process_zero,
        }
        if sys.stderr.isatty():
            self.training_bar = tqdm(**shown, unit="step", dynamic_ncols=True, mininterval=0.2, leave=False)
        else:
            self.training_bar = _Lines(**shown)
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
        better = self.best is None or (value < self.best if self.criterion == "loss" else value > self.best)
        self.best = value if better else self.best
        self.training_bar.clear()
        print(
            f"epoch {state.global_step // self.steps_an_epoch}/{self.epochs}: "
            f"training loss {metrics['train_loss']:.4f}, validation loss {metrics['eval_loss']:.4f}, "
            f"validation {self.figure} {metrics[f'eval_{self.figure}']:.4f}{' (best so far)' if better else ''}",
            flush=True,
        )
        self.training_bar.refresh()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.training_bar.clear()
        print(text, flush=True)
        self.training_bar.refresh()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: :meth:`on_evaluate` prints the epoch's line."""
