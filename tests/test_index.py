"""Index generation: the algorithms of the adapter format, against an independent NumPy implementation."""

import numpy as np
import pytest
import torch

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


GOLDEN = [  # part of the adapter format: these numbers never change
    ("uniform", dict(d=10, seed=0), [8, 6, 3, 0, 3, 2, 4, 4]),
    ("uniform", dict(d=23040, seed=42), [10796, 7853, 7535, 10467, 15167, 17823, 15451, 8735]),
    ("balanced", dict(D=10, d=3, seed=0), [2, 0, 2, 0, 1, 0, 1, 1]),
    ("balanced", dict(D=393216, d=23040, seed=42), [19516, 13966, 5858, 2795, 437, 5898, 1701, 2967]),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), GOLDEN)
def test_golden_values(name, arguments, expected):
    assert getattr(_C, f"{name}_index")(**arguments, start=0, stop=8).tolist() == expected


def random_sizes():
    D = int(torch.randint(1, 5000, ()))
    return D, int(torch.randint(1, 2 * D + 1, ())), int(torch.randint(0, 2**62, ()))


def test_native_equals_reference():
    for D, d in [(1, 1), (2, 1), (1, 7), (7, 7), (10, 3), *(random_sizes()[:2] for _ in range(10))]:
        seed = int(torch.randint(0, 2**62, ()))
        start = int(torch.randint(0, D, ()))
        np.testing.assert_array_equal(
            _C.uniform_index(d, seed, start, D), reference.uniform_index(d, seed, start, D), err_msg=f"{d=} {seed=}"
        )
        np.testing.assert_array_equal(
            _C.balanced_index(D, d, seed, start, D),
            reference.balanced_index(D, d, seed, start, D),
            err_msg=f"{D=} {d=} {seed=}",
        )


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**32, 2**63 - 1])
def test_all_bits_of_the_seed_and_position_count(seed):
    far = 2**40 + 3  # beyond 32 bits
    np.testing.assert_array_equal(
        _C.uniform_index(1000, seed, far, far + 9), reference.uniform_index(1000, seed, far, far + 9)
    )
    others = [_C.uniform_index(2**31 - 2**16, s, 0, 64) for s in (seed, seed ^ 1, seed ^ 2**40)]
    assert (others[0] != others[1]).any() and (others[0] != others[2]).any()


def test_operator_equals_numpy_function_on_any_range(device, threads):
    D, d, seed = 100_003, 1009, int(torch.randint(0, 2**62, ()))
    for start, stop in [(0, D), (1, D), (17, 17), (99_999, D), (D - 1, D), (12_345, 54_321)]:
        for count in (1, 2, 3):
            threads(count)
            index = torch.empty(stop - start, dtype=torch.int32, device=device)
            ops.fill_uniform_index(index, d, seed, start)
            np.testing.assert_array_equal(index.cpu().numpy(), _C.uniform_index(d, seed, start, stop))
            ops.fill_balanced_index(index, D, d, seed, start)
            np.testing.assert_array_equal(index.cpu().numpy(), _C.balanced_index(D, d, seed, start, stop))


@pytest.mark.parametrize("D", [1, 2, 3, 4, 5, 9, 10, 16, 17, 101, 1000, 65_536, 99_991])
def test_balanced_is_balanced_and_its_inverse_lists_the_members(D):
    for d in {1, 2, max(1, D // 3), D, D + 5}:
        index = _C.balanced_index(D, d, 7, 0, D)
        counts = np.bincount(index, minlength=d)
        assert counts.min() >= D // d and counts.max() <= -(-D // d)
        np.testing.assert_array_equal(counts, ul.BalancedProjection(D, d, seed=7).counts.numpy())
        for column in {0, d // 2, d - 1}:
            members = _C.balanced_members(D, d, 7, column)
            assert sorted(members) == np.flatnonzero(index == column).tolist()


def test_largest_sizes():
    limit = _C.max_elements
    index = _C.balanced_index(limit, limit, 1, limit - 1000, limit)
    positions = [_C.balanced_members(limit, limit, 1, int(column))[0] for column in index[:50]]
    assert positions == list(range(limit - 1000, limit - 950))
    assert index.min() >= 0 and index.max() < limit
    assert _C.uniform_index(limit, 1, 0, 1000).max() < limit


@pytest.mark.parametrize("projection", [ul.UniformProjection, ul.BalancedProjection])
def test_columns_look_random(projection):
    """Chi-squared tests of columns, and of pairs of columns at several distances, at six standard deviations."""
    D, d = 400_000, 64
    columns = projection(D, d, seed=int(torch.randint(0, 2**40, ()))).index.long()

    def deviations(values, cells):
        counts = torch.bincount(values, minlength=cells).double()
        expected = len(values) / cells
        return float((((counts - expected) ** 2 / expected).sum() - (cells - 1)) / (2 * (cells - 1)) ** 0.5)

    assert deviations(columns, d) < 6
    for distance in (1, 2, 3, 64, 384, 633, 1024, 4096):  # 633 = ceil(sqrt(D)), the width of the balanced network
        assert abs(deviations(columns[distance:] * d + columns[:-distance], d * d)) < 6, distance


def test_positions_move_far_under_balanced():
    """The permutation has no drift: where the elements of each sixteenth of theta_D come from is even."""
    D, parts = 160_000, 16
    index = ul.BalancedProjection(D, D, seed=int(torch.randint(0, 2**40, ()))).index.long()
    table = torch.bincount(torch.arange(D) * parts // D * parts + index * parts // D, minlength=parts**2).double()
    expected = D / parts**2
    freedom = (parts - 1) ** 2
    assert ((((table - expected) ** 2) / expected).sum() - freedom) / (2 * freedom) ** 0.5 < 6


def test_wrong_arguments_are_named():
    index = torch.empty(4, dtype=torch.int32)
    cases = [
        (lambda: ops.fill_uniform_index(index.long(), 3, 0, 0), "index: expected dtype Int, got Long"),
        (lambda: ops.fill_uniform_index(index, 0, 0, 0), r"d: expected a value in \[1, "),
        (lambda: ops.fill_uniform_index(index, 3, -1, 0), r"seed: expected a value in \[0, "),
        (lambda: ops.fill_uniform_index(index[::2], 3, 0, 0), "index: expected a contiguous tensor"),
        (
            lambda: ops.fill_balanced_index(index, 5, 3, 0, 2),
            r"start \+ len\(index\): expected a value in \[0, 5\], got 6",
        ),
    ]
    for call, message in cases:
        with pytest.raises(RuntimeError, match=message):
            call()
    with pytest.raises(ValueError, match="start, stop: expected 0 <= start <= stop <= 5, got 2, 6"):
        _C.balanced_index(5, 3, 0, 2, 6)
