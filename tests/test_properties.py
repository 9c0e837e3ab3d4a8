"""The measured properties of P, against its dense matrix."""

import math

import pytest
import torch
from test_family import CASES, SHAPES, made

from unilora_ext.properties import Properties, measure

FIXED = [case for case in CASES if not case.kind.trained]


@pytest.mark.parametrize("case", FIXED, ids=str)
def test_the_numbers_are_those_of_the_matrix(case):
    P, layout = made(case)
    found, matrix = measure(P, layout, seed=3), P.dense()
    reached = torch.stack([(matrix[slice(*layout.range_of(i))] != 0).any(0) for i in range(len(layout))]).sum(0)
    used = matrix[:, reached > 0]
    assert (found.D, found.d) == tuple(matrix.shape)
    assert found.shared == pytest.approx(float((reached > 1).sum() / (reached > 0).sum()))
    if P.d <= 32:  # else some columns stand for all
        loads = (matrix != 0).sum(0).double()
        if case.name not in ("fourierft", "fastfood"):  # whose sums may be 0 but for rounding
            assert found.load == pytest.approx(float(loads.mean()))
            assert found.spread == pytest.approx(float(loads.std(correction=0) / loads.mean()), abs=1e-6)
    singular = torch.linalg.svdvals(used)
    assert found.singular_values[1] * found.factor == pytest.approx(float(singular[0]), rel=1e-3)
    if P.d <= 40:  # as many steps as columns: the least one is found, too
        least = found.singular_values[0] * found.factor
        assert least == pytest.approx(float(singular[-1]), abs=2e-3 * float(singular[0]))
    assert singular[-1] / found.factor - 1e-4 <= found.ratios[0] <= found.ratios[1] <= singular[0] / found.factor + 1e-4


def test_ticks_follow_from_the_numbers():
    def of(**numbers):
        exact = dict(shared=1.0, load=9.0, spread=0.3, factor=2.0, singular_values=(1.0, 1.0), ratios=(1.0, 1.0))
        return Properties(D=90, d=10, **{**exact, **numbers}).ticks

    assert of() == ("yes", "yes", "yes")
    assert of(shared=0.09)[0] == "no"
    assert of(spread=1.1 / 3 + 1e-9)[1] == "no" and of(load=1e4, spread=0.1)[1] == "yes"
    assert of(load=0.0, spread=math.nan)[1] == "no"
    assert of(singular_values=(0.99, 1.0))[2] == "nearly"
    assert of(singular_values=(0.5, 1.5), ratios=(0.94, 1.0))[2] == "no"


def test_trained_parts_in_general_position():
    """A part that starts at 0 does not hide the columns that it multiplies; the same seed gives the same numbers."""
    (case,) = [case for case in CASES if case.name == "tied"]
    P, layout = made(case, SHAPES)
    first, again, other = measure(P, layout, 5), measure(P, layout, 5), measure(P, layout, 6)
    assert first == again != other
    assert first.load > 0 and first.ticks == ("no", "no", "no")
