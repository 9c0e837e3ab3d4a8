"""The picture of a run: loss and the run's figure by epoch, and the adapter's size beside those of LoRA and of
the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["draw", "picture"]

_AXES = {
    "accuracy": "share of rows",
    "matthews": "correlation",
    "pearson": "correlation",
    "perplexity": "exp(mean cross-entropy of a token)",
}
_BLUE, _ORANGE, _GREY = "#1f77b4", "#ff7f0e", "#999999"


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the picture of ``metrics.json``'s results as PNG."""
    temporary = path.with_name(f".{path.name}.tmp")
    picture(results).savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def picture(results: dict[str, Any]) -> Any:
    """Matplotlib's figure of ``metrics.json``'s results."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, middle, size = figure.subplots(1, 3)
    epochs = [entry["epoch"] for entry in results["epochs"]]
    kind = next(name for name in _AXES if f"validation_{name}" in results["epochs"][0])

    for key, label, color in (("train_loss", "training", _GREY), ("validation_loss", "validation", _BLUE)):
        loss.plot(epochs, [entry[key] for entry in results["epochs"]], "o-", color=color, label=label)
    loss.set(title="Loss", xlabel="epoch", ylabel="squared error" if kind == "pearson" else "cross-entropy")
    losses = [entry[key] for entry in results["epochs"] for key in ("train_loss", "validation_loss")]
    values = [entry[f"validation_{kind}"] for entry in results["epochs"]]
    middle.plot(epochs, values, "o-", color=_BLUE, label="validation", clip_on=False)  # a mark at 1 stays whole
    position = epochs.index(results["best_epoch"])
    for axes, key in ((loss, "validation_loss"), (middle, f"validation_{kind}")):
        kept = results["epochs"][position][key]
        ring = {"ms": 12, "mfc": "none", "color": _ORANGE, "clip_on": False}
        axes.plot([results["best_epoch"]], [kept], "o", label="best, kept", **ring)
    if "before" in results:
        value = results["before"]["validation"][kind]
        values.append(value)
        middle.axhline(value, color=_GREY, ls=":", label=f"validation, no adapter: {value:.4g}")
    if results["test"] is not None:
        value = results["test"][kind]
        values.append(value)
        middle.axhline(value, color=_ORANGE, ls="--", label=f"test, best adapter: {value:.4f}")
    middle.set_title(kind.capitalize(), pad=10)
    middle.set(xlabel="epoch", ylabel=_AXES[kind])
    loss.set_ylim(*_limits(losses))
    least, most = {"accuracy": (0.0, 1.0), "perplexity": (0.0, math.inf)}.get(kind, (-1.0, 1.0))
    middle.set_ylim(*_limits(values, least, most))
    for axes in (loss, middle):
        axes.legend()
        axes.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(alpha=0.3)

    sizes = results["sizes"]
    bars = [
        ("theta_d", sizes["theta_d_bytes"], _ORANGE),
        ("same LoRA", sizes["lora_bytes"], _BLUE),
        ("full fine-tuning", sizes["model_bytes"], _GREY),
    ]
    drawn = size.bar([b[0] for b in bars], [b[1] for b in bars], color=[b[2] for b in bars])
    size.bar_label(drawn, [_bytes(b[1]) for b in bars], padding=2)
    size.set(title=f"What is stored (d = {sizes['d']:,}, D = {sizes['D']:,})", ylabel="bytes", yscale="log")
    size.set_ylim(min(b[1] for b in bars) / 3, max(b[1] for b in bars) * 4)
    return figure


def _limits(values: Sequence[float], least: float = 0.0, most: float = math.inf) -> tuple[float, float]:
    """Of an axis: around the finite values, within `least` and `most`."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    margin = max(0.1 * (high - low), 0.05 * abs(high), 0.01)
    return max(least, low - margin), min(high + margin, most)


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
