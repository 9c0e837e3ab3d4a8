"""The classifier of images: a Transformers vision encoder with a head. Its rows name image files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from unilora_ext.cli.classifier import Classifier, default_targets, with_head
from unilora_ext.cli.data import Row
from unilora_ext.cli.errors import CliError, need
from unilora_ext.cli.model import attach, first_line
from unilora_ext.cli.settings import IMAGES, Settings

__all__ = ["ImageClassifier"]


@dataclass(frozen=True)
class ImageClassifier(Classifier):
    """A vision encoder that gives each image one of `labels`. `tokenizer` is its image processor; images are read when
    they are used."""

    task = IMAGES
    auto_class = "AutoModelForImageClassification"

    @classmethod
    def new(cls, settings: Settings, labels: Sequence[str]) -> ImageClassifier:
        model, processor, whole = _vision_model(settings.model, labels)
        return cls(model, processor, 0, attach(model, settings, default_targets(model), whole), tuple(labels))

    @classmethod
    def restored(cls, base: str, facts: dict[str, Any]) -> dict[str, Any]:
        model, processor, _ = _vision_model(base, facts["labels"])
        return {"model": model, "tokenizer": processor, "max_length": 0, "labels": tuple(facts["labels"])}

    def ready(self, rows: Sequence[Row]) -> tuple[list[Row], dict[str, int]]:
        from PIL import Image

        for row in rows:
            try:
                with Image.open(row.text):
                    pass
            except OSError as error:
                raise CliError(f"{row.where}: expected an image file, got {row.text}: {first_line(error)}") from error
        return list(rows), {}

    def examples(self, rows: Sequence[Row]) -> list[dict[str, Any]]:
        """The files' names and labels."""
        return [{"file": row.text, "labels": label} for row, label in zip(rows, self.targets(rows), strict=True)]

    def length(self, example: dict[str, Any]) -> int:
        return 1

    def collator(self) -> Callable[[list[dict[str, Any]]], Any]:
        def batch(examples: list[dict[str, Any]]) -> dict[str, Any]:
            labels = torch.tensor([example["labels"] for example in examples])
            return {**self._pixels([example["file"] for example in examples]), "labels": labels}

        return batch

    def batches(self, rows: Sequence[Row], size: int) -> Iterator[tuple[list[int], Any]]:
        for start in range(0, len(rows), size):
            part = list(range(start, min(start + size, len(rows))))
            yield part, self._pixels([rows[i].text for i in part])

    def _pixels(self, files: Sequence[str]) -> Any:
        """``pixel_values``, float32 [images, channels, height, width]."""
        from PIL import Image

        images = []
        for file in files:
            with Image.open(file) as image:
                images.append(image.convert("RGB"))
        return self.tokenizer(images, return_tensors="pt")


def _vision_model(base: str, labels: Sequence[str]) -> tuple[Any, Any, list[str]]:
    """(model, image processor, modules to train whole) of a base model with a head for `labels`.

    Raises:
        CliError: the model cannot be loaded or does not fit the task.
    """
    need("PIL")
    readers = transformers.AutoModelForImageClassification, transformers.AutoImageProcessor
    return with_head(base, labels, *readers, "image classification with its image processor")
