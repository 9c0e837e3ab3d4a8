"""The sizes that are measured."""

from __future__ import annotations

from dataclasses import dataclass

# (m, n) of the seven linear layers of a Llama2-7B block, in module order
LLAMA2_7B_BLOCK = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 4096),
    "v_proj": (4096, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (11008, 4096),
    "up_proj": (11008, 4096),
    "down_proj": (4096, 11008),
}


@dataclass(frozen=True)
class Model:
    """The adapted modules of a model, [m, n] each, and the paper's r and d for it."""

    name: str
    modules: tuple[tuple[int, int], ...]
    r: int
    d: int

    @property
    def D(self) -> int:
        return sum((m + n) * self.r for m, n in self.modules)


LLAMA2_7B = Model("Llama2-7B", tuple(LLAMA2_7B_BLOCK.values()) * 32, 4, 524_288)
# (m, n) of the six linear layers of a RoBERTa-large block
ROBERTA_LARGE_BLOCK = ((1024, 1024),) * 4 + ((4096, 1024), (1024, 4096))

ROBERTA_LARGE = Model("RoBERTa-large", ((1024, 1024),) * 48, 4, 23_040)
MINILM = Model("MiniLM", ((384, 384),) * 12, 4, 2048)
ROBERTA_LARGE_ALL = Model("RoBERTa-large, all linear", ROBERTA_LARGE_BLOCK * 24, 4, 98_304)
MODELS = (MINILM, ROBERTA_LARGE, ROBERTA_LARGE_ALL, LLAMA2_7B)
