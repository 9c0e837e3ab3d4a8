"""Which rows a step takes, and which process works on which of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from unilora_ext.cli import distributed
from unilora_ext.cli.encoding import IGNORED

__all__ = ["LengthSampler", "Shares", "blank"]


class LengthSampler(Sampler[int]):
    """Random batches of rows of like length, so that little is padding.

    The order is a function of seed and epoch alone, which a resumed run needs.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows a batch.
        seed: of the order.
        epoch: says the epoch that begins.
    """

    POOL = 50  # batches that are sorted together

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed}/{self.epoch()}")
        order, size = list(range(len(self.lengths))), self.batch_size
        generator.shuffle(order)
        batches = []
        for start in range(0, len(order), size * self.POOL):
            pool = sorted(order[start : start + size * self.POOL], key=lambda i: -self.lengths[i])
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        last = [batches.pop()] if len(batches[-1]) < size else []  # a short batch stays the last one
        generator.shuffle(batches)
        return iter([i for batch in batches + last for i in batch])


class Shares(Sampler[list[int]]):
    """The batches of one process: its share of every step, in parts.

    Every process has as many parts, and they are of like length. A part that the last, short step leaves empty is
    the blank row, of which nothing is learnt.

    Args:
        order: of the rows.
        parts: of a process's share of a step.
        blank: number of the blank row.
    """

    def __init__(self, order: LengthSampler, parts: int, blank: int) -> None:
        self.order, self.parts, self.blank = order, parts, blank

    def __len__(self) -> int:
        return -(-len(self.order) // self.order.batch_size) * self.parts

    def __iter__(self) -> Iterator[list[int]]:
        rows, size, processes = list(self.order), self.order.batch_size, distributed.world_size()
        for start in range(0, len(rows), size):
            step = rows[start : start + size]
            for part in range(self.parts):
                first = part * processes + distributed.rank()
                yield step[first :: processes * self.parts] or [self.blank]


def blank(examples: Sequence[dict[str, Any]], lengths: Sequence[int]) -> dict[str, Any]:
    """The shortest example with nothing to learn in it."""
    shortest = examples[lengths.index(min(lengths))]
    labels = shortest["labels"]
    return {**shortest, "labels": IGNORED if isinstance(labels, (int, float)) else [IGNORED] * len(labels)}
