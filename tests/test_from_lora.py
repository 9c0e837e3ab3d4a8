"""from_lora: LoRAs of PEFT, as they are and projected, against PEFT and dense linear algebra in float64."""

import copy
import json
import logging
import math
import sys

import pytest
import torch
from models import Tower, assert_unchanged, dense_update, snapshot, tokens
from safetensors.torch import load_file, save_file
from torch import nn

import unilora_ext as ul
from unilora_ext.config import size_of
from unilora_ext.family import FAMILY
from unilora_ext.integrations.peft import lora
from unilora_ext.layout import Order
from unilora_ext.projections import projection_class

BLOCKS = ["blocks.0.up", "blocks.1.down", "blocks.2.up", "blocks.2.down"]


def written(folder, model, names=BLOCKS, r=3, scale_B=0.1, dtype=torch.float32, whole=(), **changes):
    """A LoRA of random matrices, written by hand; {module: B A in float64}."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors, products = {}, {}
    for name in reversed(names):  # any order
        m, n = model.get_submodule(name).weight.shape
        B, A = torch.randn(m, r, dtype=dtype) * scale_B, torch.randn(r, n, dtype=dtype)
        products[name] = B.double() @ A.double()
        tensors |= {f"base_model.model.{name}.lora_{X}.weight": matrix for X, matrix in (("A", A), ("B", B))}
    for name in whole:
        state = model.get_submodule(name).state_dict()
        tensors |= {f"base_model.model.{name}.{key}": torch.randn_like(tensor) for key, tensor in state.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    record = {"peft_type": "LORA", "r": r, "lora_alpha": 5, "target_modules": ["up"], "modules_to_save": list(whole)}
    (folder / "adapter_config.json").write_text(json.dumps({**record, **changes}))
    return products


def saved_by_peft(model, folder, **changes):
    """A LoRA that PEFT wrote, and its model."""
    peft = pytest.importorskip("peft")
    given = {"r": 3, "target_modules": ["up", "down"], "lora_alpha": 5}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**{**given, **changes})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(folder)
    return theirs


def shares(caplog):
    """(of theta_D, of the updates) that the last call told, and how loudly."""
    record = caplog.records[-1]
    assert record.message.startswith("from_lora: projection ")
    return record.args[-2] / 100, record.args[-1] / 100, record.levelno


# ---- the LoRA itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"r": 1, "lora_alpha": 3},
        {"r": 17},  # more than the layers' width
        {"modules_to_save": ["head", "classifier"], "lora_dropout": 0.1},
        {"target_modules": r"blocks\.[02]\.(up|down)"},
        {"target_modules": ["embed", "up"]},
    ],
)
@pytest.mark.parametrize("projection", [None, "balanced", "peft"])
def test_d_of_all_is_the_lora(tmp_path, caplog, changes, projection):
    model, x = Tower(), tokens()
    theirs = saved_by_peft(model, tmp_path / "lora", **changes)
    caplog.set_level(logging.INFO, "unilora_ext")
    adapter = ul.from_lora(model, tmp_path / "lora", projection=projection)
    assert shares(caplog)[1:] == (pytest.approx(1, abs=1e-9), logging.INFO)
    assert adapter.config.projection == (projection or "identity")
    assert adapter.config.dropout == changes.get("lora_dropout", 0)
    assert adapter.projection.d == adapter.projection.D == adapter.theta_d.numel()
    torch.testing.assert_close(model.eval()(x), theirs(x), rtol=1e-6, atol=1e-6)
    for name, layer in adapter.layers.items():
        delta = theirs.base_model.model.get_submodule(name).get_delta_weight("default")
        torch.testing.assert_close(layer.as_weight(layer.delta_weight(), layer.weight), delta, rtol=1e-5, atol=1e-7)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"unilora.theta_d", *(f"head.{n}" for n in ("weight", "bias") if "modules_to_save" in changes)}


def test_d_of_all_by_number(tmp_path):
    model = Tower()
    written(tmp_path, model)
    D = 3 * sum(sum(model.get_submodule(name).weight.shape) for name in BLOCKS)
    adapter = ul.from_lora(model, tmp_path, D)
    assert adapter.config.projection == "identity" and list(adapter.layers) == BLOCKS
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        layer, _, letter = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        assert torch.equal(adapter.layers[layer].lora_factors()["AB".index(letter)], tensor)


def test_conv1d_of_gpt2(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = transformers.GPT2Config(n_embd=18, n_layer=2, n_head=2, vocab_size=30, n_positions=16, pad_token_id=0)
    model, x = transformers.GPT2ForSequenceClassification(sizes).eval(), torch.randint(1, 30, (2, 9))
    plain = copy.deepcopy(model)
    changes = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "task_type": "SEQ_CLS"}
    theirs = saved_by_peft(model, tmp_path, **changes)
    adapter = ul.from_lora(model, tmp_path)
    assert adapter.config.modules_to_save == ("score",)  # the task's head
    torch.testing.assert_close(model(x).logits, theirs(x).logits, rtol=1e-5, atol=1e-6)

    container = nn.Sequential(plain)  # with the Transformers model inside, as of sentence-transformers
    ul.from_lora(container, tmp_path)
    torch.testing.assert_close(container(x).logits, theirs(x).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind, shape", [("Conv1d", (2, 4, 9)), ("Conv2d", (2, 4, 9, 7)), ("Conv3d", (2, 4, 5, 6, 7))])
def test_convolutions(tmp_path, kind, shape):
    model, x = nn.Sequential(getattr(nn, kind)(4, 6, 3, stride=2, padding=1)).eval(), torch.randn(shape)
    plain = copy.deepcopy(model)
    theirs = saved_by_peft(model, tmp_path / "lora", target_modules=["0"], r=2)
    adapter = ul.from_lora(model, tmp_path / "lora")
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-5, atol=1e-6)
    adapter.export_lora(tmp_path / "again")
    ul.from_lora(plain, tmp_path / "again")
    assert torch.equal(plain(x), model(x))


def test_a_table_whose_weight_peft_saves_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=30, **sizes)).eval()
    plain, x = copy.deepcopy(model), torch.randint(1, 30, (2, 9))
    theirs = saved_by_peft(model, tmp_path, target_modules=["embed_tokens", "lm_head", "q_proj"])
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.model.embed_tokens.base_layer.weight" in stored
    ul.from_lora(model, tmp_path)
    torch.testing.assert_close(model(x).logits, theirs(x).logits, rtol=1e-5, atol=1e-6)

    stored["base_model.model.lm_head.base_layer.weight"] += 1
    save_file(stored, tmp_path / "adapter_model.safetensors")
    before = snapshot(plain)
    with pytest.raises(ul.AdapterFileError, match=r"'lm_head.base_layer.weight': expected the model's own values"):
        ul.from_lora(plain, tmp_path)
    assert_unchanged(plain, before)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float32, torch.float64])
def test_types(tmp_path, stored, computed):
    model = Tower().to(computed)
    products = written(tmp_path, model, dtype=stored)
    adapter = ul.from_lora(model, tmp_path)
    assert adapter.theta_d.dtype == (torch.float64 if computed == torch.float64 else torch.float32)
    for name, layer in adapter.layers.items():
        expected = products[name] * 5 / 3
        torch.testing.assert_close(layer.delta_weight().double(), expected, rtol=1e-5, atol=1e-6)


def test_without_peft(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "peft"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "peft", None)
    model = Tower()
    written(tmp_path, model)
    assert ul.from_lora(model, tmp_path, 40).theta_d.shape == (40,)


# ---- projected ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILY)
def test_which_projections_are_taken(name):
    """Those of a free d (and the identity) in which theta_D is a linear function of theta_d alone."""
    config, kind, taken = ul.UniLoRAConfig(r=2, projection=name), projection_class(name), False
    if not kind.trained and kind.order is not Order.DENSE:
        adapter = ul.attach(Tower(), config)
        free = size_of(config, adapter.vector.layout) in (None, adapter.projection.D)
        taken = free and not adapter.projection.offset().any()
    assert (name in lora.LINEAR) == taken


SMALLEST = {"local": 2, "nonuniform": 2}


def made(name, d):
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 5))
    d = None if name == "identity" else d
    return ul.attach(model, ul.UniLoRAConfig(r=2, projection=name, d=d, seed=5)).projection


@pytest.mark.parametrize("name", lora.LINEAR)
@pytest.mark.parametrize("d", [1, 31, 80])
def test_least_squares(name, d):
    P = made(name, max(d, SMALLEST.get(name, 1)))
    theta_D = torch.randn(P.D, dtype=torch.float64)
    found = lora.least_squares(P, theta_D)
    expected = torch.linalg.pinv(P.dense()) @ theta_D
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    if name not in ("gaussian", "fastfood"):  # whose columns are orthonormal in expectation
        torch.testing.assert_close(found, P.dense().T @ theta_D, rtol=1e-12, atol=1e-12)


def test_least_squares_of_a_singular_projection():
    with pytest.raises(ul.UniLoRAError, match="is nearly singular, no solution in 1000 steps"):
        lora.least_squares(ul.GaussianProjection(600, 600), torch.randn(600, dtype=torch.float64))


@pytest.mark.parametrize("m, n, r", [(9, 14, 4), (3, 14, 5), (9, 2, 5), (1, 1, 3)])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_least_factors(m, n, r, rank):
    B, A = torch.randn(m, r, dtype=torch.float64) * 1e-3, torch.randn(r, n, dtype=torch.float64)
    B[:, rank:] = 0
    factors = lora.least_factors(B, A)
    assert factors.B.shape == B.shape and factors.A.shape == A.shape
    torch.testing.assert_close(factors.B @ factors.A, B @ A, rtol=1e-10, atol=1e-13)
    nuclear = torch.linalg.matrix_norm(B @ A, "nuc")  # the least that |B|^2 + |A|^2 can be is twice that
    for factor in factors:
        torch.testing.assert_close(factor.square().sum(), nuclear, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", lora.LINEAR[1:])
def test_what_survives_is_told(tmp_path, caplog, name):
    model = Tower().double()
    products = written(tmp_path, model)
    adapter = ul.from_lora(model, tmp_path, 100, projection=name, seed=3)
    of_vector, of_updates, level = shares(caplog)
    assert level == logging.WARNING and adapter.config.seed == 3
    energy = 2 * sum(torch.linalg.matrix_norm(product, "nuc") for product in products.values())
    projected = adapter.projection(adapter.theta_d.detach())
    assert of_vector == pytest.approx(float(projected.square().sum() / energy), rel=1e-9)
    updates, lost, whole = dense_update(model, adapter), 0.0, 0.0
    for layer, product in products.items():
        lost += (updates[layer] - product * 5 / 3).square().sum()
        whole += (product * 5 / 3).square().sum()
    assert of_updates == pytest.approx(float(1 - lost / whole), rel=1e-8, abs=1e-9)


def test_the_share_of_the_theory(tmp_path, caplog):
    """The expectation over P is (columns that are not empty) / D."""
    model, differences = Tower(), []
    for seed in range(40):
        written(tmp_path, model)
        adapter = ul.from_lora(model, tmp_path, 150, seed=seed)
        used, D = int((adapter.projection.counts > 0).sum()), adapter.projection.D
        differences.append(shares(caplog)[0] - used / D)
        adapter.detach()
    differences = torch.tensor(differences)
    error = differences.std() / math.sqrt(len(differences))
    assert differences.mean().abs() < 4 * error and error < 0.01


def test_the_least_split_keeps_more(tmp_path, caplog, monkeypatch):
    """The figures of the docstring and of the guide."""
    model = nn.Sequential(*(nn.Linear(256, 256 * (1 + i % 3), bias=False) for i in range(6)))
    written(tmp_path, model, [str(i) for i in range(6)], r=8, scale_B=1 / 15)
    D = 8 * sum(sum(layer.weight.shape) for layer in model)

    def kept(d):
        ul.from_lora(model, tmp_path, d).detach()
        return shares(caplog)[1]

    assert kept(D // 2) == pytest.approx(0.19, abs=0.02)
    assert kept(D // 18) == pytest.approx(0.004, abs=0.002)
    monkeypatch.setattr(lora, "least_factors", lora.Factors)
    assert kept(D // 2) == pytest.approx(-4, abs=1)


def test_it_trains_saves_and_loads(tmp_path):
    model, x, y = Tower(), tokens(), torch.randint(0, 5, (6,))
    plain = copy.deepcopy(model)
    written(tmp_path / "lora", model, whole=["head"])
    adapter = ul.from_lora(model, tmp_path / "lora", 60)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([adapter.theta_d, *model.head.parameters()], lr=0.02)
    losses = []
    for _ in range(30):
        losses.append(nn.functional.cross_entropy(model(x), y))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start[name])}
    assert changed == {"unilora.theta_d", "head.weight", "head.bias"}
    adapter.save(tmp_path / "adapter")
    ul.load(plain, tmp_path / "adapter")
    assert torch.equal(plain(x), model(x))


# ---- refused --------------------------------------------------------------------------------------------------------


def change_json(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


UP = "base_model.model.blocks.0.up."


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"peft_type": "UNILORA"}, "peft_type: expected 'LORA', got 'UNILORA'"),
        ({"bias": "lora_only"}, "bias: expected 'none'"),
        ({"use_dora": True}, "use_dora: expected none"),
        ({"rank_pattern": {"up": 2}}, "rank_pattern: expected none"),
        ({"alpha_pattern": {"up": 2}}, "alpha_pattern: expected none"),
        ({"target_parameters": ["x"]}, "target_parameters: expected none"),
        ({"layer_replication": [[0, 2]]}, "layer_replication: expected none"),
        ({"lora_bias": True}, "lora_bias: expected none"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices: expected none"),
        ({"of_a_later_version": 2}, "of_a_later_version: expected none"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: .*got 'pissa_niter_4'"),
        ({"init_lora_weights": "mica"}, "init_lora_weights"),
        ({"r": 4}, "the LoRA's matrices differ in 8 places"),
        ({"r": 0}, "r: expected"),
        ({"r": "3"}, "r: expected"),
        ({"lora_alpha": None}, "lora_alpha: expected"),
        ({"lora_dropout": 1.5}, "does not fit this Tower: UniLoRAConfig: dropout"),
        ({"modules_to_save": []}, "'head.bias': in the adapter"),
        ({"modules_to_save": ["head", "blocks.0"]}, "'blocks.0.up' is also in modules_to_save"),
    ],
)
def test_other_configurations(tmp_path, changes, message):
    model = Tower()
    written(tmp_path, model, whole=["head"])
    change_json(tmp_path, **changes)
    before = snapshot(model)
    for d in (None, 50):
        with pytest.raises(ul.UniLoRAError, match=message) as error:
            ul.from_lora(model, tmp_path, d)
        assert str(tmp_path) in str(error.value)
        assert_unchanged(model, before)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(UP + "lora_A.weight"), "'blocks.0.up.lora_A.weight': in the model"),
        (lambda t: t.update({UP + "lora_magnitude_vector": torch.ones(2)}), "lora_magnitude_vector': in the adapter"),
        (lambda t: t.update({UP + "bias": torch.ones(20)}), "'blocks.0.up.bias': in the adapter"),
        (lambda t: t.update({UP + "lora_embedding_A": torch.ones(3, 12)}), "lora_embedding_A': in the adapter"),
        (lambda t: t.update({UP + "lora_B.weight": torch.ones(21, 3)}), r"in the adapter \[21, 3\], in the model \[20"),
        (lambda t: t.update({"other.lora_A.weight": torch.ones(3, 3)}), r"got 1 others: \['other'\]"),
        (lambda t: t.update({"embed.lora_A.weight": torch.ones(3, 50)}), "embed.lora_A.weight': in the adapter"),
        (lambda t: t[UP + "lora_A.weight"].fill_(math.nan), "expected finite .* got infinite or no numbers"),
        (lambda t: t.update({UP + "lora_B.weight": torch.ones(20, 3, dtype=torch.int32)}), "got torch.int32"),
        (lambda t: [t.pop(name) for name in list(t) if "lora" in name], "expected tensors named <module>"),
    ],
)
def test_other_tensors(tmp_path, change, message):
    model = Tower()
    written(tmp_path, model, whole=["head"])
    change_tensors(tmp_path, change)
    before = snapshot(model)
    for d in (None, 50):
        with pytest.raises(ul.UniLoRAError, match=message) as error:
            ul.from_lora(model, tmp_path, d)
        assert str(tmp_path) in str(error.value)
        assert_unchanged(model, before)


def test_other_arguments_and_models(tmp_path):
    model = Tower()
    written(tmp_path / "good", model)
    written(tmp_path / "untrained", model, scale_B=0)
    written(tmp_path / "pickled", model)
    (tmp_path / "pickled/adapter_model.safetensors").rename(tmp_path / "pickled/adapter_model.bin")
    before = snapshot(model)
    for folder, arguments, message in [
        ("good", {"d": 10**6}, "d: expected at most D = "),
        ("good", {"d": 0}, "d: expected an integer"),
        ("good", {"d": "10"}, "d: expected an integer"),
        ("good", {"d": 50, "seed": -1}, "seed: expected an integer"),
        ("good", {"d": 50, "projection": "identity"}, "d: expected .* or None"),
        ("good", {"d": 50, "projection": "loraxs"}, "projection: expected None or one of"),
        ("good", {"d": 50, "projection": "unknown"}, "projection: expected None or one of"),
        ("untrained", {"d": 50}, "expected a trained LoRA, got one whose updates are all zero"),
        ("pickled", {}, "adapter_model.safetensors, found none"),
        ("nowhere", {}, "adapter_config.json, found none"),
    ]:
        with pytest.raises(ul.UniLoRAError, match=message):
            ul.from_lora(model, tmp_path / folder, **arguments)
        assert_unchanged(model, before)
    ul.from_lora(model, tmp_path / "untrained")  # exactly: as it is
    before = snapshot(model)
    with pytest.raises(ul.AttachError, match="has a Uni-LoRA adapter already"):
        ul.from_lora(model, tmp_path / "good", 50)
    assert_unchanged(model, before)


@pytest.mark.parametrize("changes", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect", "padding": 1}])
def test_convolutions_that_pefts_lora_has_not(tmp_path, changes):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **changes))
    written(tmp_path, nn.Sequential(nn.Linear(4, 6)), ["0"])
    before = snapshot(model)
    with pytest.raises(ul.AdapterFileError, match=f"'0': expected {next(iter(changes))} = "):
        ul.from_lora(model, tmp_path)
    assert_unchanged(model, before)


HOSTILE = {
    "r": [None, "3", 0, -1, 3.0, True, [3], 2**40, 10**400],
    "lora_alpha": [None, "3", [], 10**400, 1.5e308],
    "lora_dropout": ["x", 1.5, None, [], -0.1],
    "use_rslora": [None, 3, "x"],
    "init_lora_weights": [None, 3, [], {}, "loftq", "olora"],
    "modules_to_save": ["head", [3], 5, [""], [None]],
    "bias": [None, 3, "all"],
    "peft_type": [None, 3, [], {}, "lora"],
    "unknown_field": [1, {"a": 1}],
}


@pytest.mark.parametrize("field", HOSTILE)
def test_a_hostile_configuration(tmp_path, field):
    model = Tower()
    before = snapshot(model)
    for value in HOSTILE[field]:
        written(tmp_path, model, whole=["head"], use_rslora=True)
        change_json(tmp_path, **{field: value})
        with pytest.raises(ul.UniLoRAError) as error:
            ul.from_lora(model, tmp_path, 50)
        assert str(tmp_path) in str(error.value)
        assert_unchanged(model, before)


class Quantised(nn.Module):
    """A layer without ``weight``."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", (linear.weight.detach() * 1e6).round().int())

    def forward(self, x):
        return x @ (self.qweight / 1e6).to(x.dtype).T


def test_a_quantised_base(tmp_path):
    model, x = Tower(), tokens()
    plain = copy.deepcopy(model)
    written(tmp_path, model, ["blocks.0.down", "blocks.2.down"])
    for block in model.blocks:
        block.down = Quantised(block.down)
    for each in (model, plain):
        assert ul.from_lora(each, tmp_path).theta_d.dtype == torch.float32
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
