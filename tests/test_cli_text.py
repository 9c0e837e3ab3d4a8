"""Text as it is: encodings and separators of what is read, columns and letters of what is written."""

import codecs
import csv
import json
import os
import random
import shlex
import subprocess
import sys

import pytest
from test_cli_data import write_model

from unilora_ext.cli import main
from unilora_ext.cli.conversations import read_conversations
from unilora_ext.cli.data import read_rows, read_table
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.files import TextFormat, as_json, encoded

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

LABELS = ("schön", "öde")


def write_table(path, encoding="utf-8", separator=",", count=40, more=True):
    """Returns the rows as they are to be read."""
    generator = random.Random(0)
    rows = []
    for i in range(count):
        text = " ".join(generator.choices(["good", "warm", "film"] if i % 2 else ["bad", "dull", "plot"], k=4))
        rows.append({"größe": f"{i}{separator} m", "text": f'{text} "ä"', "label": LABELS[i % 2]})
    if not more:
        rows = [{key: row[key] for key in ("text", "label")} for row in rows]
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run on a table of Windows, with semicolons."""
    folder = tmp_path_factory.mktemp("text")
    write_model(folder / "tiny")
    write_table(folder / "rows.csv", "cp1252", ";")
    command = f"finetune --model {folder}/tiny --data {folder}/rows.csv --test {folder}/rows.csv --output {folder}/run"
    options = "--encoding cp1252 --separator ; --epochs 1 --d 32"
    assert main([*command.split(), *options.split()]) == 0
    return folder


# ---- reading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "encoding", "separator", "form"),
    [
        ("a.csv", "utf-8", ",", TextFormat()),
        ("a.csv", "utf-8-sig", ",", TextFormat()),
        ("a.csv", "utf-8-sig", ",", TextFormat("UTF8")),
        ("a.tsv", "utf-8", "\t", TextFormat()),
        ("a.tsv", "utf-8", ";", TextFormat(separator=";")),
        ("a.csv", "cp1252", ";", TextFormat("cp1252", ";")),
        ("a.csv", "utf-16", "\t", TextFormat("utf-16", "tab")),
        ("a.csv", "utf-16-le", "§", TextFormat("utf-16-le", "§")),
        ("a.csv", "latin-1", "\t", TextFormat("latin-1", "\\t")),
    ],
)
def test_tables_are_read_as_written(tmp_path, name, encoding, separator, form):
    path = tmp_path / name
    expected = write_table(path, encoding, separator)
    rows, records = read_table(path, "text", form)
    assert records == expected and [row.text for row in rows] == [row["text"] for row in expected]
    assert [(row.text, row.label) for row in read_rows(path, "text", "label", form=form)] == [
        (row["text"], row["label"]) for row in expected
    ]
    assert [r.fields["text"] for r in read_conversations(path, "text", form=form)] == [r["text"] for r in expected]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_other_files_have_an_encoding(tmp_path, name):
    line = '{"text": "schöne Größe"}' if name == "a.jsonl" else "schöne Größe"
    (tmp_path / name).write_text(f"{line}\n{line}\n", encoding="utf-16")
    records = read_conversations(tmp_path / name, "text", form=TextFormat("utf-16"))
    assert [record.fields for record in records] == [{"text": "schöne Größe"}] * 2


LATIN = "text,label\nfilm,1\nschön,2\n".encode("latin-1")


@pytest.mark.parametrize(
    ("content", "form", "expected"),
    [
        (LATIN, TextFormat(), r"a.csv, line 3: expected UTF-8 text, got other bytes .*try --encoding cp1252"),
        (b"\xef\xbb\xbf" + LATIN, TextFormat(), r"a.csv, line 3: expected UTF-8 text"),
        (LATIN, TextFormat("ascii"), r"a.csv, line 3: expected ASCII text, got other bytes .*try --encoding utf-8"),
        ("text,label\nä,1\n".encode("utf-16"), TextFormat(), r"a.csv, line 1: expected UTF-8 .*--encoding utf-16"),
        (codecs.BOM_UTF16_LE + b"t\0\n\0\0\xd8t\0", TextFormat("utf-16"), r"a.csv, line 2: expected UTF-16 text"),
        (b"text,label\nfilm,1\n", TextFormat("utf-16"), r"a.csv: expected UTF-16 text, got other bytes"),
        (b"text;label\nfilm;1\n", TextFormat(), r"a.csv, line 1: .*got one column 'text;label'.*--separator ';'"),
        (b"text\tlabel\nfilm\t1\n", TextFormat(), r"a.csv, line 1: .*Try --separator tab"),
        (b"text,label\nfilm,1\n", TextFormat(separator="|"), r"a.csv, line 1: .*Try --separator ','"),
    ],
)
def test_what_cannot_be_read_is_told(tmp_path, content, form, expected):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(CliError, match=expected):
        read_rows(tmp_path / "a.csv", "text", "label", form=form)


@pytest.mark.parametrize("name", ["hex", "utf-9", "", "rot13", "utf-8\0"])
def test_no_encoding(name):
    with pytest.raises(CliError, match="--encoding: expected the name of a text encoding"):
        TextFormat(name)


@pytest.mark.parametrize("separator", ["", ";;", '"', "\n", "\r"])
def test_no_separator(separator):
    with pytest.raises(CliError, match="--separator: expected a single character"):
        TextFormat(separator=separator)


def test_a_run_tells_the_command_that_reads_its_data(folder, tmp_path, capsys):
    data = f"{folder}/rows.csv"
    command = f"finetune --model {folder}/tiny --data {data} --test {data} --output {tmp_path}/run --epochs 1 --d 32"
    assert main([*command.split(), "--encoding", "cp1252", "--separator", ";"]) == 0
    words = shlex.split(capsys.readouterr().out.split("in a new process:\n")[1].splitlines()[0])
    assert words[0] == "unilora" and main(words[1:]) == 0
    assert main(["evaluate", "--adapter", f"{folder}/run/adapter", "--data", f"{folder}/run/validation.csv"]) == 0
    assert main(["finetune", "--resume", f"{tmp_path}/run"]) == 0


def test_evaluate_and_predict_refuse_before_work(folder, capsys):
    for command in ("evaluate", "predict"):
        words = [command, "--adapter", f"{folder}/run/adapter", "--data", f"{folder}/rows.csv"]
        assert main(words) == 2
        assert "try --encoding cp1252" in capsys.readouterr().err
        assert main([*words, "--encoding", "latin-9000"]) == 2
        assert "--encoding: expected" in capsys.readouterr().err


# ---- writing --------------------------------------------------------------------------------------------------------


def predict(folder, data, output, *more):
    words = ["predict", "--adapter", f"{folder}/run/adapter", "--data", str(data), "--output", str(output), *more]
    return main(words)


@pytest.mark.parametrize(("name", "separator"), [("out.csv", ","), ("out.tsv", "\t")])
def test_predict_keeps_the_columns(folder, tmp_path, name, separator):
    assert predict(folder, folder / "rows.csv", tmp_path / name, "--encoding", "cp1252", "--separator", ";") == 0
    given = write_table(tmp_path / "given.csv", separator=";")
    with open(tmp_path / name, encoding="utf-8", newline="") as file:
        written = list(csv.DictReader(file, delimiter=separator))
    for row, expected in zip(written, given, strict=True):
        assert list(row) == [*expected, "prediction", "probability"] and row == {**row, **expected}
        assert row["prediction"] in LABELS and repr(float(row["probability"])) == row["probability"]


def test_predict_keeps_what_json_holds(folder, tmp_path):
    records = [
        {"n": 3, "text": "good film", "tags": ["ä", None], "ok": True},
        {"text": "dull plot", "note": "käse", "n": None},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert predict(folder, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    text = (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    written = [json.loads(line) for line in text.splitlines()]
    assert "\\u" not in text and "käse" in text
    assert [{k: v for k, v in row.items() if k not in ("prediction", "probability")} for row in written] == records
    assert [list(row)[-2:] for row in written] == [["prediction", "probability"]] * 2
    assert predict(folder, tmp_path / "in.jsonl", tmp_path / "out.csv") == 0
    with open(tmp_path / "out.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["n", "text", "tags", "ok", "note", "prediction", "probability"]
    assert [row[:5] for row in rows] == [
        ["3", "good film", '["ä", null]', "true", ""],
        ["", "dull plot", "", "", "käse"],
    ]


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("text,prediction", "expected no column 'prediction', which is added"),
        ("probability,text", "expected no column 'probability', which is added"),
        ("text,same,same", "line 1: expected the column 'same' once, got it 2 times"),
    ],
)
def test_predict_refuses_two_columns_of_a_name(folder, tmp_path, capsys, header, expected):
    (tmp_path / "in.csv").write_text(f"{header}\n{','.join(['film'] * len(header.split(',')))}\n")
    assert predict(folder, tmp_path / "in.csv", tmp_path / "out.csv") == 2
    assert expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_letters_are_never_escaped(folder, tmp_path, capsys):
    adapter = f"{folder}/run/adapter"
    assert main(["inspect", adapter, "--json", f"{tmp_path}/größe.json"]) == 0
    words = ["evaluate", "--adapter", adapter, "--data", f"{folder}/run/validation.csv", "--json", f"{tmp_path}/s.json"]
    assert main(words) == 0
    assert main(["predict", "--adapter", adapter, "--text", "größe"]) == 0
    out = capsys.readouterr().out
    assert '["schön", "öde"]' in out and "größe" in out
    files = [*(folder / "run").rglob("*.json"), *(folder / "run").glob("*.csv"), *tmp_path.iterdir()]
    texts = {path.name: path.read_text(encoding="utf-8") for path in files}
    for name in ("metrics.json", "adapter.json", "validation.csv", "größe.json"):
        assert "schön" in texts[name], name
    assert not [name for name, text in texts.items() if "\\u" in text]


def test_a_console_without_the_letters(folder, tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    for words in (["predict", "--adapter", "run/adapter", "--text", "größe \U0001f600"], ["inspect", "run/adapter"]):
        command = [sys.executable, "-m", "unilora_ext", *words]
        result = subprocess.run(command, cwd=folder, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr
        assert b"\\xf6" in result.stdout and result.stdout.isascii()


def test_a_name_that_is_no_text_survives_json():
    name = os.fsdecode(b"caf\xe9.csv")
    assert json.loads(encoded(as_json({name: "é"}))) == {name: "é"}
