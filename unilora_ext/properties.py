"""Globality, uniformity and isometry of a P, measured: the properties by which the paper tells its relatives apart
(arXiv 2506.00799, section 3.3 and table 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unilora_ext.layout import Layout
from unilora_ext.projections import Projection
from unilora_ext.projections.indexed import IndexedProjection

__all__ = ["PUBLISHED", "Properties", "measure"]

SHARED = 0.1
"""global: at least this share of the columns reach more than one module."""
SPREAD = 0.1
"""uniform: the load of the columns spreads by at most this share of its mean, or by a tenth more than what independent
uniform draws give, 1 / sqrt(mean)."""
EXACT = 1e-3
"""isometric: singular values within this of their root mean square."""
NEARLY = 0.05
"""nearly isometric: ||P x|| / ||x|| within this, over dense and sparse x."""
PROBES, STEPS, COLUMNS = 64, 48, 32
"""Random x; steps of Lanczos; columns whose rows are counted where P has no index."""

PUBLISHED = {
    "identity": ("no", "yes", "yes"),
    "uniform": ("yes", "yes", "yes"),
    "balanced": ("yes", "yes", "yes"),  # the published code's
    "peft": ("yes", "yes", "yes"),
    "local": ("no", "yes", "yes"),
    "nonuniform": ("yes", "no", "yes"),
    "vera": ("no", "no", "no"),
    "tied": ("no", "no", "no"),
    "vblora": ("yes", "yes", "no"),
    "loraxs": ("no", "yes", "yes"),
    "fastfood": ("yes", "yes", "yes"),
}
"""(global, uniform, isometric) in the paper's table, by name."""


@dataclass(frozen=True)
class Properties:
    """What was measured of a P [D, d].

    Attributes:
        D, d: its sizes.
        shared: share of the columns that reach more than one module; of those that reach any.
        load: mean number of rows of a column.
        spread: standard deviation of that number over the columns, as a share of the mean.
        factor: root mean square of ||P x|| / ||x||: to this factor P may be isometric.
        singular_values: the least and the largest, by Lanczos, as shares of the factor.
        ratios: the least and the largest ||P x|| / ||x|| of random x and of differences of two unit vectors, as shares
            of the factor.
    """

    D: int
    d: int
    shared: float
    load: float
    spread: float
    factor: float
    singular_values: tuple[float, float]
    ratios: tuple[float, float]

    @property
    def is_global(self) -> str:
        """``yes`` or ``no``."""
        return _tick(self.shared >= SHARED)

    @property
    def is_uniform(self) -> str:
        """``yes`` or ``no``."""
        return _tick(self.load > 0 and self.spread <= max(SPREAD, 1.1 * self.load**-0.5))

    @property
    def is_isometric(self) -> str:
        """``yes``, ``nearly`` or ``no``."""
        if _within(self.singular_values, EXACT):
            return "yes"
        return "nearly" if _within(self.ratios, NEARLY) else "no"

    @property
    def ticks(self) -> tuple[str, str, str]:
        """(global, uniform, isometric)"""
        return self.is_global, self.is_uniform, self.is_isometric


@torch.no_grad()
def measure(projection: Projection, layout: Layout, seed: int = 0) -> Properties:
    """The properties of a projection of this layout, in float32 on the CPU. Trained parts are as they start; one that
    starts at 0 is drawn from N(0, 1).

    Args:
        projection: P.
        layout: of its rows.
        seed: of the random vectors.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = projection.start(torch.float32)
    trained = [start[name] if start[name].any() else _like(start[name], generator) for name in projection.trained]
    offset = projection.offset(torch.float32, trained)

    def forward(x: Tensor) -> Tensor:
        return projection(x, trained=trained) - offset

    def transpose(g: Tensor) -> Tensor:
        return projection.transpose(g, trained=trained)

    reached = _modules_reached(projection, layout, trained, generator)
    loads = _loads(projection, forward, generator)
    used = (reached > 0).float()  # a column may be empty by chance
    dense = torch.randn(PROBES, projection.d, generator=generator) * used
    ratios = [float(forward(x).norm() / x.norm()) for x in (*dense, *_differences(used, generator))]
    factor = float(torch.tensor(ratios[:PROBES]).square().mean().sqrt())
    values = _singular_values(lambda x: used * transpose(forward(x)), used, generator)
    return Properties(
        projection.D,
        projection.d,
        float((reached > 1).sum() / used.sum().clamp(min=1)),
        float(loads.mean()),
        float(loads.std(correction=0) / loads.mean()),
        factor,
        (values[0] / factor, values[1] / factor),
        (min(ratios) / factor, max(ratios) / factor),
    )


def _like(part: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(part.shape, generator=generator)


def _modules_reached(
    projection: Projection, layout: Layout, trained: Sequence[Tensor], generator: torch.Generator
) -> Tensor:
    """For every column, the number of modules in which it has a row that is not 0: [d]. P^T g of a random g on the rows
    of one module is 0 where, and almost surely only where, the column has none there."""
    reached = torch.zeros(projection.d, dtype=torch.int32)
    at = (torch.zeros(projection.d), *trained) if trained else ()
    for module in range(len(layout)):
        start, stop = layout.range_of(module)
        g = torch.randn(stop - start, generator=generator)
        (g_d, *_) = projection.restrict("cpu", [(start, stop)]).transpose([g], torch.float32, at)
        reached += g_d != 0
    return reached


def _loads(projection: Projection, forward: Callable[[Tensor], Tensor], generator: torch.Generator) -> Tensor:
    """The number of rows of every column, or of some."""
    if isinstance(projection, IndexedProjection):
        return projection.counts.double()
    chosen = torch.randperm(projection.d, generator=generator)[:COLUMNS]
    return torch.tensor([int((forward(_unit(projection.d, j)) != 0).sum()) for j in chosen.tolist()]).double()


def _unit(d: int, j: int) -> Tensor:
    x = torch.zeros(d)
    x[j] = 1.0
    return x


def _differences(used: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Differences of two unit vectors, of columns in use."""
    columns, d = torch.nonzero(used).flatten(), len(used)
    count = PROBES if len(columns) > 1 else 0
    pairs = [columns[torch.randperm(len(columns), generator=generator)[:2]].tolist() for _ in range(count)]
    return [_unit(d, i) - _unit(d, j) for i, j in pairs]


def _singular_values(gram: Callable[[Tensor], Tensor], used: Tensor, generator: torch.Generator) -> tuple[float, float]:
    """The least and the largest singular value of the columns in use, by Lanczos on P^T P, every vector made orthogonal
    to all before."""
    basis = torch.zeros(0, len(used), dtype=torch.float64)
    diagonal: list[float] = []
    beside: list[float] = []
    vector = torch.randn(len(used), generator=generator, dtype=torch.float64) * used
    for _ in range(min(int(used.sum()), STEPS)):
        basis = torch.cat([basis, (vector / vector.norm())[None]])
        vector = gram(basis[-1].float()).double()
        diagonal.append(float(vector @ basis[-1]))
        for _ in range(2):
            vector = vector - basis.T @ (basis @ vector)
        beside.append(float(vector.norm()))
        if beside[-1] <= 1e-5 * abs(diagonal[0]):  # the space is exhausted
            break
    inner = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    tridiagonal += torch.diag(inner, 1) + torch.diag(inner, -1)
    squares = torch.linalg.eigvalsh(tridiagonal).clamp(min=0)
    return float(squares[0].sqrt()), float(squares[-1].sqrt())


def _tick(good: bool) -> str:
    return "yes" if good else "no"


def _within(pair: tuple[float, float], tolerance: float) -> bool:
    return 1 - tolerance <= pair[0] and pair[1] <= 1 + tolerance
