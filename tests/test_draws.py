"""Numbers drawn by position: part of the file format."""

import numpy as np
import pytest
import torch

from unilora_ext.projections.draws import Draws, Purpose

WORDS = [3064911680809431445, 8442026727404555650, 8142688649311348304]
UNIFORM = [0.16614919514048931, 0.45764318590163555, 0.4414160361728211]
NORMAL = [0.47783661453398, -1.1665787275173891, 0.44991666969891336]
SIGNS = [-1, -1, -1, 1, 1, -1, 1, -1, 1, 1, 1, -1]
PERMUTATION = [0, 3, 8, 5, 4, 7, 1, 2, 6, 9]
DISTINCT = [12, 681, 858, 166, 457]
FAR = [12656408284496641727, 12256618797596614657]


def random_integer(low, high):
    return int(torch.randint(low, high, ()))


def test_golden_values():
    draws = Draws(12345, Purpose.GAUSSIAN, 6)
    assert draws.words(3, 3).tolist() == WORDS
    assert draws.uniform(3, 3).tolist() == UNIFORM
    np.testing.assert_allclose(draws.normal(3, 3), NORMAL, rtol=1e-14)
    assert draws.signs(3, 12).tolist() == SIGNS
    assert draws.permutation(10).tolist() == PERMUTATION
    assert draws.distinct(5, 1000).tolist() == DISTINCT
    assert draws.distinct(5, 10).tolist() == PERMUTATION[:5]
    assert Draws(2**63 - 1, Purpose.VERA_A).words(2**40 + 1, 2).tolist() == FAR


@pytest.mark.parametrize("what", ["words", "uniform", "normal", "signs"])
def test_any_stretch_is_drawn_by_itself(what):
    draw = getattr(Draws(random_integer(0, 2**62), Purpose.VERA_B, random_integer(0, 1000)), what)
    first = random_integer(0, 2**40)
    whole = draw(first, 60)
    for _ in range(20):
        start, stop = sorted((random_integer(0, 61), random_integer(0, 61)))
        assert np.array_equal(draw(first + start, stop - start), whole[start:stop])


def test_permutations_are_drawn_by_themselves():
    draws, n = Draws(random_integer(0, 2**62), Purpose.FASTFOOD_PERMUTATION), random_integer(1, 40)
    whole = draws.permutations(0, 9, n)
    assert np.array_equal(whole[4:7], draws.permutations(4, 3, n))
    assert np.array_equal(np.sort(whole, axis=1), np.tile(np.arange(n), (9, 1)))
    assert np.array_equal(whole[0], draws.permutation(n))


def test_streams_differ():
    seed = random_integer(0, 2**62)
    streams = [(seed, purpose, part) for purpose in Purpose for part in (0, 1)] + [(seed ^ 1, Purpose.VERA_A, 0)]
    drawn = np.concatenate([Draws(*stream).words(0, 100) for stream in streams])
    assert len(np.unique(drawn)) == len(drawn)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.24, 0.25, 0.9, 1.0])
def test_distinct(share):
    size = random_integer(1000, 100_000)
    count = int(share * size)
    drawn = Draws(random_integer(0, 2**62), Purpose.FOURIERFT).distinct(count, size)
    assert drawn.dtype == np.int64 and len(np.unique(drawn)) == len(drawn) == count
    assert drawn.min() >= 0 and drawn.max() < size
    if count > 100:
        assert abs(drawn.mean() / size - 0.5) < 5 * np.sqrt(1 / 12 / count)


def test_distributions():
    draws, n = Draws(random_integer(0, 2**62), Purpose.TINYLORA), 200_000
    u, z, s = draws.uniform(0, n), draws.normal(0, n), draws.signs(0, n).astype(float)
    assert u.min() > 0 and u.max() < 1 and set(np.unique(s)) == {-1.0, 1.0}
    for sample, mean, variance in ((u, 0.5, 1 / 12), (u**2, 1 / 3, 4 / 45), (z, 0, 1), (z**2, 1, 2), (s, 0, 1)):
        assert abs(sample.mean() - mean) < 6 * np.sqrt(variance / n)
    for sample in (z, s):
        assert abs((sample[::2] * sample[1::2]).mean()) < 6 / np.sqrt(n / 2)
    assert abs((z**4).mean() - 3) < 6 * np.sqrt(96 / n)
