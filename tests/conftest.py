"""Fixtures shared by all tests. Every random input is drawn anew: the seed of a failing test is printed with it."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(items):
    # Files with slow tests first: workers that take a file at a time end together.
    slow = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow)
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def fresh_seed():
    seed = int(os.environ.get("UNILORA_TEST_SEED") or torch.seed() % 2**31)
    torch.manual_seed(seed)
    print(f"UNILORA_TEST_SEED={seed}")
    yield seed


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request):
    return torch.device(request.param)


@pytest.fixture
def threads():
    """torch.set_num_threads, put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def projections(monkeypatch):
    """The sizes of all projections made, in order."""
    from unilora_ext.projections import Restriction

    sizes, matrices = [], Restriction.matrices

    def counted(restriction, *args):
        sizes.append(len(restriction))
        return matrices(restriction, *args)

    monkeypatch.setattr(Restriction, "matrices", counted)
    return sizes
