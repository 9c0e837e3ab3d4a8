"""Rows of text and label. Holds the tiny model and the rows of the other tests of the command line, too."""

import csv
import json
import random

import pytest
import torch

from unilora_ext.cli.data import read_rows, split_rows

transformers = pytest.importorskip("transformers")

WORDS = ["good", "warm", "wise", "bad", "dull", "cold", "film", "plot", "actor", "story", "the", "a", "and", "very"]


def write_model(folder, layers=2):
    """An encoder without a head, random but for the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.3,  # so large that random features differ between texts
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_rows(path, count=200, seed=0, labels=("neg", "pos")):
    """Texts whose label is the kind of their adjectives."""
    generator = random.Random(seed)
    rows = []
    for i in range(count):
        positive = i % 2
        kind = WORDS[0:3] if positive else WORDS[3:6]
        words = [generator.choice(kind) for _ in range(generator.randint(2, 4))]
        words += [generator.choice(WORDS[6:]) for _ in range(generator.randint(0, 6))]
        generator.shuffle(words)
        rows.append((" ".join(words), labels[positive]))
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows))
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
    return path


def test_rows_are_read_as_written(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufefflabel,text,extra\n1,"a, ""b""\nc",x\n\n0,caf\u00e9,y\n')
    rows = read_rows(path, "text", "label")
    assert [(row.text, row.label) for row in rows] == [('a, "b"\nc', "1"), ("caf\u00e9", "0")]
    assert [row.where for row in rows] == [f"{path}, line 2", f"{path}, line 5"]


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_split_is_a_partition_with_all_labels(tmp_path, fraction):
    rows = read_rows(write_rows(tmp_path / "rows.csv", 50), "text", "label")
    training, validation = split_rows(rows, fraction, seed=3)
    assert (training, validation) == split_rows(rows, fraction, seed=3)
    assert sorted(training + validation, key=rows.index) == rows
    assert {row.label for row in training} == {row.label for row in validation} == {"neg", "pos"}
    if fraction == 0.3:
        assert len(validation) == 16 and split_rows(rows, fraction, seed=4)[1] != validation
