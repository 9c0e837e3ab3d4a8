"""The progress bar of a training run: loss and speed; one line an epoch stays."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm.auto import tqdm
from transformers.trainer_callback import ProgressCallback

__all__ = ["Progress"]


class Progress(ProgressCallback):
    """Transformers' bar, with the smoothed loss and the rows a second of this process."""

    def __init__(self, steps_an_epoch: int, epochs: int, criterion: str) -> None:
        super().__init__()
        self.steps_an_epoch, self.epochs = steps_an_epoch, epochs
        self.loss: float | None = None
        self.rows, self.seconds = 0, 0.0
        self.criterion, self.best = criterion, None

    @property
    def rows_a_second(self) -> float | None:
        """Training speed, evaluation left out."""
        return self.rows / self.seconds if self.seconds else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_terminal = sys.stderr.isatty()
        self.training_bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.2 if on_terminal else 20,  # a log file does not need every step
            leave=False,
        )
        self.current_step = state.global_step
        self.best = state.best_metric

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def step(self, loss: float, rows: int) -> None:
        """Told by the trainer after each backward pass."""
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        self.rows += rows

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._began
        self.training_bar.set_postfix_str(f"loss {self.loss:.4f}, {self.rows_a_second:.0f} samples/s", refresh=False)
        super().on_step_end(args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        value = metrics[f"eval_{self.criterion}"]
        better = self.best is None or (value > self.best if self.criterion == "accuracy" else value < self.best)
        self.best = value if better else self.best
        self.training_bar.clear()
        print(
            f"epoch {state.global_step // self.steps_an_epoch}/{self.epochs}: "
            f"training loss {metrics['train_loss']:.4f}, validation loss {metrics['eval_loss']:.4f}, "
            f"validation accuracy {metrics['eval_accuracy']:.4f}{' (best so far)' if better else ''}",
            flush=True,
        )
        self.training_bar.refresh()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: :meth:`on_evaluate` prints the epoch's line."""
