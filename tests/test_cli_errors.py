"""What goes wrong at a command line: an exit status, one line that says what, and nothing left behind."""

import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from test_cli_causal_data import write_decoder, write_records
from test_cli_data import write_model, write_rows

from unilora_ext.cli import main

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

LONE = "expected Unicode text, got a lone surrogate, "
LINES = {
    "deep.jsonl": "[" * 200_000,
    "deep_value.jsonl": '{"text": "a", "label": 1, "more": ' + "[" * 150 + "]" * 150 + "}",
    "surrogate.jsonl": r'{"text": "a \ud800 b", "label": 1}',
    "surrogate_label.jsonl": r'{"text": "a", "label": "\ud83d"}',
    "digits.jsonl": '{"text": "a", "label": ' + "1" * 5000 + "}",
}
TURNS = '{"messages": [{"role": "user", "content": "the"%s}, {"role": "assistant", "content": "end"}]}'
CONVERSATIONS = {
    "deep_message.jsonl": TURNS % (', "more": ' + "[" * 500 + "]" * 500),
    "surrogate_message.jsonl": TURNS % r', "more": "\udfff"',
    "surrogate_text.jsonl": r'{"text": "the \udc00"}',
    "deep_conversation.jsonl": '{"a":' * 200_000,
}
CLASSIFIER = "finetune --model tiny --data rows.csv --output new/run --epochs 1 --d 32 "
DECODER = "finetune --task causal-lm --model decoder --data records.jsonl --output new/run --epochs 1 --d 32 "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    write_model(folder / "tiny")
    write_decoder(folder / "decoder")
    write_rows(folder / "rows.csv", 60)
    write_records(folder / "records.jsonl", 40)
    rows = write_rows(folder / "rows.jsonl", 20).read_text()
    for name, line in LINES.items():
        (folder / name).write_text(f"{rows}{line}\n")
    records = (folder / "records.jsonl").read_text()
    for name, line in CONVERSATIONS.items():
        (folder / name).write_text(f"{records}{line}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command, name in ((CLASSIFIER, "run"), (DECODER, "talk")):
            assert main(command.replace("new/run", name).split()) == 0
    return folder


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    """Paths of the commands are relative."""
    monkeypatch.chdir(folder)
    yield
    shutil.rmtree("new", ignore_errors=True)


def failed(folder, capsys, words, status):
    """The message of a command that must end with `status`, say one line, and leave all as it was."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(words.split() if isinstance(words, str) else words) == status
    message = capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    (line,) = [line for line in message.replace("\r", "\n").splitlines() if "error" in line]
    assert line.startswith(f"unilora {words.split()[0] if isinstance(words, str) else words[0]}: error: ")
    return line


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (CLASSIFIER + "--data deep.jsonl", "deep.jsonl, line 21: expected a JSON object, got '[[["),
        (CLASSIFIER + "--data deep_value.jsonl", "line 21: expected at most 100 levels of objects and lists, got more"),
        (CLASSIFIER + "--data surrogate.jsonl", f"surrogate.jsonl, line 21: {LONE}'\\ud800'"),
        (CLASSIFIER + "--data surrogate_label.jsonl", f"line 21: {LONE}'\\ud83d'"),
        (CLASSIFIER + "--data rows.jsonl --test surrogate.jsonl", f"line 21: {LONE}"),
        (CLASSIFIER + "--data digits.jsonl", "digits.jsonl, line 21: expected a JSON object, got '{"),
        (CLASSIFIER + "--lr-theta 1e38", "--lr-theta: expected a number in (0, 1e30], got 1e+38"),
        (CLASSIFIER + "--lr-head 1e300", "--lr-head: expected a number in (0, 1e30], got 1e+300"),
        (DECODER + "--data deep_message.jsonl", "line 41: expected at most 100 levels"),
        (DECODER + "--data deep_conversation.jsonl", "line 41: expected a JSON object"),
        (DECODER + "--data surrogate_message.jsonl", f"surrogate_message.jsonl, line 41: {LONE}'\\udfff'"),
        (DECODER + "--data surrogate_text.jsonl", f"line 41: {LONE}'\\udc00'"),
        ("evaluate --adapter run/adapter --data surrogate.jsonl", LONE),
        ("evaluate --adapter talk/adapter --data deep_message.jsonl", "at most 100 levels"),
        ("predict --adapter run/adapter --data deep.jsonl", "line 21: expected a JSON object"),
        (["predict", "--adapter", "run/adapter", "--text", os.fsdecode(b"caf\xe9")], f"--text number 1: {LONE}"),
        (["generate", "--adapter", "talk/adapter", "--prompt", os.fsdecode(b"\xe9")], f"--prompt number 1: {LONE}"),
        (["generate", "--adapter", "talk/adapter", "--message", "a", "--system", "\udce9"], f"--system: {LONE}"),
    ],
)
def test_wrong_input(folder, capsys, command, expected):
    assert expected in failed(folder, capsys, command, 2)


@pytest.mark.parametrize("command", ["finetune", "evaluate", "generate"])
def test_a_vocabulary_larger_than_the_embedding(folder, capsys, command, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained("decoder")
    model.resize_token_embeddings(20)
    model.save_pretrained(tmp_path)
    for path in (folder / "decoder").iterdir():
        if not (tmp_path / path.name).exists():
            shutil.copy(path, tmp_path)
    words = {
        "finetune": DECODER,
        "evaluate": "evaluate --adapter talk/adapter --data records.jsonl",
        "generate": "generate --adapter talk/adapter --prompt zebra",
    }
    message = failed(folder, capsys, f"{words[command]} --model {tmp_path}", 2)
    assert "expected token numbers below 20, the rows of the model's embedding, got" in message


@pytest.mark.parametrize("options", ["--lr-theta 1e30", "--alpha 1e39", "--weight-decay 1e300 --epochs 2"])
def test_a_run_that_diverges_leaves_nothing(folder, capsys, options):
    message = failed(folder, capsys, CLASSIFIER + options, 1)
    assert "training diverged in step" in message and "Lower --lr-theta" in message


def test_a_run_that_diverges_in_its_last_step(folder, capsys):
    """Seen by the validation, since no training step comes after it."""
    message = failed(folder, capsys, CLASSIFIER + "--batch-size 64 --warmup 0 --lr-theta 1e30", 1)
    assert "training diverged in step 1: the validation loss is nan" in message


def test_a_begin_that_fails_leaves_nothing(folder, capsys, monkeypatch):
    """Whatever fails: an error of the system, of this package or another's."""
    from unilora_ext.cli import finetune

    for error in (PermissionError(13, "Permission denied"), OSError(28, "No space left on device")):
        monkeypatch.setattr(finetune, "write_rows", raising(error))
        assert error.strerror in failed(folder, capsys, CLASSIFIER, 1)
    monkeypatch.setattr(finetune, "write_rows", raising(LookupError("a bug")))
    with pytest.raises(LookupError):
        main(CLASSIFIER.split())
    assert not (folder / "new").exists()


def raising(error):
    def function(*_, **__):
        raise error

    return function


def test_a_folder_that_was_there_stays(folder, capsys):
    (folder / "new/run").mkdir(parents=True)
    assert main([*CLASSIFIER.split(), "--lr-theta", "1e30"]) == 1
    assert list((folder / "new").rglob("*")) == [folder / "new/run"]


def test_a_run_with_a_checkpoint_stays(folder, monkeypatch):
    from unilora_ext.cli import report

    with monkeypatch.context() as patch:
        patch.setattr(report, "draw", raising(OSError(28, "No space left on device")))
        assert main(CLASSIFIER.split()) == 1
    assert main(["finetune", "--resume", "new/run"]) == 0
    assert json.loads((folder / "new/run/report/metrics.json").read_text())["timing"]["resumed_from"]


# ---- real processes -------------------------------------------------------------------------------------------------


def process(folder, command, kilobytes=None, **options):
    """A command with a limit to the size of files, as of a disk that is full."""

    def limit():
        if kilobytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes,) * 2)

    words = [sys.executable, "-m", "unilora_ext", *command.split()]
    options = {"stdout": subprocess.DEVNULL, **options}
    result = subprocess.run(words, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=limit, **options)
    assert "Traceback" not in result.stderr and "Exception ignored" not in result.stderr, result.stderr
    return result


@pytest.mark.parametrize("kilobytes", [1, 4])
@pytest.mark.parametrize(
    "command", [CLASSIFIER, DECODER, "merge run/adapter --output new", "predict --adapter run/adapter --data rows.csv"]
)
def test_a_full_disk(folder, command, kilobytes):
    if command.startswith("predict"):
        command, kilobytes = f"{command} --output new.csv", 1
    before = set(folder.rglob("*"))
    result = process(folder, command, kilobytes)
    assert result.returncode == 1 and "error: new" in result.stderr.splitlines()[-1]
    assert set(folder.rglob("*")) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["info", "inspect run/adapter", CLASSIFIER])
def test_standard_output_is_full(folder, command):
    with open("/dev/full", "w") as full:
        result = process(folder, command, stdout=full)
    assert result.returncode == 1 and result.stderr.strip().endswith("[Errno 28] No space left on device")
    assert not (folder / "new").exists()


@pytest.mark.parametrize(("command", "status"), [("info", 0), ("inspect run/adapter", 0), (CLASSIFIER, 1)])
def test_nobody_reads_standard_output(folder, command, status):
    """A reader that has seen enough is no error, but a run that ended for it is."""
    reader, writer = os.pipe()
    os.close(reader)
    result = process(folder, command, stdout=writer)
    os.close(writer)
    assert result.returncode == status
    assert not (folder / "new").exists()
    if status:
        assert "new/run: the run ended early: [Errno 32] Broken pipe" in result.stderr


def test_standard_output_is_closed(folder):
    words = f"{sys.executable} -m unilora_ext inspect run/adapter >&-"
    result = subprocess.run(words, shell=True, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert result.returncode == 0 and not result.stderr


def test_a_terminal_without_the_letters(folder):
    (folder / "accents.csv").write_text("text\ncaf\u00e9 good\n", encoding="utf-8")
    options = {"stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONIOENCODING": "ascii"}}
    result = process(folder, "predict --adapter run/adapter --data accents.csv", **options)
    assert result.returncode == 0 and result.stdout.rstrip().endswith("caf\\xe9 good")


def test_a_place_that_cannot_be_written(folder):
    result = process(folder, CLASSIFIER.replace("new/run", "/proc/new"))
    assert result.returncode in (1, 2) and "/proc/new" in result.stderr
