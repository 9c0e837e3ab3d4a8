"""Small models for the tests."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Tower(nn.Module):
    """Blocks of unequal shape, then a head. `checkpointing`: None, "reentrant" or "non-reentrant"."""

    def __init__(self, width: int = 12, hidden: int = 20, depth: int = 3, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, width)
        self.blocks = nn.ModuleList(Block(width, hidden + i) for i in range(depth))
        self.head = nn.Linear(width, classes)
        self.checkpointing = None

    def forward(self, tokens):
        x = self.embed(tokens)
        if self.checkpointing == "reentrant":
            x.requires_grad_()  # reentrant checkpointing needs an input with a gradient
        for block in self.blocks:
            if self.checkpointing:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x)
        return self.head(x.mean(1))


def tokens(batch: int = 6, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length))


def snapshot(model: nn.Module) -> dict:
    """Everything that a failed call must leave as it was."""
    return {
        "state": {name: t.clone() for name, t in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "identities": {name: id(m) for name, m in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    now = snapshot(model)
    assert now["state"].keys() == before["state"].keys()
    assert all(torch.equal(now["state"][name], before["state"][name]) for name in now["state"])
    for what in ("flags", "classes", "identities", "hooks"):
        assert now[what] == before[what], what


def dense_update(model: nn.Module, adapter) -> dict[str, torch.Tensor]:
    """s B A of every layer in float64, rebuilt from theta_d by the paper's formulas alone."""
    P, config = adapter.projection, adapter.config
    theta_D = P.dense() @ adapter.theta_d.detach().double().cpu()
    updates, start = {}, 0
    for name, layer in adapter.layers.items():
        (m, n), r = adapter.vector.layout.shapes[layer._unilora.slot_id], config.r
        part = theta_D[start : start + (m + n) * r]
        start += (m + n) * r
        flat_A, flat_B = (
            (part[: r * n], part[r * n :]) if config.projection == "peft" else (part[m * r :], part[: m * r])
        )
        A, B = flat_A.view(r, n), flat_B.view(m, r)
        updates[name] = config.scaling * B @ A
    assert start == P.D
    return updates
