"""The family's projections against PEFT's own modules, given the same numbers."""

import copy

import pytest
import torch
from models import Block, Tower, tokens

import unilora_ext as ul

peft = pytest.importorskip("peft")

TARGETS = ["up", "down"]
SETTINGS = {
    "identity": (peft.LoraConfig, {"lora_alpha": 3}, {}),
    "vera": (peft.VeraConfig, {}, {}),
    "vblora": (
        peft.VBLoRAConfig,
        {"num_vectors": 9, "vector_length": 4, "topk": 3, "save_only_topk_weights": True},
        {"num_vectors": 9, "topk": 3, "save_only_topk": True},
    ),
    "fourierft": (peft.FourierFTConfig, {"n_frequency": 7, "scaling": 150.0}, {"n_frequency": 7}),
    "tinylora": (peft.TinyLoraConfig, {"u": 5, "weight_tying": 0.5}, {"u": 5, "groups": 3}),
}
each = pytest.mark.parametrize("name", list(SETTINGS))


def pair(name):
    """(our adapter, PEFT's model) around equal weights; ours has random numbers."""
    base = Tower(12)
    base.blocks = torch.nn.ModuleList(Block(12, hidden) for hidden in (20, 24, 16))
    kind, theirs, options = SETTINGS[name]
    config = ul.UniLoRAConfig(r=3, target_modules=TARGETS, projection=name, seed=7, projection_options=options)
    adapter = ul.attach(copy.deepcopy(base), config)
    with torch.no_grad():
        for tensor in adapter.trained.values():
            tensor.normal_(std=0.5)
    rank = {} if name == "fourierft" else {"r": 3}
    return adapter, peft.get_peft_model(base, kind(target_modules=TARGETS, **rank, **theirs))


def modules(adapter, model):
    """(number, (m, n), our layer, PEFT's) of each."""
    for number, (name, layer) in enumerate(adapter.layers.items()):
        yield number, tuple(layer.weight.shape), layer, model.base_model.model.get_submodule(name)


def give(target, value):
    with torch.no_grad():
        target.copy_(torch.as_tensor(value).reshape(target.shape))


def hand_over(name, adapter, model):
    """Our numbers into PEFT's tensors."""
    P, theta_d, layout = adapter.projection, adapter.theta_d.detach(), adapter.vector.layout
    place = first = 0
    for number, (m, n), layer, theirs in modules(adapter, model):
        if name == "identity":
            A, B = layer.lora_factors()
            give(theirs.lora_A["default"].weight, A)
            give(theirs.lora_B["default"].weight, B)
        elif name == "vera":
            give(theirs.vera_lambda_d["default"], theta_d[place : place + 3])
            give(theirs.vera_lambda_b["default"], theta_d[place + 3 : place + 3 + m])
            place += 3 + m
            for target, value in zip((theirs.vera_A, theirs.vera_B), P.matrices(), strict=True):
                give(target["default"], value)
        elif name == "vblora":
            give(theirs.vblora_vector_bank["default"], theta_d)
            logits = adapter.trained["logits"].detach()
            for target in (theirs.vblora_logits_B["default"], theirs.vblora_logits_A["default"]):
                count = target.numel() // target.shape[-1]
                give(target, logits[first : first + count])
                first += count
        elif name == "fourierft":
            places = P.places(number)
            theirs.indices["default"] = torch.stack([places // n, places % n])
            give(theirs.fourierft_spectrum["default"], theta_d[7 * number : 7 * number + 7])
        else:
            left, _, A = P.block_operands(number, torch.device("cpu"), torch.float32)
            give(theirs.tinylora_B["default"], left)
            give(theirs.tinylora_A["default"], A)
            give(theirs.tinylora_P["default"], P.directions(number))
            key = theirs._tinylora_v_key["default"]
            give(theirs.tinylora_v["default"][key], theta_d.view(3, 5)[int(key)])
    assert len(layout) == number + 1


@each
def test_same_updates_outputs_and_gradients(name):
    adapter, model = pair(name)
    hand_over(name, adapter, model)
    for _, _, layer, theirs in modules(adapter, model):
        torch.testing.assert_close(layer.delta_weight(), theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-5)
    x = tokens()
    ours, other = adapter.model(x), model(x)
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    ours.square().sum().backward()
    other.square().sum().backward()
    # theta_d has each of PEFT's parameters once, in another order
    trained = [p for p in model.parameters() if p.requires_grad]
    got, expected = (torch.cat([t.grad.flatten() for t in ts]) for ts in (adapter.trained.values(), trained))
    assert len(got) == len(expected)
    torch.testing.assert_close(got.sort().values, expected.sort().values, rtol=1e-3, atol=1e-3)


def test_small_form_of_vblora_is_pefts(tmp_path):
    adapter, model = pair("vblora")
    hand_over("vblora", adapter, model)
    theirs = peft.get_peft_model_state_dict(model)
    ours = adapter.projection.stored({"logits": adapter.trained["logits"].detach()})
    for kind in ("indices", "weights"):
        parts = []
        for name in adapter.layers:
            for part in "BA":
                tensor = theirs[f"base_model.model.{name}.vblora_logits_{part}_topk_{kind}"]
                parts.append(tensor.reshape(-1, tensor.shape[-1]))
        torch.testing.assert_close(ours[f"topk_{kind}"], torch.cat(parts))

    plain = copy.deepcopy(adapter.model)
    ul.get_adapter(plain).detach()
    adapter.save(tmp_path / "ours")
    again = ul.load(plain, tmp_path / "ours")
    x = tokens()
    torch.testing.assert_close(again.model(x), adapter.model(x), rtol=1e-4, atol=1e-5)
    logits = again.trained["logits"]
    assert ((logits == -torch.inf).sum(-1) == 9 - 3).all()
    optimizer = torch.optim.AdamW(again.trained.values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        again.model(x).square().sum().backward()
        optimizer.step()
    assert not logits.isnan().any() and ((logits == -torch.inf).sum(-1) == 9 - 3).all()
