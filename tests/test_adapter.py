"""attach, what it leaves alone, merge, disable, detach; and the right targets."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from models import Tower, assert_unchanged, dense_update, snapshot, tokens
from torch import nn

import unilora_ext as ul


def config(**changes):
    return ul.UniLoRAConfig(**{"r": 3, "d": 64, "target_modules": ["up", "down"], "seed": 11, **changes})


@pytest.mark.parametrize("projection", ["uniform", "balanced"])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_forward_is_the_dense_update(projection, alpha):
    model, x = Tower().double(), tokens()
    plain = copy.deepcopy(model)
    adapter = ul.attach(model, config(projection=projection, alpha=alpha, init_bound=0.5))
    assert adapter.theta_d.dtype == torch.float64 and adapter.theta_d.abs().max() <= 0.5
    for name, update in dense_update(model, adapter).items():
        plain.get_submodule(name).weight.data += update
    assert adapter.config.scaling == (1.0 if alpha is None else alpha / 3)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projection", ["uniform", "balanced"])
def test_a_computed_index_changes_nothing(projection):
    """materialize=False: the same outputs and gradients to the bit, nothing kept."""
    stored, x = Tower(), tokens()
    computed = copy.deepcopy(stored)
    adapters = [
        ul.attach(model, config(projection=projection, materialize=m))
        for model, m in ((stored, True), (computed, False))
    ]
    with torch.no_grad():
        adapters[1].theta_d.copy_(adapters[0].theta_d)
    for model in (stored, computed):
        model(x).square().sum().backward()
    assert torch.equal(stored(x), computed(x)) and torch.equal(adapters[0].theta_d.grad, adapters[1].theta_d.grad)
    assert adapters[1].projection.restrict("cpu").nbytes == 0


def test_gradient_is_the_projected_dense_gradient():
    model, x = Tower().double(), tokens()
    plain = copy.deepcopy(model)
    adapter = ul.attach(model, config(init_bound=0.5))
    model(x).square().sum().backward()

    theta_d = adapter.theta_d.detach().clone().requires_grad_()
    theta_D, start, updated = adapter.projection.dense() @ theta_d, 0, {}
    for name, layer in adapter.layers.items():
        m, n = layer.weight.shape
        B, A = theta_D[start : start + m * 3].view(m, 3), theta_D[start + m * 3 : start + (m + n) * 3].view(3, n)
        start += (m + n) * 3
        updated[name + ".weight"] = plain.get_parameter(name + ".weight").detach() + B @ A
    torch.func.functional_call(plain, updated, (x,)).square().sum().backward()
    torch.testing.assert_close(adapter.theta_d.grad, theta_d.grad, rtol=1e-10, atol=1e-12)


def test_what_attach_changes_and_what_not():
    model = Tower()
    before = snapshot(model)
    adapter = ul.attach(model, config(modules_to_save=["head"]))
    assert set(model.state_dict()) == {*before["state"], "unilora.theta_d"}
    assert {name: id(m) for name, m in model.named_modules() if name != "unilora"} == before["identities"]
    assert isinstance(model.blocks[0].up, ul.UniLoRALinear) and isinstance(model.blocks[0].up, nn.Linear)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"unilora.theta_d", "head.weight", "head.bias"}
    assert sum(p is adapter.theta_d for p in model.parameters()) == 1
    assert "UniLoRALinear(in_features=12, out_features=20, bias=True, r=3, scaling=1)" in repr(model)


def test_detach_restores_the_model_exactly():
    model = Tower()
    model.embed.weight.requires_grad_(False)
    before, x = snapshot(model), tokens()
    y = model(x)
    adapter = ul.attach(model, config(modules_to_save=["head"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), y)
    adapter.merge()
    assert adapter.detach() is model
    assert_unchanged(model, before)
    assert torch.equal(model(x), y)
    with pytest.raises(ul.AttachError, match="detached"):
        _ = adapter.theta_d


def test_disable_gives_the_model_before_attach():
    model, x = Tower(), tokens()
    y = model(x)
    adapter = ul.attach(model, config(modules_to_save=["head"]))
    with torch.no_grad():
        model.head.weight += 1
    adapted = model(x)
    with adapter.disable() as same:
        assert same is adapter and torch.equal(model(x), y)
        trained = adapter.modules_to_save()["head.weight"]
    assert torch.equal(model(x), adapted) and torch.equal(trained, model.head.weight)
    adapter.disable()
    adapter.disable()
    assert torch.equal(model(x), y)
    adapter.enable()
    assert torch.equal(model(x), adapted)


def test_disable_nests():
    """What an outer block switched off stays off when an inner one ends, by an exception too."""
    model, x = Tower(), tokens()
    y = model(x)
    adapter = ul.attach(model, config(modules_to_save=["head"], init_bound=0.5))
    with torch.no_grad():
        model.head.weight += 1
    adapted = model(x)
    with adapter.disable():
        with adapter.disable():
            assert torch.equal(model(x), y)
        assert torch.equal(model(x), y)
        with pytest.raises(KeyError), adapter.disable():
            raise KeyError
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), adapted)
    adapter.disable()
    with adapter.disable():
        pass
    assert torch.equal(model(x), y)
    adapter.enable()
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_merge_and_unmerge(dtype):
    model, x = Tower().to(dtype), tokens()
    adapter = ul.attach(model, config(init_bound=0.5))
    weights = {name: layer.weight.detach().clone() for name, layer in adapter.layers.items()}
    updates = dense_update(model, adapter)
    adapted = model(x)
    adapter.merge()
    for name, layer in adapter.layers.items():
        expected = (weights[name].double() + updates[name]).to(dtype)  # rounded once
        torch.testing.assert_close(layer.weight.detach(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    torch.testing.assert_close(
        model(x),
        adapted,
        rtol=0.05 if dtype == torch.bfloat16 else 1e-4,
        atol=0.05 if dtype == torch.bfloat16 else 1e-5,
    )
    assert adapter.merged and not adapter.theta_d.requires_grad
    adapter.unmerge()
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in adapter.layers.items())
    assert torch.equal(model(x), adapted) and adapter.theta_d.requires_grad


def test_detach_merged_keeps_the_update():
    model, x = Tower(), tokens()
    before = snapshot(model)
    adapter = ul.attach(model, config(modules_to_save=["head"], init_bound=0.5))
    with torch.no_grad():
        model.head.bias += 1
    adapted = model(x)
    adapter.detach(merge=True)
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    assert snapshot(model)["classes"] == before["classes"] and snapshot(model)["flags"] == before["flags"]


def test_merge_that_cannot_be_finite_changes_nothing():
    model = Tower().half()
    adapter = ul.attach(model, config(init_bound=0.02))
    with torch.no_grad():
        adapter.theta_d.fill_(1e4)
    weights = {name: layer.weight.clone() for name, layer in adapter.layers.items()}
    with pytest.raises(ul.UniLoRAError, match=r"not finite in torch.float16 \(layer 'blocks.0.up'\)"):
        adapter.merge()
    assert not adapter.merged
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in adapter.layers.items())


def test_merge_refuses_a_shared_weight():
    model = Tower(width=12)
    model.blocks[1].down.weight = model.blocks[0].down.weight = nn.Parameter(torch.randn(12, 20))
    model.blocks[1].up = nn.Linear(12, 20)
    adapter = ul.attach(model, config())
    with pytest.raises(
        ul.UniLoRAError, match=r"'blocks.0.down.weight' and 'blocks.1.down.weight': merging would change both"
    ):
        adapter.merge()


def test_wrong_order_of_calls():
    model = Tower()
    adapter = ul.attach(model, config())
    with pytest.raises(ul.UniLoRAError, match="unmerge: the adapter is not merged"):
        adapter.unmerge()
    adapter.disable()
    with pytest.raises(ul.UniLoRAError, match=r"merge: the adapter is disabled; call enable\(\) first"):
        adapter.merge()
    adapter.enable()
    adapter.merge()
    with pytest.raises(ul.UniLoRAError, match="merge: the adapter is merged already"):
        adapter.merge()
    with pytest.raises(ul.UniLoRAError, match=r"disable: .* call unmerge\(\) first"):
        adapter.disable()


# ---- copies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("used", [False, True])
def test_copies_are_whole_and_separate(copier, used):
    model, x = Tower(), tokens()
    before = snapshot(model)
    ul.attach(model, config(modules_to_save=["head"]))
    if used:
        model(x).sum().backward()
    y = model(x)
    twin = copier(model)
    adapter = ul.get_adapter(twin)
    assert torch.equal(twin(x), y)
    with torch.no_grad():
        adapter.theta_d.add_(1)
    assert not torch.equal(twin(x), y) and torch.equal(model(x), y)
    adapter.detach()
    now = snapshot(twin)
    assert all(torch.equal(now["state"][k], v) for k, v in before["state"].items()) and now["hooks"] == before["hooks"]
    assert torch.equal(model(x), y)


def test_an_adapted_model_is_freed_at_once():
    """No reference cycle: memory does not wait for the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        model = Tower()
        ul.attach(model, config())
        model(tokens())
        watch = weakref.ref(model)
        del model
        assert watch() is None
    finally:
        gc.enable()


def test_state_dict_round_trip():
    first, x = Tower(), tokens()
    ul.attach(first, config())
    second = Tower()
    ul.attach(second, config())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


# ---- targets --------------------------------------------------------------------------------------------------------


def names(model, **changes):
    return list(ul.attach(model, config(**{"d": 16, **changes})).layers)


def test_targets_by_ending_regular_expression_and_all_linear():
    blocks = [f"blocks.{i}.{part}" for i in range(3) for part in ("up", "down")]
    assert names(Tower(), target_modules=["down", "up"]) == blocks
    assert names(Tower(), target_modules=["blocks.1.up", "head"]) == ["blocks.1.up", "head"]
    assert names(Tower(), target_modules=r"blocks\.[02]\.up") == ["blocks.0.up", "blocks.2.up"]
    assert names(Tower(), target_modules="all-linear") == [*blocks, "head"]
    assert names(Tower(), target_modules="all-linear", modules_to_save=["head"]) == blocks
    assert names(Tower(), target_modules=["up"]) == [b for b in blocks if b.endswith("up")]


def test_all_linear_leaves_the_output_head_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=30)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**small))
    assert not any("classifier" in name for name in names(bert, target_modules="all-linear"))
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small))
    found = names(llama, target_modules="all-linear")
    assert len(found) == 7 and "lm_head" not in found


def test_conv1d_of_gpt2():
    transformers = pytest.importorskip("transformers")
    model = (
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
        )
        .double()
        .eval()
    )
    plain, x = copy.deepcopy(model), torch.randint(0, 30, (2, 9))
    adapter = ul.attach(model, config(target_modules=["c_attn", "c_fc"], d=50, init_bound=0.5))
    assert adapter.projection.D == 2 * 3 * ((16 + 48) + (16 + 64))
    for name, update in dense_update(model, adapter).items():
        plain.get_submodule(name).weight.data += update.T
    torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=1e-10, atol=1e-10)
    model(x).logits.sum().backward()
    assert adapter.theta_d.grad.abs().sum() > 0
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    adapter.merge()
    torch.testing.assert_close(model(x).logits, plain(x).logits, rtol=1e-10, atol=1e-10)
    assert "UniLoRAConv1D(in_features=16, out_features=48, r=3" in repr(model)
    adapter.unmerge()
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(twin(x).logits, model(x).logits)


def test_transformer_encoder_layer_in_evaluation():
    """torch.nn.TransformerEncoderLayer reads linear1.weight in a fused evaluation path: the update must still act."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(3, 5, 16)
    adapter = ul.attach(model, config(target_modules=["linear1", "linear2"], init_bound=1.0))
    with torch.no_grad():
        adapted = model(x)
        with adapter.disable():
            base = model(x)
    assert (adapted - base).abs().max() > 1e-3
    torch.testing.assert_close(adapted, model(x.requires_grad_()).detach(), rtol=1e-4, atol=1e-4)


def test_default_d_is_the_papers_ratio_but_in_small_models(caplog):
    adapter = ul.attach(Tower(width=64, hidden=200), config(d=None))
    D, d = adapter.projection.D, adapter.projection.d
    assert 4 <= D / d <= 5 and d == ul.default_d(D) == adapter.config.d
    assert f"taking d = {d} for D = {D}" in caplog.text
    for D in (73_728, 147_456, 393_216, 9_994_240):
        assert 17 <= D / ul.default_d(D) <= 19 and ul.default_d(D) % 1024 == 0
    assert [ul.default_d(D) for D in (16_384, 36_864, 69_632)] == [4096] * 3
    for D in range(1, 80_000, 7):
        d = ul.default_d(D)
        assert 1 <= d <= D and (d >= 4096 or 4 <= D / d <= 5 or D < 20)


def test_modules_to_save_are_trained_and_nothing_inside_is_adapted():
    model = Tower()
    ul.attach(model, config(target_modules="all-linear", modules_to_save=["blocks.2"]))
    assert isinstance(model.blocks[0].up, ul.UniLoRALinear) and type(model.blocks[2].up) is nn.Linear
    assert model.blocks[2].up.weight.requires_grad and not model.blocks[0].up.weight.requires_grad


def test_attach_to_a_meta_model_and_to_large_shapes():
    with torch.device("meta"):
        model = Tower(width=1024, hidden=4096)
    adapter = ul.attach(model, config(d=4096))
    assert adapter.theta_d.device.type == "cpu" and torch.isfinite(adapter.theta_d).all()
    y = model(torch.randint(0, 50, (2, 3), device="meta"))
    assert y.is_meta and y.shape == (2, 5)
