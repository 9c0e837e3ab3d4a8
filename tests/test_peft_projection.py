"""projection="peft": the same matrices, outputs and gradients as PEFT's own UniLora."""

import copy
import pickle

import pytest
import torch
from models import Tower, dense_update, tokens

import unilora_ext as ul

peft = pytest.importorskip("peft")

CASES = [(1, 7, 0), (3, 64, 11), (4, 500, 42), (2, 396, 2**40 + 1), (5, 1, 3)]
"""(r, d, seed); D = 198 r for the tower."""


def random_integer(low, high):
    return int(torch.randint(low, high, ()))


def peft_tower(model, r, d, seed, **changes):
    return peft.get_peft_model(
        model,
        peft.UniLoraConfig(
            r=r, theta_d_length=d, proj_seed=seed, target_modules=["up", "down"], init_theta_d_bound=0.5, **changes
        ),
    )


def peft_index(model):
    """The index as PEFT keeps it, in the order in which PEFT deals it out."""
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.unilora.UniLoraLayer)]
    return torch.cat(
        [t["default"].flatten() for layer in layers for t in (layer.unilora_indices_A, layer.unilora_indices_B)]
    )


def same_adapter(model, theirs, r, d, seed, **changes):
    """Our adapter with theta_d of a PEFT model."""
    config = ul.UniLoRAConfig(r=r, d=d, seed=seed, target_modules=["up", "down"], projection="peft", **changes)
    adapter = ul.attach(model, config)
    with torch.no_grad():
        adapter.theta_d.copy_(theirs.base_model.unilora_theta_d["default"])
    return adapter


def test_index_is_pefts():
    generate = peft.tuners.unilora.UniLoraModel.generate_index
    sizes = [(1, 1), (10, 3), (9, 3), (3, 10), (393_216, 23_040)]
    sizes += [(random_integer(1, 5000), random_integer(1, 3000)) for _ in range(20)]
    for D, d in sizes:
        seed = random_integer(0, 2**40)
        index = ul.PeftProjection(D, d, seed=seed).index
        assert index.dtype == torch.int32
        assert torch.equal(index.long(), generate(D, d, seed)), (D, d, seed)


@pytest.mark.parametrize(
    ("D", "d", "seed", "expected"),
    [
        (10, 3, 0, [1, 2, 0, 2, 1, 1, 2, 0, 2, 0]),
        (393_216, 23_040, 42, [616, 12067, 13307, 5417, 22054, 15054, 12794, 19804]),
    ],
)
def test_golden_values(D, d, seed, expected):
    """Part of the adapter format: a NumPy whose generator differs must not go unnoticed."""
    assert ul.PeftProjection(D, d, seed=seed).index[: len(expected)].tolist() == expected


def test_ranges_counts_and_copies():
    P = ul.PeftProjection(1003, 60, seed=5)
    assert torch.equal(torch.cat([P.columns(0, 17), P.columns(17, 17), P.columns(17, 1003)]), P.index)
    assert torch.equal(P.counts, torch.bincount(P.index, minlength=60).int())
    assert P.restrict("cpu").nbytes == 4 * 1003 and P.columns(3, 9, device="meta").shape == (6,)
    assert torch.equal(pickle.loads(pickle.dumps(P)).index, P.index)
    with pytest.raises(ul.UniLoRAError, match="rows: expected 0 <= start <= stop <= 1003, got 4, 1004"):
        P.columns(4, 1004)
    with pytest.raises(ul.UniLoRAError, match="materialize: expected True or None"):
        ul.PeftProjection(10, 3, materialize=False)


@pytest.mark.parametrize(("r", "d", "seed"), CASES)
def test_outputs_and_gradients_are_pefts(r, d, seed):
    model, x = Tower(), tokens()
    theirs = peft_tower(copy.deepcopy(model), r, d, seed)
    adapter = same_adapter(model, theirs, r, d, seed)
    assert torch.equal(peft_index(theirs), adapter.projection.index.long())
    for name, layer in adapter.layers.items():
        expected = theirs.base_model.model.get_submodule(name)._get_lora_matrices("default")
        torch.testing.assert_close(layer.lora_factors(), expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-5)
    weight = torch.randn(6, 5)
    for y in (model(x), theirs(x)):
        (y * weight).sum().backward()
    gradient = theirs.base_model.unilora_theta_d["default"].grad
    torch.testing.assert_close(adapter.theta_d.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_conv1d_is_pefts():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=18, n_layer=2, n_head=2, vocab_size=30, n_positions=16)
    model = transformers.GPT2LMHeadModel(config).eval()
    lora = peft.UniLoraConfig(
        r=3, theta_d_length=77, proj_seed=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), lora).eval()
    torch.nn.init.normal_(theirs.base_model.unilora_theta_d["default"])
    adapter = ul.attach(
        model, ul.UniLoRAConfig(r=3, d=77, seed=8, target_modules=["c_attn", "c_fc"], projection="peft")
    )
    with torch.no_grad():
        adapter.theta_d.copy_(theirs.base_model.unilora_theta_d["default"])
    x = torch.randint(0, 30, (2, 9))
    torch.testing.assert_close(model(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-4)


def test_a_training_run_is_pefts():
    model, data = Tower(), [tokens() for _ in range(5)]
    theirs = peft_tower(copy.deepcopy(model), 4, 90, 2, modules_to_save=["head"])
    adapter = same_adapter(model, theirs, 4, 90, 2, modules_to_save=["head"])
    for each in (model, theirs):
        optimizer = torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=0.01)
        for x in data:
            optimizer.zero_grad()
            each(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(adapter.theta_d, theirs.base_model.unilora_theta_d["default"], rtol=1e-3, atol=1e-4)


def test_save_load_merge_detach_export(tmp_path):
    model, x = Tower(), tokens()
    plain, before = copy.deepcopy(model), model(x)
    config = ul.UniLoRAConfig(r=3, d=64, target_modules=["up", "down"], projection="peft", seed=9, init_bound=0.5)
    adapter = ul.attach(model, config)
    adapted = model(x)
    adapter.save(tmp_path / "own")
    record = ul.read(tmp_path / "own").record
    assert record["projection"] == {"name": "peft", "version": 1, "seed": 9, "options": {}}
    assert record["layout"] == "per module in named_modules order: vec_row(A [r, n]), vec_row(B [m, r])"
    loaded = copy.deepcopy(plain)
    ul.load(loaded, tmp_path / "own")
    assert torch.equal(loaded(x), adapted)

    adapter.export_lora(tmp_path / "lora")
    exported = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora")
    torch.testing.assert_close(exported(x), adapted, rtol=1e-4, atol=1e-5)

    for name, update in dense_update(model, adapter).items():
        plain.get_submodule(name).weight.data += update.float()
    torch.testing.assert_close(plain(x), adapted, rtol=1e-4, atol=1e-5)
    adapter.merge()
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
    adapter.detach()
    assert torch.equal(model(x), before)


def test_a_layer_with_its_own_vector():
    layer = ul.UniLoRALinear(5, 8, r=2, d=13, projection="peft", seed=4, init_bound=1.0)
    theta_D = layer.projection.dense().float() @ layer.theta_d.detach()
    A, B = layer.lora_factors()
    torch.testing.assert_close(A, theta_D[:10].view(2, 5))
    torch.testing.assert_close(B, theta_D[10:].view(8, 2))
