"""Index generation: the algorithms of the adapter format, against an independent NumPy implementation."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import unilora_ext as ul
from unilora_ext import _C, reference

ops = torch.ops.unilora


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # Random123's known answers for philox4x32, 10 rounds
        ([0] * 4, (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox4x32_10(key, np.array([counter], dtype=np.uint64))
    assert words[0].tolist() == expected


def uniform(d, seed, start, stop, device="cpu"):
    index = torch.empty(stop - start, dtype=torch.int32, device=device)
    ops.fill_index(index, "uniform", 1, 1, d, seed, start)  # of any positions: D bounds nothing
    return index.cpu().numpy()


def balanced(version, D, d, seed, start, stop, device="cpu"):
    index = torch.empty(stop - start, dtype=torch.int32, device=device)
    ops.fill_index(index, "balanced", version, D, d, seed, start)
    return index.cpu().numpy()


GOLDEN = [  # part of the adapter format: these numbers never change
    (uniform, dict(d=10, seed=0), [8, 6, 3, 0, 3, 2, 4, 4]),
    (uniform, dict(d=23040, seed=42), [10796, 7853, 7535, 10467, 15167, 17823, 15451, 8735]),
    (balanced, dict(version=1, D=10, d=3, seed=0), [2, 0, 2, 0, 1, 0, 1, 1]),
    (balanced, dict(version=2, D=10, d=3, seed=0), [0, 0, 1, 2, 1, 1, 0, 2]),
    (balanced, dict(version=2, D=256, d=40, seed=42), [21, 31, 29, 21, 14, 17, 36, 33]),
    *((balanced, dict(version=v, D=257, d=40, seed=42), [2, 3, 20, 34, 17, 34, 32, 15]) for v in (1, 2)),
    *(
        (balanced, dict(version=v, D=393216, d=23040, seed=42), [19516, 13966, 5858, 2795, 437, 5898, 1701, 2967])
        for v in (1, 2)
    ),
]


@pytest.mark.parametrize(("function", "arguments", "expected"), GOLDEN)
def test_golden_values(device, function, arguments, expected):
    assert function(**arguments, start=0, stop=8, device=device).tolist() == expected


def random_sizes():
    D = int(torch.randint(1, 5000, ()))
    return D, int(torch.randint(1, 2 * D + 1, ()))


def test_native_equals_reference():
    for D, d in [(1, 1), (2, 1), (1, 7), (7, 7), (10, 3), (255, 31), (256, 256), *(random_sizes() for _ in range(10))]:
        seed = int(torch.randint(0, 2**62, ()))
        start = int(torch.randint(0, D, ()))
        np.testing.assert_array_equal(
            uniform(d, seed, start, D), reference.uniform_index(d, seed, start, D), err_msg=f"{d=} {seed=}"
        )
        for version in (1, 2):
            np.testing.assert_array_equal(
                balanced(version, D, d, seed, start, D),
                reference.balanced_index(D, d, seed, start, D, version),
                err_msg=f"{version=} {D=} {d=} {seed=}",
            )


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63 - 1])
def test_all_bits_of_the_seed_and_position_count(seed):
    far = 2**40 + 3  # beyond 32 bits
    np.testing.assert_array_equal(uniform(1000, seed, far, far + 9), reference.uniform_index(1000, seed, far, far + 9))
    others = [uniform(2**31 - 2**16, s, 0, 64) for s in (seed, seed ^ 1, seed ^ 2**40)]
    assert (others[0] != others[1]).any() and (others[0] != others[2]).any()


def test_any_range_is_a_part_of_the_whole(device, threads):
    d, seed = 1009, int(torch.randint(0, 2**62, ()))
    for D in (256, 20_011):
        whole = reference.uniform_index(d, seed, 0, D), reference.balanced_index(D, d, seed, 0, D)
        for start, stop in [(0, D), (1, D), (17, 17), (D - 2, D), (D - 1, D), (D // 3, D // 2)]:
            for count in (1, 2, 3):
                threads(count)
                np.testing.assert_array_equal(uniform(d, seed, start, stop, device), whole[0][start:stop])
                np.testing.assert_array_equal(balanced(2, D, d, seed, start, stop, device), whole[1][start:stop])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 9, 10, 16, 17, 101, 256, 257, 1000, 65_536, 99_991])
def test_balanced_is_a_permutation_dealt_in_turn(version, D):
    elements = balanced(version, D, D, 7, 0, D)
    np.testing.assert_array_equal(np.sort(elements), np.arange(D))
    for d in {1, 2, max(1, D // 3), D + 5}:
        np.testing.assert_array_equal(balanced(version, D, d, 7, 0, D), elements % d)
        P = ul.BalancedProjection(D, d, seed=7, version=version)
        np.testing.assert_array_equal(np.bincount(elements % d, minlength=d), P.counts.numpy())


def test_largest_sizes():
    limit = _C.max_elements
    index = balanced(2, limit, limit, 1, limit - 1000, limit)
    assert index.min() >= 0 and index.max() < limit and len(set(index.tolist())) == 1000
    np.testing.assert_array_equal(index[-20:], reference.balanced_index(limit, limit, 1, limit - 20, limit))
    assert uniform(limit, 1, 0, 1000).max() < limit


def deviation(counts, total, cells, freedom):
    """Chi-squared over `cells` equally likely ones, as a number of its standard deviations; counts of 0 may lack."""
    chi_squared = (np.asarray(counts, dtype=np.float64) ** 2).sum() * cells / total - total
    return (chi_squared - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("D", range(2, 9))
def test_every_permutation_of_few_rows_is_as_likely(D):
    n, cells = 40_000, math.factorial(D)
    permutations = torch.stack([ul.BalancedProjection(D, D, seed=s).columns(0, D) for s in range(n)]).numpy()
    counts = np.unique(permutations @ (D ** np.arange(D)), return_counts=True)[1]
    assert abs(deviation(counts, n, cells, cells - 1)) < 5


@pytest.mark.parametrize("D", [12, 14, 16, 100, 256, 257])
def test_neighbours_are_at_every_distance_alike(D):
    """The difference of the elements of two neighbouring rows, over many seeds."""
    n = 40_000
    pairs = torch.stack([ul.BalancedProjection(D, D, seed=s).columns(0, 2) for s in range(n)]).numpy()
    assert abs(deviation(np.bincount((pairs[:, 1] - pairs[:, 0]) % D), n, D - 1, D - 2)) < 5


def test_an_adapter_of_an_older_version_keeps_its_projection(tmp_path):
    """D = 16: the two versions differ."""

    def model():
        return nn.Sequential(nn.Linear(8, 8))

    config = ul.UniLoRAConfig(target_modules=["0"], r=1, d=4, projection="balanced", seed=3)
    adapter = ul.attach(model(), config)
    assert adapter.projection.version == 2 and adapter.projection.spec()["version"] == 2
    adapter.save(tmp_path / "new")
    adapter.vector.projection = older = ul.BalancedProjection(16, 4, seed=3, version=1)
    assert not torch.equal(older.index, ul.BalancedProjection(16, 4, seed=3).index)
    adapter.save(tmp_path / "old")
    for folder, version in (("new", 2), ("old", 1)):
        for name in (folder, f"{folder} again"):
            loaded = ul.load(model(), tmp_path / name)
            assert loaded.projection.version == version
            expected = reference.balanced_index(16, 4, 3, 0, 16, version)
            np.testing.assert_array_equal(loaded.projection.index.numpy(), expected)
            loaded.save(tmp_path / f"{folder} again")


@pytest.mark.parametrize("projection", [ul.UniformProjection, ul.BalancedProjection])
def test_columns_look_random(projection):
    """Chi-squared tests of columns, and of pairs of columns at several distances, at six standard deviations."""
    D, d = 400_000, 64
    columns = projection(D, d, seed=int(torch.randint(0, 2**40, ()))).index.long()

    def deviations(values, cells):
        return deviation(torch.bincount(values), len(values), cells, cells - 1)

    assert deviations(columns, d) < 6
    for distance in (1, 2, 3, 64, 384, 633, 1024, 4096):  # 633 = ceil(sqrt(D)), the width of the balanced network
        assert abs(deviations(columns[distance:] * d + columns[:-distance], d * d)) < 6, distance


def test_positions_move_far_under_balanced():
    """The permutation has no drift: where the elements of each sixteenth of theta_D come from is even."""
    D, parts = 160_000, 16
    index = ul.BalancedProjection(D, D, seed=int(torch.randint(0, 2**40, ()))).index.long()
    table = torch.bincount(torch.arange(D) * parts // D * parts + index * parts // D, minlength=parts**2)
    assert deviation(table, D, parts**2, (parts - 1) ** 2) < 6


def test_wrong_arguments_are_named():
    index = torch.empty(4, dtype=torch.int32)
    cases = [
        (dict(index=index.long()), "index: expected dtype Int, got Long"),
        (dict(index=index[::2]), "index: expected a contiguous tensor"),
        (dict(algorithm="peft"), "algorithm: expected 'uniform' or 'balanced', got 'peft'"),
        (dict(version=0), r"version: expected a value in \[1, 2\], got 0"),
        (dict(version=3), r"version: expected a value in \[1, 2\], got 3"),
        (dict(algorithm="uniform", version=2), r"version: expected a value in \[1, 1\], got 2"),
        (dict(algorithm="uniform", version=1, D=0), r"D: expected a value in \[1, "),
        (dict(algorithm="uniform", version=1, start=-1), r"start: expected a value in \[0, "),
        (
            dict(algorithm="uniform", version=1, start=2**63 - 4),
            rf"start: expected a value in \[0, {2**63 - 5}\], got {2**63 - 4}",
        ),
        (dict(D=2**31), r"D: expected a value in \[1, "),
        (dict(d=0), r"d: expected a value in \[1, "),
        (dict(d=2**31), r"d: expected a value in \[1, "),
        (dict(seed=-1), r"seed: expected a value in \[0, "),
        (dict(start=-1), r"start: expected a value in \[0, 5\], got -1"),
        (dict(start=2**63 - 1), rf"start: expected a value in \[0, 5\], got {2**63 - 1}"),
        (dict(start=2), r"start \+ len\(index\): expected a value in \[0, 5\], got 6"),
    ]
    good = dict(index=index, algorithm="balanced", version=2, D=5, d=3, seed=0, start=1)
    ops.fill_index(**good)
    before = index.clone()
    for change, message in cases:
        with pytest.raises(RuntimeError, match="unilora::fill_index: " + message):
            ops.fill_index(**{**good, **change})
    assert torch.equal(index, before)
