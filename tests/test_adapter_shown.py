"""What an adapter says of itself and of the model: counts, the notebook's table."""

import copy
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
