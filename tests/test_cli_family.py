"""`unilora finetune --projection NAME` and `unilora properties`, on a tiny model."""

import json
import math
import re

import pytest
import safetensors.torch
import torch
from test_cli_data import write_model, write_rows

import unilora_ext as ul
from unilora_ext.cli import main
from unilora_ext.family import FAMILY

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

OPTIONS = {
    "vblora": ["num_vectors=16", "save_only_topk=true"],
    "tinylora": ["u=8"],
    "fourierft": ["n_frequency=20"],
    "loraxs": ["sigma=false"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    write_model(folder / "tiny")
    write_rows(folder / "rows.csv", 60)
    return folder


def finetune(folder, output, *more):
    command = f"finetune --model {folder}/tiny --data {folder}/rows.csv --output {folder}/{output} --batch-size 8"
    return main([*command.split(), "--epochs", "2", *more])


@pytest.mark.parametrize("name", FAMILY)
def test_a_run_with_every_projection(folder, name, capsys):
    """The numbers of the run come out of its file again; the file is exported where the update has factors."""
    options = ["--projection-option", *OPTIONS[name]] if name in OPTIONS else []
    assert finetune(folder, name, "--projection", name, *options) == 0
    metrics = json.loads((folder / name / "report/metrics.json").read_text())
    assert all(math.isfinite(epoch["train_loss"]) for epoch in metrics["results"]["epochs"])
    file = ul.read(folder / name / "adapter")
    assert file.config.projection == name and file.record["projection"]["name"] == name
    capsys.readouterr()
    assert main(["inspect", str(folder / name / "adapter")]) == 0
    assert f"name {name}" in capsys.readouterr().out
    rows = ["--data", str(folder / name / "validation.csv"), "--json", str(folder / f"{name}.json")]
    assert main(["evaluate", "--adapter", str(folder / name / "adapter"), *rows]) == 0
    got = json.loads((folder / f"{name}.json").read_text())
    assert got["loss"] == metrics["results"]["validation"]["loss"]
    exported = main(["export", str(folder / name / "adapter"), "--output", str(folder / f"{name}-lora")])
    message = capsys.readouterr().err
    if name == "fourierft":
        assert exported != 0 and "expected a low-rank update" in message and not (folder / f"{name}-lora").exists()
    else:
        assert exported == 0
        tensors = safetensors.torch.load_file(folder / f"{name}-lora" / "adapter_model.safetensors")
        assert sum("lora_A" in key for key in tensors) == len(file.modules)


def test_trained_parts_survive_an_interruption(folder, monkeypatch):
    """A run that is stopped between checkpoints goes on as if it had not been."""
    from unilora_ext.cli.trainer import AdapterTrainer

    options = ["num_vectors=16", "save_only_topk=true"]  # the best adapter is small, checkpoints are not
    more = ["--projection", "vblora", "--projection-option", *options, "--save-steps", "3"]
    assert finetune(folder, "straight", *more) == 0
    step, steps = AdapterTrainer.training_step, []

    def interrupted(self, *args, **kwargs):
        steps.append(0)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(AdapterTrainer, "training_step", interrupted)
        assert finetune(folder, "stopped", *more) != 0
    assert main(["finetune", "--resume", str(folder / "stopped")]) == 0
    straight, stopped = (ul.read(folder / name / "adapter") for name in ("straight", "stopped"))
    assert torch.equal(straight.theta_d, stopped.theta_d)
    assert set(straight.parts) == {"topk_indices", "topk_weights"}
    assert all(torch.equal(straight.parts[name], stopped.parts[name]) for name in straight.parts)
    assert "logits" in ul.read(next((folder / "stopped/checkpoints").iterdir()) / "adapter").parts


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--projection", "fastfod"], "--projection: expected one of identity, uniform"),
        (["--projection", "vera", "--d", "7"], r"d: expected \d+ or None, which the sizes give 'vera'; got 7"),
        (["--projection-option", "normalize"], "--projection-option: expected NAME=VALUE"),
        (
            ["--projection-option", "sigma=true"],
            r"projection_options: expected \['normalize'\] for 'uniform', got 'sig",
        ),
        (["--projection-option", "normalize=3"], r"projection_options\['normalize'\]: expected True or False, got 3"),
        (["--projection", "loraxs", "--r", "40"], "r: expected at most 32 for 'loraxs'"),
    ],
)
def test_wrong_projections_are_refused_before_anything_is_written(folder, more, message, capsys):
    assert finetune(folder, "refused", *more) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (folder / "refused").exists()


def test_properties(folder, capsys):
    out = [f"{folder}/properties.json", f"{folder}/properties.png"]
    command = ["properties", "--model", f"{folder}/tiny", "--d", "64", "--json", out[0], "--picture", out[1]]
    some = ["uniform", "local", "nonuniform", "vera", "identity", "loraxs", "fastfood"]
    assert main([*command, "--projection", *some]) == 0
    rows = {row["projection"]: row for row in json.loads((folder / "properties.json").read_text())}
    assert list(rows) == some
    ticks = {name: (row["global"], row["uniform"], row["isometric"]) for name, row in rows.items()}
    assert ticks["uniform"] == ("yes", "yes", "yes") and ticks["local"] == ("no", "yes", "yes")
    assert ticks["nonuniform"][1] == "no" and ticks["vera"] == ("no", "no", "no")
    assert ticks["identity"] == ("no", "yes", "yes") and ticks["fastfood"] == ("yes", "yes", "yes")
    shown = capsys.readouterr().out
    assert "loraxs: isometric: published yes, measured no: the published code scales U" in shown
    assert (folder / "properties.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--projection", "uniform", "frobnicate"]) == 2
    assert "--projection: expected all or some of identity, uniform" in capsys.readouterr().err


def test_what_does_not_fit_a_model_stops_the_others_not(folder, capsys):
    command = ["properties", "--model", f"{folder}/tiny", "--r", "33"]  # the layers are 32 wide
    assert main([*command, "--d", "64"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^loraxs sigma=false +not for this model and these sizes: .*expected at most 32", shown, re.M)
    assert re.search(r"^fastfood +[\d,]+ ", shown, re.M)
    assert main([*command, "--projection", "loraxs"]) == 2
    assert "expected at most 32 for 'loraxs'" in capsys.readouterr().err
