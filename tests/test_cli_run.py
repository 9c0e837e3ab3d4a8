"""`unilora finetune` and what is done with its adapter, on a tiny model."""

import csv
import json
import subprocess
import sys
import tempfile

import pytest
import torch
from test_cli_data import write_model, write_rows

import unilora_ext as ul
from unilora_ext.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: (folder of everything, metrics)."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "tiny")
    write_rows(folder / "rows.csv", 200)
    write_rows(folder / "test.jsonl", 100, seed=1)
    assert main(arguments(folder, "run")) == 0
    return folder, json.loads((folder / "run/report/metrics.json").read_text())


def arguments(folder, output, *more):
    command = f"finetune --model {folder}/tiny --data {folder}/rows.csv --test {folder}/test.jsonl "
    command += f"--output {folder}/{output} --d 64 --lr-theta 0.2 --lr-head 0.02 --batch-size 8"
    return [*command.split(), *more]


def fresh_process(*command):
    # Not in a source folder: there, Python would import the package that is not installed.
    words = [sys.executable, "-m", "unilora_ext", *map(str, command)]
    result = subprocess.run(words, cwd=tempfile.gettempdir(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_run_learns_and_reports(run):
    folder, metrics = run
    results = metrics["results"]
    assert results["test"]["accuracy"] > 0.7
    assert [entry["epoch"] for entry in results["epochs"]] == [1, 2, 3]
    best = min(results["epochs"], key=lambda entry: entry["validation_loss"])
    assert results["best_epoch"] == best["epoch"]
    assert results["validation"]["accuracy"] == best["validation_accuracy"]
    assert results["rows"] == {"training": 180, "validation": 20, "test": 100}
    assert (folder / "run/report/report.png").read_bytes().startswith(b"\x89PNG")
    assert metrics["timing"]["samples_per_second"] > 0


def test_sizes_are_those_of_the_files(run):
    folder, metrics = run
    sizes, file = metrics["results"]["sizes"], ul.read(folder / "run/adapter")
    (path,) = (folder / "run/adapter").glob("theta_d-*")
    assert sizes["theta_d_bytes"] == path.stat().st_size <= 4 * sizes["d"] + 4096
    assert (sizes["d"], sizes["D"]) == (64, sum((m + n) * 4 for _, m, n in file.modules))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tiny")
    assert sizes["model_parameters"] == model.num_parameters()


def test_same_settings_give_the_same_results(run, capsys):
    folder, metrics = run
    assert main(arguments(folder, "again", "--save-steps", "5")) == 0
    assert json.loads((folder / "again/report/metrics.json").read_text())["results"] == metrics["results"]
    assert "epoch 3/3" in capsys.readouterr().out
    assert main(arguments(folder, "again")) == 2  # a run is never overwritten unasked
    assert "--overwrite" in capsys.readouterr().err
    other_seed = [*arguments(folder, "again", "--overwrite"), "--seed", "1", "--epochs", "1"]
    assert main(other_seed) == 0
    assert len(json.loads((folder / "again/report/metrics.json").read_text())["results"]["epochs"]) == 1


def test_complete_run_is_left_alone(run, capsys):
    folder, _ = run
    before = (folder / "run/report/metrics.json").stat().st_mtime_ns
    assert main(["finetune", "--resume", f"{folder}/run"]) == 0
    assert "complete already" in capsys.readouterr().out
    assert (folder / "run/report/metrics.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(("data", "part"), [("test.jsonl", "test"), ("run/validation.csv", "validation")])
def test_evaluate_in_a_new_process_gives_the_same_number(run, data, part):
    folder, metrics = run
    out = fresh_process(
        "evaluate", "--adapter", folder / "run/adapter", "--data", folder / data, "--json", folder / "score.json"
    )
    score, expected = json.loads((folder / "score.json").read_text()), metrics["results"][part]
    assert {key: score[key] for key in expected} == expected
    assert repr(expected["accuracy"]) in out and repr(expected["loss"]) in out


def test_predict(run, capsys):
    folder, _ = run
    adapter = ["predict", "--adapter", f"{folder}/run/adapter"]
    assert main([*adapter, "--text", "good good wise film", "--text", "bad dull film"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["pos", "neg"] and all(0.5 <= float(line[1]) <= 1 for line in lines)
    for name in ("out.csv", "out.jsonl"):
        assert main([*adapter, "--data", f"{folder}/test.jsonl", "--output", f"{folder}/{name}"]) == 0
    with open(folder / "out.csv", newline="") as file:
        from_csv = [(*row.values(),) for row in csv.DictReader(file)]
    records = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert from_csv == [(*map(str, record.values()),) for record in records] and len(records) == 100
    given = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    for record, row in zip(records, given, strict=True):
        assert list(record) == ["text", "label", "prediction", "probability"] and record == {**record, **row}


def logits_of(model, folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model.eval()(**tokenizer(["good film", "dull story and plot"], padding=True, return_tensors="pt")).logits


def adapted(folder):
    from unilora_ext.cli.tasks import load_task_model

    return load_task_model(folder / "run/adapter")[0].model


def test_merge_gives_the_same_logits(run, capsys):
    folder, _ = run
    assert main(["merge", f"{folder}/run/adapter", "--output", f"{folder}/merged"]) == 0
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "merged")
    assert merged.config.id2label == {0: "neg", 1: "pos"}
    expected = logits_of(adapted(folder), folder / "tiny")
    torch.testing.assert_close(logits_of(merged, folder / "merged"), expected, rtol=1e-5, atol=1e-5)
    assert main(["merge", f"{folder}/run/adapter", "--output", f"{folder}/merged"]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err


def test_export_loads_in_peft(run):
    peft = pytest.importorskip("peft")
    folder, _ = run
    assert main(["export", f"{folder}/run/adapter", "--output", f"{folder}/lora"]) == 0
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "tiny")
    model = peft.PeftModel.from_pretrained(base, folder / "lora")
    expected = logits_of(adapted(folder), folder / "tiny")
    torch.testing.assert_close(logits_of(model, folder / "tiny"), expected, rtol=1e-5, atol=1e-5)


def test_inspect(run, capsys):
    folder, _ = run
    assert main(["inspect", f"{folder}/run/adapter", "--json", f"{folder}/record.json"]) == 0
    out, file = capsys.readouterr().out, ul.read(folder / "run/adapter")
    for word in ("d = 64", "D = 1,024", "D / d = 16", "r = 4", "uniform", "seed 0", file.record["fingerprint"], "x 2"):
        assert word in out, word
    assert json.loads((folder / "record.json").read_text())["d"] == 64


def test_info(capsys):
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["unilora_ext"] == ul.__version__


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        ("BertConfig", ("query", "value")),
        ("RobertaConfig", ("query", "value")),
        ("DistilBertConfig", ("q_lin", "v_lin")),
        ("DebertaV2Config", ("query_proj", "value_proj")),
        ("ElectraConfig", ("query", "value")),
        ("ModernBertConfig", ("Wqkv",)),
        ("FNetConfig", ("all-linear",)),
    ],
)
def test_default_targets(config, targets):
    from unilora_ext.cli.classifier import default_targets

    made = getattr(transformers, config)()
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(made)
    assert default_targets(model) == targets


def test_new_modules_outside_the_head_are_saved_too(tmp_path):
    """A base without a pooler: it starts at random, so the adapter must hold it."""
    from unilora_ext.cli.classifier import plain_model

    write_model(tmp_path / "tiny")
    weights = tmp_path / "tiny/model.safetensors"
    from safetensors.torch import load_file, save_file

    save_file({k: v for k, v in load_file(weights).items() if "pooler" not in k}, weights, {"format": "pt"})
    assert plain_model(str(tmp_path / "tiny"), ["a", "b"], None)[2] == ["classifier", "bert.pooler.dense"]


@pytest.mark.parametrize(("config", "limit"), [("BertConfig", 512), ("RobertaConfig", 512), ("DistilBertConfig", 512)])
def test_longest_input(config, limit):
    from unilora_ext.cli.classifier import _positions

    made = getattr(transformers, config)(pad_token_id=1)
    if config == "RobertaConfig":
        made.max_position_embeddings = 514  # as in the published models: two rows are not used
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(made)
    assert _positions(model) == limit


@pytest.mark.parametrize(("hidden", "layers", "d"), [(32, 2, 256), (384, 6, 4096), (1024, 24, 22528)])
def test_default_d(hidden, layers, d, monkeypatch):
    """That of UniLoRAConfig."""
    from unilora_ext.cli import classifier
    from unilora_ext.cli.settings import Settings

    made = transformers.BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=1, intermediate_size=8, vocab_size=8
    )
    with torch.device("meta"):
        bert = transformers.AutoModelForSequenceClassification.from_config(made)
    monkeypatch.setattr(classifier, "plain_model", lambda *_: (bert, None, ["classifier"], 128))
    adapter = classifier.Classifier.new(Settings(model="base", data="rows"), ["a", "b"]).adapter
    assert adapter.config.d == d == ul.default_d(adapter.projection.D)
