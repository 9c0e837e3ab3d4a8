"""Pairs of texts, numbers as labels, and the figures and options that go with them, on a tiny model."""

import csv
import json
import math
import random

import pytest
import torch
from test_cli_data import WORDS, write_model

from unilora_ext.cli import main
from unilora_ext.cli.data import Row, read_rows, split_rows
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.settings import Settings

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")


def write_pairs(path, count, seed=0):
    """The label is near the sign of the second text's words; the first text says nothing."""
    generator = random.Random(seed)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["score", "one", "two"])
        for _ in range(count):
            sign = generator.randrange(2)
            words = [generator.choice(WORDS[3 * sign : 3 * sign + 3]) for _ in range(3)]
            score = 1 - 2 * sign + generator.uniform(-0.2, 0.2)
            writer.writerow([score, generator.choice(WORDS[6:]), " ".join(words)])
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: (folder of everything, metrics)."""
    folder = tmp_path_factory.mktemp("regression")
    write_model(folder / "tiny")
    write_pairs(folder / "rows.csv", 200)
    write_pairs(folder / "test.csv", 90, seed=1)
    command = f"finetune --task sequence-regression --model {folder}/tiny --data {folder}/rows.csv --test "
    command += f"{folder}/test.csv --text-column one --text-pair-column two --label-column score --output {folder}/run "
    command += "--d 64 --lr-theta 0.2 --lr-head 0.02 --batch-size 8 --epochs 4 --best pearson --device cpu"
    assert main(command.split()) == 0
    return folder, json.loads((folder / "run/report/metrics.json").read_text())


def test_run_learns_from_the_second_text(run):
    folder, metrics = run
    results = metrics["results"]
    assert results["test"]["pearson"] > 0.7 and results["test"]["spearman"] > 0.7 and results["labels"] == []
    best = max(results["epochs"], key=lambda epoch: epoch["validation_pearson"])
    assert results["best_epoch"] == best["epoch"]
    assert results["validation"]["pearson"] == pytest.approx(best["validation_pearson"], abs=1e-12)
    assert (folder / "run/report/report.png").read_bytes().startswith(b"\x89PNG")


def test_figures_are_those_of_scipy_and_the_answers_those_of_the_model(run, capsys):
    """Answers by Transformers' own forward pass of the merged model, row by row; figures by SciPy."""
    stats = pytest.importorskip("scipy.stats")
    folder, metrics = run
    with open(folder / "test.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert main(["merge", f"{folder}/run/adapter", "--output", f"{folder}/merged"]) == 0
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "merged").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tiny")
    with torch.no_grad():
        said = [model(**tokenizer(row["one"], row["two"], return_tensors="pt")).logits.item() for row in rows]
    expected, test = [float(row["score"]) for row in rows], metrics["results"]["test"]
    assert test["pearson"] == pytest.approx(stats.pearsonr(said, expected)[0], abs=1e-5)
    assert test["spearman"] == pytest.approx(stats.spearmanr(said, expected)[0], abs=1e-2)  # ranks of near-equals
    error = sum((x - y) ** 2 for x, y in zip(said, expected, strict=True)) / len(rows)
    assert test["loss"] == pytest.approx(error, rel=1e-4)
    command = ["predict", "--adapter", f"{folder}/run/adapter", "--data", f"{folder}/test.csv"]
    assert main([*command, "--output", f"{folder}/out.csv"]) == 0
    with open(folder / "out.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert list(written[0]) == ["score", "one", "two", "prediction"]
    assert [float(row["prediction"]) for row in written] == pytest.approx(said, abs=1e-4)
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[0].split("\t")[1:] == [rows[0]["one"], rows[0]["two"]]


def test_evaluate_gives_the_same_number(run):
    folder, metrics = run
    for data, part in (("test.csv", "test"), ("run/validation.csv", "validation")):
        command = f"evaluate --adapter {folder}/run/adapter --data {folder}/{data} --json {folder}/score.json"
        assert main(command.split()) == 0
        score, expected = json.loads((folder / "score.json").read_text()), metrics["results"][part]
        assert {key: score[key] for key in expected} == expected


def test_ranks_and_correlations_with_ties():
    stats = pytest.importorskip("scipy.stats")
    from unilora_ext.cli.regressor import Regressor, _ranks, _sums

    x, y = torch.randint(8, (50,)).double(), torch.randn(50).double()
    assert _ranks(x).tolist() == stats.rankdata(x.numpy()).tolist()
    score = Regressor.score_of(None, [a + b for a, b in zip(_sums(x[:20], y[:20]), _sums(x[20:], y[20:]), strict=True)])
    assert score.pearson == pytest.approx(stats.pearsonr(x.numpy(), y.numpy())[0], abs=1e-9) and score.rows == 50
    constant = Regressor.score_of(None, _sums(torch.full((9,), 0.1).double(), y[:9]))
    assert constant.pearson == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("labels", [2, 5])
def test_matthews_is_that_of_scikit_learn(labels):
    sklearn = pytest.importorskip("sklearn.metrics")
    from unilora_ext.cli.classifier import _matthews

    said, expected = torch.randint(labels, (2, 60))
    confusion = torch.zeros(labels, labels, dtype=torch.float64)
    for x, y in zip(said, expected, strict=True):
        confusion[y, x] += 1
    assert _matthews(confusion) == pytest.approx(sklearn.matthews_corrcoef(expected, said), abs=1e-12)
    assert _matthews(torch.diag(torch.tensor([3.0, 0.0]))) == 0.0


def test_decay_of_the_head_and_clipping_reach_the_trainer(tmp_path):
    from unilora_ext.cli.tasks import TASKS
    from unilora_ext.cli.trainer import AdapterTrainer

    write_model(tmp_path / "tiny")
    settings = Settings(
        model=str(tmp_path / "tiny"), data="rows", d=64, weight_decay=0.5, weight_decay_head=0.25, max_grad_norm=0.125,
        device="cpu",
    )  # fmt: skip
    task, rows = TASKS[settings.task].new(settings, ["a", "b"]), [Row("good", "a", "1"), Row("bad", "b", "2")]
    trainer = AdapterTrainer(task, rows, rows, settings, {}, tmp_path / "adapter", tmp_path / "checkpoints")
    decay = {id(p): group["weight_decay"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    head = task.model.classifier
    assert decay[id(task.adapter.theta_d)] == 0.5
    assert decay[id(head.weight)] == 0.25 and decay[id(head.bias)] == 0.0
    assert trainer.args.max_grad_norm == 0.125


@pytest.mark.parametrize("value", ["warm", "", "nan", "inf", "-100", "1e999"])
def test_labels_that_are_no_numbers(tmp_path, value):
    (tmp_path / "rows.csv").write_text(f"text,label\ngood,1.5\nbad,{value}\n")
    with pytest.raises(CliError, match="line 3: column 'label': expected a finite number"):
        read_rows(tmp_path / "rows.csv", "text", "label", numbers=True)


def test_numbers_are_read_and_split_as_they_are(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 3}\n' + '{"text": "b", "label": -0.1}\n' * 9)
    rows = read_rows(tmp_path / "rows.jsonl", "text", "label", numbers=True)
    assert [float(row.label) for row in rows] == [3.0, *[-0.1] * 9]
    training, validation = split_rows(rows, 0.3, 1, by_label=False)
    assert len(validation) == 3 and sorted([*training, *validation], key=lambda row: row.where) == sorted(
        rows, key=lambda row: row.where
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best": "pearson"}, "--best: expected loss or accuracy or matthews with --task sequence-classification"),
        ({"task": "sequence-regression", "best": "accuracy"}, "--best: expected loss or pearson with"),
        ({"text_pair_column": "text"}, "--text-column, --text-pair-column, --label-column: expected different names"),
        ({"task": "causal-lm", "text_pair_column": "two"}, "--text-pair-column: expected with --task"),
        ({"quantization": "nf4"}, "--quantization: expected with --task causal-lm only"),
        ({"weight_decay_head": math.inf}, "--weight-decay-head: expected a number >= 0"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(CliError, match=message):
        Settings(model="base", data="rows", **settings)


def test_a_text_without_its_pair(run, capsys):
    folder, _ = run
    assert main(["predict", "--adapter", f"{folder}/run/adapter", "--text", "good"]) == 2
    assert "trained on pairs ('one' and 'two')" in capsys.readouterr().err
