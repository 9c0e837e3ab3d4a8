"""Scores of a classifier on rows: one way for training, evaluation and prediction, so that their numbers are equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from unilora_ext.cli.data import Row
from unilora_ext.cli.model import EVALUATION_BATCH, Classifier

__all__ = ["Score", "logits", "mean_pooled", "score"]


@dataclass(frozen=True)
class Score:
    """Accuracy and mean cross-entropy on some rows."""

    accuracy: float
    loss: float
    correct: int
    rows: int

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


def _batches(tokenizer: Any, texts: Sequence[str], max_length: int, size: int) -> Iterator[tuple[list[int], Any]]:
    """(positions, padded batch): in order of length, so that little is padding; the same for the same texts."""
    encoded = [tokenizer(text, truncation=True, max_length=max_length) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: (len(encoded[i]["input_ids"]), i))
    pad = DataCollatorWithPadding(tokenizer)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        yield part, pad([encoded[i] for i in part])


@torch.no_grad()
def logits(classifier: Classifier, texts: Sequence[str], size: int = EVALUATION_BATCH) -> Tensor:
    """float64 [rows, labels] on the CPU, in the order of `texts`. The model is in evaluation mode meanwhile."""
    model = classifier.model
    result = torch.empty(len(texts), len(classifier.labels), dtype=torch.float64)
    training = model.training
    model.eval()
    try:
        for part, batch in _batches(classifier.tokenizer, texts, classifier.max_length, size):
            result[part] = model(**batch.to(model.device)).logits.cpu().double()
    finally:
        model.train(training)
    return result


def score(classifier: Classifier, rows: Sequence[Row]) -> Score:
    """Accuracy and loss on labelled rows."""
    number = {label: i for i, label in enumerate(classifier.labels)}
    expected = torch.tensor([number[row.label] for row in rows])
    values = logits(classifier, [row.text for row in rows])
    correct = int((values.argmax(-1) == expected).sum())
    loss = torch.nn.functional.cross_entropy(values, expected).item()
    return Score(correct / len(rows), loss, correct, len(rows))


@torch.no_grad()
def mean_pooled(encoder: Any, tokenizer: Any, texts: Sequence[str], max_length: int) -> Tensor:
    """[rows, hidden]: the mean of an encoder's last hidden states over each text's tokens."""
    result = torch.empty(len(texts), encoder.config.hidden_size)
    for part, batch in _batches(tokenizer, texts, max_length, EVALUATION_BATCH):
        batch = batch.to(encoder.device)
        mask = batch["attention_mask"].unsqueeze(-1)
        hidden = encoder(**batch).last_hidden_state
        result[part] = ((hidden * mask).sum(1) / mask.sum(1)).cpu()
    return result
