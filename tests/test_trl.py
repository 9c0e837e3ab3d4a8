"""TRL's trainers: adapters by peft_config, a reference without a second copy of the weights, QLoRA, the examples."""

import copy
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unilora_ext as ul

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")

from test_cli_causal_data import make_tokenizer  # noqa: E402

from unilora_ext.integrations.trl import DPOTrainer, GRPOTrainer, SFTTrainer, reference  # noqa: E402

CONFIG = ul.UniLoRAConfig(r=3, d=60, target_modules=["q_proj", "v_proj"], init_bound=0.2)
TEXTS = ["a warm film", "two hours", "nothing new", "the plot is thin"] * 2
ARGUMENTS = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": 0.05,
    "max_steps": 3,
    "logging_steps": 1,
}
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of two layers, random but for the seed."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=64, max_position_embeddings=96, eos_token_id=3, bos_token_id=1, pad_token_id=3,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return transformers.LlamaForCausalLM.from_pretrained(folder)


def rows(**columns):
    return datasets.Dataset.from_dict(columns)


def texts():
    return rows(text=TEXTS)


def pairs():
    return rows(prompt=TEXTS, chosen=TEXTS[::-1], rejected=TEXTS[1:] + TEXTS[:1])


def weights():
    """Bytes of all 64 x 64 weights in the process: how many models there are."""
    gc.collect()
    return sum(isinstance(each, torch.nn.Parameter) and each.shape == (64, 64) for each in gc.get_objects())


# ---- SFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["peft_config", "a name", "attached", "TRL's own"])
def test_sft(model, folder, tmp_path, how):
    """All ways train the same vector, and save it."""
    arguments = trl.SFTConfig(str(tmp_path / "out"), per_device_train_batch_size=4, **ARGUMENTS)
    if how in ("attached", "TRL's own"):
        transformers.set_seed(arguments.seed)
        ul.attach(model, CONFIG)
    kind = trl.SFTTrainer if how == "TRL's own" else SFTTrainer
    options = {"peft_config": CONFIG} if how in ("peft_config", "a name") else {}
    trainer = kind(
        str(folder) if how == "a name" else model,
        arguments,
        train_dataset=texts(),
        processing_class=make_tokenizer(),
        **options,
    )
    frozen = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    trainer.save_model()
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.model.named_parameters() if name in frozen)
    got = ul.read(tmp_path / "out").theta_d

    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    transformers.set_seed(arguments.seed)
    ul.attach(plain, CONFIG)
    again = trl.SFTTrainer(
        plain,
        trl.SFTConfig(str(tmp_path / "again"), per_device_train_batch_size=4, **ARGUMENTS),
        train_dataset=texts(),
        processing_class=make_tokenizer(),
    )
    start = ul.get_adapter(plain).theta_d.detach().clone()
    again.train()
    assert torch.equal(got, ul.get_adapter(plain).theta_d) and not torch.equal(got, start)


def test_qlora(folder, tmp_path):
    """On nf4: TRL narrows what is trained to bfloat16, in which small steps are lost; here it stays float32."""
    pytest.importorskip("bitsandbytes")
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    arguments = trl.SFTConfig(
        str(tmp_path / "out"), per_device_train_batch_size=4, model_init_kwargs={"device_map": "cpu"}, **ARGUMENTS
    )
    trainer = SFTTrainer(
        str(folder), arguments, train_dataset=texts(), processing_class=make_tokenizer(), peft_config=CONFIG,
        quantization_config=nf4,
    )  # fmt: skip
    adapter = ul.get_adapter(trainer.model)
    assert adapter.theta_d.dtype == torch.bfloat16  # so far
    trainer.train()
    trainer.save_model()
    saved = ul.read(tmp_path / "out").theta_d
    assert adapter.theta_d.dtype == saved.dtype == torch.float32
    assert not torch.equal(saved, saved.bfloat16().float())
    assert type(trainer.model.model.layers[0].self_attn.q_proj.weight).__name__ == "Params4bit"


def test_wrong_arguments_leave_the_model(model, tmp_path):
    lora = pytest.importorskip("peft").LoraConfig(target_modules=["q_proj"])
    arguments = trl.SFTConfig(str(tmp_path), **ARGUMENTS)
    with pytest.raises(TypeError, match="must be a `peft"):  # TRL's own, of TRL's own trainer
        trl.SFTTrainer(model, arguments, train_dataset=texts(), processing_class=make_tokenizer(), peft_config=CONFIG)
    with pytest.raises(ul.AttachError, match="no module of LlamaForCausalLM"):
        wrong = ul.UniLoRAConfig(r=3, d=60, target_modules=["nothing"])
        SFTTrainer(model, arguments, train_dataset=texts(), processing_class=make_tokenizer(), peft_config=wrong)
    with pytest.raises(ul.AttachError):
        ul.get_adapter(model)
    ul.attach(model, ul.UniLoRAConfig(r=3, d=60, target_modules=["lm_head"]))
    with pytest.raises(ul.UniLoRAError, match="the output head is adapted"):
        SFTTrainer(model, arguments, train_dataset=texts(), processing_class=make_tokenizer())
    with pytest.raises(ul.UniLoRAError, match="expected none for a model that has an adapter"):
        SFTTrainer(model, arguments, train_dataset=texts(), processing_class=make_tokenizer(), peft_config=lora)


# ---- references -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("whole", [[], ["lm_head"]])
def test_a_reference_is_the_model_before(model, whole, start):
    """Whatever was trained since; the model's own pass, between whose halves it runs, is as without it."""
    x = torch.randint(4, 60, (2, 9))
    with torch.no_grad():
        before = model.eval()(x).logits
    config = ul.UniLoRAConfig(r=3, d=60, target_modules=["q_proj"], modules_to_save=whole, init_bound=0.3, dropout=0.5)
    adapter = ul.attach(model, config)
    with torch.no_grad():
        expected = model(x).logits if start else before
    old = reference(model, start)
    with torch.no_grad():
        for tensor in (adapter.theta_d, *adapter.modules_to_save().values()):
            tensor.mul_(1.5)
    trained = {**adapter.trained, **adapter.modules_to_save()}
    other = copy.deepcopy(model)
    assert not torch.allclose(model(x).logits, expected)
    for each in (model, other):
        each.train()
        torch.manual_seed(1)
        loss = each(input_ids=x, labels=x).loss
        if each is model:
            assert torch.equal(old(input_ids=x).logits, expected) and not old(x).logits.requires_grad
        loss.backward()
        assert all(module.training for module in each.modules())
    assert torch.equal(adapter.theta_d.grad, ul.get_adapter(other).theta_d.grad)
    assert all(torch.equal(t, trained[name]) for name, t in {**adapter.trained, **adapter.modules_to_save()}.items())
    assert not list(old.parameters()) and old.config is model.config


@pytest.mark.parametrize("how", ["peft_config", "attached", "TRL's own"])
def test_dpo(model, folder, tmp_path, how):
    """As with a second copy of the reference, without one."""
    arguments = trl.DPOConfig(str(tmp_path / "out"), per_device_train_batch_size=4, seed=3, **ARGUMENTS)

    def trained(kind, model, **options):
        trainer = kind(
            model, args=copy.deepcopy(arguments), train_dataset=pairs(), processing_class=make_tokenizer(), **options
        )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return ul.get_adapter(model).theta_d.detach(), losses

    plain = transformers.LlamaForCausalLM.from_pretrained(folder)
    transformers.set_seed(arguments.seed)
    ul.attach(plain, CONFIG)
    second = copy.deepcopy(plain) if how == "attached" else transformers.LlamaForCausalLM.from_pretrained(folder)
    expected, losses = trained(trl.DPOTrainer, plain, ref_model=second)
    del plain, second
    before = weights()
    if how == "peft_config":
        got, ours = trained(DPOTrainer, model, peft_config=CONFIG)
    else:
        transformers.set_seed(arguments.seed)
        ul.attach(model, CONFIG)
        options = {"ref_model": reference(model)} if how == "TRL's own" else {}
        got, ours = trained(trl.DPOTrainer if options else DPOTrainer, model, **options)
    assert weights() <= before
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert len(losses) == 3 and ours == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("name", ["sync_ref_model", "precompute_ref_log_probs"])
def test_dpo_refuses(model, tmp_path, name):
    arguments = trl.DPOConfig(str(tmp_path), **ARGUMENTS, **{name: True})
    with pytest.raises(ul.UniLoRAError, match=f"args.{name}: expected False"):
        DPOTrainer(model, args=arguments, train_dataset=pairs(), processing_class=make_tokenizer(), peft_config=CONFIG)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_grpo(model, folder, tmp_path, beta):
    """The reference's log-probabilities are those of the base model, and no second model is there."""
    arguments = trl.GRPOConfig(
        str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=4, max_completion_length=6, beta=beta,
        **{**ARGUMENTS, "learning_rate": 0.2},
    )  # fmt: skip
    before = weights()
    trainer = GRPOTrainer(
        model, lambda completions, **_: [float(len(text)) for text in completions], arguments,
        train_dataset=rows(prompt=TEXTS), processing_class=make_tokenizer(), peft_config=CONFIG,
    )  # fmt: skip
    assert weights() == before and arguments.beta == trainer.beta == trainer.args.beta == beta
    seen = []
    compute = trainer._compute_loss

    def spied(model, inputs):
        seen.append({name: inputs[name] for name in inputs if isinstance(inputs[name], torch.Tensor)})
        return compute(model, inputs)

    trainer._compute_loss = spied
    start = ul.get_adapter(model).theta_d.detach().clone()
    trainer.train()
    assert not torch.equal(ul.get_adapter(model).theta_d, start)
    base = transformers.LlamaForCausalLM.from_pretrained(folder).eval()
    for inputs in seen:
        if not beta:
            assert "ref_per_token_logps" not in inputs
            continue
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        with torch.no_grad():
            logits = base(ids, attention_mask=mask).logits[:, :-1] / trainer.temperature
        wanted = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0][:, -inputs["completion_ids"].shape[1] :]
        keep = inputs["completion_mask"].bool()
        torch.testing.assert_close(inputs["ref_per_token_logps"][keep], wanted[keep], rtol=1e-4, atol=1e-4)
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert bool(kl) == bool(beta) and all(value > 0 for value in kl)


@pytest.mark.parametrize("name", ["sync_ref_model", "use_vllm"])
def test_grpo_refuses(model, tmp_path, name):
    arguments = trl.GRPOConfig(str(tmp_path), beta=0.1, **ARGUMENTS)
    setattr(arguments, name, True)
    with pytest.raises(ul.UniLoRAError, match=f"args.{name}: expected False"):
        GRPOTrainer(
            model, lambda completions, **_: [0.0] * len(completions), arguments, train_dataset=rows(prompt=TEXTS),
            processing_class=make_tokenizer(), peft_config=CONFIG,
        )  # fmt: skip


# ---- the examples ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("sft.py", ["--batch-size", "4"]),
        ("sft.py", ["--batch-size", "4", "--four-bit"]),
        ("dpo.py", ["--batch-size", "4"]),
        ("grpo.py", ["--batch-size", "2", "--steps", "2", "--length", "4"]),
    ],
)
def test_examples(folder, tmp_path, script, options):
    """A newcomer's run: an adapter that loads."""
    if "--four-bit" in options:
        pytest.importorskip("bitsandbytes")
    kinds = {"sft.py": ["text"], "dpo.py": ["prompt", "chosen", "rejected"], "grpo.py": ["prompt"]}
    lines = [{name: TEXTS[(i + k) % 4] for k, name in enumerate(kinds[script])} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, "--model", folder, "--data", "rows.jsonl", "--output", "out", *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    adapter = ul.load(model, tmp_path / "out")
    fresh = ul.attach(transformers.LlamaForCausalLM.from_pretrained(folder), adapter.config)
    assert not torch.equal(adapter.theta_d, fresh.theta_d)
