"""What an adapter says of itself and of the model: counts, the notebook's table, statistics that are not saved."""

import copy
import logging
from html.parser import HTMLParser

import pytest
import torch
from models import Tower
from torch import nn

import unilora_ext as ul


def attached(model, **options):
    return ul.attach(model, ul.UniLoRAConfig(**{"r": 2, "d": 40, "target_modules": ["up", "down"], **options}))


def printed(adapter, capsys):
    adapter.print_trainable_parameters()
    return capsys.readouterr().out


def test_trainable_parameters_are_pefts(capsys):
    """PEFT's own line, of its own UniLora with as many numbers."""
    peft = pytest.importorskip("peft")
    model = Tower()
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.UniLoraConfig(r=2, theta_d_length=40, target_modules=["up", "down"])
    )
    theirs.print_trainable_parameters()
    expected = capsys.readouterr().out
    assert printed(attached(model), capsys) == expected and "trainable params: 40 ||" in expected


@pytest.mark.parametrize("tied", [False, True])
def test_trainable_parameters(tied, capsys):
    model = Tower()
    if tied:
        model.blocks[1].up.weight = nn.Parameter(torch.randn(20, 12))
        model.blocks[1].up.bias = nn.Parameter(torch.randn(20))
        model.blocks[0].up.weight = model.blocks[1].up.weight
    plain = sum(p.numel() for p in model.parameters())
    adapter = attached(model, projection="vblora", d=None, projection_options={"num_vectors": 8, "vector_length": 1},
                       modules_to_save=["head"])  # fmt: skip
    trained = sum(t.numel() for t in adapter.trained.values()) + 12 * 5 + 5
    added = sum(t.numel() for t in adapter.trained.values())
    assert adapter.get_nb_trainable_parameters() == (trained, plain + added)
    share = 100 * trained / (plain + added)
    assert printed(adapter, capsys) == (
        f"trainable params: {trained:,} || all params: {plain + added:,} || trainable%: {share:.4f}\n"
    )


def test_packed_weights_count_as_what_they_stand_for():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 128, bias=False), nn.Linear(128, 4, bias=False))
    model[0].to("cpu")
    assert model[0].weight.dtype == torch.uint8
    adapter = attached(model, target_modules=["0"])
    assert adapter.get_nb_trainable_parameters() == (40, 64 * 128 + 128 * 4 + 40)


class Cells(HTMLParser):
    """The texts of a table, and whether its tags match."""

    def __init__(self):
        super().__init__()
        self.open, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_notebooks_table():
    model = Tower()
    model.__class__ = type("<Odd & model>", (Tower,), {})
    adapter = attached(model, seed=7, modules_to_save=["head"])
    for change, state in (
        (lambda: None, "on"),
        (adapter.disable, "off"),
        (adapter.enable, "on"),
        (adapter.merge, "merged"),
    ):
        change()
        cells = Cells()
        cells.feed(adapter._repr_html_())
        assert not cells.open and {"<Odd & model>", "uniform, seed 7", "6", "head", state} < set(cells.texts)


# ---- running statistics ---------------------------------------------------------------------------------------------


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm, self.head = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.up(x)))


@pytest.mark.parametrize("how", ["train", "eval", "frozen", "modules_to_save", "no statistics"])
def test_statistics_that_are_not_saved_are_told(how, tmp_path, caplog):
    model = Normed()
    if how == "no statistics":
        model.norm = nn.BatchNorm1d(8, track_running_stats=False)
    plain = copy.deepcopy(model)
    whole = ["norm"] if how == "modules_to_save" else []
    adapter = attached(model, d=20, target_modules=["up"], modules_to_save=whole)
    model.train(how != "eval")
    if how == "frozen":
        model.norm.eval()
    for _ in range(3):
        model(torch.randn(6, 5) * 3 + 1).sum().backward()
    with caplog.at_level(logging.WARNING, logger="unilora_ext"):
        adapter.save(tmp_path)
    assert ("running statistics of 1 layers ('norm'" in caplog.text) == (how == "train")
    ul.load(plain, tmp_path)
    x = torch.randn(4, 5)
    assert torch.equal(plain.eval()(x), model.eval()(x)) == (how != "train")


def test_a_copy_and_a_loaded_adapter_know_their_start(tmp_path, caplog):
    model = Normed()
    attached(model, d=20, target_modules=["up"])
    model.train()(torch.randn(6, 5))
    other = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, logger="unilora_ext"):
        ul.get_adapter(other).save(tmp_path)
    assert "have moved" in caplog.text
    caplog.clear()
    ul.get_adapter(other).detach()
    ul.load(other.eval(), tmp_path).save(tmp_path)  # they are the model's own now
    assert "have moved" not in caplog.text
