"""Named ranges in profilers."""

import pytest
import torch
from models import Tower, tokens

import unilora_ext as ul
from unilora_ext import trace

OPERATORS = {
    "unilora::project", "unilora::project_scatter", "unilora::lora_linear", "unilora::lora_linear_backward",
}  # fmt: skip
RANGES = {
    "unilora::project", "unilora::project_backward", "unilora::lora_linear", "unilora::lora_linear_backward",
}  # fmt: skip
CONFIG = ul.UniLoRAConfig(r=3, d=64, target_modules=["up", "down"])


@pytest.fixture
def nvtx(monkeypatch):
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
    trace.enable(False)
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


def test_ranges_are_balanced_and_off_by_default(nvtx):
    model = Tower()
    ul.attach(model, CONFIG)
    step(model)
    assert nvtx == [] and not trace.enabled()
    trace.enable()
    step(model)
    names = [name for _, name in nvtx]
    assert set(names) == RANGES and names.count("unilora::project") == names.count("unilora::project_backward") == 1
    assert names.count("unilora::lora_linear") == names.count("unilora::lora_linear_backward") == 6
    assert {depth for depth, _ in nvtx} == {0}
    nvtx.clear()
    trace.enable(False)
    step(model)
    assert nvtx == []


def test_a_failing_operator_closes_its_range(nvtx):
    trace.enable()
    with pytest.raises(RuntimeError, match="lora_linear: x: expected shape"):
        ul.lora_linear(torch.randn(2, 5), torch.randn(3, 4), None, torch.randn(1, 4), torch.randn(3, 1))
    assert [name for _, name in nvtx] == ["unilora::lora_linear"]


def test_tracing_changes_no_result(nvtx):
    model, x = Tower(), tokens()
    ul.attach(model, CONFIG)
    expected = model(x)
    trace.enable()
    assert torch.equal(model(x), expected)
