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


def test_one_process_tells_the_error(tmp_path):
    result = launch(tmp_path, "finetune", "--task", "causal-lm", "--model", "tiny", "--data", "missing.jsonl")
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if "unilora finetune: error:" in line]
    assert len(errors) == 1 and "missing.jsonl: expected a .jsonl, .csv or .txt file, got no such file" in errors[0]
    assert "exitcode  : 2" in result.stderr and 'Traceback (most recent call last):\n  File "/' not in result.stdout
    assert list(tmp_path.iterdir()) == []
