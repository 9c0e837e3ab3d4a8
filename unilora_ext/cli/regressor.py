"""The regressor: a Transformers encoder whose head says a number, such as how alike two sentences are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from unilora_ext.cli.classifier import Classifier, logits
from unilora_ext.cli.data import IGNORED, Row
from unilora_ext.cli.model import Score
from unilora_ext.cli.settings import REGRESSION

__all__ = ["Regressor"]


@dataclass(frozen=True)
class Correlation(Score):
    """Correlations of what was said with the labels; `loss` is the mean squared error. `spearman`, of the ranks, is
    None where the rows were scored in parts."""

    pearson: float
    spearman: float | None = None

    def lines(self) -> list[str]:
        ranks = [] if self.spearman is None else [f"spearman {self.spearman!r}"]
        return [f"pearson  {self.pearson!r} ({self.rows} rows)", *ranks, f"loss     {self.loss!r}"]


@dataclass(frozen=True)
class Regressor(Classifier):
    """An encoder that gives each text, or pair of texts, a number. It has no labels."""

    task = REGRESSION
    figure = "pearson"

    def targets(self, rows: Sequence[Row]) -> list[float]:
        return [float(row.label or "nan") for row in rows]

    def loss_sum(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Squared errors, summed."""
        labels = inputs["labels"]
        said = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits.squeeze(-1)
        return (said.float() - labels).square()[labels != IGNORED].sum()

    def sums(self, rows: Sequence[Row]) -> list[float]:
        """[squared error, rows, x, y, x^2, y^2, x y] for x said and y expected"""
        return _sums(*self._said(rows))

    def _said(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        """float64 [rows]: (said, expected)"""
        return logits(self, rows).squeeze(-1), torch.tensor(self.targets(rows), dtype=torch.float64)

    def score_of(self, sums: Sequence[float]) -> Correlation:
        error, rows, x, y, xx, yy, xy = sums
        scale = (rows * xx - x * x) * (rows * yy - y * y)
        pearson = (rows * xy - x * y) / math.sqrt(scale) if scale > 0 else 0.0
        return Correlation(error / rows, int(rows), pearson)

    def score(self, rows: Sequence[Row]) -> Correlation:
        said, expected = self._said(rows)
        spearman = self.score_of(_sums(_ranks(said), _ranks(expected))).pearson
        return replace(self.score_of(_sums(said, expected)), spearman=spearman)


def _sums(x: Tensor, y: Tensor) -> list[float]:
    parts = ((x - y).square(), torch.ones_like(x), x, y, x.square(), y.square(), x * y)
    return [part.sum().item() for part in parts]


def _ranks(values: Tensor) -> Tensor:
    """float64 [rows]: places in order of size; equal values share the mean of theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0).double() - (counts - 1).double() / 2)[group]
