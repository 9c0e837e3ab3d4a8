"""Convolutions as targets: against plain PyTorch in float64, and against PEFT's LoRA."""

import copy
import json

import pytest
import torch
from models import assert_unchanged, dense_update, snapshot
from torch import nn

import unilora_ext as ul
from unilora_ext.convolution import UniLoRAConv2d

KINDS = {
    "1d": lambda: (nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (3, 4, 7, 5)),
    "2d, no bias": lambda: (nn.Conv2d(3, 5, 1, bias=False), (2, 3, 4, 4)),
    "3d": lambda: (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
    "dilation": lambda: (nn.Conv2d(4, 6, 3, dilation=(2, 1), padding="same"), (2, 4, 6, 5)),
    "even and same": lambda: (nn.Conv2d(4, 6, 2, padding="same"), (2, 4, 6, 5)),
    "reflect": lambda: (nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 6, 5)),
    "circular": lambda: (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (2, 4, 6)),
    "groups": lambda: (nn.Conv2d(6, 9, 3, groups=3, padding=1), (2, 6, 5, 4)),
    "depth-wise": lambda: (nn.Conv1d(5, 10, 4, groups=5, stride=3), (2, 5, 11)),
    "one sample": lambda: (nn.Conv2d(6, 4, 3, groups=2), (6, 5, 4)),
    "no sample": lambda: (nn.Conv2d(6, 4, 3, groups=2), (0, 6, 5, 4)),
}


def config(**changes):
    return ul.UniLoRAConfig(**{"r": 3, "d": 17, "target_modules": ["0"], "alpha": 2.0, "init_bound": 0.7, **changes})


def made(kind, **changes):
    layer, shape = KINDS[kind]()
    model = nn.Sequential(layer).double()
    return model, ul.attach(model, config(**changes)), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_the_updated_kernels(kind):
    model, adapter, x = made(kind)
    x.requires_grad_()
    layer = model[0]
    y = model(x)
    weights = torch.randn_like(y)
    got = torch.autograd.grad((y * weights).sum(), (x, adapter.theta_d))

    m, n = adapter.vector.layout.shapes[0]
    assert (m, n) == (layer.out_channels, layer.weight[0].numel())
    theta_d = adapter.theta_d.detach().clone().requires_grad_()
    part = adapter.projection.dense() @ theta_d
    kernels = layer.weight + 2 / 3 * (part[: 3 * m].view(m, 3) @ part[3 * m :].view(3, n)).view(layer.weight.shape)
    oracle = layer._conv_forward(x, kernels, layer.bias)
    torch.testing.assert_close(y, oracle, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad((oracle * weights).sum(), (x, theta_d))
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_is_the_forward_and_unmerge_exact(kind):
    model, adapter, x = made(kind)
    y, before = model(x), model[0].weight.clone()
    with adapter.disable():
        plain = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-10, atol=1e-10)
    wanted = before + dense_update(model, adapter)["0"].view(before.shape)
    torch.testing.assert_close(model[0].weight, wanted, rtol=1e-12, atol=1e-12)
    adapter.unmerge()
    assert torch.equal(model[0].weight, before)
    adapter.detach()
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("projection, d", [("fourierft", None), ("loraxs", None), ("vera", None), ("gaussian", 12)])
@pytest.mark.parametrize("kind", ["2d", "groups", "reflect"])
def test_the_family(kind, projection, d):
    options = {"n_frequency": 7} if projection == "fourierft" else {}
    model, adapter, x = made(kind, projection=projection, d=d, init_bound=None, projection_options=options)
    with torch.no_grad():
        adapter.theta_d.copy_(torch.randn_like(adapter.theta_d))
        with adapter.disable():
            plain = model(x)
    y = model(x)
    y.square().sum().backward()
    assert adapter.theta_d.grad.abs().sum() > 0 and (y - plain).abs().max() > 1e-6
    adapter.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["1d", "2d", "2d, no bias", "3d"])
def test_export_is_pefts_lora(kind, tmp_path):
    peft = pytest.importorskip("peft")
    layer, shape = KINDS[kind]()
    model = nn.Sequential(layer).eval()
    plain = copy.deepcopy(model)
    x = torch.randn(shape)
    adapter = ul.attach(model, config())
    adapter.export_lora(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
    theirs = theirs.merge_and_unload()
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, what", [("groups", "groups"), ("dilation", "dilation"), ("reflect", "padding_mode")])
def test_what_pefts_lora_cannot_say_is_not_exported(kind, what, tmp_path):
    _, adapter, _ = made(kind)
    with pytest.raises(ul.UniLoRAError, match=rf"expected {what} = .*got .*\(layer '0'\)"):
        adapter.export_lora(tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_dropout_acts_on_the_input_of_the_update():
    torch.manual_seed(0)
    model, adapter, x = made("2d, no bias", dropout=0.5)
    with torch.no_grad():
        y = torch.stack([model(x) for _ in range(3000)]).mean(0)
        torch.testing.assert_close(y, model.eval()(x), rtol=0.2, atol=0.3)
    assert adapter.config.dropout == 0.5


def test_save_and_load(tmp_path):
    model, adapter, x = made("groups")
    fresh = copy.deepcopy(model)
    ul.get_adapter(fresh).detach()
    adapter.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter.json").read_text())["modules"] == [["0", 9, 18]]
    ul.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("kind", ["2d", "groups", "reflect"])
def test_compiles_as_one_graph(kind):
    torch.compiler.reset()  # the graphs of other tests count
    model, adapter, x = made(kind)
    y = model(x)
    (wanted,) = torch.autograd.grad(y.square().sum(), adapter.theta_d)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), adapter.theta_d)[0], wanted)


@pytest.mark.parametrize("kind", ["2d", "groups", "reflect"])
def test_exported_for_any_number_of_samples(kind):
    model, _, x = made(kind)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model.eval(), (x,), dynamic_shapes=({0: batch},))
    traced = torch.jit.trace(model, (x,))
    more = torch.cat([x, x.flip(0), x])
    torch.testing.assert_close(program.module()(more), model(more))
    torch.testing.assert_close(traced(more), model(more))


def test_autocast_and_channels_last():
    layer, shape = KINDS["2d"]()
    model = nn.Sequential(layer)
    ul.attach(model, config())
    x = torch.randn(shape)
    y = model(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), y)
    with torch.autocast("cpu", torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=0.05, atol=0.1)
    copied = copy.deepcopy(model).bfloat16()
    assert type(copied[0]) is UniLoRAConv2d and copied(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [lambda: nn.ConvTranspose2d(3, 3, 2), lambda: type("Own", (nn.Conv2d,), {})(3, 3, 2)])
def test_other_kinds_are_refused(make):
    model = nn.Sequential(make(), nn.Conv2d(3, 3, 1))
    before = snapshot(model)
    with pytest.raises(ul.AttachError, match=r"'0' \(\w+\) cannot be adapted: expected a torch.nn.Linear, Embedding"):
        ul.attach(model, config())
    assert_unchanged(model, before)


def test_all_linear_is_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Embedding(3, 4), nn.Linear(5, 5))
    assert list(ul.attach(model, config(target_modules="all-linear")).layers) == ["2"]
