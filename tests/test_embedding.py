"""Embeddings as targets: against plain PyTorch in float64, and against PEFT's LoRA."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from models import Tower, assert_unchanged, dense_update, snapshot, tokens
from torch import nn

import unilora_ext as ul
from unilora_ext.embedding import UniLoRAEmbedding


def config(**changes):
    return ul.UniLoRAConfig(
        **{"r": 3, "d": 41, "target_modules": ["embed", "up"], "alpha": 2.0, "init_bound": 0.7, **changes}
    )


class Reader(nn.Module):
    """Reads its table where `call` is False."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5)
        self.read = read

    def forward(self, ids):
        return self.table.weight[ids] if self.read else self.table(ids)


def expected(model, adapter, ids):
    """The plain model with E + dE in place of E, dE in float64 by the paper's formulas."""
    plain = copy.deepcopy(model)
    ul.get_adapter(plain).detach()
    for name, update in dense_update(model, adapter).items():
        module = plain.get_submodule(name)
        module.weight.data += update.T if isinstance(module, nn.Embedding) else update
    return plain(ids)


@pytest.mark.parametrize("projection", ["uniform", "peft"])
def test_forward_is_that_of_the_updated_table(projection):
    model, ids = Tower().double(), tokens()
    plain = model(ids)
    adapter = ul.attach(model, config(projection=projection))
    assert type(model.embed) is UniLoRAEmbedding and adapter.vector.layout.shapes[0] == (12, 50)
    y = model(ids)
    torch.testing.assert_close(y, expected(model, adapter, ids), rtol=1e-10, atol=1e-10)
    assert (y - plain).abs().max() > 1e-3
    with adapter.disable():
        assert torch.equal(model(ids), plain)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2), (0,), (2, 0)])
def test_gradient_of_any_shape(shape):
    model = nn.Sequential(nn.Embedding(11, 5)).double()
    adapter = ul.attach(model, config(target_modules=["0"], d=13))
    ids = torch.randint(0, 11, shape)
    y = model(ids)
    assert y.shape == (*shape, 5)
    weights = torch.randn_like(y)
    gradient = torch.autograd.grad((y * weights).sum(), adapter.theta_d)[0]

    theta_d = adapter.theta_d.detach().clone().requires_grad_()
    part = adapter.projection.dense() @ theta_d
    B, A = part[:15].view(5, 3), part[15:].view(3, 11)
    oracle = model[0].weight + 2 / 3 * (B @ A).T
    (wanted,) = torch.autograd.grad((oracle[ids] * weights).sum(), theta_d)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-12)


def test_padding_idx_keeps_its_column_from_a_gradient():
    model = nn.Sequential(nn.Embedding(7, 5, padding_idx=2)).double()
    adapter = ul.attach(model, config(target_modules=["0"], d=13))
    ids = torch.tensor([[2, 3, 2], [5, 2, 0]])
    A, B = model[0].lora_factors()
    A, B = (t.detach().requires_grad_() for t in (A, B))
    theirs = F.embedding(ids, A.T, padding_idx=2) @ B.T * 2 / 3 + model[0].weight[ids]
    of_A, of_B = torch.autograd.grad(theirs.square().sum(), (A, B))
    assert torch.equal(of_A.abs().sum(0) > 0, torch.tensor([True, False, False, True, False, True, False]))
    y = model(ids)
    torch.testing.assert_close(y, (model[0].weight + dense_update(model, adapter)["0"].T)[ids])
    (gradient,) = torch.autograd.grad(y.square().sum(), adapter.theta_d)
    wanted = adapter.projection.dense().T @ torch.cat([of_B.reshape(-1), of_A.reshape(-1)])
    torch.testing.assert_close(gradient, wanted)


def test_dropout_drops_whole_tokens():
    model = nn.Sequential(nn.Embedding(7, 5)).double()
    adapter = ul.attach(model, config(target_modules=["0"], d=13, dropout=0.4))
    ids = torch.randint(0, 7, (400,))
    change = model(ids) - model[0].weight[ids]
    whole = model.eval()(ids) - model[0].weight[ids]
    kept = change.abs().sum(1) > 0
    torch.testing.assert_close(change[kept], whole[kept] / 0.6)
    assert 180 < kept.sum() < 300 and adapter.theta_d.requires_grad


def test_merge_is_the_forward_and_unmerge_exact():
    model, ids = Tower(), tokens()
    before = snapshot(model)
    adapter = ul.attach(model, config())
    y = model(ids)
    adapter.merge()
    torch.testing.assert_close(model(ids), y, rtol=1e-4, atol=1e-5)
    adapter.unmerge()
    assert torch.equal(model(ids), y)
    adapter.detach()
    assert_unchanged(model, before)


def test_save_and_load(tmp_path):
    model, ids = Tower(), tokens()
    fresh = copy.deepcopy(model)
    adapter = ul.attach(model, config())
    adapter.save(tmp_path / "a")
    ul.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(ids), model(ids))


def test_a_tied_head_keeps_the_plain_table():
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
        )
    ).double()  # fmt: skip
    ids = tokens()
    adapter = ul.attach(model, config(target_modules=["embed_tokens"]))
    with torch.no_grad():
        dE = dense_update(model, adapter)["model.embed_tokens"].T
        x = F.embedding(ids, model.lm_head.weight + dE)
        y = model(input_ids=ids).logits
        with adapter.disable():
            torch.testing.assert_close(y, model(inputs_embeds=x).logits, rtol=1e-10, atol=1e-10)
    with pytest.raises(ul.UniLoRAError, match=r"shared by 'model.embed_tokens' and 'lm_head.weight'|is shared by"):
        adapter.merge()


def test_export_is_pefts_lora(tmp_path):
    peft = pytest.importorskip("peft")
    model, ids = Tower(), tokens()
    plain = copy.deepcopy(model).eval()
    adapter = ul.attach(model.eval(), config())
    adapter.export_lora(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(ids), model(ids), rtol=1e-4, atol=1e-5)
    assert (theirs.get_base_model().embed.get_delta_weight("default") != 0).any()


@pytest.mark.parametrize(
    "projection, options",
    [("vera", {}), ("loraxs", {}), ("fourierft", {"n_frequency": 7}), ("tinylora", {}), ("tied", {}), ("gaussian", {})],
)
def test_the_family(projection, options):
    model, ids = Tower().double(), tokens()
    adapter = ul.attach(
        model, config(projection=projection, d=30 if projection == "gaussian" else None, init_bound=None,
                      projection_options=options)
    )  # fmt: skip
    with torch.no_grad():
        for part in adapter.trained.values():
            part.copy_(torch.randn_like(part))
    y = model(ids)
    y.square().sum().backward()
    assert adapter.theta_d.grad.abs().sum() > 0
    before = model.embed.weight.clone()
    adapter.merge()
    torch.testing.assert_close(model(ids), y, rtol=1e-8, atol=1e-8)
    assert (model.embed.weight - before).abs().max() > 1e-6


@pytest.mark.parametrize("mode", ["reentrant", "non-reentrant", "autocast", "bfloat16"])
def test_modes(mode):
    model, ids = Tower(), tokens()
    adapter = ul.attach(model, config(target_modules=["embed"] if mode == "autocast" else ["embed", "up"]))
    y = model(ids)
    (wanted,) = torch.autograd.grad(y.square().sum(), adapter.theta_d)
    if "reentrant" in mode:
        model.checkpointing = mode
    elif mode == "bfloat16":
        model.bfloat16()
    if mode == "autocast":
        y = model.embed(ids)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.embed(ids), y)  # as nn.Embedding, not touched by it
        return
    adapter.theta_d.grad = None
    model(ids).float().square().sum().backward()
    loose = {"rtol": 0.1, "atol": 0.1 * wanted.abs().max().item()} if mode == "bfloat16" else {}
    torch.testing.assert_close(adapter.theta_d.grad, wanted, **loose)


def test_compiles_as_one_graph():
    torch.compiler.reset()  # the graphs of other tests count
    model, ids = Tower(), tokens()
    adapter = ul.attach(model, config())
    y = model(ids)
    (wanted,) = torch.autograd.grad(y.square().sum(), adapter.theta_d)
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids)
    torch.testing.assert_close(got, y)
    torch.testing.assert_close(torch.autograd.grad(got.square().sum(), adapter.theta_d)[0], wanted)


def whole_numbers():
    table = nn.Embedding(5, 3).requires_grad_(False)
    table.weight.data = table.weight.data.to(torch.int8)
    return table


class Other(nn.Embedding):
    def forward(self, input):
        return super().forward(input) + self.weight.mean()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: nn.Embedding(5, 3, max_norm=1.0), "with max_norm it writes its weight"),
        (lambda: nn.Embedding(5, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (lambda: Other(5, 3), r"'0' \(Other\) cannot be adapted: expected a torch.nn.Linear, Embedding"),
        (lambda: nn.EmbeddingBag(5, 3), r"\(EmbeddingBag\) cannot be adapted"),
        (whole_numbers, "expected a floating weight, got torch.int8"),
    ],
)
def test_what_would_be_wrong_is_refused(make, message):
    model = nn.Sequential(make(), nn.Linear(3, 3))
    before = snapshot(model)
    with pytest.raises(ul.AttachError, match=message):
        ul.attach(model, config(target_modules=["0"]))
    assert_unchanged(model, before)


class Tied(nn.Module):
    """Calls its table, and reads it for the head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Reader(read=False)

    def forward(self, ids):
        return F.linear(self.inner(ids), self.inner.table.weight)


def test_a_table_that_is_read_from_above_is_refused():
    with pytest.raises(ul.AttachError, match=r"'inner.table' .*Tied reads its weight"):
        ul.attach(Tied(), config(target_modules=["inner.table"]))


def test_a_table_that_is_read_is_refused():
    with pytest.raises(ul.AttachError, match=r"'table' .*Reader reads its weight instead of calling it"):
        ul.attach(Reader(read=True), config(target_modules=["table"]))


def test_pefts_unilora_has_no_embeddings(tmp_path):
    adapter = ul.attach(Tower(), config(projection="peft", alpha=None))
    with pytest.raises(ul.UniLoRAError, match=r"to_peft: 'embed': expected a linear layer .* got Embedding"):
        ul.integrations.peft.to_peft(adapter, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert", "T5"])
def test_word_tables_of_usual_models_are_adapted(kind):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9)
    if kind == "T5":
        sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    configuration = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}Model")(configuration)
    name = {"Llama": "embed_tokens", "GPT2": "wte", "Bert": "word_embeddings", "T5": "shared"}[kind]
    adapter = ul.attach(model, config(target_modules=[name], d=9))
    assert [type(layer) for layer in adapter.layers.values()] == [UniLoRAEmbedding]


def test_meta_device():
    with torch.device("meta"):
        model = Tower()
    adapter = ul.attach(model, config())
    assert adapter.vector.layout.shapes[0] == (12, 50)


def test_a_table_that_is_scaled(tmp_path):
    """Gemma's has a forward around that of nn.Embedding, which has the update; so has PEFT's LoRA."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
    configuration = transformers.Gemma3TextConfig(**sizes, intermediate_size=8, vocab_size=9)
    model, ids = transformers.Gemma3TextModel(configuration).double().eval(), torch.randint(0, 9, (2, 5))
    plain = copy.deepcopy(model)
    adapter = ul.attach(model, config(target_modules=["embed_tokens"], d=9))
    assert type(model.embed_tokens).__name__ == f"UniLoRA{type(plain.embed_tokens).__name__}"
    table = plain.embed_tokens.weight + dense_update(model, adapter)["embed_tokens"].T
    torch.testing.assert_close(model.embed_tokens(ids), table[ids] * plain.embed_tokens.embed_scale)
    y = model(ids).last_hidden_state
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).last_hidden_state, y)
    adapter.export_lora(tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(ids).last_hidden_state, y, rtol=1e-4, atol=1e-4)
    adapter.merge()
    torch.testing.assert_close(model(ids).last_hidden_state, y)
    adapter.detach()
    assert type(model.embed_tokens) is type(plain.embed_tokens)
    assert torch.equal(model(ids).last_hidden_state, plain(ids).last_hidden_state)


class Imitation(torch.Tensor):
    """A tensor that is not what it seems, as a quantised one."""


@pytest.mark.parametrize("make", [lambda: nn.Embedding(5, 3), lambda: nn.Conv2d(3, 3, 2)])
def test_a_weight_that_imitates_a_floating_one_is_refused(make):
    layer = make()
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Imitation))
    with pytest.raises(ul.AttachError, match="cannot be adapted: expected a plain floating weight, got a Imitation"):
        ul.attach(nn.Sequential(layer), config(target_modules=["0"]))
