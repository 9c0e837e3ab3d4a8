#!/usr/bin/env python3
"""Renews the tables and pictures of docs/quality.md from the rows.

python benchmarks/quality/report.py
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from answers import Answer, answers, tried
from drawings import DRAWINGS
from questions import ENTRY_RATES, QUESTIONS
from rows import RESULTS, Rows
from tables import rewrite
from tasks import TASKS

PAGE = RESULTS.parents[1] / "docs" / "quality.md"


def _table(columns: str, *rows: list[str]) -> Iterator[str]:
    yield f"| {columns} |"
    yield "|" + " --- |" * (columns.count("|") + 1)
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _rate(answer: Answer) -> str:
    return f"{answer.rows[0]['rate']:.2g}" + (" (edge)" if answer.at_edge else "")


def _beside(answer: Answer, found: list[Answer], method: str) -> str:
    """The paired difference to another method of the same task and d."""
    for other in found:
        if other.choice.method == method and other is not answer:
            return answer.over(other).percent("+")
    return ""


def methods(rows: Rows, task: str) -> Iterator[str]:
    """Methods at their usual budgets."""
    found = answers(rows, "methods", task)
    columns = f"{TASKS[task].what} | r | numbers | bytes | rate | accuracy % | over LoRA | CPU-s"
    lines = []
    for answer in sorted(found, key=lambda a: -a.mean().value):
        head = answer.choice.method == "head"
        lines.append([
            answer.label,
            "" if head else str(answer.choice.r),
            f"{answer.numbers:,}",
            f"{answer.rows[0]['bytes']:,}",
            "" if head else _rate(answer),
            answer.mean().percent(),
            _beside(answer, found, "lora"),
            f"{answer.mean('training_seconds').value:.0f}",
        ])  # fmt: skip
    return _table(columns, *lines)


def matched(rows: Rows) -> Iterator[str]:
    """Uni-LoRA beside a relative of as many numbers."""
    found = answers(rows, "matched")
    ours = {answer.numbers: answer for answer in found if answer.choice.method == "uniform"}
    lines = []
    for answer in found:
        nearest = min(ours.values(), key=lambda a: abs(a.numbers - answer.numbers), default=None)
        if nearest is not None and answer.choice.method != "uniform":
            row = [answer.label, str(answer.choice.r), f"{answer.numbers:,}", answer.mean().percent()]
            lines.append([*row, f"{nearest.numbers:,}", nearest.mean().percent(), nearest.over(answer).percent("+")])
    return _table("relative | r | numbers | accuracy % | d | Uni-LoRA's accuracy % | over the relative", *lines)


def ablation(rows: Rows) -> Iterator[str]:
    """Other P of the same d."""
    lines = []
    for answer in answers(rows, "ablation"):
        choice = answer.choice
        same = [a for a in answers(rows, "ablation", choice.task) if a.choice.d == choice.d]
        seconds = f"{answer.mean('training_seconds').value:.0f}"
        row = [answer.label, choice.task, f"{choice.d:,}", _rate(answer), answer.mean().percent()]
        lines.append([*row, _beside(answer, same, "uniform"), str(len(answer.rows)), seconds])
    return _table("P | task | d | rate | accuracy % | over uniform | seeds | CPU-s", *lines)


def rates(rows: Rows) -> Iterator[str]:
    """Accuracy over the rate of an entry of theta_D."""
    lines = []
    for choice in QUESTIONS["rates"]():
        means = {f"{rate:.2g}": mean for rate, mean in tried(rows, choice)}
        if means:
            best = max(mean.value for mean in means.values())
            cells = [means.get(f"{rate:.2g}") for rate in ENTRY_RATES]
            texts = ["" if m is None else f"**{m.percent()}**" if m.value == best else m.percent() for m in cells]
            ratio = TASKS[choice.task].width * choice.r / choice.d
            lines.append([choice.task, str(choice.r), f"{choice.d:,}", f"{ratio:.0f}", *texts])
    return _table("task | r | d | D / d | " + " | ".join(f"{rate:g}" for rate in ENTRY_RATES), *lines)


def starts(rows: Rows) -> Iterator[str]:
    """Accuracy over the start of an entry of theta_D."""
    lines: dict[int, list[str]] = {}
    for answer in answers(rows, "starts"):
        d = answer.choice.d
        lines.setdefault(d, [f"{d:,}", f"{answer.rows[0]['D'] / d:.0f}"]).append(answer.mean().percent())
    whole = [line for line in lines.values() if len(line) == 7]
    return _table("d | D / d | x 1/4 | x 1/2 | the paper's 0.0048 | x 2 | x 4", *whole)


def series(rows: Rows, question: str, axis: str) -> Iterator[str]:
    """Accuracy over d or r."""
    lines = []
    for answer in answers(rows, question):
        row, found = answer.rows[0], answers(rows, "methods", answer.choice.task)
        lines.append([
            answer.choice.task,
            f"{getattr(answer.choice, axis):,}",
            f"{row['D'] / row['d']:.1f}",
            f"{row['rate']:.2g}",
            answer.mean().percent(),
            _beside(answer, found, "lora"),
        ])  # fmt: skip
    return _table(f"task | {axis} | D / d | rate | accuracy % | over LoRA", *lines)


def heldout(rows: Rows) -> Iterator[str]:
    """The defaults beside the best of a grid."""
    lines = []
    for answer in answers(rows, "heldout"):
        what = "default" if len(answer.choice.rates) == 1 else "best of five"
        loss = answer.mean("test_loss")
        lines.append([what, _rate(answer), f"{loss.value:.4f} ± {loss.error:.4f}", answer.mean().percent()])
    return _table("rate | learning rate | test loss | accuracy of the next token %", *lines)


def growing(rows: Rows) -> Iterator[str]:
    """theta_d that grows, beside those that do not."""
    lines = []
    for answer in (found := answers(rows, "growing")):
        paths = sorted({_path(row["path"]) for row in answer.rows if row["path"]})
        numbers = f"{answer.rows[0]['numbers']:,}" if not paths else "; ".join(paths)
        difference = _beside(answer, [a for a in found if a.choice.d == answer.choice.d], "uniform")
        lines.append([answer.label, numbers, answer.mean().percent(), difference])
    return _table("theta_d | numbers (epochs) | accuracy % | over d = 3,072", *lines)


def _path(text: str) -> str:
    """``48 48 192`` -> ``48 (2), 192 (1)``."""
    counts = Counter(int(d) for d in str(text).split())
    return ", ".join(f"{d:,} ({counts[d]})" for d in sorted(counts))


def cost(rows: Rows) -> Iterator[str]:
    """CPU time of everything."""
    for task in TASKS:
        seconds = [row["seconds"] for row in rows.values() if row["task"] == task]
        if seconds:
            yield f"* {task}: {len(seconds):,} runs, {sum(seconds) / 3600:.2f} CPU hours, {TASKS[task].what}"


TABLES = {
    **{f"quality methods {task}": partial(methods, task=task) for task in TASKS},
    "quality matched": matched,
    "quality ablation": ablation,
    "quality rates": rates,
    "quality starts": starts,
    "quality lengths": partial(series, question="lengths", axis="d"),
    "quality ranks": partial(series, question="ranks", axis="r"),
    "quality growing": growing,
    "quality heldout": heldout,
    "quality cost": cost,
}


def draw(rows: Rows) -> Iterator[Path]:
    """Draws a picture for each question; gives the paths."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    for name, (drawing, panels) in DRAWINGS.items():
        figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 4.2), squeeze=False, layout="constrained")
        drawing(rows, list(axes[0]))
        for panel in axes[0]:
            panel.grid(alpha=0.3)
            panel.xaxis.set_minor_formatter(NullFormatter())
            if panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=7)
        path = RESULTS / f"quality-{name}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        yield path


def main() -> int:
    rows = Rows()
    for path in draw(rows):
        print(path)
    if rewrite(PAGE, {name: partial(lines, rows) for name, lines in TABLES.items()}):
        print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
