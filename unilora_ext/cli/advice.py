"""What to tell whose run cannot learn, or has not learnt: before it, and after it."""

from __future__ import annotations

from math import ceil

from unilora_ext.cli.settings import CAUSAL_LM, CLASSIFICATION, IMAGES, REGRESSION

__all__ = ["few_steps", "hardly_learnt", "hardly_moves"]

ENOUGH_STEPS = 150
"""Optimizer steps from which a classifier learns with the defaults, however many epochs they are: all-MiniLM-L6-v2 on
film reviews is right on 65 % of 400 others after 51 steps (300 rows), 73 % after 136 (300 rows), 77 % after 135 (800
rows) and 75 % after 306 (300 rows). A language model needs fewer: it has no new head."""

LEARNT = {CLASSIFICATION: 0.95, REGRESSION: 0.95, IMAGES: 0.95, CAUSAL_LM: 0.99}
"""Share of the loss at the start below which something has been learnt; a language model starts with most of it."""


def few_steps(steps_an_epoch: int, epochs: int) -> str | None:
    """A warning where a classifier's run is planned with fewer steps than learning takes."""
    steps = steps_an_epoch * epochs
    if steps >= ENOUGH_STEPS:
        return None
    return (
        f"{steps:,} steps in all are few to learn from, about {ENOUGH_STEPS} are needed; "
        f"take --epochs {ceil(ENOUGH_STEPS / steps_an_epoch)} or more"
    )


LEAST_MOVE = 1e-6
"""What a LoRA matrix must move by in a step of Adam to learn: a hundredth of the smallest learning rate in use."""


def hardly_moves(rate: float, stretch: float, default: float) -> str | None:
    """A warning where the learning rate of theta_d is too small for its d.

    Args:
        rate: of theta_d, under Adam.
        stretch: of the projection, sqrt(D / d).
        default: the rate that would be taken.
    """
    if rate / stretch >= LEAST_MOVE:
        return None
    return (
        f"--lr-theta {rate:g} moves the entries of A and B by about {rate / stretch:.1g} a step, the rate over "
        f"sqrt(D / d) = {stretch:.1f}: too little to learn anything; without --lr-theta it is {default:.2g}"
    )


def hardly_learnt(task: str, start: float, end: float, steps_an_epoch: int, epochs: int) -> str | None:
    """A warning where the loss has stayed near its start.

    Args:
        task: of the run.
        start: mean loss of a model that has learnt nothing of the task.
        end: mean loss at the end of the training, on the same kind of rows.
        steps_an_epoch: optimizer steps.
        epochs: of the run.
    """
    if end < LEARNT[task] * start:
        return None
    more = max(2 * epochs, ceil(ENOUGH_STEPS / steps_an_epoch))
    return (
        f"the loss is {end:.4f} at the end, and {start:.4f} with nothing learnt: this run hardly learnt anything; "
        f"take --epochs {more} or more, or a higher --lr-theta"
    )
