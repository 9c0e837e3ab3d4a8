"""A picture for each question."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt
from typing import Any

from answers import Answer, answers, tried
from questions import ENTRY_RATES, QUESTIONS
from rows import Rows
from tasks import TASKS

__all__ = ["DRAWINGS"]


def _points(axes: Any, points: Iterable[tuple[float, Any]], **style: Any) -> None:
    """Means in per cent over x, with their standard errors."""
    xs, means = zip(*points, strict=True)
    values, errors = [100 * m.value for m in means], [100 * m.error if m.error == m.error else 0 for m in means]
    axes.errorbar(xs, values, yerr=errors, **{"marker": "o", "markersize": 4, "capsize": 2, **style})


def _level(axes: Any, answer: Answer, colour: str) -> None:
    mean = answer.mean()
    axes.axhline(100 * mean.value, color=colour, linestyle="--", linewidth=1, label=answer.label)
    axes.axhspan(100 * (mean.value - mean.error), 100 * (mean.value + mean.error), color=colour, alpha=0.12)


def _levels(axes: Any, rows: Rows, task: str) -> None:
    for answer in answers(rows, "methods", task):
        if answer.choice.method in ("lora", "head"):
            _level(axes, answer, "black" if answer.choice.method == "lora" else "grey")


def rates(rows: Rows, axes: list[Any]) -> None:
    """Accuracy over the rate of an entry of theta_D: do the curves of all d have their top at one place?"""
    panels = {("garments", 4): axes[0], ("garments", 1): axes[1], ("garments", 16): axes[1], ("tweets", 4): axes[2]}
    for choice in QUESTIONS["rates"]():
        if points := tried(rows, choice):
            ratio = TASKS[choice.task].width * choice.r / choice.d
            style = "--" if choice.r == 1 else "-"
            label = f"r {choice.r}, D / d {ratio:.0f}"
            _points(panels[choice.task, choice.r], points, linestyle=style, label=label)
    for panel, title in zip(axes, ("garments, r = 4", "garments, r = 1 and 16", "tweets, r = 4"), strict=True):
        panel.set(xscale="log", xlabel="learning rate / sqrt(D / d)", ylabel="test accuracy, %", title=title)
        panel.set_xticks(ENTRY_RATES, [f"{rate:g}" for rate in ENTRY_RATES], fontsize=7)


def starts(rows: Rows, axes: list[Any]) -> None:
    """Accuracy over the start of an entry of theta_D."""
    series: dict[int, list] = {}
    for answer in answers(rows, "starts"):
        stretch = sqrt(answer.rows[0]["D"] / answer.choice.d)
        series.setdefault(answer.choice.d, []).append((answer.choice.start / stretch, answer.mean()))
    for d, points in series.items():
        _points(axes[0], points, label=f"d {d:,}")
    axes[0].set(xscale="log", xlabel="start bound / sqrt(D / d)", ylabel="test accuracy, %", title="garments, r = 4")


def lengths(rows: Rows, axes: list[Any]) -> None:
    """Accuracy over d, with LoRA and the head alone."""
    for panel, task in zip(axes, ("garments", "reviews"), strict=True):
        found = answers(rows, "lengths", task)
        if found:
            _points(panel, [(a.choice.d, a.mean()) for a in found], label="Uni-LoRA, rate by the law")
        _levels(panel, rows, task)
        panel.set(xscale="log", xlabel="d", ylabel="test accuracy, %", title=f"{task}, r = 4")


def ranks(rows: Rows, axes: list[Any]) -> None:
    """Accuracy over r at one d."""
    for panel, task in zip(axes, ("garments", "reviews"), strict=True):
        found = answers(rows, "ranks", task)
        if found:
            _points(panel, [(a.choice.r, a.mean()) for a in found], label=f"Uni-LoRA, d = {found[0].choice.d:,}")
        _levels(panel, rows, task)
        panel.set(xscale="log", xlabel="r", ylabel="test accuracy, %", title=task)


def methods(rows: Rows, axes: list[Any]) -> None:
    """Accuracy over numbers trained."""
    for panel, task in zip(axes, ("garments", "reviews", "tweets"), strict=True):
        found = {(a.choice, a.label): a for q in ("methods", "matched", "lengths") for a in answers(rows, q, task)}
        ours = sorted((a for a in found.values() if a.choice.method == "uniform"), key=lambda a: a.numbers)
        if ours:
            _points(panel, [(a.numbers, a.mean()) for a in ours], label="Uni-LoRA", color="tab:blue")
        for answer in found.values():
            if answer.choice.method not in ("uniform", "head"):
                style = {"color": "tab:red" if answer.choice.method == "lora" else "tab:grey", "linestyle": ""}
                _points(panel, [(answer.numbers, answer.mean())], **style)
                place = (answer.numbers, 100 * answer.mean().value)
                panel.annotate(answer.label, place, fontsize=6, xytext=(3, 3), textcoords="offset points")
        for answer in found.values():
            if answer.choice.method == "head":
                _level(panel, answer, "grey")
        panel.set(xscale="log", xlabel="numbers trained beside the head", ylabel="test accuracy, %", title=task)


def ablation(rows: Rows, axes: list[Any]) -> None:
    """Differences to the uniform P of the same d, seed by seed."""
    names, found = [], answers(rows, "ablation")
    for answer in found:
        same = [a for a in found if (a.choice.task, a.choice.d) == (answer.choice.task, answer.choice.d)]
        base = next((a for a in same if a.choice.method == "uniform"), None)
        if base is not None and answer is not base:
            mean = answer.over(base)
            axes[0].errorbar(
                100 * mean.value, len(names), xerr=100 * mean.error, marker="o", color="tab:blue", capsize=3
            )
            names.append(f"{answer.label}, {answer.choice.task}, d {answer.choice.d:,}")
    axes[0].axvline(0, color="black", linewidth=1)
    axes[0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="test accuracy over the uniform P, points, paired by seed")


DRAWINGS: dict[str, tuple[Callable[[Rows, list[Any]], None], int]] = {
    "rates": (rates, 3),
    "starts": (starts, 1),
    "lengths": (lengths, 2),
    "ranks": (ranks, 2),
    "methods": (methods, 3),
    "ablation": (ablation, 1),
}
"""By question: what draws, and its number of panels."""
