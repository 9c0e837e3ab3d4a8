"""merge() where the weight is not simply there, and what may happen to weights while they are merged."""

import copy
import io
import warnings

import pytest
import torch
from models import Tower, dense_update, tokens
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import unilora_ext as ul


def config(**changes):
    return ul.UniLoRAConfig(
        **{"r": 3, "d": 64, "target_modules": ["up", "down"], "seed": 11, "init_bound": 0.5, **changes}
    )


def written(model):
    with torch.no_grad():
        model.blocks[1].up.weight.view(-1)[7] += 0.5


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


COMPUTED = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.3),
    "weight_norm hook": lambda layer: nn.utils.weight_norm(layer),
    "spectral_norm hook": lambda layer: nn.utils.spectral_norm(layer),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "own parametrization": lambda layer: parametrize.register_parametrization(layer, "weight", Halved()),
}


@pytest.fixture(params=COMPUTED)
def compute(request):
    def on(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the hooks, which are still there
            COMPUTED[request.param](layer)

    return on


@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_a_computed_weight_acts_and_is_not_merged(compute, when):
    """The layer computes with it; merging, which its next forward would undo, is an error that changes nothing."""
    model, x = Tower().double().eval(), tokens()
    if when == "before attach":
        compute(model.blocks[1].up)
    adapter = ul.attach(model, config())
    if when == "after attach":
        compute(model.blocks[1].up)
    model(x)  # the hooks make the weight in the forward
    plain = Tower().double().eval()
    state = {name: t for name, t in model.state_dict().items() if name in plain.state_dict()}
    plain.load_state_dict({**plain.state_dict(), **state})
    with torch.no_grad():
        plain.blocks[1].up.weight.copy_(model.blocks[1].up.weight)
        updates = dense_update(model, adapter)
        for name, update in updates.items():
            plain.get_submodule(name).weight += update
    torch.testing.assert_close(model(x), plain(x), rtol=1e-9, atol=1e-9)
    model(x).square().sum().backward()
    assert adapter.theta_d.grad.abs().sum() > 0

    y = model(x)
    for call in (adapter.merge, lambda: adapter.detach(merge=True)):
        with pytest.raises(ul.UniLoRAError, match=r"^(merge|detach): .*'blocks.1.up'"):
            call()
        assert not adapter.merged and torch.equal(model(x), y)


def test_a_weight_computed_since_the_merge_is_not_taken_for_the_merged_one(compute):
    model = Tower().eval()
    adapter = ul.attach(model, config())
    adapter.merge()
    compute(model.blocks[1].up)
    x = tokens()
    y = model(x)
    with pytest.raises(ul.UniLoRAError, match=r"unmerge: the weight was written after merge\(\).*'blocks.1.up'"):
        adapter.unmerge()
    assert adapter.merged and all(layer.merged for layer in adapter.layers.values())
    assert torch.equal(model(x), y)


def test_detach_of_a_parametrized_layer():
    """Before attach() the parametrization survives; after, its class stands in the way of the old one."""
    model, x = Tower().eval(), tokens()
    parametrize.register_parametrization(model.blocks[0].up, "weight", Halved())
    y = model(x)
    adapter = ul.attach(model, config())
    assert not torch.equal(model(x), y)
    adapter.detach()
    assert torch.equal(model(x), y) and parametrize.is_parametrized(model.blocks[0].up)

    adapter = ul.attach(model, config())
    parametrize.register_parametrization(model.blocks[1].down, "weight", Halved())
    adapted = model(x)
    with pytest.raises(ul.UniLoRAError, match=r"detach: 'blocks.1.down' was parametrized after attach"):
        adapter.detach()
    assert torch.equal(model(x), adapted) and adapter.vector.enabled
    parametrize.remove_parametrizations(model.blocks[1].down, "weight", leave_parametrized=False)
    adapter.detach()
    assert torch.equal(model(x), y)


def test_pruned_for_good_is_a_plain_weight_again():
    model, x = Tower().double(), tokens()
    adapter = ul.attach(model, config())
    prune.l1_unstructured(model.blocks[1].up, "weight", amount=0.3)
    prune.remove(model.blocks[1].up, "weight")
    y = model(x)
    adapter.merge()
    torch.testing.assert_close(model(x), y, rtol=1e-9, atol=1e-9)
    adapter.unmerge()
    assert torch.equal(model(x), y)


def test_a_weight_without_values_is_not_merged():
    with torch.device("meta"):
        model = Tower()
    adapter = ul.attach(model, config())
    with pytest.raises(ul.UniLoRAError, match=r"merge: the weight has no values here.*'blocks.0.up'"):
        adapter.merge()
    assert not adapter.merged


def test_merge_under_autocast_is_the_merge_without():
    model = Tower()
    adapter = ul.attach(model, config())
    weights = {name: layer.weight.detach().double() for name, layer in adapter.layers.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter.merge()
    for name, update in dense_update(model, adapter).items():
        torch.testing.assert_close(adapter.layers[name].weight.double(), weights[name] + update, rtol=1e-6, atol=1e-6)


# ---- written while merged -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:state_dict")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", ["element", "data", "order", "optimizer"])
def test_what_was_written_while_merged_is_not_lost(write, dtype):
    model, x = Tower().to(dtype), tokens()
    adapter = ul.attach(model, config())
    adapter.merge()
    weight = model.blocks[1].up.weight
    if write == "element":
        with torch.no_grad():
            weight[3, 5] = torch.nextafter(weight[3, 5], weight.new_tensor(9.0)) if dtype != torch.bfloat16 else 9
    elif write == "data":
        weight.data = weight.data * 1.01
    elif write == "order":
        weight.data.copy_(weight.data.flip(0))
    else:
        weight.requires_grad_()
        model(x).float().square().sum().backward()
        torch.optim.SGD([weight], lr=0.1).step()
    now = {name: t.clone() for name, t in model.state_dict().items()}
    message = r"unmerge: the weight was written after merge\(\).* detach\(merge=True\) keeps .*\(layer 'blocks.1.up'\)"
    for call in (adapter.unmerge, adapter.detach):
        with pytest.raises(ul.UniLoRAError, match=message):
            call()
        assert adapter.merged and all(layer.merged for layer in adapter.layers.values())
        assert all(torch.equal(t, now[name]) for name, t in model.state_dict().items())
    adapter.detach(merge=True)
    assert all(torch.equal(t, now[name]) for name, t in model.state_dict().items())


def test_a_written_layer_by_hand():
    layer = ul.UniLoRALinear(6, 8, r=2, d=9, init_bound=1.0)
    layer.merge()
    layer.weight.data.mul_(2)
    kept = layer.weight.detach().clone()
    with pytest.raises(ul.UniLoRAError, match="unmerge: the weight was written"):
        layer.unmerge()
    assert layer.merged and torch.equal(layer.weight, kept)


def test_moves_casts_and_copies_while_merged_are_no_writes():
    model, x = Tower(), tokens()
    adapter = ul.attach(model, config())
    weights = {name: layer.weight.detach().clone() for name, layer in adapter.layers.items()}
    y = model(x)
    adapter.merge()
    for twin in (copy.deepcopy(model), model):
        twin.double().half().to("cpu")
        ul.get_adapter(twin).unmerge()
        for name, layer in ul.get_adapter(twin).layers.items():
            assert torch.equal(layer.weight, weights[name].half())
        torch.testing.assert_close(twin(x).float(), y, rtol=0.05, atol=0.05)
    adapter.merge()
    written(model)
    model.float()  # hides no write
    with pytest.raises(ul.UniLoRAError, match="unmerge: the weight was written"):
        adapter.unmerge()


# ---- state_dict -----------------------------------------------------------------------------------------------------


def merged_state(model):
    with pytest.warns(UserWarning, match=r"state_dict\(\) of a merged model"):
        return model.state_dict()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("carry", [lambda state: state, through_a_file])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_merged_state_dict_is_not_loaded_into_a_model_that_adds_the_update_again(carry, wrapped):
    model, x = Tower(), tokens()
    adapter = ul.attach(model, config())
    twin = copy.deepcopy(model)
    adapter.merge()
    first, second = (nn.ModuleDict({"inner": m}) if wrapped else m for m in (model, twin))
    state = carry(merged_state(first))
    before = {name: t.clone() for name, t in second.state_dict().items()}
    with pytest.raises(ul.UniLoRAError, match=r"'(inner.)?blocks.0.up.weight' was saved while merged"):
        second.load_state_dict(state)
    layer = "inner.blocks.0.up.weight" if wrapped else "embed.weight"
    assert torch.equal(second.state_dict()[layer], before[layer])
    ul.get_adapter(twin).merge()
    second.load_state_dict(state)
    assert torch.equal(twin(x), model(x))
    ul.get_adapter(twin).unmerge()
    adapter.unmerge()
    assert torch.equal(twin(x), model(x))


def test_weights_without_the_update_are_not_loaded_into_a_merged_model():
    model = Tower()
    base = copy.deepcopy(model.state_dict())
    adapter = ul.attach(model, config())
    adapter.merge()
    now = {name: t.clone() for name, t in model.named_parameters()}
    with torch.no_grad():
        base["embed.weight"].add_(1)
    for state in (base, dict(base)):
        with pytest.raises(ul.UniLoRAError, match=r"'blocks.0.up.weight' would replace a weight that has the update"):
            model.load_state_dict(state, strict=False)
        assert all(torch.equal(t, now[name]) for name, t in model.named_parameters())
    adapter.unmerge()
    model.load_state_dict(base, strict=False)
    assert torch.equal(model.embed.weight, base["embed.weight"])


def test_an_unmerged_or_detached_model_says_nothing():
    model = Tower()
    adapter = ul.attach(model, config())
    adapter.merge()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter.unmerge()
        state = model.state_dict()
        model.load_state_dict(state)
        adapter.detach(merge=True)
        plain = model.state_dict()
    assert not model._state_dict_pre_hooks and not model._load_state_dict_pre_hooks
    Tower().load_state_dict(plain)


def test_a_merged_layer_by_hand_is_not_loaded_twice():
    first = ul.UniLoRALinear(6, 8, r=2, d=9, init_bound=1.0)
    second = copy.deepcopy(first)
    first.merge()
    with pytest.raises(ul.UniLoRAError, match="'weight' was saved while merged"):
        second.load_state_dict(first.state_dict())
