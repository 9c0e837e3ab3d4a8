"""Every projection of the family theta_D = c + P theta_d, by the same tests."""

import copy
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import unilora_ext as ul
from unilora_ext.config import make_projection
from unilora_ext.family import FAMILY
from unilora_ext.layout import Layout
from unilora_ext.projections import projection_class

SHAPES = ((12, 8), (20, 16), (8, 24), (4, 4))


@dataclass(frozen=True)
class Case:
    """A projection: one line of the table.

    Attributes:
        name: of the projection.
        d: None where the sizes give it.
        options: of it.
        drawn: whether P depends on the seed.
    """

    name: str
    d: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    drawn: bool = True

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.options.items())])

    @property
    def kind(self):
        return projection_class(self.name)

    def config(self, r: int, seed: int = 0, **changes) -> ul.UniLoRAConfig:
        return ul.UniLoRAConfig(
            r=r, d=self.d, seed=seed, projection=self.name, projection_options=self.options, **changes
        )


CASES = [
    Case("identity", drawn=False),
    Case("uniform", 23),
    Case("uniform", 23, {"normalize": False}),
    Case("balanced", 23),
    Case("peft", 23),
    Case("local", 23),
    Case("local", 23, {"normalize": False}),
    Case("nonuniform", 23),
    Case("countsketch", 23),
    Case("vera"),
    Case("tied", drawn=False),
    Case("vblora", None, {"num_vectors": 9}, drawn=False),
    Case("vblora", None, {"num_vectors": 9, "topk": 3, "vector_length": 2}, drawn=False),
    Case("loraxs", drawn=False),
    Case("loraxs", None, {"sigma": False}, drawn=False),
    Case("tinylora", None, {"u": 5}),
    Case("tinylora", None, {"u": 4, "groups": 3}),
    Case("gaussian", 23),
    Case("fastfood", 23),
    Case("fastfood", 23, {"gaussian": True}),
    Case("fourierft", None, {"n_frequency": 3}),
    Case("fourierft", None, {"n_frequency": 7, "scale": 10.0}),
]
each_case = pytest.mark.parametrize("case", CASES, ids=str)
by_name = {case.name: case for case in reversed(CASES)}
each_seeded = pytest.mark.parametrize("name", [name for name, case in by_name.items() if case.drawn])
each_layout = pytest.mark.parametrize(("shapes", "r"), [(SHAPES, 3), (SHAPES, 1), (((12, 8),), 2)], ids=str)


def random_seed() -> int:
    return int(torch.randint(2**62, ()))


def random_weights(shapes, dtype=torch.float32):
    weights = [torch.randn(shape, dtype=dtype) for shape in shapes]
    return weights.__getitem__


def made(case: Case, shapes=SHAPES, r: int = 3, seed: int | None = None, weights=None, **changes):
    layout = Layout(shapes, r, case.kind.order)
    if case.options.get("groups", 1) > len(shapes):
        case = Case(case.name, case.d, {**case.options, "groups": len(shapes)})
    config = case.config(r, random_seed() if seed is None else seed, **changes)
    return make_projection(config, layout, weights=weights or random_weights(shapes)), layout


def values(P, dtype=torch.float64):
    """Random values of theta_d and the trained parts."""
    return [torch.randn(t.shape, dtype=dtype) for t in P.start(torch.float64).values()]


def test_every_projection_is_here():
    assert {case.name for case in CASES} == set(FAMILY)


# ---- the map ---------------------------------------------------------------------------------------------------------


@each_case
@each_layout
def test_transpose_is_the_adjoint(case, shapes, r):
    P, layout = made(case, shapes, r)
    theta_d, *trained = values(P)
    y = torch.randn(layout.D, dtype=torch.float64)
    difference = P(theta_d, trained=trained) - P.offset(trained=trained)
    assert difference.shape == (layout.D,) and theta_d.shape == (P.d,)
    torch.testing.assert_close(difference @ y, theta_d @ P.transpose(y, trained=trained))


@each_case
@each_layout
def test_it_is_affine(case, shapes, r):
    P, _ = made(case, shapes, r)
    theta_d, *trained = values(P)
    expected = P.offset(trained=trained) + P.dense(trained=trained) @ theta_d
    torch.testing.assert_close(P(theta_d, trained=trained), expected)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_rounded(case, dtype):
    P, _ = made(case)
    theta_d, *trained = values(P)
    result = P(theta_d.to(dtype), dtype, [t.float() for t in trained])
    assert result.dtype == dtype
    exact = P(theta_d.to(dtype).double(), trained=trained)
    torch.testing.assert_close(result.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@each_case
def test_derivatives_are_those_of_finite_differences(case):
    P, _ = made(case, ((8, 4), (4, 12)), 2)
    inputs = [t.requires_grad_() for t in values(P)]
    assert gradcheck(lambda theta_d, *trained: P(theta_d, trained=trained), inputs, fast_mode=True)
    assert gradgradcheck(lambda theta_d, *trained: P(theta_d, trained=trained), inputs, fast_mode=True)


@each_case
def test_some_rows_are_those_of_the_whole(case):
    P, layout = made(case)
    inputs = [t.requires_grad_() for t in values(P)]
    cuts = sorted(torch.randint(layout.D + 1, (4,)).tolist())
    ranges = [tuple(cuts[2:]), tuple(cuts[:2]), layout.range_of(1)]
    ranges = [(start, stop) for start, stop in ranges if start < stop]
    rows = torch.cat([torch.arange(*bounds) for bounds in ranges])
    whole, part = P(inputs[0], trained=inputs[1:])[rows], P.restrict("cpu", ranges).project(inputs[0], None, inputs[1:])
    g = torch.randn(len(rows), dtype=torch.float64)
    torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-12)
    for got, expected in zip(*(torch.autograd.grad(y @ g, inputs) for y in (part, whole)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@each_case
def test_the_seed_gives_P(case):
    weights, seed = random_weights(SHAPES), random_seed()
    (P, _), (same, _), (other, _) = (
        made(case, seed=s, weights=weights) for s in (seed, seed, seed ^ (1 << int(torch.randint(62, ()))))
    )
    theta_d, *trained = values(P)
    assert torch.equal(P(theta_d, trained=trained), same(theta_d, trained=trained))
    assert torch.equal(P(theta_d, trained=trained), other(theta_d, trained=trained)) != case.drawn
    assert P.spec() == {"name": case.name, "version": P.version, "seed": seed, "options": dict(P.given_options)}


@each_case
def test_copies(case):
    P, _ = made(case)
    theta_d, *trained = values(P)
    again = pickle.loads(pickle.dumps(P))
    assert torch.equal(P(theta_d, trained=trained), again(theta_d, trained=trained))
    assert copy.deepcopy(P) is P


@each_case
def test_a_start_is_drawn_by_the_global_generator(case):
    P, _ = made(case)
    torch.manual_seed(5)
    first = P.start(torch.float32)
    torch.manual_seed(5)
    second = P.start(torch.float32)
    assert list(first) == ["theta_d", *P.trained]
    assert list(P.learning_rates) in ([], list(first))
    assert all(torch.equal(first[k], second[k]) and first[k].dtype == torch.float32 for k in first)
    if case.kind.start is ul.Projection.start or case.name == "vblora":
        bound = 0.02 if case.name == "vblora" else 0.005 * P.stretch
        assert 0.3 * bound < float(P.start(torch.float64)["theta_d"].abs().max()) <= bound
        assert 1 < float(P.start(torch.float32, 5.0)["theta_d"].abs().max()) <= 5
    else:
        with pytest.raises(ul.UniLoRAError, match="init_bound"):
            P.start(torch.float32, 0.1)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@each_case
def test_the_gpu_has_the_same_map(case):
    """theta_D, P^T g and the gradients of the trained parts as on the CPU, and bit-equal from run to run."""
    P, layout = made(case)
    numbers = values(P, torch.float32)
    g_D = torch.randn(layout.D)

    def of(device):
        theta_d, *trained = (t.to(device).requires_grad_() for t in numbers)
        theta_D = P(theta_d, trained=trained)
        return [theta_D.detach(), *torch.autograd.grad(theta_D, (theta_d, *trained), g_D.to(device))]

    first, again = of("cuda"), of("cuda")
    assert all(map(torch.equal, first, again))
    for got, expected in zip(first, of("cpu"), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
