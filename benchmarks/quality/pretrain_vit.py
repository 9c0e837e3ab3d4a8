#!/usr/bin/env python3
"""Pretrains the small vision transformer on the classes of Fashion-MNIST that it is not adapted to.

    python benchmarks/quality/pretrain_vit.py

Five minutes of one core; the model goes into benchmarks/quality/vit, which git ignores. The same seed, version of
PyTorch and machine give the same weights.
"""

from __future__ import annotations

import time

import torch
from tasks import UPPER, VIT, fashion, vit
from torch.nn.functional import cross_entropy

EPOCHS, BATCH, RATE = 8, 128, 1e-3


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    began = time.process_time()
    images, labels = fashion("train")
    others = [label for label in range(10) if label not in UPPER]
    chosen = torch.isin(labels, torch.tensor(others))
    images, labels = images[chosen], torch.bucketize(labels[chosen], torch.tensor(others))
    model = vit(len(others)).train()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    for epoch in range(EPOCHS):
        right = 0
        order = torch.randperm(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            scores = model(pixel_values=images[batch]).logits
            cross_entropy(scores, labels[batch]).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            right += int((scores.argmax(-1) == labels[batch]).sum())
        print(
            f"epoch {epoch + 1}: accuracy {right / len(images):.4f}, {time.process_time() - began:.0f} CPU-s",
            flush=True,
        )
    model.save_pretrained(VIT)
    print(VIT)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
