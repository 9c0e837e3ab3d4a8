"""Transformers' Trainer and Accelerate on an attached model: nothing but attach() is needed."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import unilora_ext as ul

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402

# Models are float64: Adam divides by the gradient's size, so that rounding alone moves small entries in float32.
ROWS, CLASSES = 24, 3


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """Accelerate keeps its settings in the process."""
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def bert(dtype=torch.float64):
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, intermediate_size=20,
        max_position_embeddings=16, num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).to(dtype)
    ul.attach(
        model,
        ul.UniLoRAConfig(r=3, d=70, target_modules=["query", "value"], modules_to_save=["classifier"], init_bound=0.5),
    )
    return model


def llama(tied=False, dtype=torch.float64):
    config = transformers.LlamaConfig(
        vocab_size=60, hidden_size=12, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=20, max_position_embeddings=32, tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(dtype)
    ul.attach(model, ul.UniLoRAConfig(r=3, d=70, target_modules="all-linear", init_bound=0.5))
    return model


def rows(model):
    ids = torch.randint(1, 60, (ROWS, 7))
    labels = torch.randint(0, CLASSES, (ROWS,)) if hasattr(model, "classifier") else ids
    return [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)]


class InOrder(transformers.Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(model, data, folder, **changes):
    """A Trainer of 6 steps on rows in their order."""
    options = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 0.02,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        **changes,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **options)
    return InOrder(model, arguments, train_dataset=data, eval_dataset=data[:8])


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(got, expected, tolerance=0.0):
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("make", [bert, llama])
def test_trainer_is_the_plain_loop(make, tmp_path):
    """AdamW with a linear schedule and clipping on dense W + B A, written out; frozen weights stay as they were."""
    model = make()
    plain, data, frozen = copy.deepcopy(model), rows(model), copy.deepcopy(model.state_dict())
    adapter = ul.get_adapter(plain)
    P, theta_d = adapter.projection.dense(), adapter.theta_d.detach().clone().requires_grad_()
    shapes = {name: layer.weight.shape for name, layer in adapter.layers.items()}
    adapter.detach()
    trainer(model, data, tmp_path).train()

    def weights():
        theta_D, start, changed = P @ theta_d, 0, {}
        for name, (m, n) in shapes.items():
            B, A = theta_D[start : start + 3 * m].view(m, 3), theta_D[start + 3 * m : start + 3 * (m + n)].view(3, n)
            changed[f"{name}.weight"] = plain.get_parameter(f"{name}.weight").detach() + B @ A
            start += 3 * (m + n)
        return changed

    parameters = {"unilora.theta_d": theta_d}
    parameters |= {name: p for name, p in plain.named_parameters() if name.startswith("classifier")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.02, weight_decay=0.0)
    for step in range(6):
        batch = data[step % 3 * 8 :][:8]
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (6 - step) / 6
        batch = {key: torch.stack([row[key] for row in batch]) for key in batch[0]}
        torch.func.functional_call(plain, weights(), (), batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(trained(model), {name: p.detach() for name, p in parameters.items()}, 1e-9)
    after = model.state_dict()
    assert {name for name in frozen if not torch.equal(frozen[name], after[name])} == set(parameters)


@pytest.mark.parametrize("make", [bert, llama])
def test_gradient_checkpointing(make, tmp_path):
    model = make()
    data, models = rows(model), {mode: copy.deepcopy(model) for mode in (None, True, False)}
    for mode, each in models.items():
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": mode}}
        trainer(each, data, tmp_path, max_steps=3, **({} if mode is None else options)).train()
    assert not torch.equal(trained(models[None])["unilora.theta_d"], trained(model)["unilora.theta_d"])
    for mode in (True, False):
        assert any(getattr(part, "gradient_checkpointing", False) for part in models[mode].modules())
        assert_same(trained(models[mode]), trained(models[None]), 1e-9)


class Grows(transformers.TrainerCallback):
    """A theta_d of 210 numbers after the second step."""

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        if state.global_step == 2:
            ul.get_adapter(model).grow(210, optimizer)


def test_theta_d_grows_in_a_callback(tmp_path):
    """A run that has grown is resumed, to the bit, by one that had the length from the start."""
    model = llama()
    data, fresh = rows(model), copy.deepcopy(model)
    run = trainer(model, data, tmp_path, save_strategy="steps", save_steps=3)
    run.add_callback(Grows())
    run.train()
    adapter = ul.get_adapter(model)
    assert adapter.theta_d.shape == (210,) and run.optimizer.state[adapter.theta_d]["step"] == 6
    ul.get_adapter(fresh).detach()
    ul.attach(fresh, adapter.config)
    trainer(fresh, data, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same(trained(fresh), trained(model))


def test_gradient_accumulation_is_the_big_batch(tmp_path):
    model = llama()
    data, big = rows(model), copy.deepcopy(model)
    trainer(big, data, tmp_path, max_steps=3).train()
    trainer(model, data, tmp_path, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=4).train()
    assert_same(trained(model), trained(big), 1e-9)


@pytest.mark.parametrize("make", [bert, llama])
def test_resume_is_the_uninterrupted_run(make, tmp_path):
    model = make(dtype=torch.float32)
    data, resumed = rows(model), copy.deepcopy(model)
    trainer(model, data, tmp_path, save_strategy="steps", save_steps=2).train()
    with torch.no_grad():
        for parameter in resumed.parameters():
            if parameter.requires_grad:
                parameter.zero_()  # all must come from the checkpoint
    trainer(resumed, data, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert_same(trained(resumed), trained(model))


@pytest.mark.parametrize("tied", [False, True])
def test_save_model_and_load_best(tied, tmp_path):
    """The adapter alone, of a model with and without tied weights; the best step is put back at the end."""
    model = llama(tied)
    data, untouched = rows(model), copy.deepcopy(model)
    run = trainer(
        model, data, tmp_path, learning_rate=0.5, lr_scheduler_type="constant", load_best_model_at_end=True,
        save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)

    from safetensors.torch import load_file

    state = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert state.keys() == {"unilora.theta_d"} and torch.equal(state["unilora.theta_d"], ul.get_adapter(model).theta_d)
    run.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    fresh = ul.get_adapter(untouched).detach()
    ul.load(fresh, tmp_path / "saved")
    ids = data[0]["input_ids"][None]
    assert torch.equal(fresh(ids).logits, model(ids).logits)


def test_accelerate(tmp_path):
    """prepare, accumulate, clip_grad_norm_, save_state and load_state, against the same loop by hand."""
    model = bert()
    by_hand, data = copy.deepcopy(model), rows(model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    def epoch():
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()

    epoch()
    parameters = [p for p in by_hand.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, lr=0.02)
    for start in (0, 12):
        batch = data[start : start + 12]
        by_hand(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        plain.step()
        plain.zero_grad()
    assert_same(trained(model), trained(by_hand), 1e-9)

    accelerator.save_state(str(tmp_path))
    epoch()
    expected = trained(model)
    accelerator.load_state(str(tmp_path))
    assert_same(trained(model), trained(by_hand), 1e-9)
    epoch()
    assert_same(trained(model), expected)


def test_accelerate_mixed_precision():
    """bf16 autocast: theta_d and its gradient stay float32, near those of float32."""
    model = bert(torch.float32)
    exact, data = copy.deepcopy(model), rows(model)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare(model)
    loss = model(**batch).loss
    accelerator.backward(loss)
    exact(**batch).loss.backward()
    got, expected = ul.get_adapter(model).theta_d, ul.get_adapter(exact).theta_d
    assert got.dtype == got.grad.dtype == torch.float32 and not torch.equal(got.grad, expected.grad)
    assert (got.grad - expected.grad).norm() < 0.05 * expected.grad.norm()


def test_two_processes(tmp_path):
    """torchrun: DDP with half the batch on each process, and tensor parallelism, are what one process computes."""
    model = llama()
    data = rows(model)
    ids = torch.stack([row["input_ids"] for row in data])
    sharded = copy.deepcopy(model)
    loss = model(ids, labels=ids).loss
    loss.backward()
    theta_d = ul.get_adapter(model).theta_d
    by_tensor_parallelism, theta_d.grad = {"loss": loss.detach(), "grad": theta_d.grad}, None
    torch.save((ul.get_adapter(sharded).detach(), theta_d.detach().clone(), ids), tmp_path / "sharded.pt")
    torch.save((model, data), tmp_path / "start.pt")
    trainer(model, data, tmp_path, max_steps=3).train()

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*command, Path(__file__).with_name("trainer_worker.py"), tmp_path],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-8000:]
    assert_same(torch.load(tmp_path / "trained.pt"), trained(model), 1e-9)
    assert_same(torch.load(tmp_path / "by_tensor_parallelism.pt"), by_tensor_parallelism, 1e-9)
