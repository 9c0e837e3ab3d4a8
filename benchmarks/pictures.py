"""Pictures of the rows in results/."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from common import RESULTS, Row

COLOURS = {"unilora_ext": "#1f77b4", "peft": "#d62728", "torch": "#7f7f7f", "copy": "#000000", "frozen": "#000000"}


def load(name: str, device: str) -> list[Row]:
    """The rows of a benchmark; none if it has not run."""
    path = RESULTS / f"{name}-{device}.json"
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def draw(device: str) -> list[Path]:
    """Draws what there are rows for; returns the paths."""
    import matplotlib

    matplotlib.use("Agg")
    made = [_projection(device), _family(device), _layer(device), _memory(device)]
    return [path for path in made if path is not None]


def _style(rival: str) -> dict:
    colour = next((c for key, c in COLOURS.items() if rival.lower().startswith(key)), "#2ca02c")
    dashed = any(word in rival for word in ("computed", "compile", "alone")) or rival.endswith("-lora")
    dash = "--" if dashed else "-"
    return {"color": colour, "linestyle": dash, "marker": "s" if "balanced" in rival else "o", "markersize": 4}


def _lines(axes, rows: Iterable[Row], x: str, y: str) -> None:
    series = defaultdict(list)
    for row in rows:
        series[row["rival"]].append((row[x], row[y]))
    for rival, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), label=rival, **_style(rival))


def _save(figure, name: str) -> Path:
    path = RESULTS / name
    figure.savefig(path, dpi=130, bbox_inches="tight")
    return path


def _projection(device: str) -> Path | None:
    from matplotlib import pyplot

    rows = load("projection", device)
    if not rows:
        return None
    count = rows[0]["threads"]
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axes, name in zip(panels, ("forward", "backward"), strict=True):
        _lines(axes, (r for r in rows if r["pass"] == name and r["threads"] == count), "D", "median_ms")
        axes.set(xscale="log", yscale="log", xlabel="D, numbers of theta_D", title=f"projection, {name}")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds" + (f", {count} thread" if count else ""))
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, f"projection-{device}.png")


def _family(device: str) -> Path | None:
    """Times of P theta_d and P^T g, over D and over d."""
    from matplotlib import colormaps, pyplot

    rows = [row for row in load("family", device) if row["pass"] != "step"]
    if not rows:
        return None
    names = list(dict.fromkeys(row["projection"] for row in rows))
    figure, panels = pyplot.subplots(2, 2, figsize=(12, 9), sharey=True, layout="constrained")
    for line, what in zip(panels, ("forward", "transpose"), strict=True):
        for axes, axis in zip(line, ("D", "d"), strict=True):
            for k, name in enumerate(names):
                points = [
                    (row[axis], row["median_ms"])
                    for row in rows
                    if row["projection"] == name and row["axis"] == axis and row["pass"] == what
                ]
                if points:
                    marker = "osv^D"[k % 5]
                    colour = colormaps["tab20"](k % 20)
                    axes.plot(*zip(*sorted(points), strict=True), marker=marker, markersize=4, color=colour, label=name)
            other = "d = 1,024 where it is free" if axis == "D" else "D = 147,456"
            title = f"{'P theta_d' if what == 'forward' else 'P^T g'} over {axis} ({other})"
            axes.set(xscale="log", yscale="log", xlabel=axis, title=title)
            axes.grid(alpha=0.3)
        line[0].set_ylabel("milliseconds, 1 thread" if device == "cpu" else "milliseconds")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return _save(figure, f"family-{device}.png")


def _layer(device: str) -> Path | None:
    from matplotlib import pyplot

    rows = [r for r in load("lora_linear", device) if r["n"] == 1024 and r["r"] == 4]
    if not rows:
        return None
    count = rows[0]["threads"]
    figure, axes = pyplot.subplots(figsize=(6, 4))
    _lines(axes, (r for r in rows if r["threads"] == count), "tokens", "ratio")
    axes.set(
        xscale="log",
        xlabel="tokens",
        ylabel="time over the frozen layer",
        title="1024 x 1024, r = 4, forward + backward",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, f"lora_linear-{device}.png")


def _memory(device: str) -> Path | None:
    from matplotlib import pyplot

    rows = [r for r in load("attach", device) if r["bench"] == "memory"]
    if not rows:
        return None
    figure, axes = pyplot.subplots(figsize=(6, 4))
    _lines(axes, ({**r, "MiB": r["bytes"] / 2**20} for r in rows), "D", "MiB")
    axes.set(
        xscale="log", yscale="symlog", xlabel="D, numbers of theta_D", ylabel="MiB", title="kept to rebuild theta_D"
    )
    axes.set_yscale("symlog", linthresh=0.1)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _save(figure, f"memory-{device}.png")
