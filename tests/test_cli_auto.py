"""`unilora finetune --d auto`: theta_d grows where validation stalls."""

import csv
import json
from math import sqrt

import pytest
import torch
from test_cli_data import write_model, write_rows

import unilora_ext as ul
from unilora_ext.cli import checkpoints, main
from unilora_ext.cli.growth import first_d

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

LENGTHS = [64, 256, 1024]  # of D = 4,096 at r = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A model, rows, and rows whose labels are exchanged: what is learnt makes their loss rise."""
    folder = tmp_path_factory.mktemp("auto")
    write_model(folder / "tiny")
    write_rows(folder / "rows.csv", 200)
    write_rows(folder / "right.csv", 60, seed=1)
    with open(folder / "right.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    first, second = sorted({row["label"] for row in rows})
    with open(folder / "wrong.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows({**row, "label": second if row["label"] == first else first} for row in rows)
    return folder


def arguments(data, output, validation, *more):
    command = f"finetune --model {data}/tiny --data {data}/rows.csv --validation {data}/{validation} --output {output} "
    return [*(command + "--d auto --r 16 --lr-head 0.02 --batch-size 8").split(), *more]


def results(output):
    return json.loads((output / "report/metrics.json").read_text())["results"]


@pytest.fixture(scope="module")
def stalled(data):
    assert main(arguments(data, data / "stalled", "wrong.csv", "--epochs", "5")) == 0
    return data / "stalled"


def test_grows_where_validation_stalls(stalled, capsys):
    epochs = results(stalled)["epochs"]
    losses = [entry["validation_loss"] for entry in epochs]
    d = 0
    for number, entry in enumerate(epochs):
        assert entry["d"] == LENGTHS[d]
        if number and losses[number] >= min(losses[:number]) and d + 1 < len(LENGTHS):
            d += 1
    assert [entry["d"] for entry in epochs][-1] == LENGTHS[-1]


def test_the_best_adapter_has_the_d_that_it_was_best_with(stalled):
    found = results(stalled)
    best = min(found["epochs"], key=lambda entry: entry["validation_loss"])
    assert ul.read(stalled / "adapter").theta_d.numel() == best["d"] == found["sizes"]["d"]
    assert found["validation"]["loss"] == best["validation_loss"]


def test_says_so_and_moves_theta_D_as_before(data, tmp_path, capsys):
    assert main(arguments(data, tmp_path / "run", "wrong.csv", "--epochs", "3", "--schedule", "constant")) == 0
    out = capsys.readouterr().out
    assert "from d = 64 that may grow to 1,024" in out
    assert "validation loss has not improved: d 64 -> 256" in out
    (last,) = [path for path in (tmp_path / "run/checkpoints").iterdir() if path.name == "checkpoint-75"]
    state = torch.load(last / "optimizer.pt", weights_only=True)["param_groups"][0]
    D, d = 4_096, results(tmp_path / "run")["epochs"][-1]["d"]
    assert d > 64 and state["lr"] == pytest.approx(2 / 128 * sqrt(D / d)) == pytest.approx(state["initial_lr"])


def test_does_not_grow_while_validation_improves(data, tmp_path):
    assert main(arguments(data, tmp_path / "run", "right.csv", "--epochs", "3", "--schedule", "constant")) == 0
    epochs = results(tmp_path / "run")["epochs"]
    losses = [entry["validation_loss"] for entry in epochs]
    for number, entry in enumerate(epochs):
        stalls = sum(losses[i] >= min(losses[:i]) for i in range(1, number))
        assert entry["d"] == LENGTHS[min(stalls, 2)]


def test_goes_on_after_an_interruption_as_if_there_was_none(data, stalled, tmp_path, monkeypatch):
    """With the d, the optimizer's moments and the rates of that moment."""
    from unilora_ext.cli.trainer import AdapterTrainer

    save = AdapterTrainer._save_checkpoint

    def interrupted(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if self.state.global_step == 110:
            raise KeyboardInterrupt

    monkeypatch.setattr(AdapterTrainer, "_save_checkpoint", interrupted)
    output = tmp_path / "run"
    assert main(arguments(data, output, "wrong.csv", "--epochs", "5", "--save-steps", "10")) == 130
    monkeypatch.undo()
    assert ul.read(checkpoints.latest(output / "checkpoints") / "adapter").theta_d.numel() > LENGTHS[0]
    assert main(["finetune", "--resume", str(output)]) == 0
    assert results(output) == results(stalled)
    one, other = (ul.read(folder / "adapter") for folder in (output, stalled))
    assert torch.equal(one.theta_d, other.theta_d)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--projection", "fastfood"], "--d auto: expected a projection whose columns split"),
        (["--d", "some"], "argument --d: invalid length value: 'some'"),
        (["--d", "0"], "--d: expected an integer >= 1, or auto, got 0"),
    ],
)
def test_what_cannot_grow(data, tmp_path, capsys, more, message):
    try:
        status = main(arguments(data, tmp_path / "run", "right.csv", *more))
    except SystemExit as end:
        status = end.code
    assert status == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_more_than_one_process_is_refused(data, tmp_path, capsys, monkeypatch):
    from unilora_ext.cli import distributed

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert main(arguments(data, tmp_path / "run", "right.csv")) == 2
    assert "--d auto: expected one process, got 2" in capsys.readouterr().err


@pytest.mark.parametrize("last", [1, 56, 64, 255, 256, 2_048, 65_536, 524_288, 22_528])
def test_first_d(last):
    d, times = first_d(last), 0
    while d < last:
        d, times = 4 * d, times + 1
    assert d == last and times <= 3
    assert first_d(last) >= 64 or times == 0
    assert times == 3 or first_d(last) % 4 or first_d(last) < 256  # no further
