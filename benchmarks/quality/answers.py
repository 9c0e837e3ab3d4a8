"""What the rows say: means with their standard errors, and differences seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from methods import METHODS
from questions import QUESTIONS, Choice
from rows import Rows
from tasks import TASKS

__all__ = ["Answer", "Mean", "answers", "tried"]


@dataclass(frozen=True)
class Mean:
    """Mean of some seeds, and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        return cls(statistics.mean(values), spread / sqrt(len(values)))

    def percent(self, sign: str = "") -> str:
        """In per cent, with the error where there is one."""
        error = "" if self.error != self.error else f" ± {100 * self.error:.1f}"
        return f"{100 * self.value:{sign}.1f}{error}"


@dataclass(frozen=True)
class Answer:
    """The runs of a choice with the rate that was chosen, in the order of its seeds."""

    choice: Choice
    rows: list[dict[str, Any]]

    @property
    def label(self) -> str:
        return METHODS[self.choice.method].label

    @property
    def numbers(self) -> int:
        """Trained beside the head."""
        return self.rows[0]["numbers"]

    @property
    def entry_rate(self) -> float:
        """By how much a step of Adam moves an entry of theta_D."""
        return self.rows[0]["rate"] / sqrt(self.rows[0]["D"] / self.choice.d)

    def mean(self, name: str = "test_accuracy") -> Mean:
        return Mean.of([row[name] for row in self.rows])

    def over(self, other: Answer, name: str = "test_accuracy") -> Mean:
        """The mean difference to another, seed by seed, of the seeds that both have."""
        theirs = {row["seed"]: row[name] for row in other.rows}
        return Mean.of([row[name] - theirs[row["seed"]] for row in self.rows if row["seed"] in theirs])

    @property
    def at_edge(self) -> bool:
        """Whether a better rate may lie beyond those that were tried."""
        rates = self.choice.rates
        return len(rates) > 1 and self.rows[0]["rate"] in (min(rates), max(rates))


def answers(rows: Rows, question: str, task: str | None = None) -> list[Answer]:
    """Of the choices of a question whose runs are all there."""
    found = []
    for choice in QUESTIONS[question]():
        rate = choice.rate(rows) if task in (None, choice.task) else None
        if rate is not None and all(choice.run(rate, seed) in rows for seed in choice.seeds):
            found.append(Answer(choice, [rows[choice.run(rate, seed)] for seed in choice.seeds]))
    return found


def tried(rows: Rows, choice: Choice) -> list[tuple[float, Mean]]:
    """(rate of an entry of theta_D, test accuracy) of all trials of a choice; none while some are missing."""
    runs = {rate: [choice.run(rate, seed) for seed in choice.trials] for rate in choice.rates}
    if not all(run in rows for of_rate in runs.values() for run in of_rate):
        return []
    stretch = sqrt(TASKS[choice.task].width * choice.r / choice.d)
    return [(rate / stretch, Mean.of([rows[run]["test_accuracy"] for run in runs[rate]])) for rate in choice.rates]
