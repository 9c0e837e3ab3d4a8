"""The picture of a run: loss and accuracy or perplexity by epoch, and the adapter's size beside those of LoRA and of
the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw"]

_AXES = {"accuracy": "share of rows", "perplexity": "exp(mean cross-entropy of a token)"}
_BLUE, _ORANGE, _GREY = "#1f77b4", "#ff7f0e", "#999999"


def draw(results: dict[str, Any], path: Path) -> None:
    """Writes the picture of ``metrics.json``'s results as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, middle, size = figure.subplots(1, 3)
    epochs = [entry["epoch"] for entry in results["epochs"]]
    kind = "accuracy" if "validation_accuracy" in results["epochs"][0] else "perplexity"

    for key, label, color in (("train_loss", "training", _GREY), ("validation_loss", "validation", _BLUE)):
        loss.plot(epochs, [entry[key] for entry in results["epochs"]], "o-", color=color, label=label)
    loss.set(title="Loss", xlabel="epoch", ylabel="cross-entropy")
    values = [entry[f"validation_{kind}"] for entry in results["epochs"]]
    middle.plot(epochs, values, "o-", color=_BLUE, label="validation")
    position = epochs.index(results["best_epoch"])
    for axes, key in ((loss, "validation_loss"), (middle, f"validation_{kind}")):
        kept = results["epochs"][position][key]
        axes.plot([results["best_epoch"]], [kept], "o", ms=12, mfc="none", color=_ORANGE, label="best, kept")
    if "before" in results:
        value = results["before"]["validation"][kind]
        middle.axhline(value, color=_GREY, ls=":", label=f"validation, no adapter: {value:.4g}")
    if results["test"] is not None:
        value = results["test"][kind]
        middle.axhline(value, color=_ORANGE, ls="--", label=f"test, best adapter: {value:.4f}")
    middle.set(title=kind.capitalize(), xlabel="epoch", ylabel=_AXES[kind])
    for axes in (loss, middle):
        axes.legend()
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)


def _bytes(count: int) -> str:
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
