"""Every class of stacked experts in the installed Transformers: its own loop over experts, and ours."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import unilora_ext as ul
from unilora_ext.experts import problem_of, stacks_experts

transformers = pytest.importorskip("transformers")
EXPERTS, HIDDEN, INNER = 3, 6, 4


class Sizes:
    """A configuration that has all that experts read, small."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name:
            return "silu"
        if "limit" in name or "alpha" in name or "eps" in name or "scal" in name:
            return 0.7
        if "expert" in name and "size" not in name and "dim" not in name:
            return EXPERTS
        return INNER if any(part in name for part in ("intermediate", "moe", "latent")) else HIDDEN


def stacked_classes():
    """(module, class) of all that are decorated."""
    models = Path(transformers.__file__).parent / "models"
    for path in sorted(models.glob("*/modeling_*.py")):
        text = path.read_text("utf-8")
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)\(", text, re.MULTILINE):
            yield f"transformers.models.{path.parent.name}.{path.stem}", name


@pytest.mark.parametrize("module, name", stacked_classes(), ids=lambda value: value.rpartition(".")[2])
def test_ours_is_the_class_s_own_forward(module, name):
    cls = getattr(importlib.import_module(module), name)
    try:
        experts = cls(Sizes()).double().eval()
    except Exception as error:  # this test does not know its configuration
        pytest.skip(f"not made: {error!r}")
    assert stacks_experts(experts)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model = nn.Sequential()
    model.experts = experts
    config = ul.UniLoRAConfig(r=2, d=31, target_modules=["experts"], init_bound=0.5)
    if problem_of(experts):
        with pytest.raises(ul.AttachError, match=r"'experts' \(\w+\) cannot be adapted"):
            ul.attach(model, config)
        return
    adapter = ul.attach(model, config)
    width = experts.weight.shape[1 if not experts.is_transposed else 2]
    x, shares = torch.randn(9, width).double(), torch.rand(9, 2).double()
    chosen = torch.stack([torch.randperm(experts.num_experts)[:2] for _ in range(9)])
    y = experts(x, chosen, shares)
    with adapter.disable():
        plain = experts(x, chosen, shares)
    low = copy.deepcopy(experts).bfloat16()(x.bfloat16(), chosen, shares.bfloat16())
    assert low.dtype == torch.bfloat16 and (low - y).norm() < 0.1 * y.norm()
    adapter.merge()  # by now the class's own forward runs, with W + dW
    loose = 1e-5  # some classes compute their gate in float32 in their own loop
    torch.testing.assert_close(experts(x, chosen, shares), y, rtol=loose, atol=loose)
    assert (y - plain).abs().max() > 1e-3
