"""A run killed at any moment goes on to the same result. Real processes, real SIGKILL."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from test_cli_data import write_model, write_rows

from unilora_ext import read
from unilora_ext.cli import checkpoints, main
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.finetune import _alone

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")

STEPS_AN_EPOCH = 45


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_model(folder / "tiny")
    write_rows(folder / "rows.csv", 400)
    return folder


def command(data, output):
    text = f"finetune --model {data}/tiny --data {data}/rows.csv --output {output} --d 64 --epochs 6 --save-steps 10 "
    return (text + "--batch-size 8 --dropout 0.1 --lr-theta 0.2 --lr-head 0.02 --schedule cosine").split()


@pytest.fixture(scope="module")
def uninterrupted(data):
    assert main(command(data, data / "whole")) == 0
    return outcome(data / "whole")


def outcome(folder):
    """Everything that must be equal: the results, and the best adapter to the last bit."""
    results = json.loads((folder / "report/metrics.json").read_text())["results"]
    return results, json.loads((folder / "adapter/adapter.json").read_text())


def kill_when(arguments, condition):
    """Starts a run and kills it at the first moment in which `condition` holds."""
    command = [sys.executable, "-m", "unilora_ext", *arguments]
    process = subprocess.Popen(command, cwd=tempfile.gettempdir(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and not condition():
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGKILL)
    return process.wait()


def steps(output, whole):
    return [
        int(path.name.partition("-")[2])
        for path in (output / "checkpoints").glob("checkpoint-*")
        if (path / checkpoints.MARKER).exists() == whole
    ]


def assert_loads(output):
    """What a killed run left: the best adapter so far, whole, or none yet."""
    if (output / "adapter/adapter.json").exists():
        read(output / "adapter")
    assert checkpoints.latest(output / "checkpoints") is not None


def resume(output):
    command = [sys.executable, "-m", "unilora_ext", "finetune", "--resume", str(output)]
    subprocess.run(command, cwd=tempfile.gettempdir(), check=True)


def test_killed_in_mid_epoch(data, uninterrupted, tmp_path):
    output = tmp_path / "killed"
    mid_second_epoch = STEPS_AN_EPOCH + 15
    status = kill_when(command(data, output), lambda: max(steps(output, True), default=0) >= mid_second_epoch)
    assert status == -signal.SIGKILL
    assert_loads(output)
    resume(output)
    assert outcome(output) == uninterrupted
    began = json.loads((output / "report/metrics.json").read_text())["timing"]["resumed_from"]
    assert int(began.partition("-")[2]) >= mid_second_epoch


def test_killed_while_a_checkpoint_is_saved(data, uninterrupted, tmp_path):
    output, arguments, hits = tmp_path / "killed", command(data, tmp_path / "killed"), 0
    for after in (20, 120):  # the second time in a later epoch, of a run that was resumed
        status = kill_when(arguments, lambda at=after: max(steps(output, False), default=0) > at)
        if status != -signal.SIGKILL:
            break
        hits += bool(steps(output, False))
        assert_loads(output)
        arguments = ["finetune", "--resume", str(output)]
    assert hits, "no save was caught"
    resume(output)
    assert not steps(output, False)
    assert outcome(output) == uninterrupted


def test_killed_before_the_first_checkpoint(data, uninterrupted, tmp_path):
    output = tmp_path / "killed"
    assert kill_when(command(data, output), (output / "run.json").exists) == -signal.SIGKILL
    resume(output)
    assert outcome(output) == uninterrupted


def test_killed_before_the_report(data, uninterrupted, tmp_path):
    """All training done, the report missing; the folder was moved meanwhile."""
    shutil.copytree(data / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved/report")
    shutil.rmtree(tmp_path / "moved/adapter")
    assert main(["finetune", "--resume", str(tmp_path / "moved")]) == 0
    assert outcome(tmp_path / "moved") == uninterrupted


def test_damaged_checkpoints_are_told_apart(tmp_path):
    def make(step):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "adapter").mkdir(parents=True)
        (folder / "adapter/a").write_text("abc")
        (folder / "b").write_text("abc")
        checkpoints.mark_complete(folder, {"loss_sum": 0.1 + 0.2})
        return folder

    folders = {step: make(step) for step in (5, 10, 20, 30, 40, 100)}
    assert checkpoints.latest(tmp_path) == folders[100]
    assert checkpoints.read_marker(folders[5])["loss_sum"] == 0.1 + 0.2
    (folders[100] / checkpoints.MARKER).unlink()
    (folders[40] / checkpoints.MARKER).write_text('{"files": {')
    (folders[30] / "adapter/a").unlink()
    (folders[20] / "b").write_text("ab")
    (tmp_path / "checkpoint-x").mkdir()
    assert checkpoints.latest(tmp_path) == folders[10]
    assert checkpoints.remove_incomplete(tmp_path) == [folders[step] for step in (20, 30, 40, 100)]
    checkpoints.prune(tmp_path, keep={5})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "checkpoint-x"]


def test_changed_data_is_refused(data, uninterrupted, tmp_path, capsys):
    rows = write_rows(tmp_path / "rows.csv", 40)
    arguments = command(data, tmp_path / "run")
    arguments[arguments.index("--data") + 1] = str(rows)
    assert main([*arguments, "--epochs", "1"]) == 0
    write_rows(rows, 42)
    assert main(["finetune", "--resume", str(tmp_path / "run")]) == 2
    assert "expected the data the run began with" in capsys.readouterr().err


@pytest.fixture
def begun(data, tmp_path, monkeypatch):
    """A run with a model folder of its own, interrupted after its first checkpoint."""
    shutil.copytree(data / "tiny", tmp_path / "tiny")
    arguments = command(data, tmp_path / "run")
    arguments[arguments.index("--model") + 1] = str(tmp_path / "tiny")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest's workers ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints, "prune", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
            assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    return tmp_path


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.1.attention.self.value.weight"])
def test_changed_base_weights_are_refused(begun, capsys, name):
    """One number, in a layer that is adapted or not."""
    from safetensors.torch import load_file, save_file

    path = begun / "tiny/model.safetensors"
    weights = load_file(path)
    whole = path.read_bytes()
    weights[name][-1, -1] *= 1 + 2**-23
    save_file(weights, path, {"format": "pt"})
    before = {file: file.stat().st_mtime_ns for file in (begun / "run").rglob("*")}
    assert main(["finetune", "--resume", str(begun / "run")]) == 2
    assert "expected the frozen weights the run began with, got others in" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (begun / "run").rglob("*")} == before

    path.write_bytes(whole)
    assert main(["finetune", "--resume", str(begun / "run")]) == 0
    rows = ["--data", str(begun / "run/validation.csv")]
    assert main(["evaluate", "--adapter", str(begun / "run/adapter"), *rows]) == 0
    assert "warning" not in capsys.readouterr().err
    save_file(weights, path, {"format": "pt"})
    assert main(["evaluate", "--adapter", str(begun / "run/adapter"), *rows]) == 0
    assert "warning: --model" in capsys.readouterr().err


def test_a_second_process_is_kept_out(tmp_path):
    with (
        _alone(tmp_path, create=False),
        pytest.raises(CliError, match="expected no other process"),
        _alone(tmp_path, create=False),
    ):
        pass
    with _alone(tmp_path, create=False):  # the lock has gone with its holder
        pass


def test_interrupted_by_the_keyboard(data, tmp_path):
    arguments = [sys.executable, "-m", "unilora_ext", *command(data, tmp_path / "run")]
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's is ignored
    )
    while not steps(tmp_path / "run", True):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130 and "Traceback" not in err
    assert f"unilora finetune --resume {tmp_path / 'run'}" in out
