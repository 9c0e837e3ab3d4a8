"""Running statistics of frozen BatchNorm layers, which training moves: they belong to the adapter."""

import copy
import logging

import pytest
import torch
from models import assert_unchanged, snapshot
from torch import nn

import unilora_ext as ul

CONFIG = ul.UniLoRAConfig(r=2, d=30, target_modules=["up", "down"])


class Normed(nn.Module):
    def __init__(self, tracked: bool = True) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(7, 9), nn.BatchNorm1d(9), nn.Linear(9, 4)
        self.last = nn.InstanceNorm1d(4, track_running_stats=tracked)
        self.head = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))

    def forward(self, x):
        y = self.down(torch.relu(self.norm(self.up(x))))
        return self.head(self.last(y.unsqueeze(2).expand(-1, -1, 3)).mean(2) + y)


MOVED = {f"{layer}.running_{name}" for layer in ("norm", "last") for name in ("mean", "var")}
MOVED |= {"norm.num_batches_tracked"}  # InstanceNorm does not count


def trained(model, config=CONFIG):
    """The adapter after two steps of training."""
    adapter = ul.attach(model.train(), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(3 * torch.randn(11, 7) + 1).square().sum().backward()
        optimizer.step()
    model.eval()
    return adapter


@pytest.mark.parametrize("whole", [[], ["head"]])
def test_saved_and_loaded(tmp_path, whole):
    config = ul.UniLoRAConfig(r=2, d=30, target_modules=["up", "down"], modules_to_save=whole)
    model, x = Normed(), torch.randn(5, 7)
    fresh = copy.deepcopy(model).eval()
    adapter = trained(model, config)
    in_head = {f"head.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert adapter.moved_statistics().keys() == (MOVED if whole else MOVED | in_head)
    adapter.save(tmp_path)
    ul.load(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x))
    with adapter.disable():
        adapter.save(tmp_path / "off")
    again = ul.read(tmp_path / "off").modules_to_save
    assert all(torch.equal(t, again[name]) for name, t in ul.read(tmp_path).modules_to_save.items())


def test_off_and_detached():
    model, x = Normed(), torch.randn(5, 7)
    plain = copy.deepcopy(model).eval()
    before = snapshot(model.eval())
    adapter = trained(model)
    y = model(x)
    with adapter.disable():
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model(x), y)
    kept = copy.deepcopy(model)
    merged = ul.get_adapter(kept).detach(merge=True)
    torch.testing.assert_close(merged(x), y)
    adapter.detach()
    assert_unchanged(model, before)


def test_nothing_is_saved_of_statistics_that_did_not_move(tmp_path):
    model = Normed().eval()
    adapter = ul.attach(model, CONFIG)
    model(torch.randn(5, 7)).sum().backward()
    adapter.save(tmp_path)
    assert not adapter.moved_statistics() and not ul.read(tmp_path).modules_to_save


def test_an_adapter_of_other_statistics_is_refused(tmp_path):
    trained(Normed()).save(tmp_path)
    other = Normed(tracked=False)
    before = snapshot(other)
    with pytest.raises(ul.AdapterFileError, match=r"'last.running_mean': in the adapter \[4\], not in the model"):
        ul.load(other, tmp_path)
    assert_unchanged(other, before)


def test_a_layer_of_two_names_and_one_of_modules_to_save_is_exchanged_once():
    model = Normed()
    model.alias = model.norm
    model.head.append(model.norm)
    model.head.forward = lambda x: model.head[1](model.head[0](x))
    mean = model.norm.running_mean.clone()
    config = ul.UniLoRAConfig(r=2, d=30, target_modules=["up", "down"], modules_to_save=["head"])
    adapter = trained(model, config)
    moved = model.norm.running_mean.clone()
    with adapter.disable():
        assert torch.equal(model.norm.running_mean, mean) and not torch.equal(mean, moved)
    assert torch.equal(model.norm.running_mean, moved)


def test_exporting_warns(tmp_path, caplog):
    adapter = trained(Normed())
    with caplog.at_level(logging.WARNING, "unilora_ext"):
        adapter.export_lora(tmp_path)
    assert "'norm.running_mean'" in caplog.text
    assert not any("running" in name for name in adapter.modules_to_save())
