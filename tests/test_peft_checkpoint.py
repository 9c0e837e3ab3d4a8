"""to_peft and from_peft: checkpoints of PEFT's UniLora, out and in, against PEFT's own saving and loading."""

import copy
import json
import sys

import pytest
import torch
from models import Tower, assert_unchanged, snapshot, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import unilora_ext as ul
from unilora_ext.integrations.peft import from_peft, to_peft

peft = pytest.importorskip("peft")


def our_config(**changes):
    given = {"r": 3, "d": 64, "target_modules": ["up", "down"], "projection": "peft", "seed": 11, "init_bound": 0.5}
    return ul.UniLoRAConfig(**{**given, **changes})


def saved_by_peft(model, folder, **changes):
    """A checkpoint that PEFT wrote, and the PEFT model."""
    given = {"r": 3, "theta_d_length": 64, "target_modules": ["up", "down"], "proj_seed": 7, "init_theta_d_bound": 0.5}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.UniLoraConfig(**{**given, **changes})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


def change_json(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"r": 1, "d": 5, "seed": 2**40},
        {"modules_to_save": ["head"], "dropout": 0.1},
        {"target_modules": r"blocks\.[02]\.(up|down)"},
        {"target_modules": "all-linear"},
    ],
)
def test_peft_loads_what_to_peft_wrote(tmp_path, changes):
    model, x = Tower(), tokens()
    plain = copy.deepcopy(model)
    adapter = ul.attach(model, our_config(**changes))
    with torch.no_grad():
        for tensor in adapter.modules_to_save().values():
            tensor.add_(1)
    to_peft(adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    torch.testing.assert_close(theirs(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert torch.equal(theirs.base_model.unilora_theta_d["default"], adapter.theta_d)
    layers = [m for m in theirs.modules() if isinstance(m, peft.tuners.unilora.UniLoraLayer)]
    assert len(layers) == len(adapter.layers)

    back = from_peft(plain, tmp_path)
    assert torch.equal(plain(x), model(x)) or changes.get("dropout")
    assert back.layers.keys() == adapter.layers.keys() and torch.equal(back.theta_d, adapter.theta_d)
    assert torch.equal(plain.eval()(x), model(x))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"save_indices": True},
        {"modules_to_save": ["head", "classifier"], "unilora_dropout": 0.2},
        {"target_modules": r".*\.down"},
        {"target_modules": "all-linear"},
        {"target_modules": ["blocks.1.up", "head", "nowhere"]},
        {"layers_to_transform": [0, 2], "layers_pattern": ["blocks"]},
    ],
)
def test_from_peft_computes_the_same(tmp_path, changes):
    model, x = Tower(), tokens()
    theirs = saved_by_peft(model, tmp_path, **changes)
    adapter = from_peft(model, tmp_path)
    model.eval()
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-4, atol=1e-5)
    for each in (model, theirs):
        each(x).square().sum().backward()
    gradient = theirs.base_model.unilora_theta_d["default"].grad
    torch.testing.assert_close(adapter.theta_d.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {"head.weight", "head.bias"} if "modules_to_save" in changes else set()
    assert trainable == {"unilora.theta_d", *head}

    to_peft(adapter, tmp_path / "again")
    ours, original = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "again", tmp_path))
    assert ours.keys() == {name for name in original if "indices" not in name and "scales" not in name}
    assert all(torch.equal(ours[name], original[name]) for name in ours)
    adapter.save(tmp_path / "own")
    assert ul.read(tmp_path / "own").config.projection == "peft"


@pytest.mark.parametrize("kind", ["GPT2ForSequenceClassification", "BertForSequenceClassification"])
def test_transformers_models_both_ways(tmp_path, kind):
    transformers = pytest.importorskip("transformers")
    if kind.startswith("GPT2"):
        targets = ["c_attn", "c_fc"]
        sizes = transformers.GPT2Config(n_embd=18, n_layer=2, n_head=2, vocab_size=30, n_positions=16, pad_token_id=0)
    else:
        targets = ["query", "value"]
        sizes = transformers.BertConfig(
            hidden_size=18, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20, vocab_size=30
        )
    model, x = getattr(transformers, kind)(sizes).eval(), torch.randint(1, 30, (2, 9))
    plain = copy.deepcopy(model)
    theirs = saved_by_peft(model, tmp_path / "theirs", target_modules=targets, task_type="SEQ_CLS", r=2)
    adapter = from_peft(model, tmp_path / "theirs")
    assert adapter.config.modules_to_save  # PEFT adds the task's head
    torch.testing.assert_close(model(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-4)
    to_peft(adapter, tmp_path / "ours")

    back = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(back(x).logits, theirs(x).logits, rtol=1e-4, atol=1e-4)


def test_half_precision_base(tmp_path):
    model, x = Tower().bfloat16(), tokens()
    theirs = saved_by_peft(model, tmp_path)
    adapter = from_peft(model, tmp_path)
    assert adapter.theta_d.dtype == torch.float32
    torch.testing.assert_close(model(x), theirs(x), rtol=0.05, atol=0.05)


def test_a_name_that_ends_another_is_written_exactly(tmp_path):
    """PEFT reads a listed name as an ending too: 'up' would adapt 'deep.up'."""
    model = nn.Sequential()
    model.add_module("up", nn.Linear(6, 6))
    model.add_module("deep", nn.Sequential())
    model.deep.add_module("up", nn.Linear(6, 6))
    plain, x = copy.deepcopy(model), torch.randn(3, 6)
    adapter = ul.attach(model, our_config(target_modules="up", d=10))
    assert list(adapter.layers) == ["up"]
    for name, write in (("unilora", to_peft), ("lora", ul.Adapter.export_lora)):
        write(adapter, tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / name)
        torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)
        assert not isinstance(theirs.base_model.model.deep.up, peft.tuners.tuners_utils.BaseTunerLayer)
    from_peft(plain, tmp_path / "unilora")
    assert torch.equal(plain(x), model(x))


def test_a_layer_of_two_names_is_refused(tmp_path):
    """PEFT replaces it under the first name; attach changes the layer itself, so its second use too."""
    model = nn.Sequential()
    model.add_module("up", nn.Linear(6, 6))
    model.add_module("again", model.up)
    saved_by_peft(model, tmp_path / "theirs", target_modules=["up"], theta_d_length=10)
    before = snapshot(model)
    with pytest.raises(ul.UniLoRAError, match=r"theirs: does not fit.*'up': expected a layer of one name.*'again'"):
        from_peft(model, tmp_path / "theirs")
    assert_unchanged(model, before)
    adapter = ul.attach(model, our_config(target_modules=["up"], d=10))
    for write in (to_peft, ul.Adapter.export_lora):
        with pytest.raises(ul.UniLoRAError, match="expected a layer of one name"):
            write(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"projection": "uniform"}, "projection: expected 'peft', got 'uniform'.*adapter.export_lora"),
        ({"alpha": 6.0}, r"scaling: expected 1 .*got 2; adapter.export_lora"),
    ],
)
def test_to_peft_refuses(tmp_path, changes, message):
    adapter = ul.attach(Tower(), our_config(**changes))
    with pytest.raises(ul.UniLoRAError, match=message):
        to_peft(adapter, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_peft(monkeypatch, tmp_path):
    adapter = ul.attach(Tower(), our_config())
    saved_by_peft(Tower(), tmp_path)
    monkeypatch.setitem(sys.modules, "peft.tuners.unilora", None)
    with pytest.raises(ul.UniLoRAError, match=r"expected the package peft, 0\.21 or later"):
        from_peft(Tower(), tmp_path)
    with pytest.raises(ul.UniLoRAError, match="expected the package peft"):
        _ = ul.integrations.peft.accelerate
    to_peft(adapter, tmp_path / "out")
    adapter.export_lora(tmp_path / "lora")


def test_from_peft_refuses_and_leaves_the_model(tmp_path):
    def damaged(name, change, **changes):
        folder = tmp_path / name
        saved_by_peft(Tower(), folder, modules_to_save=["head"], **changes)
        change(folder)
        return folder

    def cut(folder):
        path = folder / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-4])

    theta_d = "base_model.unilora_theta_d"
    lora = tmp_path / "lora"
    peft.get_peft_model(Tower(), peft.LoraConfig(target_modules=["up"])).save_pretrained(lora)
    (tmp_path / "empty").mkdir()
    cases = [
        (tmp_path / "empty", "expected a PEFT checkpoint with adapter_config.json, found none"),
        (lora, "peft_type: expected 'UNILORA', got 'LORA'"),
        (damaged("json", lambda f: (f / "adapter_config.json").write_text("{")), "expected JSON, the file is"),
        (damaged("bias", lambda f: change_json(f, bias="all")), "bias: expected 'none'"),
        (damaged("d", lambda f: change_json(f, theta_d_length=65)), r"shape \[65\], got torch.float32 of shape \[64\]"),
        (damaged("gone", lambda f: (f / "adapter_model.safetensors").unlink()), "adapter_model.safetensors, found"),
        (damaged("cut", cut), "expected safetensors, the file is truncated"),
        (damaged("no theta_d", lambda f: change_tensors(f, lambda t: t.pop(theta_d))), "got no such tensor"),
        (damaged("targets", lambda f: change_json(f, target_modules=["query"])), "expected modules that match"),
        (damaged("embed", lambda f: change_json(f, target_modules=["embed"])), r"'embed' \(Embedding\) cannot be"),
        (damaged("head", lambda f: change_json(f, modules_to_save=None)), "'head.bias': in the adapter .*, not in the"),
        (damaged("more", lambda f: change_json(f, modules_to_save=["head", "blocks.0"])), "not in the adapter"),
        (damaged("r", lambda f: change_json(f, r=4), save_indices=True), "unilora_indices_A: expected the index"),
        (damaged("seed", lambda f: change_json(f, proj_seed=8), save_indices=True), "index of seed 8, got another"),
        (
            damaged(
                "scales",
                lambda f: change_tensors(f, lambda t: t["base_model.model.blocks.1.up.unilora_scales_B"].mul_(1.1)),
                save_indices=True,
            ),
            r"'blocks.1.up': unilora_scales_B: expected 1 / sqrt\(n_j\)",
        ),
    ]
    model = Tower()
    before = snapshot(model)
    for folder, message in cases:
        with pytest.raises(ul.UniLoRAError, match=message) as error:
            from_peft(model, folder)
        assert str(folder) in str(error.value)
        assert_unchanged(model, before)
    other = Tower(classes=4)
    with pytest.raises(ul.AdapterFileError, match=r"'head.weight': in the adapter \[5, 12\], in the model \[4, 12\]"):
        from_peft(other, damaged("shape", lambda f: None))


class GPTQLinear(nn.Module):
    """As auto-gptq's layers are: no ``weight`` at all."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 1e6).round().int())

    def forward(self, x):
        return x @ (self.qweight / 1e6).to(x.dtype).T


def test_from_peft_on_layers_without_a_weight(tmp_path):
    model, x = Tower(), tokens()
    theirs = saved_by_peft(model, tmp_path, target_modules=["down"])
    for block in model.blocks:
        block.down = GPTQLinear(block.down)
    adapter = from_peft(model, tmp_path)
    assert adapter.theta_d.dtype == torch.float32
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-3, atol=1e-4)


def test_from_peft_with_a_sharded_head(tmp_path):
    """The tensors of the folder are whole; each process takes its part."""
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    model = Tower()
    theirs = saved_by_peft(model, tmp_path / "theirs", modules_to_save=["head"])
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), mesh, [Shard(0)]))
        from_peft(model, tmp_path / "theirs")
        assert isinstance(model.head.weight, DTensor)
        trained = theirs.base_model.model.head.modules_to_save["default"].weight
        assert torch.equal(model.head.weight.detach().full_tensor(), trained)
    finally:
        distributed.destroy_process_group()


HOSTILE = {
    "r": [None, "3", 0, -1, 3.0, True, [3], 2**40, 10**400],
    "theta_d_length": [None, "64", 64.0, 0, -1, 2**63],
    "proj_seed": [None, "x", -1, 2**63, 1.5],
    "unilora_dropout": ["x", 1.5, None, [], -0.1],
    "init_theta_d_bound": ["x", 0, -1.0, None],
    "target_modules": [3, [3], {"up": 1}, "(", "(" * 3000, [], "", None, {}, [["up"]]],
    "exclude_modules": ["(", 3, [3], {"a": 1}],
    "modules_to_save": ["head", [3], 5, ["("], [None]],
    "layers_to_transform": ["x", [None], {"a": 1}, 1.5],
    "layers_pattern": [3, ["("], [None]],
    "bias": [None, 3, "all"],
    "peft_type": [None, 3, [], {}, "unilora"],
    "unknown_field": [1],
    "auto_mapping": [3, {"base_model_class": 3}],
    "task_type": [3, "X"],
}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_hostile_configuration(tmp_path, field):
    """An error of the package and an unchanged model, or an adapter that works."""
    saved_by_peft(Tower(), tmp_path, modules_to_save=["head"])
    text = (tmp_path / "adapter_config.json").read_text()
    model, x = Tower(), tokens()
    before = snapshot(model)
    for value in HOSTILE[field]:
        (tmp_path / "adapter_config.json").write_text(text)
        change_json(tmp_path, **{field: value})
        try:
            adapter = from_peft(model, tmp_path)
        except ul.UniLoRAError as error:
            assert str(tmp_path) in str(error)
        else:
            assert model(x).shape == (6, 5)
            adapter.detach()
        assert_unchanged(model, before)


@pytest.mark.parametrize("data", [b"[]", b"3", b"[" * 100_000, b'{"r": NaN}', b"\xff\xfe", b'{"peft_type": "UNILORA"}'])
def test_a_damaged_configuration(tmp_path, data):
    saved_by_peft(Tower(), tmp_path)
    (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(ul.AdapterFileError, match=r"adapter_config\.json"):
        from_peft(Tower(), tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("base_model.unilora_theta_d", torch.float8_e4m3fn, "theta_d: expected float16, .*got torch.float8_e4m3fn"),
        ("base_model.model.head.weight", torch.int64, "'head.weight': expected torch.float32, .*got torch.int64"),
        ("base_model.model.head.bias", torch.complex64, "'head.bias': expected torch.float32, .*got torch.complex64"),
    ],
)
def test_tensors_of_another_kind(tmp_path, name, dtype, message):
    saved_by_peft(Tower(), tmp_path, modules_to_save=["head"])
    change_tensors(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    model = Tower()
    before = snapshot(model)
    with pytest.raises(ul.AdapterFileError, match=message):
        from_peft(model, tmp_path)
    assert_unchanged(model, before)
