"""`unilora finetune` on two processes: the adapter of one, written and told by one. Gloo, on the CPU."""

import json
import subprocess
import sys

import pytest
import torch
from test_cli_causal_data import write_decoder, write_records
from test_cli_data import write_model, write_rows

import unilora_ext as ul
from unilora_ext.cli import main
from unilora_ext.cli.conversations import read_conversations

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")


def launch(cwd, *arguments):
    """``--`` keeps torchrun from reading our --d and --r as beginnings of its own options."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "--", "unilora_ext", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def without_dropout(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}))


@pytest.mark.parametrize("task", ["causal-lm", pytest.param("sequence-classification", marks=pytest.mark.slow)])
def test_two_processes_give_the_adapter_of_one(tmp_path, task):
    """Of 45 rows, the last step of 8 has 5, or 1 where two processes work in two parts."""
    if task == "causal-lm":
        write_decoder(tmp_path / "tiny")
        write_records(tmp_path / "rows.data.jsonl", 45)
        rows = write_records(tmp_path / "validation.jsonl", 7, seed=1)
    else:
        without_dropout(write_model(tmp_path / "tiny"))
        write_rows(tmp_path / "rows.data.jsonl", 45)
        rows = write_rows(tmp_path / "validation.jsonl", 7, seed=1)
    command = f"finetune --task {task} --model tiny --data rows.data.jsonl --validation {rows} --d 64 --epochs 2 "
    command += "--batch-size 8 --lr-theta 0.05 --save-steps 4 --output "
    absolute = (command.replace("tiny", f"{tmp_path}/tiny").replace("rows.data", f"{tmp_path}/rows.data")).split()
    assert main([*absolute, f"{tmp_path}/one"]) == 0
    result = launch(tmp_path, *command.split(), "two", "--gradient-accumulation", "2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("best adapter") == result.stdout.count("epoch 2/2") == 1

    one, two = (json.loads((tmp_path / name / "report/metrics.json").read_text()) for name in ("one", "two"))
    assert two["environment"]["processes"] == 2
    torch.testing.assert_close(
        ul.read(tmp_path / "two/adapter").theta_d, ul.read(tmp_path / "one/adapter").theta_d, rtol=1e-3, atol=1e-4
    )
    assert two["results"]["best_step"] == one["results"]["best_step"]
    for ours, theirs in zip(two["results"]["epochs"], one["results"]["epochs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)

    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    again = tmp_path / "two/report/metrics.json"
    again.unlink()  # as if killed before the report: it goes on from the last checkpoint, here on one process
    assert main(["finetune", "--resume", f"{tmp_path}/two"]) == 0
    assert json.loads(again.read_text())["results"]["validation"] == pytest.approx(two["results"]["validation"])


@pytest.mark.parametrize("processes", [1, 2])
def test_shares_of_a_step_add_up_to_its_gradient(tmp_path, monkeypatch, processes):
    """Every row once, and the mean over the processes is the gradient of the mean over all tokens."""
    from unilora_ext.cli import distributed
    from unilora_ext.cli.settings import Settings
    from unilora_ext.cli.tasks import TASKS
    from unilora_ext.cli.trainer import AdapterTrainer

    write_decoder(tmp_path / "tiny")
    settings = Settings(
        model=f"{tmp_path}/tiny", data="-", task="causal-lm", d=50, batch_size=8, gradient_accumulation=2, device="cpu"
    )
    task = TASKS["causal-lm"].new(settings)
    records = write_records(tmp_path / "rows.jsonl", 13)
    rows, _ = task.ready(read_conversations(records, "text"))
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    trainer = AdapterTrainer(task, rows, rows[:1], settings, {}, tmp_path / "adapter", tmp_path / "checkpoints")
    shares = []
    for rank in range(processes):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(list(trainer.get_train_dataloader()))
        assert len(shares[-1]) == 4  # two steps of two parts
    for step in range(2):
        parts = [batch for share in shares for batch in share[2 * step : 2 * step + 2]]
        learnt = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in parts)
        assert sum(int((batch["labels"] != -100).any(1).sum()) for batch in parts) == (8, 5)[step]
        task.adapter.theta_d.grad = None
        for batch in parts:
            (trainer.compute_loss(task.model, batch, num_items_in_batch=learnt) / processes).backward()
        theirs, task.adapter.theta_d.grad = task.adapter.theta_d.grad, None
        losses = []
        for batch in parts:
            labels = batch.pop("labels")
            logits = task.model(**batch).logits[:, :-1]
            losses.append(torch.nn.functional.cross_entropy(logits.mT, labels[:, 1:], reduction="sum"))
        (sum(losses) / learnt).backward()
        torch.testing.assert_close(theirs, task.adapter.theta_d.grad, rtol=1e-4, atol=1e-6)


def test_one_process_tells_the_error(tmp_path):
    result = launch(tmp_path, "finetune", "--task", "causal-lm", "--model", "tiny", "--data", "missing.jsonl")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if "unilora finetune: error:" in line]
    assert len(errors) == 1 and "missing.jsonl: expected a .jsonl, .csv, .tsv or .txt file, got no such" in errors[0]
    assert "exitcode  : 2" in result.stderr and 'Traceback (most recent call last):\n  File "/' not in result.stdout
    assert list(tmp_path.iterdir()) == []
