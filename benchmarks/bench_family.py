"""The whole family: time and memory of P theta_d and P^T g against D and against d, and a step of MiniLM with each.

Layouts are square modules of width 384, r = 4. Slopes are those of log time over log D (or log d), fitted to the larger
half of the sizes: 1 is linear. Where the sizes give d, it grows with D, and there is no curve over d.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_step import BATCH, LENGTH, encoder, step_with
from common import Options, Row, measure, rows_of, threads
from torch import Tensor

import unilora_ext as ul
from unilora_ext.config import make_projection, size_of
from unilora_ext.family import FAMILY
from unilora_ext.layout import Layout
from unilora_ext.projections import Projection, projection_class

WIDTH, R = 384, 4
MODULES, D_OF_CURVE = (3, 12, 48, 192), 1024  # curves over D, at this d
COLUMNS, MODULES_OF_CURVE = (256, 1024, 4096, 16384), 48  # curves over d, at this number of modules
DENSEST = 1 << 28
"""D d of the largest dense P: 1 GiB."""


def run(options: Options) -> list[Row]:
    count = options.threads[0] if options.device == "cpu" else None
    with threads(count or torch.get_num_threads()):
        rows = [row for name in FAMILY for row in _curves(name, options)]
    count = options.threads[-1] if options.device == "cpu" else None
    with threads(count or torch.get_num_threads()):
        rows += _steps(options)
    return [{**row, "threads": row.get("threads", options.threads[0])} for row in rows]


# ---- P theta_d and P^T g --------------------------------------------------------------------------------------------


def _curves(name: str, options: Options) -> Iterator[Row]:
    over_D = [(modules, D_OF_CURVE) for modules in MODULES]
    over_d = [(MODULES_OF_CURVE, d) for d in COLUMNS]
    for axis, sizes in (("D", over_D), ("d", over_d)):
        rows: list[Row] = []
        for modules, d in sizes:
            if (P := made(name, modules, d)) is None or (axis == "d" and P.d != d):
                continue
            rows += _measured(name, P, axis, options)
        for what in ("forward", "transpose"):
            points = [(row[axis], row["median_ms"]) for row in rows if row["pass"] == what]
            slope = _slope(points) if len(points) > 1 else None
            yield from ({**row, "slope": slope} for row in rows if row["pass"] == what)


def made(name: str, modules: int, d: int) -> Projection | None:
    """A projection of so many modules; None: it would be too large."""
    layout = Layout(((WIDTH, WIDTH),) * modules, R, projection_class(name).order)
    config = ul.UniLoRAConfig(r=R, projection=name)
    if size_of(config, layout) is None:
        if name == "gaussian" and layout.D * d > DENSEST:
            return None
        config = ul.UniLoRAConfig(r=R, projection=name, d=min(d, layout.D))
    generator = torch.Generator().manual_seed(0)
    return make_projection(config, layout, weights=lambda _: torch.randn(WIDTH, WIDTH, generator=generator))


def _measured(name: str, P: Projection, axis: str, options: Options) -> Iterator[Row]:
    start = {key: t.to(options.device) for key, t in P.start(torch.float32).items()}
    theta_d = start.pop("theta_d")
    trained = tuple(start.values())
    g_D = torch.randn(P.D, device=options.device)
    with torch.no_grad():
        forward: dict[str, Callable[[], Any]] = {
            "forward": lambda: P(theta_d, trained=trained),
            "transpose": lambda: P.transpose(g_D, trained=trained),
        }
        times = measure(forward, options, least=5, most=50)
    nbytes = P.restrict(options.device).nbytes
    for row in rows_of("family", {"projection": name, "axis": axis, "D": P.D, "d": P.d}, times, "forward"):
        yield {**row, "pass": row.pop("rival"), "nbytes": nbytes, "threads": options.threads[0]}


def _slope(points: list[tuple[int, float]]) -> float:
    """Of log y over log x, by least squares over the larger half of the x."""
    upper = sorted(points)[len(points) // 2 - 1 :]
    x, y = ([math.log(point[i]) for point in upper] for i in (0, 1))
    return round(statistics.linear_regression(x, y).slope, 3)


# ---- a step of MiniLM -----------------------------------------------------------------------------------------------


def _steps(options: Options) -> Iterator[Row]:
    case: Row = {"model": "6 x 384 (MiniLM)", "batch": BATCH, "length": LENGTH, "r": R}
    steps = {name: _step(name, options.device) for name in ("frozen", *FAMILY)}
    times = measure(steps, Options(options.device, options.seconds * 8, options.threads), least=5)
    for row in rows_of("family", case, times, "frozen"):
        yield {**row, "projection": row.pop("rival"), "pass": "step", "threads": options.threads[-1]}


def _step(name: str, device: str) -> Callable[[], Any]:
    """A step of forward, backward and AdamW; frozen: of the head alone, through the whole model."""
    model = encoder("6 x 384 (MiniLM)")
    if name == "frozen":
        model.requires_grad_(False)
        # so that the backward goes all the way, as it does for the others
        model.bert.embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        trained: list[Tensor] = list(model.classifier.requires_grad_(True).parameters())
    else:
        layout = Layout(((WIDTH, WIDTH),) * 12, R, projection_class(name).order)
        config = ul.UniLoRAConfig(r=R, target_modules=["query", "value"], projection=name)
        if size_of(config, layout) is None:
            config = ul.UniLoRAConfig(r=R, d=2048, target_modules=["query", "value"], projection=name)
        trained = list(ul.attach(model, config).trained.values())
    return step_with(model, trained, device)
