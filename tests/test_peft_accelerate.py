"""integrations.peft.accelerate: PEFT's UniLora models compute, save and load as before, on our operators."""

import copy
import io
from functools import partial

import pytest
import torch
from models import Tower, snapshot, tokens
from torch import nn

import unilora_ext as ul

peft = pytest.importorskip("peft")
accelerate, accelerated_layers = ul.integrations.peft.accelerate, ul.integrations.peft.accelerated_layers


def config(**changes):
    given = {"r": 3, "theta_d_length": 64, "target_modules": ["up", "down"], "proj_seed": 11, "init_theta_d_bound": 0.5}
    return peft.UniLoraConfig(**{**given, **changes})


def pair(model=None, **changes):
    """The same PEFT model twice: plain, and accelerated."""
    plain = peft.get_peft_model(model or Tower(), config(**changes))
    return plain, accelerate(copy.deepcopy(plain))


def theta_d(model, name="default"):
    return model.base_model.unilora_theta_d[name]


def fused(model, monkeypatch, x):
    """(y, how many layers ran as one fused operator)."""
    from unilora_ext import functional

    calls, run = [], functional.lora_linear
    monkeypatch.setattr(functional, "lora_linear", lambda *args: calls.append(0) or run(*args))
    y = model(x)
    monkeypatch.undo()
    return y, len(calls)


def assert_same(plain, fast, x, rtol=1e-4, atol=1e-5):
    """Outputs and gradients of every trainable parameter."""
    weight = torch.randn_like(plain(x), dtype=torch.float32)
    for model in (plain, fast):
        model.zero_grad()
        (model(x).float() * weight).sum().backward()
    torch.testing.assert_close(fast(x), plain(x), rtol=rtol, atol=atol)
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in fast.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys() and ours
    for name, expected in theirs.items():
        if expected is None:
            assert ours[name] is None, name
        else:
            scale = float(expected.abs().max())
            torch.testing.assert_close(ours[name], expected, rtol=rtol, atol=10 * atol * max(scale, 1e-3), msg=name)


@pytest.mark.parametrize(("r", "d", "seed"), [(1, 5, 0), (3, 64, 7), (4, 900, 2**33)])
def test_outputs_and_gradients(r, d, seed, monkeypatch):
    plain, fast = pair(r=r, theta_d_length=d, proj_seed=seed, modules_to_save=["head"])
    x = tokens()
    assert len(accelerated_layers(fast)) == 6 and not accelerated_layers(plain)
    assert fused(fast, monkeypatch, x)[1] == 6
    assert_same(plain, fast, x)


def test_one_projection_for_all_layers(monkeypatch):

    _, fast = pair()
    from unilora_ext.projections import Restriction

    calls, project = [], Restriction.matrices
    monkeypatch.setattr(Restriction, "matrices", lambda *args: calls.append(0) or project(*args))
    fast(tokens()).sum().backward()
    assert len(calls) == 1
    fast.base_model.model.blocks[0].up(torch.randn(2, 12))  # a layer called alone projects its own rows
    assert len(calls) == 2


def test_names_buffers_and_state_dict_stay():
    for save_indices in (False, True):
        plain, fast = pair(save_indices=save_indices)
        assert list(fast.state_dict()) == list(plain.state_dict())
        for name, tensor in plain.state_dict().items():
            torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=1e-6, atol=0)
        buffers = dict(fast.named_buffers())
        assert len(buffers) == 4 * 6
        for name, tensor in plain.named_buffers():
            torch.testing.assert_close(buffers[name], tensor, rtol=1e-6, atol=0)
        assert [n for n, _ in fast.named_modules()] == [n for n, _ in plain.named_modules()]
        flags = {n: p.requires_grad for n, p in plain.named_parameters()}
        assert {n: p.requires_grad for n, p in fast.named_parameters()} == flags


def test_nothing_is_stored_an_element():
    _, fast = pair()
    D = 3 * sum(m.in_features + m.out_features for m in accelerated_layers(fast).values())
    file = io.BytesIO()
    torch.save(fast, file)
    plain = io.BytesIO()
    torch.save(pair()[0], plain)
    assert file.tell() < plain.tell()
    for layer in accelerated_layers(fast).values():
        for buffers in (layer.unilora_indices_A, layer.unilora_indices_B, layer.unilora_scales_A):
            assert not buffers._buffers.stored
    fast(tokens())
    projection = fast.base_model._vectors.by_adapter["default"].projection
    assert projection.D == D and projection.restrict("cpu").nbytes == 4 * D
    assert projection.restrict("cpu").index.data_ptr() == projection._index.data_ptr()


@pytest.mark.parametrize("copied", ["deepcopy", "torch.save"])
def test_copies_are_independent(copied):
    plain, fast = pair()
    x = tokens()
    fast(x)
    if copied == "deepcopy":
        copy_ = copy.deepcopy(fast)
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        copy_ = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert accelerate(copy_) is copy_ and len(accelerated_layers(copy_)) == 6
    with torch.no_grad():
        theta_d(copy_).mul_(2)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        theta_d(plain).mul_(2)
    assert_same(plain, copy_, x)


def test_training_is_pefts():
    plain, fast = pair(modules_to_save=["head"])
    data = [tokens() for _ in range(5)]
    for model in (plain, fast):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        for x in data:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(theta_d(fast), theta_d(plain), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("checkpointing", ["reentrant", "non-reentrant"])
def test_activation_checkpointing(checkpointing):
    plain, fast = pair()
    for model in (plain, fast):
        model.base_model.model.checkpointing = checkpointing
    assert_same(plain, fast, tokens())


def test_autocast_keeps_pefts_dtype(monkeypatch):
    plain, fast = pair()
    x = torch.randn(3, 12)
    layers = [model.base_model.model.blocks[0].up for model in (plain, fast)]
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = (layer(x) for layer in layers)
        assert fused(fast, monkeypatch, tokens())[1] == 6
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_of_the_base(dtype, monkeypatch):
    plain, fast = pair(Tower().to(dtype))
    x = tokens()
    assert theta_d(fast).dtype == theta_d(plain).dtype
    y, count = fused(fast, monkeypatch, x)
    assert count == 6 and y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(y, plain(x), rtol=tolerance, atol=tolerance)


def test_dropout(monkeypatch):
    plain, fast = pair(unilora_dropout=0.3)
    x = tokens()
    assert fused(fast, monkeypatch, x)[1] == 0  # PEFT's own code draws the mask
    outputs = []
    for model in (plain, fast):
        torch.manual_seed(5)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    plain.eval(), fast.eval()
    assert fused(fast, monkeypatch, x)[1] == 6
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-5)


def test_several_adapters(monkeypatch):
    plain, fast = pair()
    x = tokens()
    other = config(r=2, proj_seed=3, theta_d_length=40, target_modules=["up", "head"])
    for model in (plain, fast):
        model.add_adapter("other", copy.deepcopy(other))
    with torch.no_grad():
        theta_d(plain, "other").copy_(theta_d(fast, "other"))
    assert len(accelerated_layers(fast)) == 7  # the head is new
    assert_same(plain, fast, x)
    for model in (plain, fast):
        model.set_adapter("other")
    assert fused(fast, monkeypatch, x)[1] == 4
    assert_same(plain, fast, x)
    for model in (plain, fast):
        model.base_model.set_adapter(["default", "other"])
    assert_same(plain, fast, x)
    for model in (plain, fast):
        model.delete_adapter("default")
    assert fast.active_adapters == plain.active_adapters == ["other"]
    assert_same(plain, fast, x)
    for model in (plain, fast):
        model.add_adapter("default", config(proj_seed=4))
        model.set_adapter("default")
    with torch.no_grad():
        theta_d(plain).copy_(theta_d(fast))
    assert_same(plain, fast, x)


def test_disable_merge_unmerge():
    base, x = Tower(), tokens()
    y = base(x)
    plain, fast = pair(base)
    adapted = fast(x)
    with fast.disable_adapter():
        assert torch.equal(fast(x), y)
    fast.merge_adapter()
    plain.merge_adapter()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], tensor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(fast(x), adapted, rtol=1e-4, atol=1e-5)
    fast.unmerge_adapter()
    torch.testing.assert_close(fast(x), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", [True, False])
def test_unload(merge):
    plain, fast = pair()
    inner, x = fast.base_model.model, tokens()
    results = [model.merge_and_unload() if merge else model.unload() for model in (plain, fast)]
    assert results[1] is inner
    torch.testing.assert_close(results[1](x), results[0](x), rtol=1e-4, atol=1e-5)
    before = snapshot(results[0])
    now = snapshot(results[1])
    assert now["classes"] == before["classes"] and now["hooks"] == before["hooks"]
    assert not accelerated_layers(results[1])


@pytest.mark.parametrize("save_indices", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(tmp_path, save_indices, low_cpu_mem_usage):
    base, x = Tower(), tokens()
    plain, fast = pair(copy.deepcopy(base), save_indices=save_indices, modules_to_save=["head"])
    fast.save_pretrained(tmp_path)
    for load in (lambda model: model, accelerate):
        loaded = load(
            peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        )
        torch.testing.assert_close(loaded(x), plain(x), rtol=1e-4, atol=1e-5)
    fresh = accelerate(peft.get_peft_model(copy.deepcopy(base), config(proj_seed=5)))
    fresh.load_adapter(tmp_path, "loaded", low_cpu_mem_usage=low_cpu_mem_usage)
    fresh.set_adapter("loaded")
    torch.testing.assert_close(fresh(x), plain(x), rtol=1e-4, atol=1e-5)


def test_an_index_of_its_own_is_loaded(tmp_path):
    """save_indices: the file's index counts, not the seed's."""
    from safetensors.torch import load_file, save_file

    base, x = Tower(), tokens()
    _, fast = pair(copy.deepcopy(base), save_indices=True)
    _, other = pair(copy.deepcopy(base), save_indices=True, proj_seed=99)
    other.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    fast(x)
    peft.set_peft_model_state_dict(fast, tensors)
    for ours, theirs in zip(accelerated_layers(fast).values(), accelerated_layers(other).values(), strict=True):
        torch.testing.assert_close(ours.get_delta_weight("default"), theirs.get_delta_weight("default"))
    torch.testing.assert_close(fast(x), other(x), rtol=1e-4, atol=1e-5)
    save_file({k: v + 1 if "scales" in k else v for k, v in tensors.items()}, tmp_path / "adapter_model.safetensors")
    broken = peft.PeftModel.from_pretrained(base, tmp_path)
    before = snapshot(broken)
    with pytest.raises(ul.UniLoRAError, match=r"adapter 'default': scales: expected 1 / sqrt\(n_j\)"):
        accelerate(broken)
    assert snapshot(broken)["classes"] == before["classes"] and snapshot(broken)["hooks"] == before["hooks"]
    fast.load_state_dict(fast.state_dict())
    torch.testing.assert_close(fast(x), other(x), rtol=1e-4, atol=1e-5)


def test_moves_and_casts():
    plain, fast = pair()
    x = tokens()
    fast(x)
    for change in (lambda m: m.double(), lambda m: m.float(), lambda m: m.to("cpu")):
        assert_same(change(plain), change(fast), x)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_base_layer_with_a_hook_is_called(monkeypatch, register):
    plain, fast = pair()
    seen, x = [], tokens()
    getattr(fast.base_model.model.blocks[1].up.base_layer, register)(lambda *_: seen.append(1))
    assert fused(fast, monkeypatch, x)[1] == 5 and seen
    assert_same(plain, fast, x)


def test_gpt2_generates_the_same():
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2Config(n_embd=18, n_layer=2, n_head=2, vocab_size=30, n_positions=32)
    model = transformers.GPT2LMHeadModel(gpt2).eval()
    plain, fast = pair(model, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    x = torch.randint(0, 30, (2, 5))
    torch.testing.assert_close(fast(x).logits, plain(x).logits, rtol=1e-4, atol=1e-4)
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(fast.generate(x, **options), plain.generate(x, **options))
    torch.testing.assert_close(
        fast.merge_and_unload()(x).logits, plain.merge_and_unload()(x).logits, rtol=1e-4, atol=1e-4
    )


def several(model, **options):
    """An accelerated model with the adapters default, b and c, the last of other layers."""
    made = peft.get_peft_model(model, peft.UniLoraConfig(r=3, theta_d_length=40, **options))
    made.add_adapter("b", peft.UniLoraConfig(r=2, theta_d_length=30, **options))
    fewer = {**options, "target_modules": options["target_modules"][-1:]}
    made.add_adapter("c", peft.UniLoraConfig(r=2, theta_d_length=20, **fewer))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "theta_d" in name:
                parameter.normal_(std=0.5)
    return accelerate(made).eval()


def tiny_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def alone(model, name, call):
    """What the model gives with one adapter, or none, for all rows."""
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()


@pytest.mark.parametrize("rounds", range(3))
def test_rows_of_several_adapters(rounds):
    """Each row as with its own adapter alone, whichever is active; generated too, by beams and by samples' copies."""
    model = several(tiny_llama(), target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    names = [["__base__", "default", "b", "c"][k] for k in torch.randint(0, 4, (5,))]
    x = torch.randint(3, 40, (5, 6))
    mask = torch.ones_like(x)
    wanted = {name: alone(model, name, lambda: model(x).logits) for name in set(names)}
    model.set_adapter("default")
    got = model(x, adapter_names=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(got[row], wanted[name][row], rtol=1e-4, atol=1e-4)
    assert torch.equal(model(x).logits, alone(model, "default", lambda: model(x).logits))  # nothing stays

    for options in ({}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 3}):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": mask, **options}
        many = options.get("num_return_sequences", 1)
        generate = partial(model.generate, x, **options)
        lines = {name: alone(model, name, generate) for name in set(names)}
        model.set_adapter("default")
        mixed = model.generate(x, adapter_names=names, **options)
        for row, name in enumerate(names):
            own = slice(row * many, (row + 1) * many)
            assert torch.equal(mixed[own], lines[name][own])


def test_rows_of_several_heads():
    """modules_to_save too are those of the row's adapter."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    model = several(
        transformers.BertForSequenceClassification(config),
        target_modules=["query", "value"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.normal_()
    x, names = torch.randint(3, 40, (3, 6)), ["b", "default", "b"]
    wanted = {name: alone(model, name, lambda: model(x).logits) for name in set(names)}
    got = model(input_ids=x, adapter_names=names).logits
    torch.testing.assert_close(got, torch.stack([wanted[n][i] for i, n in enumerate(names)]), rtol=1e-4, atol=1e-4)


def test_a_head_that_one_adapter_lacks_is_refused():
    """PEFT gives its rows another one's head."""
    model = several(Tower(), target_modules=["up", "down"], modules_to_save=["head"])
    model.add_adapter("d", peft.UniLoraConfig(r=2, theta_d_length=20, target_modules=["up"]))
    with pytest.raises(ValueError, match=r"'model.head' in modules_to_save of every .* not in those of \['d'\]"):
        model.eval()(tokens(2), adapter_names=["default", "d"])
    model(tokens(2), adapter_names=["default", "b"])


def test_rows_that_cannot_be_told_are_refused():
    model = several(tiny_llama(), target_modules=["q_proj", "v_proj"])
    x = torch.randint(3, 40, (4, 6))
    for names, message in (
        (["default", "d", "b", "b"], "expected a list of names in"),
        (["default"] * 3, "expected a name for each of 4 rows, got 3 names"),
        (["default"] * 2, "expected a name for each of 4 rows, got 2 names"),
        ("default", "expected a list of names in"),
        ([], "expected a name for each of 4 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, adapter_names=names)
        model(x)
    with pytest.raises(ValueError, match="evaluation mode"):
        model.train()(x, adapter_names=["b"] * 4)
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="no merged adapter"):
        model(x, adapter_names=["b"] * 4)


def test_what_cannot_be_accelerated_is_refused_unchanged():
    lora = peft.get_peft_model(Tower(), peft.LoraConfig(target_modules=["up"]))
    mixed = peft.get_peft_model(Tower(), peft.LoraConfig(target_modules=["up"]), mixed=True)
    odd, _ = pair()

    class Other(peft.tuners.unilora.Linear):
        pass

    odd.base_model.model.blocks[1].down.__class__ = Other
    cases = [
        (nn.Linear(2, 2), "expected a peft.PeftModel, got Linear"),
        (mixed, "expected a peft.PeftModel, got PeftMixedModel"),
        (lora, "expected a UniLora tuner, got LoraModel"),
        (odd, "'model.blocks.1.down': expected PEFT's UniLora Linear, got Other"),
    ]
    for model, message in cases:
        classes = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ul.AttachError, match=message):
            accelerate(model)
        assert {name: type(module) for name, module in model.named_modules()} == classes


def test_a_quantised_base_that_peft_leaves_without_an_adapter():
    """PEFT casts its scales to the dtype of the packed weight, and only zeros are left of them."""
    bnb = pytest.importorskip("bitsandbytes")

    def layer(n, m):
        return bnb.nn.Linear4bit(n, m, compute_dtype=torch.float32, quant_type="nf4")

    base = torch.nn.Sequential(layer(64, 96), torch.nn.ReLU(), layer(96, 32)).to("cpu")
    x = torch.randn(5, 64)
    before = base(x)
    weights = [(m(torch.eye(m.in_features)) - m.bias).T.detach() for m in (base[0], base[2])]
    model = peft.get_peft_model(base, peft.UniLoraConfig(r=3, theta_d_length=64, target_modules=["0", "2"]))
    assert torch.equal(model(x), before)  # PEFT alone: no change
    accelerate(model)
    (theta_d,) = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        theta_d.mul_(20)
    layers = [m for m in model.modules() if hasattr(m, "_get_lora_matrices")]
    h = x
    for module, W in zip(layers, weights, strict=True):
        A, B = module._get_lora_matrices("default")
        h = h @ (W + B @ A).T + module.base_layer.bias
        h = torch.relu(h) if module is layers[0] else h
    y = model(x)
    torch.testing.assert_close(y, h, rtol=1e-4, atol=1e-4)
    (expected,) = torch.autograd.grad(h.square().sum(), theta_d)
    y.square().sum().backward()
    assert expected.norm() > 0
    torch.testing.assert_close(theta_d.grad, expected, rtol=1e-3, atol=1e-3)


def test_compiled():
    _, fast = pair()
    x = tokens()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fast(x))
    torch._dynamo.reset()
