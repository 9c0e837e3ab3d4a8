"""What is asked, and which runs answer it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import sqrt

from methods import METHODS, START
from protocol import Run
from tasks import TASKS

__all__ = ["QUESTIONS", "Choice", "law"]

TRIED = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Learning rates that every method may try, as multiples of the middle one."""
Rows = Mapping[Run, Mapping[str, float]]


@dataclass(frozen=True)
class Choice:
    """A way of adapting, whose learning rate is chosen by the validation rows of `trials`, then run with all `seeds`.

    With one rate there is nothing to choose.
    """

    task: str
    method: str
    r: int = 4
    d: int | None = None
    start: float | None = None
    rates: tuple[float, ...] = ()
    trials: tuple[int, ...] = (0, 1)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)

    def run(self, rate: float, seed: int) -> Run:
        return Run(self.task, self.method, self.r, self.d, self.start, rate, seed)

    def rate(self, rows: Rows) -> float | None:
        """The rate of the best mean validation figure; None while trials are missing."""
        if len(self.rates) == 1:
            return self.rates[0]
        tried = {rate: [self.run(rate, seed) for seed in self.trials] for rate in self.rates}
        if not all(run in rows for runs in tried.values() for run in runs):
            return None
        best = TASKS[self.task].best
        means = {rate: statistics.mean(rows[run][f"validation_{best}"] for run in runs) for rate, runs in tried.items()}
        return (min if best == "loss" else max)(means, key=means.__getitem__)

    def wanted(self, rows: Rows) -> Iterator[Run]:
        """Runs that can be made now, done or not."""
        if len(self.rates) > 1:
            yield from (self.run(rate, seed) for seed in self.trials for rate in self.rates)
        chosen = self.rate(rows)
        if chosen is not None:
            yield from (self.run(chosen, seed) for seed in self.seeds)


def law(task: str, r: int, d: int, entry_rate: float, entry_start: float = START) -> dict[str, float]:
    """Rate and start of theta_d by which every d moves like the same LoRA; rounded, since they name a run."""
    stretch = sqrt(TASKS[task].width * r / d)
    return {"rate": _rounded(entry_rate * stretch), "start": _rounded(entry_start * stretch)}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def choice(task: str, method: str, r: int = 4, d: int | None = None, **given: object) -> Choice:
    """With the rates around the method's centre; its start by the law, where the method follows it."""
    kind = METHODS[method]
    start = None
    centre = kind.centre or TASKS[task].lora_rate
    if kind.law:
        d = d or round(TASKS[task].width * r / 16)
        centre, start = law(task, r, d, centre).values()
    if method == "head":
        return Choice(task, method, rates=(1.0,), **given)
    return Choice(task, method, r, d, start, tuple(_rounded(centre * multiple) for multiple in TRIED), **given)


# -- the questions ----------------------------------------------------------------------------------------------------

RATIOS = (600, 150, 36, 9, 4, 1)
"""D / d."""
ENTRY_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
ENTRY_STARTS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""As multiples of the paper's."""


def _grid(task: str, r: int, ratios: tuple[int, ...], rates: tuple[float, ...], seeds: tuple[int, ...]) -> Iterator:
    for ratio in ratios:
        d = round(TASKS[task].width * r / ratio)
        by_law = [law(task, r, d, rate) for rate in rates]
        tried = tuple(given["rate"] for given in by_law)
        yield Choice(task, "uniform", r, d, by_law[0]["start"], tried, trials=seeds, seeds=seeds)


def rates() -> Iterator[Choice]:
    """Is the best rate of an entry of theta_D the same for every d, r and model?"""
    yield from _grid("garments", 4, RATIOS, ENTRY_RATES, (0, 1, 2))
    yield from _grid("garments", 1, (600, 36, 4), ENTRY_RATES, (0, 1))
    yield from _grid("garments", 16, (600, 36, 4), ENTRY_RATES, (0, 1))
    yield from _grid("tweets", 4, (600, 36, 4), ENTRY_RATES, (0,))


def starts() -> Iterator[Choice]:
    """Is the best start of an entry of theta_D the same for every d?"""
    for ratio in (600, 150, 36, 9, 4):
        d = round(TASKS["garments"].width * 4 / ratio)
        for multiple in ENTRY_STARTS:
            given = law("garments", 4, d, TASKS["garments"].lora_rate, START * multiple)
            yield Choice("garments", "uniform", 4, d, given["start"], (given["rate"],), seeds=(0, 1, 2))


FREE = ("uniform", "balanced", "unnormalised", "countsketch", "local", "nonuniform", "fastfood", "gaussian")
OTHERS = ("vera", "tied", "vblora", "loraxs", "fourierft", "tinylora")
PEFTS = ("peft-lora", "peft-vera", "peft-vblora", "peft-fourierft")


def methods() -> Iterator[Choice]:
    """Methods at their usual budgets, on the images."""
    for method in ("head", "lora", "uniform", *OTHERS, *PEFTS):
        yield choice("garments", method)


def ablation() -> Iterator[Choice]:
    """P of the same d, drawn in other ways."""
    for method in FREE:
        for d in (768, 96):
            yield choice("garments", method, d=d)


QUESTIONS: dict[str, Callable[[], Iterator[Choice]]] = {
    "rates": rates,
    "starts": starts,
    "methods": methods,
    "ablation": ablation,
}
