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


def law(
    task: str, r: int, d: int, entry_rate: float, entry_start: float = START, normalised: bool = True
) -> dict[str, float]:
    """Rate and start of theta_d by which every d moves like the same LoRA; rounded, since they name a run.

    An entry of theta_D is theta_d[j] / sqrt(D / d), and a step of Adam moves theta_d[j] by the rate.
    """
    stretch = sqrt(TASKS[task].width * r / d) if normalised else 1.0
    return {"rate": _rounded(entry_rate * stretch), "start": _rounded(entry_start * stretch)}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def choice(
    task: str,
    method: str,
    r: int | None = None,
    d: int | None = None,
    tried: tuple[float, ...] = TRIED,
    **given: tuple[int, ...],
) -> Choice:
    """With the rates `tried` around the method's centre; its start by the law, where the method follows it."""
    kind, start = METHODS[method], None
    r = r or kind.r
    centre = kind.centre or TASKS[task].lora_rate
    if kind.law:
        d = d or round(TASKS[task].width * r / 16)
        centre, start = law(task, r, d, centre, normalised=kind.options.get("normalize", True)).values()
    if method == "head":
        return Choice(task, method, rates=(1.0,), **given)
    return Choice(task, method, r, d, start, tuple(_rounded(centre * multiple) for multiple in tried), **given)


# -- the questions ----------------------------------------------------------------------------------------------------

RATIOS = (600, 150, 36, 9, 4, 1)
"""D / d."""
ENTRY_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
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
    yield from _grid("garments", 1, (600, 36, 4), ENTRY_RATES[2:], (0, 1))
    yield from _grid("garments", 16, (600, 36, 4), ENTRY_RATES[2:], (0, 1))
    yield from _grid("tweets", 4, (600, 36, 4), ENTRY_RATES[1:7], (0,))


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
FEW = {"tried": (0.5, 1.0, 2.0), "trials": (0,)}
"""Of the tasks whose runs take a minute."""


def methods() -> Iterator[Choice]:
    """Every method at its usual budget."""
    for method in ("head", "lora", "uniform", *OTHERS, *PEFTS):
        yield choice("garments", method)
    for method in ("head", "lora", "uniform", "vera", "vblora", "fourierft", "loraxs"):
        yield choice("reviews", method, **FEW)
        yield choice("tweets", method, **FEW)


def matched() -> Iterator[Choice]:
    """Uni-LoRA with as many numbers as a relative has: 192, 768, 3,072 and 4,608 on the images."""
    for d in (192, 768, 3_072, 4_608):
        yield choice("garments", "uniform", d=d)
    for r in (4, 8, 16):
        yield choice("garments", "loraxs", r=r)
    for method in ("tinylora-large", "vblora-small", "fourierft-small", "vera"):
        yield choice("garments", method)
    yield choice("garments", "lora", r=1)


def ablation() -> Iterator[Choice]:
    """P of the same d, drawn in other ways."""
    for method in FREE:
        yield choice("garments", method, d=768, seeds=tuple(range(10)))
    for method in ("uniform", "balanced", "local", "nonuniform", "fastfood"):
        yield choice("garments", method, d=96)
    for method in ("uniform", "fastfood", "local", "nonuniform"):
        yield choice("reviews", method, d=2_304, **FEW)


def lengths() -> Iterator[Choice]:
    """Accuracy over d from 64 to D, by the law from one rate of a LoRA matrix."""
    for task, ds in (
        ("garments", (64, 128, 256, 512, 1_024, 2_048, 4_096, 8_192, 12_288)),
        ("reviews", (64, 256, 1_024, 4_096, 16_384, 36_864)),
    ):
        for d in ds:
            yield Choice(task, "uniform", 4, d, *_one(law(task, 4, d, TASKS[task].lora_rate)))


def ranks() -> Iterator[Choice]:
    """Accuracy over r at one d."""
    for task, d, rs in (("garments", 768, (1, 2, 4, 8, 16, 32)), ("reviews", 2_304, (1, 4, 16))):
        for r in rs:
            yield Choice(task, "uniform", r, d, *_one(law(task, r, d, TASKS[task].lora_rate)))


def growing() -> Iterator[Choice]:
    """Does a theta_d that grows from d = 48 reach what d = 3,072 reaches from the start?"""
    task, rate = "garments-long", TASKS["garments-long"].lora_rate
    for method, d in (("uniform", 48), ("uniform", 192), ("uniform", 768), ("uniform", 3_072), ("growing", 3_072)):
        yield Choice(task, method, 4, d, *_one(law(task, 4, d, rate)))


def heldout() -> Iterator[Choice]:
    """The defaults alone, beside the best of a grid, on a task and a model that settings were not chosen by."""
    width, d = 30 * (6 * 576 + 1_536) / 210, 65_536  # of the inputs of the adapted layers; default_d
    given = law("language", 4, d, 2 / width, 0.005)
    yield Choice("language", "uniform", 4, d, *_one(given), seeds=(0, 1, 2))
    rates = tuple(_rounded(given["rate"] * multiple) for multiple in TRIED)
    yield Choice("language", "uniform", 4, d, given["start"], rates, trials=(0,), seeds=(0, 1, 2))


def _one(given: dict[str, float]) -> tuple[float, tuple[float]]:
    return given["start"], (given["rate"],)


QUESTIONS: dict[str, Callable[[], Iterator[Choice]]] = {
    "rates": rates,
    "starts": starts,
    "methods": methods,
    "matched": matched,
    "ablation": ablation,
    "lengths": lengths,
    "ranks": ranks,
    "growing": growing,
    "heldout": heldout,
}
