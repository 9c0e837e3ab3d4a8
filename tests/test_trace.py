"""Named ranges in profilers."""

import pytest
import torch
from models import Tower, tokens

import unilora_ext as ul
from unilora_ext import nvtx

OPERATORS = {
    "unilora::project", "unilora::project_scatter", "unilora::lora_linear", "unilora::lora_linear_backward",
}  # fmt: skip
RANGES = {
    "unilora::project", "unilora::project_backward", "unilora::lora_linear", "unilora::lora_linear_backward",
}  # fmt: skip
CONFIG = ul.UniLoRAConfig(r=3, d=64, target_modules=["up", "down"])


@pytest.fixture
def ranges(monkeypatch):
    """The ranges that would go to nsys, as (depth, name), in a PyTorch without CUDA too."""
    seen, depth = [], [0]

    def push(name):
        seen.append((depth[0], name))
        depth[0] += 1

    def pop():
        depth[0] -= 1

    monkeypatch.setattr(torch.cuda.nvtx, "range_push", push)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", pop)
    yield seen
    nvtx.enable(False)
    assert depth == [0]


def step(model):
    model(tokens()).sum().backward()


def test_operators_show_in_the_profiler():
    model = Tower()
    ul.attach(model, CONFIG)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(model)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts.keys() >= OPERATORS
    assert counts["unilora::project"] == counts["unilora::project_scatter"] == 1
    assert counts["unilora::lora_linear"] == counts["unilora::lora_linear_backward"] == 6


def test_ranges_are_balanced_and_off_by_default(ranges):
    model = Tower()
    ul.attach(model, CONFIG)
    step(model)
    assert ranges == [] and not nvtx.enabled()
    nvtx.enable()
    step(model)
    names = [name for _, name in ranges]
    assert set(names) == RANGES and names.count("unilora::project") == names.count("unilora::project_backward") == 1
    assert names.count("unilora::lora_linear") == names.count("unilora::lora_linear_backward") == 6
    assert {depth for depth, _ in ranges} == {0}
    ranges.clear()
    nvtx.enable(False)
    step(model)
    assert ranges == []


def test_a_failing_operator_closes_its_range(ranges):
    nvtx.enable()
    with pytest.raises(RuntimeError, match="lora_linear: x: expected shape"):
        ul.lora_linear(torch.randn(2, 5), torch.randn(3, 4), None, torch.randn(1, 4), torch.randn(3, 1))
    assert [name for _, name in ranges] == ["unilora::lora_linear"]


def test_tracing_changes_no_result(ranges):
    model, x = Tower(), tokens()
    ul.attach(model, CONFIG)
    expected = model(x)
    nvtx.enable()
    assert torch.equal(model(x), expected)
