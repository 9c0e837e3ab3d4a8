"""What the models of all tasks share: the base model with its adapter, and what is done with both."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn

import unilora_ext as ul
from unilora_ext.cli import growth
from unilora_ext.cli.base import base_digest, base_sha256
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.settings import Settings

__all__ = ["Score", "TaskModel", "attach", "device_of", "first_line", "learning_rates", "quiet_bars"]


@dataclass(frozen=True)
class Score:
    """Figures of some rows. `loss` is the mean cross-entropy; a task adds its own."""

    loss: float
    rows: int

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """To the last digit, as ``unilora evaluate`` prints them."""
        raise NotImplementedError  # each task says its own

    def line(self) -> str:
        """The same in one line."""
        return ", ".join(" ".join(line.split()) for line in self.lines())


@dataclass(frozen=True)
class TaskModel(ABC):
    """A model with its tokenizer, its adapter and what its task asks of it.

    Attributes:
        model: adapted, on its device.
        tokenizer: of the base model.
        max_length: tokens kept of a row.
        adapter: of `model`.
        task: name of the task.
        auto_class: of Transformers, that loads such a model.
        figure: name of the figure that is reported beside the loss, unless ``--best`` names another.
        speed_unit: what the progress bar counts: ``samples`` or ``tokens``.
    """

    model: Any
    tokenizer: Any
    max_length: int
    adapter: ul.Adapter

    task: ClassVar[str]
    auto_class: ClassVar[str]
    figure: ClassVar[str]
    speed_unit: ClassVar[str]

    @classmethod
    @abstractmethod
    def new(cls, settings: Settings, labels: Sequence[str]) -> TaskModel:
        """With a new adapter, from a run's settings."""

    @classmethod
    @abstractmethod
    def restored(cls, base: str, facts: dict[str, Any]) -> dict[str, Any]:
        """The attributes, but for the adapter, that an adapter file's metadata asks for around `base`."""

    def metadata(self, settings: Settings) -> dict[str, Any]:
        """What an adapter file must say so that other commands need nothing else; a task adds its own."""
        return {
            "task": self.task,
            "base_model": settings.model,
            "base_digest": base_digest(self.adapter),
            "base_sha256": self.base_sha256,
            "max_length": self.max_length,
            "text_column": settings.text_column,
        }

    @cached_property
    def base_sha256(self) -> str:
        """SHA-256 of the frozen weights, which no training changes."""
        return base_sha256(self.adapter)

    @abstractmethod
    def ready(self, rows: Sequence[Any]) -> tuple[list[Any], dict[str, int]]:
        """(rows as :meth:`examples` and :meth:`sums` take them, counts to report)"""

    @abstractmethod
    def examples(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """Rows to train on: ``input_ids`` and ``labels`` (`IGNORED` where nothing is learnt), and more."""

    def length(self, example: dict[str, Any]) -> int:
        """Of an example: those of like length are trained together."""
        return len(example["input_ids"])

    @abstractmethod
    def collator(self) -> Callable[[list[dict[str, Any]]], Any]:
        """Makes a batch of examples."""

    @abstractmethod
    def loss_sum(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Cross-entropy of a batch, summed over all that is learnt in it; `model` may be wrapped."""

    @abstractmethod
    def sums(self, rows: Sequence[Any]) -> list[float]:
        """Figures of rows as sums: those of two parts add up to the whole's."""

    @abstractmethod
    def score_of(self, sums: Sequence[float]) -> Score:
        """The score that :meth:`sums` amount to."""

    def score(self, rows: Sequence[Any]) -> Score:
        """Loss and figure on rows."""
        return self.score_of(self.sums(rows))


def device_of(name: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        CliError: cuda where there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise CliError(
            f"--device: expected a device of this machine, got cuda; torch {torch.__version__} sees no GPU here"
        )
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def attach(model: nn.Module, settings: Settings, targets: Sequence[str] | str, whole: Sequence[str]) -> ul.Adapter:
    """A new adapter, as a run's settings ask for it.

    Args:
        model: to adapt.
        settings: of the run.
        targets: layers to adapt where the settings name none.
        whole: modules trained whole.
    """
    targets = settings.target_modules or targets
    targets = "all-linear" if list(targets) == ["all-linear"] else targets
    chosen = ul.UniLoRAConfig(
        r=settings.r,
        d=None if settings.d == growth.AUTO else settings.d,
        target_modules=targets,
        projection=settings.projection,
        seed=settings.seed,
        alpha=settings.alpha,
        dropout=settings.dropout,
        modules_to_save=whole,
        projection_options=settings.options,
    )
    return ul.attach(model, growth.shortened(model, chosen) if settings.d == growth.AUTO else chosen)


def learning_rates(settings: Settings, adapter: ul.Adapter) -> dict[str, float]:
    """Of theta_d and the projection's trained parts: the projection's own, all scaled where one is set for theta_d."""
    own = adapter.learning_rates()
    if settings.lr_theta is None:
        return own
    factor = settings.lr_theta / own["theta_d"]
    return {name: rate * factor for name, rate in own.items()} | {"theta_d": settings.lr_theta}


def first_line(error: BaseException) -> str:
    """An error of another library in one line."""
    return " ".join([type(error).__name__ + ":", *str(error).strip().splitlines()[:1]])


@contextmanager
def quiet_bars() -> Iterator[None]:
    """No bars, and no table of new weights, while Transformers reads or writes a model."""
    log = transformers.utils.logging
    level, bar = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bar:
            log.enable_progress_bar()
