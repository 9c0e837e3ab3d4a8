"""Wrong calls: the message says what was wrong, what was expected and what came, and the model is as it was.

Damaged adapter files are in test_checkpoint.py, wrong operator arguments beside each operator's tests.
"""

import pytest
import torch
from models import Tower, assert_unchanged, snapshot
from torch import nn

import unilora_ext as ul
from unilora_ext.integrations import peft as peft_format


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.linear = nn.Linear(8, 8)


def adapted(**changes):
    return {"target_modules": ["up", "down"], "r": 2, "d": 20, **changes}


WRONG_ATTACH = {
    "a name that no module has": (
        Tower,
        adapted(target_modules=["up", "downn"]),
        r"target_modules: no module of Tower is named 'downn'.* it has the linear layers down \(x3\), head \(x1\), up "
        r"\(x3\); close names: \['down'\]",
    ),
    "a pattern that matches nothing": (
        Tower,
        adapted(target_modules="layers.*"),
        r"expected a module whose whole name matches 'layers\.\*', Tower has the linear layers",
    ),
    "a module that is not linear": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),
        adapted(target_modules=["1"]),
        r"'1' \(LayerNorm\) cannot be adapted: expected a torch.nn.Linear, Embedding",
    ),
    "a container": (Tower, adapted(target_modules=["blocks"]), r"'blocks' \(ModuleList\) cannot be adapted"),
    "a layer whose parent reads its weight": (
        Attention,
        adapted(target_modules=["out_proj"]),
        r"'attention.out_proj' .*MultiheadAttention reads its weight instead of calling it",
    ),
    "more columns than rows": (
        Tower,
        adapted(d=10**6),
        r"d: expected at most D = \d+, the number of values of the 6 target modules at r = 2; got 1000000",
    ),
    "a module adapted and trained whole": (
        Tower,
        adapted(modules_to_save=["blocks.1"]),
        r"'blocks.1.up' is also in modules_to_save \['blocks.1'\]: choose one",
    ),
    "a module to save that does not exist": (
        Tower,
        adapted(modules_to_save=["classifier"]),
        r"modules_to_save: no module of Tower is named 'classifier'",
    ),
    "a model without linear layers": (
        lambda: nn.Sequential(nn.Embedding(3, 3)),
        adapted(target_modules="all-linear"),
        r"expected any linear layer .*, Sequential has no linear layers",
    ),
    "a linear layer itself": (lambda: nn.Linear(3, 3), adapted(), "use UniLoRALinear.from_linear"),
}


@pytest.mark.parametrize("case", WRONG_ATTACH)
def test_attach_refuses_and_changes_nothing(case):
    make, arguments, message = WRONG_ATTACH[case]
    model = make()
    before = snapshot(model)
    with pytest.raises(ul.AttachError, match=message):
        ul.attach(model, ul.UniLoRAConfig(**arguments))
    assert_unchanged(model, before)


def test_attach_refuses_what_is_adapted_already():
    model = Tower()
    ul.attach(model, ul.UniLoRAConfig(**adapted()))
    before = snapshot(model)
    with pytest.raises(ul.AttachError, match="Tower has an adapter"):
        ul.attach(model, ul.UniLoRAConfig(**adapted()))
    outer = nn.ModuleDict({"inner": model})
    with pytest.raises(
        ul.AttachError, match=r"'inner.blocks.0.up' \(UniLoRALinear\) .* has a Uni-LoRA adapter already"
    ):
        ul.attach(outer, ul.UniLoRAConfig(**adapted()))
    assert_unchanged(model, before)


def test_attach_refuses_a_part_that_is_adapted():
    """Around it or inside it: the one would freeze the other's vector."""
    model = Tower()
    adapter = ul.attach(model, ul.UniLoRAConfig(**adapted()))
    outer = nn.ModuleDict({"inner": model, "own": nn.Linear(4, 4)})
    inner_first = next(iter(adapter.layers)).removeprefix("blocks.0.")
    before = snapshot(outer)
    for part, layer, target in ((outer, "inner.blocks.0.up", "own"), (model.blocks[0], inner_first, "down")):
        with pytest.raises(ul.AttachError, match=rf"attach: '{layer}' \(UniLoRALinear\) .* has a Uni-LoRA adapter"):
            ul.attach(part, ul.UniLoRAConfig(r=2, d=4, target_modules=[target]))
    assert_unchanged(outer, before)
    by_hand = nn.ModuleDict({"first": ul.UniLoRALinear(4, 4, d=4), "second": nn.Linear(4, 4)})
    with pytest.raises(ul.AttachError, match=r"attach: 'first' \(UniLoRALinear\) .* has a Uni-LoRA adapter"):
        ul.attach(by_hand, ul.UniLoRAConfig(r=2, d=4, target_modules=["second"]))
    assert by_hand["first"].theta_d.requires_grad


@pytest.mark.parametrize("lazy", [lambda: nn.LazyLinear(3), lambda: nn.LazyConv2d(3, 2), nn.LazyBatchNorm1d])
@pytest.mark.parametrize("changes", [{}, {"target_modules": "all-linear"}, {"modules_to_save": ["lazy"]}])
def test_attach_refuses_an_uninitialised_layer(lazy, changes):
    """Anywhere in the model: what has no shape yet cannot be frozen."""
    model = nn.Sequential()
    model.first, model.lazy = nn.Linear(4, 4), lazy()
    with pytest.raises(ul.AttachError, match=r"attach: 'lazy\.\w+' is not initialised: call the model once before"):
        ul.attach(model, ul.UniLoRAConfig(**{"r": 2, "d": 4, "target_modules": ["first"], **changes}))
    assert all(p.requires_grad for p in model.parameters()) and type(model.first) is nn.Linear


def test_all_linear_refuses_the_matrices_of_another_adapter():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(Tower(), peft.LoraConfig(r=2, target_modules=["up"]))
    before = snapshot(model)
    with pytest.raises(ul.AttachError, match=r"'base_model.model.blocks.0.up' has an adapter of PEFT \(peft.*lora"):
        ul.attach(model, ul.UniLoRAConfig(r=2, d=4))
    assert_unchanged(model, before)
    plain = model.merge_and_unload()
    assert len(ul.attach(plain, ul.UniLoRAConfig(r=2, d=4)).layers) == 7


def test_attach_refuses_a_replaced_forward():
    """Offloading hooks replace `forward` on the instance: the update would silently have no effect."""
    model = Tower()
    layer = model.blocks[0].up
    layer.forward = layer.forward
    with pytest.raises(ul.AttachError, match=r"'blocks.0.up' .* its forward was replaced on the instance"):
        ul.attach(model, ul.UniLoRAConfig(**adapted()))


def test_attach_refuses_a_plain_integer_weight():
    integer = nn.Sequential(nn.Linear(3, 3))
    integer[0].weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ul.AttachError, match=r"'0' .* expected a floating weight, got torch.int8"):
        ul.attach(integer, ul.UniLoRAConfig(**adapted(target_modules=["0"])))


def test_arguments_of_the_wrong_kind():
    with pytest.raises(ul.AttachError, match=r"attach: model: expected a torch.nn.Module, got dict"):
        ul.attach({}, ul.UniLoRAConfig())
    with pytest.raises(ul.AttachError, match=r"attach: config: expected a UniLoRAConfig, got dict"):
        ul.attach(Tower(), {"r": 4})
    with pytest.raises(ul.AttachError, match=r"Tower has no Uni-LoRA adapter"):
        ul.get_adapter(Tower())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(r=0), r"r: expected an integer in \[1, 2\^31\), got 0"),
        (dict(r=4.0), r"r: expected an integer in \[1, 2\^31\), got 4\.0"),
        (dict(d=-3), r"d: expected an integer in \[1, 2\^31\) or None, got -3"),
        (dict(r=10**5000), "r: expected an integer in .*, got int too large to show"),
        (dict(d=2**31), "d: expected an integer in .*, got 2147483648"),
        (dict(alpha=float("inf")), "alpha: expected a finite number or None, got inf"),
        (dict(alpha=10**400), "alpha: expected a finite number or None"),
        (dict(init_bound=float("inf")), "init_bound: expected a number > 0 or None, got inf"),
        (dict(materialize=1), "materialize: expected True, False or None, got 1"),
        (dict(projection=["uniform"]), r"projection: expected a name, got \['uniform'\]"),
        (dict(target_modules="(" * 5000), "target_modules: expected a list, 'all-linear' or a regular expression"),
        (dict(target_modules="a{99999999999}"), "target_modules: expected a list, 'all-linear' or a regular"),
        (dict(seed=2**63), r"seed: expected an integer in \[0, 2\^63\)"),
        (dict(alpha="8"), "alpha: expected a finite number or None, got '8'"),
        (dict(dropout=1.0), r"dropout: expected a number in \[0, 1\), got 1\.0"),
        (dict(init_bound=0.0), r"init_bound: expected a number > 0 or None, got 0\.0"),
        (dict(projection="unifrom"), r"projection: expected one of \['identity', 'uniform', .*\], got 'unifrom'"),
        (dict(target_modules=[]), "target_modules: expected at least one name"),
        (dict(target_modules=["q", 3]), "target_modules: expected a list of module names"),
        (
            dict(target_modules="(q"),
            r"target_modules: expected a list, 'all-linear' or a regular expression, got '\(q'",
        ),
        (dict(modules_to_save="head"), "modules_to_save: expected a list of module names, got 'head'"),
    ],
)
def test_configuration_refuses(arguments, message):
    with pytest.raises(ul.UniLoRAError, match=message):
        ul.UniLoRAConfig(**arguments)


def test_export_needs_an_attached_adapter(tmp_path):
    model = Tower()
    adapter = ul.attach(model, ul.UniLoRAConfig(**adapted()))
    adapter.detach()
    with pytest.raises(ul.AttachError, match="detached"):
        peft_format.export_lora(adapter, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()
