"""The classifier: a Transformers encoder with a head; :mod:`~unilora_ext.cli.regressor` is the same for numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithPadding

from unilora_ext.cli.base import check_base, check_tokenizer, check_tokens, or_a_copy
from unilora_ext.cli.data import Row
from unilora_ext.cli.errors import CliError
from unilora_ext.cli.model import Score, TaskModel, attach, first_line, quiet_bars
from unilora_ext.cli.packages import model_path
from unilora_ext.cli.settings import CLASSIFICATION, Settings

__all__ = ["Classifier", "default_targets", "logits", "mean_pooled", "plain_model", "with_head"]

EVALUATION_BATCH = 32
DEFAULT_MAX_LENGTH = 128

# Query and value projections by their names in Transformers' models; the first pair that a model has is taken.
_QUERY_VALUE = (
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("q_proj", "v_proj"),
    ("query_proj", "value_proj"),
    ("q", "v"),
    ("Wqkv",),
    ("query_key_value",),
    ("c_attn",),
)


@dataclass(frozen=True)
class Accuracy(Score):
    """Accuracy, the Matthews correlation and mean cross-entropy on some rows."""

    accuracy: float
    correct: int
    matthews: float

    def lines(self) -> list[str]:
        return [
            f"accuracy {self.accuracy!r} ({self.correct} of {self.rows})",
            f"matthews {self.matthews!r}",
            f"loss     {self.loss!r}",
        ]


@dataclass(frozen=True)
class Classifier(TaskModel):
    """An encoder that gives each text, or pair of texts, one of `labels`, the names of the classes by their number."""

    labels: tuple[str, ...]

    task = CLASSIFICATION
    auto_class = "AutoModelForSequenceClassification"
    figure = "accuracy"
    speed_unit = "samples"

    @classmethod
    def new(cls, settings: Settings, labels: Sequence[str]) -> Classifier:
        model, tokenizer, whole, max_length = plain_model(settings.model, labels, settings.max_length)
        adapter = attach(model, settings, default_targets(model), whole)
        return cls(model, tokenizer, max_length, adapter, tuple(labels))

    @classmethod
    def restored(cls, base: str, facts: dict[str, Any]) -> dict[str, Any]:
        model, tokenizer, _, max_length = plain_model(base, facts["labels"], facts["max_length"])
        return {"model": model, "tokenizer": tokenizer, "max_length": max_length, "labels": tuple(facts["labels"])}

    def metadata(self, settings: Settings) -> dict[str, Any]:
        return {
            **super().metadata(settings),
            "labels": list(self.labels),
            "batch_size": EVALUATION_BATCH,
            "label_column": settings.label_column,
            "text_pair_column": settings.text_pair_column,
        }

    def ready(self, rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
        ids = self._encoded(rows)["input_ids"]
        check_tokens(self.model, zip((row.where for row in rows), ids, strict=True))
        return list(rows), {}

    def examples(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        encoded, targets = self._encoded(rows), self.targets(rows)
        return [
            {**{key: values[i] for key, values in encoded.items()}, "labels": target}
            for i, target in enumerate(targets)
        ]

    def _encoded(self, rows: Sequence[Row]) -> Any:
        columns = map(list, zip(*(row.texts for row in rows), strict=True))
        return self.tokenizer(*columns, truncation=True, max_length=self.max_length)

    def targets(self, rows: Sequence[Row]) -> list[Any]:
        """What the head is to say of each row."""
        number = {label: i for i, label in enumerate(self.labels)}
        return [number[row.label] for row in rows]

    def collator(self) -> Callable[[list[dict[str, Any]]], Any]:
        return DataCollatorWithPadding(self.tokenizer)

    def batches(self, rows: Sequence[Row], size: int) -> Iterator[tuple[list[int], Any]]:
        """(positions, what the model takes): the same for the same rows."""
        return _batches(self.tokenizer, [row.texts for row in rows], self.max_length, size)

    def loss_sum(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        labels = inputs["labels"]
        scores = model(**{key: value for key, value in inputs.items() if key != "labels"}).logits
        return cross_entropy(scores.float(), labels, reduction="sum")

    def sums(self, rows: Sequence[Row]) -> list[float]:
        """[cross-entropy, the confusion matrix: rows of each label by the label they were given]"""
        expected, count = torch.tensor(self.targets(rows), dtype=torch.int64), len(self.labels)
        values = logits(self, rows)
        confusion = torch.bincount(expected * count + values.argmax(-1), minlength=count**2)
        return [cross_entropy(values, expected, reduction="sum").item(), *confusion.tolist()]

    def score_of(self, sums: Sequence[float]) -> Accuracy:
        loss, *counts = sums
        confusion = torch.tensor(counts, dtype=torch.float64).view(len(self.labels), -1)
        rows, correct = int(confusion.sum()), int(confusion.trace())
        return Accuracy(loss / rows, rows, correct / rows, correct, _matthews(confusion))


def _matthews(confusion: Tensor) -> float:
    """The correlation of labels and answers, for any number of labels; 0 where either is always the same."""
    rows, given, expected = confusion.sum(), confusion.sum(0), confusion.sum(1)
    scale = ((rows**2 - given @ given) * (rows**2 - expected @ expected)).sqrt()
    return ((rows * confusion.trace() - given @ expected) / scale).item() if scale > 0 else 0.0


def plain_model(base: str, labels: Sequence[str], max_length: int | None) -> tuple[Any, Any, list[str], int]:
    """(model, tokenizer, modules to train whole, max_length) of a base model with a head for `labels`, or where
    there are none for a number.

    Raises:
        CliError: the model cannot be loaded or does not fit the task; the message says what is missing.
    """
    readers = transformers.AutoModelForSequenceClassification, transformers.AutoTokenizer
    model, tokenizer, whole = with_head(base, labels, *readers, "sequence classification with its tokenizer")
    check_tokenizer(base, tokenizer)
    if tokenizer.pad_token is None:
        raise CliError(f"--model {base}: expected a tokenizer with a padding token, got one without")
    check_tokens(model, [(f"--model {base}: padding token", [tokenizer.pad_token_id])])
    limit = min(tokenizer.model_max_length, _positions(model))
    if max_length is None:
        max_length = min(DEFAULT_MAX_LENGTH, limit)
    elif max_length > limit:
        raise CliError(f"--max-length: expected at most {limit}, the longest input of {base}; got {max_length}")
    return model, tokenizer, whole, max_length


def with_head(
    base: str, labels: Sequence[str], model_reader: Any, input_reader: Any, what: str
) -> tuple[Any, Any, list[str]]:
    """(model, what prepares its inputs, modules to train whole) of a base model with a head for `labels`.

    Trained whole are the head (all outside ``base_model``) and whatever the base model's files have no weights for:
    those start at random, and only saving them makes the adapter complete.

    Args:
        base: folder, hub name or package.
        labels: none: the head says a number.
        model_reader, input_reader: Transformers' auto classes.
        what: what is expected, for the message.

    Raises:
        CliError: either cannot be loaded.
    """
    path = model_path(base)
    check_base(path)
    with quiet_bars():
        try:
            inputs = input_reader.from_pretrained(path)
            model, info = model_reader.from_pretrained(
                path,
                **_head_options(labels),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # Transformers and safetensors raise of every kind for files that do not fit
            raise CliError(
                f"--model {base}: expected a Transformers encoder for {what}; "
                f"loading it failed: {first_line(error)}{or_a_copy(path)}"
            ) from error
    return model, inputs, _trained_whole(model, info)


def _head_options(labels: Sequence[str]) -> dict[str, Any]:
    """What the model's configuration says of its head."""
    if not labels:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }


def _trained_whole(model: Any, info: dict[str, Any]) -> list[str]:
    """Names of the head, and of what the model's files have no weights for (`info`, of its loading)."""
    parts = [(name, part) for name, part in model.named_children() if part is not model.base_model]
    head = [name for name, part in parts if next(part.parameters(), None) is not None]
    new = {
        key if isinstance(key, str) else key[0] for kind in ("missing_keys", "mismatched_keys") for key in info[kind]
    }
    fresh = sorted({key.rpartition(".")[0] for key in new if key.partition(".")[0] not in head})
    return [*head, *(name for name in fresh if name)]


def _positions(model: nn.Module) -> int:
    """How many tokens the model's position table serves; RoBERTa's has padding_idx + 1 rows of no use."""
    table = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    if isinstance(table, nn.Embedding):
        return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return getattr(model.config, "max_position_embeddings", None) or 10**9


def default_targets(model: nn.Module) -> tuple[str, ...]:
    """Query and value layers by the names the model's architecture gives them, else all linear layers."""
    endings = {name.rpartition(".")[2] for name, _ in model.base_model.named_modules()}
    return next((names for names in _QUERY_VALUE if endings.issuperset(names)), ("all-linear",))


# One way for training, evaluation and prediction, so that their numbers are equal.


def _batches(
    tokenizer: Any, texts: Sequence[tuple[str, ...]], max_length: int, size: int
) -> Iterator[tuple[list[int], Any]]:
    """(positions, padded batch): in order of length, so that little is padding; the same for the same texts."""
    encoded = [tokenizer(*parts, truncation=True, max_length=max_length) for parts in texts]
    order = sorted(range(len(texts)), key=lambda i: (len(encoded[i]["input_ids"]), i))
    pad = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield part, pad([encoded[i] for i in part])


@torch.no_grad()
def logits(classifier: Classifier, rows: Sequence[Row], size: int = EVALUATION_BATCH) -> Tensor:
    """float64 [rows, outputs of the head] on the CPU, in the order of `rows`. The model is in evaluation mode
    meanwhile."""
    model = classifier.model
    result = torch.empty(len(rows), model.config.num_labels, dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for part, batch in classifier.batches(rows, size):
            result[part] = model(**batch.to(model.device)).logits.cpu().double()
    finally:
        model.train(training)
    return result


@torch.no_grad()
def mean_pooled(encoder: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """[rows, hidden]: the mean of an encoder's last hidden states over each text's tokens."""
    result = torch.empty(len(texts), encoder.config.hidden_size)
    for part, batch in _batches(tokenizer, [(text,) for text in texts], max_length, EVALUATION_BATCH):
        batch = batch.to(encoder.device)
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = encoder(**batch).last_hidden_state
        result[part] = ((hidden * mask).sum(1) / mask.sum(1)).cpu()
    return result
