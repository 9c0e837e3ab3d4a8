"""``unilora properties``: what the paper's table says of the projections, measured for a given model."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from unilora_ext.cli.errors import CliError, need
from unilora_ext.cli.files import as_json
from unilora_ext.cli.outputs import check_target, write
from unilora_ext.cli.packages import model_path
from unilora_ext.errors import UniLoRAError
from unilora_ext.family import FAMILY

__all__ = ["command"]

MOST_SPREAD = 1.2
"""Drawn of a spread."""
_NAMES = ("global", "uniform", "isometric")
_VARIANTS = {"loraxs": ("", "sigma=false"), "uniform": ("", "normalize=false")}
"""Options beside the defaults that ``all`` measures too: the paper speaks of them."""


def command(arguments: Namespace) -> None:
    """Measures, prints the numbers and the ticks that follow from them, beside the published ones."""
    need("transformers", "matplotlib")
    check_target(arguments.json, None)
    check_target(arguments.picture, None, "--picture")
    unknown = [name for name in arguments.projection if name not in (*FAMILY, "all")]
    if unknown:
        raise CliError(f"--projection: expected all or some of {', '.join(FAMILY)}, got {', '.join(unknown)}")
    chosen = list(FAMILY) if "all" in arguments.projection else arguments.projection

    model, targets = _model_with_targets(arguments)
    rows: list[dict[str, Any]] = []
    print(f"{'':<25}{'D':>10} {'d':>9}   {'shared':>7}   {'load':>8} {'spread':>7}   {'singular values':>17}   "
          f"{'global':>7} {'uniform':>8} {'isometric':>10}")  # fmt: skip
    for name in chosen:
        for option in _VARIANTS.get(name, ("",)) if "all" in arguments.projection else ("",):
            try:
                row = _measured(arguments, model, targets, name, option)
            except UniLoRAError as error:
                if "all" not in arguments.projection or rows == []:
                    raise
                print(f"{_label(name, option):<25}not for this model and these sizes: {error}", flush=True)
                continue
            rows.append(row)
            print(_line(row), flush=True)
    print(_legend())
    for row in rows:
        for note in row["notes"]:
            print(f"  {row['label']}: {note}")
    if arguments.json is not None:
        write(arguments.json, as_json(rows))
    if arguments.picture is not None:
        _draw(rows, Path(arguments.picture))
        print(f"picture: {arguments.picture}")


def _model_with_targets(arguments: Namespace) -> tuple[Any, Any]:
    import transformers

    from unilora_ext.cli.base import check_base
    from unilora_ext.cli.classifier import default_targets
    from unilora_ext.cli.model import first_line, quiet_bars

    base = model_path(arguments.model)
    check_base(base)
    try:
        with quiet_bars():
            model = transformers.AutoModel.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise CliError(f"--model {base}: expected a Transformers model, got: {first_line(error)}") from error
    targets = arguments.target_modules or default_targets(model)
    return model, "all-linear" if list(targets) == ["all-linear"] else targets


def _measured(arguments: Namespace, model: Any, targets: Any, name: str, option: str) -> dict[str, Any]:
    import unilora_ext as ul
    from unilora_ext.attaching import Plan, layout_of
    from unilora_ext.config import size_of
    from unilora_ext.properties import PUBLISHED, measure
    from unilora_ext.targets import find_targets

    options = {key: json.loads(value) for key, value in [option.split("=")]} if option else {}
    config = ul.UniLoRAConfig(
        r=arguments.r, target_modules=targets, projection=name, seed=arguments.seed, projection_options=options
    )
    layout = layout_of(find_targets(model, targets, ()), config)
    if size_of(config, layout) is None:
        config = ul.UniLoRAConfig(**{**asdict(config), "d": min(arguments.d, layout.D)})
    plan = Plan.of(model, config)
    found = measure(plan.projection, plan.layout, arguments.seed)
    published = PUBLISHED.get(name) if not option or name == "loraxs" else None
    return {
        "projection": name,
        "label": _label(name, option),
        **asdict(found),
        **dict(zip(_NAMES, found.ticks, strict=True)),
        "published": None if published is None else dict(zip(_NAMES, published, strict=True)),
        "notes": _notes(name, option, found, published),
    }


def _label(name: str, option: str) -> str:
    return f"{name} {option}".strip()


def _notes(name: str, option: str, found: Any, published: tuple[str, ...] | None) -> list[str]:
    """Why a measured property is not the published one."""
    notes = []
    for what, measured, said in zip(_NAMES, found.ticks, published or found.ticks, strict=True):
        if measured != said:
            notes.append(
                f"{what}: published {said}, measured {measured}: {_REASONS.get((name, option, what), OTHERWISE)}"
            )
    return notes


OTHERWISE = "the numbers of its row say so for this model; what they are held to stands above"
_REASONS = {
    ("loraxs", "", "isometric"): "the published code scales U by the singular values of W; with sigma=false it holds",
    ("vblora", "", "global"): "the bank is larger than what this model's sub-vectors ask of it",
    ("vblora", "", "uniform"): "few sub-vectors choose from the bank in this model",
    ("fastfood", "", "isometric"): "D is no multiple of the transform's length, so the last block is cut",
}


def _line(row: dict[str, Any]) -> str:
    low, high = row["singular_values"]
    marks = [
        f"{row[what]}{'' if row['published'] is None else ' =' if row['published'][what] == row[what] else ' !'}"
        for what in _NAMES
    ]
    return (
        f"{row['label']:<25}{row['D']:>10,} {row['d']:>9,}   {row['shared']:>7.1%}   {row['load']:>8.4g} "
        f"{row['spread']:>7.1%}   {f'{low:.3f} to {high:.3f}':>17}   {marks[0]:>7} {marks[1]:>8} {marks[2]:>10}"
    )


def _legend() -> str:
    from unilora_ext.properties import EXACT, NEARLY, SHARED, SPREAD

    return (
        "\n= as in the paper's table, ! not so, no mark: not in it\n"
        f"shared: columns that reach more than one module; global from {SHARED:.0%} on\n"
        f"load: rows of a column, and its spread over the columns; uniform up to {SPREAD:.0%} or 1.1 / sqrt(load),\n"
        "  a tenth more than independent draws give\n"
        f"singular values: least and largest, as shares of their root mean square; isometric within {EXACT:.1%},\n"
        f"  nearly where ||P x|| / ||x|| of random x is within {NEARLY:.0%}"
    )


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 1.9 + 0.32 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    positions, labels = range(len(rows)), [row["label"] for row in rows]
    colours = {"yes": "#2a7f4f", "nearly": "#c9a227", "no": "#b5403a"}

    def colour(what: str) -> list[str]:
        return [colours[row[what]] for row in rows]

    def bars(panel: Any, what: str, ends: list[float], starts: list[float] | None = None) -> None:
        """With a dot at each end, so that a bar of no length is seen."""
        starts = starts or [0.0] * len(rows)
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        panel.barh(positions, lengths, left=starts, color=colour(what), height=0.6)
        panel.scatter(ends, positions, color=colour(what), s=28, zorder=3, clip_on=False)

    bars(panels[0], "global", [row["shared"] for row in rows])
    panels[0].set(title="global", xlabel="share of columns that reach several modules", xlim=(0, 1.05))
    bars(panels[1], "uniform", [min(row["spread"], MOST_SPREAD) for row in rows])
    for position, row in zip(positions, rows, strict=True):
        if row["spread"] > MOST_SPREAD:
            panels[1].annotate(f"{row['spread']:.0%} ", (MOST_SPREAD, position), ha="right", va="center", color="white")
    chance = [1.1 * row["load"] ** -0.5 for row in rows]
    panels[1].plot(chance, positions, "k|", ms=12, label="1.1 / sqrt(load)")
    panels[1].set(title="uniform", xlabel="spread of the rows of a column / mean", xlim=(0, MOST_SPREAD))
    panels[1].legend(loc="upper right", fontsize="small")
    lows, highs = ([row["singular_values"][i] for row in rows] for i in (0, 1))
    bars(panels[2], "isometric", highs, lows)
    panels[2].axvline(1.0, color="black", lw=0.6)
    panels[2].set(title="isometric", xlabel="singular values / their root mean square", xlim=(0, None))
    figure.legend(
        handles=[Patch(color=value, label=key) for key, value in colours.items()], loc="outside lower center", ncols=3
    )
    panels[0].set_yticks(positions, labels)
    panels[0].invert_yaxis()
    for panel in panels:
        panel.grid(axis="x", alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    temporary.replace(path)
