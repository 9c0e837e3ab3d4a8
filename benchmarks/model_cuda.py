#!/usr/bin/env python3
"""Times of the CUDA kernels on an H100 as a MODEL has them. Nothing here was measured on a GPU.

    python benchmarks/model_cuda.py                            writes results/model-h100.json and the tables of the docs
    python benchmarks/model_cuda.py --profile FILE.json ...    holds the bytes below to those that an emulator counted

A kernel's time is the largest of what its bytes, sectors, products and instructions take at the rates below, and of the
waits for memory of one block after another, times the waves of blocks; and a launch. What a launch takes of each
follows from the sizes by the formulas of this file, which are those of the kernels' header comments. Registers and
shared memory are those that nvcc gives for sm_90 (`tests/cuda/run resources`).

What no such model has: clocks under load, replays, caches beyond the few words below, and how well latencies overlap.
Expect a kernel to be off by up to 40 %, and an order of two options that are closer than that to be wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "cuda"))
from measures import read_profile, resident_blocks
from shapes import LLAMA2_7B, Model

RESULT = Path(__file__).resolve().parent / "results" / "model-h100.json"


@dataclass(frozen=True)
class Assumption:
    """A number that the model takes as given."""

    value: float
    unit: str
    what: str


H100 = {
    "multiprocessors": Assumption(132, "", "H100 SXM"),
    "clock": Assumption(1.755, "GHz", "boost, as under a load of matrix products"),
    "schedulers": Assumption(4, "a multiprocessor", "one instruction of a warp a cycle each"),
    "HBM": Assumption(3.0, "TB/s", "of 3.35 on the data sheet"),
    "L2": Assumption(5.5, "TB/s", "32-byte sectors, read or written, in order or not"),
    "L2 to one": Assumption(40, "bytes a ns", "what one multiprocessor can take from L2"),
    "HBM latency": Assumption(750, "cycles", "a load that misses L2, under load"),
    "L2 latency": Assumption(300, "cycles", "a load that L2 has, under load"),
    "tensor": Assumption(620, "TFLOP/s", "mma.sync in bfloat16: about 62 % of wgmma's 990"),
    "FP32": Assumption(60, "TFLOP/s", "of 67 on the data sheet"),
    "frozen product": Assumption(700, "TFLOP/s", "cuBLAS: 196 us for 4096 x 4096 x 4096"),
    "beta read": Assumption(0.25, "", "share of reading C that a product with beta = 1 does not hide"),
    "y in L2": Assumption(0.5, "", "share of y that L2 still has when the update comes; bytes are counted in full"),
    "table in L1": Assumption(0.2, "", "share of the gather's random reads that L1 has: 0.2 MB of 1 MB"),
    "launch": Assumption(2.0, "us", "from one kernel's last block to the next one's first, ramps included"),
    "graph launch": Assumption(1.0, "us", "the same between the kernels of a CUDA graph"),
    "host": Assumption(6.0, "us", "of the host for an operator's launch from Python, eager mode"),
}


def given(name: str) -> float:
    return H100[name].value


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, or a dense product of cuBLAS.

    Attributes:
        kernel: its name.
        hbm: bytes that must come from or go to memory.
        scratch: bytes written for the next kernel, which L2 holds.
        l2: bytes of the sectors that cross L2; by default hbm and scratch.
        tensor: FLOP of tensor cores in bfloat16; TF32 counts twice.
        fp32: FLOP of the others.
        instructions: of warps, all together.
        blocks: of the grid.
        resident: blocks that a multiprocessor holds.
        waits: cycles that a block waits for memory, one wait after another.
        fixed: us, of a product of cuBLAS, in place of all of these.
    """

    kernel: str
    hbm: float = 0
    scratch: float = 0
    l2: float = 0
    tensor: float = 0
    fp32: float = 0
    instructions: float = 0
    blocks: int = 0
    resident: int = 1
    waits: float = 0
    fixed: float = 0

    def limits(self) -> dict[str, float]:
        """us that each resource needs by itself."""
        if self.fixed:
            return {"product": self.fixed}
        sms, hertz = given("multiprocessors"), given("clock") * 1e3
        waves = -(-self.blocks // int(sms * self.resident))
        return {
            "HBM": self.hbm / given("HBM") / 1e6,
            "L2": max(self.l2, self.hbm + self.scratch) / given("L2") / 1e6,
            "tensor": self.tensor / given("tensor") / 1e6,
            "FP32": self.fp32 / given("FP32") / 1e6,
            "issue": self.instructions / (sms * given("schedulers") * hertz),
            "latency": waves * self.waits / hertz,
        }

    @property
    def bound(self) -> str:
        limits = self.limits()
        return max(limits, key=limits.__getitem__)

    def us(self, launch: str = "launch") -> float:
        """The kernel's time with what stands between it and the next."""
        return max(self.limits().values()) + (0 if self.fixed else given(launch))


def total(launches: Iterable[Launch], launch: str = "launch") -> float:
    return sum(x.us(launch) for x in launches)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


# ---- the kernels of the LoRA matmul, bfloat16 ---------------------------------------------------------------------


def dot(tokens: int, columns: int, r: int, of_B: bool = False) -> Launch:
    """out = x factor^T, A or B: a block has 16 or 32 rows and up to 64 ranks; its 16 warps share the columns, 32 at a
    time, with as many chunks in flight as registers hold."""
    ranks = next(x for x in (8, 16, 32, 64) if x >= min(r, 64))
    while ranks > 8 and ceil_div(tokens, 16) * ceil_div(r, ranks) < 128:
        ranks //= 2
    rows, stages = (32 if tokens > 2048 and not (of_B and ranks == 64) else 16), {8: 4, 16: 3, 32: 2, 64: 1}[ranks]
    rank_tiles = ceil_div(r, ranks)
    blocks = ceil_div(tokens, rows) * rank_tiles
    x, out = 2 * tokens * columns, 4 * tokens * r
    return Launch(
        "dot",
        hbm=x + out + 2 * r * columns,
        l2=rank_tiles * x + out + blocks * 2 * ranks * columns,
        tensor=2 * tokens * columns * ranks * rank_tiles,
        instructions=rank_tiles * tokens * columns / 256 * (12 + ranks / 8),
        blocks=blocks,
        resident=resident_blocks(512, 128, 36864),
        waits=ceil_div(ceil_div(columns, 32 * 16), stages) * given("HBM latency"),
    )


def few(tokens: int, m: int, n: int, r: int) -> Launch:
    """h = x A^T and y += s h B^T in one launch: every block reads all of A."""
    blocks = min(ceil_div(m, 128), 128)
    A, B, y = 2 * r * n, 2 * m * r, 2 * tokens * m
    reading = A / given("L2 to one") * given("clock")
    return Launch(
        "few",
        hbm=A + B + 2 * y + 2 * tokens * n + 4 * tokens * r,
        l2=blocks * A + B + 2 * y,
        tensor=blocks * 2 * 16 * n * max(r, 16),
        instructions=blocks * n / 16 * (12 + r / 8),
        blocks=blocks,
        resident=1,
        waits=2 * given("HBM latency") + reading + ceil_div(ceil_div(m, 128), blocks) * given("L2 latency"),
    )


def update(tokens: int, columns: int, r: int, *, reads: bool) -> Launch:
    """y += s h factor, or y = bias + s h factor: a block has a strip of 128 columns and walks down a run of tiles of 64
    rows, each tile's y loaded a tile ahead; h in two parts, so two products in TF32."""
    ranks = 8 if r <= 8 else 16 if r <= 16 else 64 * ceil_div(r, 64)
    strips, row_tiles = ceil_div(columns, 128), ceil_div(tokens, 64)
    run = min(max(row_tiles * strips // 512, 1), 8)
    blocks = strips * ceil_div(row_tiles, run)
    y, h = 2 * tokens * columns, 4 * tokens * r
    y_latency = given("L2 latency") * given("y in L2") + given("HBM latency") * (1 - given("y in L2"))
    staging = ceil_div(min(ranks, 64) * 128, 256 * 4) * given("L2 latency") * (run if r > 64 else 1)
    return Launch(
        "rank_update" if reads else "rank_product",
        hbm=(2 if reads else 1) * y + h + 2 * r * columns,
        l2=(2 if reads else 1) * y + strips * h + ceil_div(row_tiles, run) * 2 * r * columns,
        tensor=2 * 2 * (2 * tokens * columns * ranks),
        instructions=tokens * columns / 256 * (16 + 5 * ranks / 8),
        blocks=blocks,
        resident=resident_blocks(256, 114, 16640 if ranks > 16 else 4160),
        waits=staging + run * ((y_latency if reads else 0) + ceil_div(ranks, 32) * given("L2 latency")),
    )


def outer(tokens: int, columns: int, r: int) -> list[Launch]:
    """out = s h^T g: a block has a chunk of the rows and 64 or 128 columns; its warps share the rows, 16 at a time. A
    second kernel adds the chunks. h in two parts, so two products in TF32."""
    ranks = 16 if r <= 16 else 32 if r <= 32 else 64 * ceil_div(r, 64)
    tiles = ceil_div(columns, 64 if r <= 32 else 128) * ceil_div(r, 64)
    chunks = min(max(264 // tiles, 1), ceil_div(tokens, 128))
    row_warps = 8 if r <= 16 else 4 if r <= 32 else 2
    steps = ceil_div(ceil_div(tokens, chunks), 16 * row_warps)
    g, h = 2 * tokens * columns, 4 * tokens * r
    partial = 4 * chunks * r * columns if chunks > 1 else 0
    first = Launch(
        "outer",
        hbm=g + h + (0 if partial else 2 * r * columns),
        scratch=partial,
        l2=g + tiles * h + partial,
        tensor=2 * 2 * (2 * tokens * columns * ranks),
        instructions=tokens * columns / 256 * (16 + 5 * ranks / 8),
        blocks=tiles * chunks,
        resident=resident_blocks(256, 128, 34816),
        waits=steps * (given("HBM latency") + given("L2 latency")),
    )
    return [first, added("outer_finish", partial, chunks, 2 * r * columns)] if partial else [first]


def dot_and_outer(tokens: int, columns: int, r: int) -> list[Launch]:
    """u and out from one read of g for r <= 16: a block has a chunk of the rows and 512 columns, copied one step of 16
    rows ahead. A second kernel adds u over the column tiles and out over the chunks."""
    if r > 16:
        return [dot(tokens, columns, r, of_B=True), *outer(tokens, columns, r)]
    ranks, tiles = (8 if r <= 8 else 16), ceil_div(columns, 512)
    chunks = min(max(264 // tiles, 1), ceil_div(tokens, 64))
    steps = ceil_div(ceil_div(tokens, chunks), 16)
    g, h = 2 * tokens * columns, 4 * tokens * r
    partial = 4 * (tiles * tokens * ranks + chunks * r * columns)
    first = Launch(
        "dot_outer",
        hbm=g + h + 2 * r * columns,
        scratch=partial,
        l2=g + tiles * h + chunks * 2 * r * columns + partial,
        tensor=2 * tokens * columns * ranks + 2 * 2 * (2 * tokens * columns * 16),
        instructions=tokens * columns / 256 * (24 + 6 * ranks / 8),
        blocks=tiles * chunks,
        resident=resident_blocks(256, 128, 49152),
        waits=(steps + 1) * given("HBM latency"),
    )
    return [first, added("dot_outer_finish", partial, chunks, 4 * tokens * r + 2 * r * columns)]


def added(kernel: str, partial: float, chunks: int, out: float) -> Launch:
    """The kernel that adds partial sums, eight loads in flight a thread."""
    return Launch(
        kernel,
        hbm=out,
        l2=partial + out,
        fp32=partial / 4,
        blocks=int(ceil_div(int(out), 1024)),
        resident=resident_blocks(256, 48, 2112),
        waits=ceil_div(chunks, 8) * given("L2 latency"),
    )


def product(tokens: int, m: int, n: int, *, onto: bool = False) -> Launch:
    """A dense product of cuBLAS: 2 tokens m n FLOP, or a read of the weight; `onto` adds to what y holds."""
    flop, weight = 2 * tokens * m * n / given("frozen product") / 1e6, 2 * m * n / given("HBM") / 1e6
    read = given("beta read") * 2 * tokens * m / given("HBM") / 1e6 if onto else 0
    return Launch("product", fixed=max(flop, weight + given("launch")) + read)


# ---- a layer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A frozen weight [m, n] under `tokens` rows."""

    name: str
    m: int
    n: int
    tokens: int


LAYERS = (
    Layer("A", 4096, 4096, 4096),
    Layer("B", 4096, 4096, 16384),
    Layer("C", 11008, 4096, 4096),
    Layer("D", 11008, 4096, 16384),
)
RANKS = (4, 16, 64)


def forward(x: Layer, r: int, *, first: bool) -> list[Launch]:
    """`first`: the update is written into y, and the product added to it. Few tokens: h and the update in one launch,
    where A is small (lora_linear_plan.h)."""
    if x.tokens <= 8 and 2 * r * x.n <= 256 * 1024:
        return [product(x.tokens, x.m, x.n), few(x.tokens, x.m, x.n, r)]
    h = dot(x.tokens, x.n, r)
    if first:
        return [h, update(x.tokens, x.m, r, reads=False), product(x.tokens, x.m, x.n, onto=True)]
    return [h, product(x.tokens, x.m, x.n), update(x.tokens, x.m, r, reads=True)]


def backward(x: Layer, r: int, *, first: bool) -> list[Launch]:
    head, tail = dot_and_outer(x.tokens, x.m, r), outer(x.tokens, x.n, r)
    if first:
        middle = [update(x.tokens, x.n, r, reads=False), product(x.tokens, x.n, x.m, onto=True)]
    else:
        middle = [product(x.tokens, x.n, x.m), update(x.tokens, x.n, r, reads=True)]
    return [*head, *middle, *tail]


# ---- the projection -----------------------------------------------------------------------------------------------


def project(model: Model) -> list[Launch]:
    """theta_D = P theta_d from a stored index: a table of d scaled numbers, then eight elements a thread."""
    D, d = model.D, model.d
    table = Launch("scaled_theta", hbm=8 * d, scratch=2 * d, blocks=ceil_div(d, 256), resident=8, waits=750)
    random = (1 - given("table in L1")) * 32 * D
    gather = Launch(
        "gather",
        hbm=6 * D + 2 * d,
        l2=random + 6 * D,
        instructions=11 * D / 32,
        blocks=ceil_div(D, 2048),
        resident=resident_blocks(256, 48, 0),
        waits=given("HBM latency") + given("L2 latency"),
    )
    return [table, gather]


def project_transpose(model: Model) -> list[Launch]:
    """g_d = P^T g_D through a stored order: a block reads the entries of some columns as a stream, four a thread, and
    sums the columns in shared memory; the gradient is read where the layers left it."""
    D, d = model.D, model.d
    tile = 2048
    columns = min(max(tile * 7 // 8 * d // D, 1), tile // 4)
    columns -= columns % 8 if columns >= 8 else 0
    tiles = ceil_div(columns * D, d * tile)
    return [
        Launch(
            "segment_sum",
            hbm=2 * D + 4 * D + 12 * d,
            l2=32 * D + 4 * D + 12 * d,
            instructions=64 * D / 32,
            blocks=ceil_div(d, columns),
            resident=resident_blocks(512, 40, 45060),
            waits=2 * given("HBM latency") + tiles * (given("HBM latency") + given("L2 latency")),
        )
    ]


# ---- rows ---------------------------------------------------------------------------------------------------------


def rows() -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    for name, launches in (("project", project(LLAMA2_7B)), ("project_transpose", project_transpose(LLAMA2_7B))):
        out.append({"what": name, "model": LLAMA2_7B.name, **_shown(launches)})
    one = LAYERS[0]
    for r in RANKS:
        kernels = [dot(one.tokens, one.n, r), *(update(one.tokens, one.m, r, reads=x) for x in (True, False))]
        for launches in ([x] for x in kernels):
            out.append({"what": "kernel", "layer": one.name, "r": r, "kernel": launches[0].kernel, **_shown(launches)})
        for name, several in (("outer", outer), ("dot_and_outer", dot_and_outer)):
            launches = several(one.tokens, one.m, r)
            out.append({"what": "kernel", "layer": one.name, "r": r, "kernel": name, **_shown(launches)})
    for layer in LAYERS:
        for r in RANKS:
            for name, way in (("forward", forward), ("backward", backward)):
                frozen = product(layer.tokens, layer.m, layer.n).us()
                for first in (False, True):
                    launches = way(layer, r, first=first)
                    case = {"what": name, "layer": layer.name, "m": layer.m, "n": layer.n, "tokens": layer.tokens}
                    ratio = {"frozen_us": round(frozen, 1), "ratio": round(total(launches) / frozen, 3)}
                    out.append({**case, "r": r, "update_first": first, **_shown(launches), **ratio})
    out += decode(LLAMA2_7B)
    return out


def decode(model: Model) -> list[dict[str, Any]]:
    """One token through all layers, theta_D kept from the prompt: the products read the weights."""
    found = []
    for r in RANKS:
        layers = [forward(Layer("", m, n, 1), r, first=True) for m, n in model.modules]
        launches = [x for layer in layers for x in layer]
        frozen = [product(1, m, n) for m, n in model.modules]
        saved = (given("launch") - given("graph launch")) * len(frozen)
        gpu, graph = total(launches) / 1e3, (total(launches, "graph launch") - saved) / 1e3
        found.append(
            {
                "what": "decode",
                "model": model.name,
                "r": r,
                "launches": len(launches),
                "frozen_launches": len(frozen),
                "eager_ms": round(max(gpu, len(launches) * given("host") / 1e3), 2),
                "frozen_eager_ms": round(max(total(frozen), len(frozen) * given("host")) / 1e3, 2),
                "graph_ms": round(graph, 2),
                "frozen_graph_ms": round((total(frozen) - saved) / 1e3, 2),
            }
        )
    return found


def _shown(launches: Sequence[Launch]) -> dict[str, Any]:
    return {
        "us": round(total(launches), 1),
        "launches": [
            {"kernel": x.kernel, "us": round(x.us(), 2), "bound": x.bound, "hbm_bytes": int(x.hbm)} for x in launches
        ],
    }


# ---- against an emulator's counts -----------------------------------------------------------------------------------


def compare(path: Path, sizes: argparse.Namespace) -> list[str]:
    """Lines that set the bytes of the formulas beside the distinct bytes that an emulator counted, for the bfloat16
    launches of the kernels that both know. Of two formulas, the one that is nearer."""
    tokens, columns, r = sizes.tokens, sizes.columns, sizes.r
    model = Model("profiled", ((sizes.D, 0),), 1, sizes.d)
    gather = project(model)[1]
    known = {
        "dot_kernel": [dot(tokens, columns, r)],
        "few_kernel": [few(8, columns, columns, r)],
        "rank_update_mma_kernel": [update(tokens, columns, r, reads=reads) for reads in (True, False)],
        "outer_mma_kernel": [outer(tokens, columns, r)[0]],
        "dot_outer_kernel": [dot_and_outer(tokens, columns, r)[0]],
        "gather_kernel": [gather, replace(gather, hbm=gather.hbm - 4 * sizes.D)],  # with an index, or without
        "segment_sum_kernel": [project_transpose(model)[0]],
    }
    lines = []
    for launches in read_profile(path):
        if launches.kernel.name in known and "bfloat16" in launches.kernel.types:
            formulas = [x.hbm + x.scratch for x in known[launches.kernel.name]]
            for counted in dict.fromkeys(launches.values("bytes")):
                formula = min(formulas, key=lambda value, counted=counted: abs(value - counted))
                share = formula / counted - 1
                lines.append(f"{launches.kernel}: {counted:,.0f} bytes, formula {formula:,.0f} ({share:+.1%})")
    return lines or [f"{path}: no bfloat16 kernel that the model knows"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", type=Path, nargs="+", help="JSON of the emulator's `profile --launches`")
    for name, value in (("tokens", 256), ("columns", 1024), ("r", 16), ("D", 300_000), ("d", 16_384)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of the profiled launches, {value}")
    options = parser.parse_args()
    if options.profile:
        print("\n".join(line for path in options.profile for line in compare(path, options)))
        return 0
    document = {
        "machine": {"device": "H100 SXM, a model: nothing was measured on a GPU"},
        "assumptions": [{"name": name, **vars(assumption)} for name, assumption in H100.items()],
        "rows": rows(),
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    print(RESULT)
    import tables  # imports PyTorch, which the model does without

    print("\n".join(map(str, tables.renew())))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
