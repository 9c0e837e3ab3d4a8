"""The documentation's tables, written from the rows in results/ between markers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from common import RESULTS, Row
from limits import READS, UPDATES
from pictures import load

ROOT = RESULTS.parents[1]
END = "<!-- end -->"


def renew() -> list[Path]:
    """Renews the tables of the README and of docs/ whose results are there; returns the paths of the pages that
    changed."""
    lines = {name: write for name, (needed, write) in TABLES.items() if (RESULTS / needed).is_file()}
    return [path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))) if rewrite(path, lines)]


def rewrite(path: Path, tables: Mapping[str, Callable[[], Iterable[str]]]) -> bool:
    """Replaces what stands between ``<!-- NAME table -->`` and ``<!-- end -->`` in a page by the lines of each table
    that it has; returns whether that changed it."""
    before = text = path.read_text()
    for name, lines in tables.items():
        begin = f"<!-- {name} table -->\n"
        if begin in text:
            head, rest = text.split(begin, 1)
            text = head + begin + "\n".join(lines()) + "\n" + END + rest.split(END, 1)[1]
    if text != before:
        path.write_text(text)
    return text != before


def _demo() -> list[str]:
    document = json.loads((RESULTS / "demo.json").read_text())
    machine, demo, results = document["machine"], document["demo"], document["results"]
    sizes, rows = results["sizes"], results["rows"]
    return [
        f"The demo fine-tunes all-MiniLM-L6-v2 on {rows['training'] + rows['validation']:,} Rotten Tomatoes reviews "
        f"and scores {rows['test']:,} others: {demo['seconds']:.0f} seconds on {machine['cores']} cores "
        f"({machine['device']}), no network.",
        "",
        "| | test accuracy | bytes stored |",
        "| --- | --- | --- |",
        f"| frozen model, logistic regression on mean-pooled features | {demo['frozen']['accuracy']:.4f} "
        f"| {demo['frozen']['bytes']:,} |",
        f"| Uni-LoRA, theta_d of {sizes['d']:,} numbers | {results['test']['accuracy']:.4f} "
        f"| {sizes['theta_d_bytes']:,} |",
        f"| the same LoRA would store | | {sizes['lora_bytes']:,} |",
        f"| the model | | {sizes['model_bytes']:,} |",
        "",
        f"(A head of {sizes['head_bytes']:,} bytes comes with each.) " + _seeds(document["seeds"]),
    ]


def _seeds(seeds: list[Row]) -> str:
    several = [f"{s['accuracy']:.4f} ({s['frozen']:.4f} frozen) with seed {s['seed']}" for s in seeds[1:]]
    return f"Other splits, orders and projections: {', '.join(several)}." if several else ""


def _quantised() -> list[str]:
    lines = ["| | change of the logits by the fresh adapter | norm of the gradient | loss before | loss after |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for row in load("quantised", "cpu"):
        lines.append(
            f"| {row['rival']} | {row['logit_change']:.2g} | {row['gradient_norm']:.2g} | {row['loss_before']:.4f} "
            f"| {row['loss_after']:.4f} |"
        )
    return lines


def _situations() -> list[str]:
    document = json.loads((RESULTS / "situations.json").read_text())
    rows, versions = document["rows"], document["machine"]["versions"]
    rivals = [name for name in rows[0] if name != "situation"]
    lines = [f"| | {' | '.join(rivals)} |", "| --- |" + " --- |" * len(rivals)]
    lines += [f"| {row['situation']} | {' | '.join(row[rival] for rival in rivals)} |" for row in rows]
    return [*lines, "", "With " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."]


def _decoder() -> list[str]:
    document = json.loads((RESULTS / "decoder.json").read_text())
    machine, results, timing = document["machine"], document["results"], document["timing"]
    rows, before, after = results["rows"], results["before"]["test"], results["test"]
    return [
        f"SmolLM2-135M from its GGUF file, one epoch of {rows['training'] + rows['validation']} film reviews in "
        f"{timing['training_seconds']:.0f} seconds on",
        f"{machine['cores']} cores: the perplexity of {rows['test']} other reviews ({after['tokens']:,} tokens) goes "
        f"from {before['perplexity']:.1f} to",
        f"{after['perplexity']:.1f}, with {results['sizes']['d']:,} trained numbers (`benchmarks/record_decoder.py`).",
    ]


def _pick(rows: list[Row], **wanted: object) -> Row:
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if not found:
        raise LookupError(f"no row with {wanted}")
    return found[0]


def _cpu() -> list[str]:
    machine = json.loads((RESULTS / "projection-cpu.json").read_text())["machine"]
    versions = machine["versions"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, torch {versions['torch']}, PEFT {versions['peft']}, commit "
        f"{machine['commit']}. Medians; ratios are of times from the same rounds.",
        "",
        "| what | threads | ours | over the limit | PEFT UniLora | PEFT / ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    projection = load("projection", "cpu")
    for model in dict.fromkeys(row["model"] for row in projection):
        for name in ("forward", "backward"):
            for count in dict.fromkeys(row["threads"] for row in projection):
                case = {"model": model, "pass": name, "threads": count}
                ours = _pick(projection, **case, rival="unilora_ext uniform")
                peft = _pick(projection, **case, rival="PEFT UniLora")
                limit = READS if name == "forward" else UPDATES
                reads = [row for row in projection if row["rival"] == limit and case.items() <= row.items()]
                beside = f", {ours['median_ms'] / reads[0]['median_ms']:.2f} x its {limit}" if reads else ""
                lines.append(
                    f"| projection, {name}, {model} (D = {ours['D']:,}) | {count} | {ours['median_ms']:.3g} ms "
                    f"| {ours['ratio']:.2f} x a copy of theta_D{beside} | {peft['median_ms']:.3g} ms "
                    f"| {peft['median_ms'] / ours['median_ms']:.1f} |"
                )
    layer = load("lora_linear", "cpu")
    for n, tokens, r, count in dict.fromkeys((x["n"], x["tokens"], x["r"], x["threads"]) for x in layer):
        case = {"n": n, "tokens": tokens, "r": r, "threads": count}
        ours, peft = (_pick(layer, **case, rival=rival) for rival in ("unilora_ext", "peft-unilora"))
        lines.append(
            f"| layer, forward + backward, {n} x {n}, {tokens} tokens, r = {r} | {count} | {ours['median_ms']:.3g} ms "
            f"| {ours['ratio']:.2f} x the frozen layer | {peft['median_ms']:.3g} ms ({peft['ratio']:.2f} x) "
            f"| {peft['median_ms'] / ours['median_ms']:.2f} |"
        )
    decode = load("decode", "cpu")
    for count in dict.fromkeys(row["threads"] for row in decode):
        case = {"threads": count}
        ours, lora, peft = (
            _pick(decode, **case, rival=rival) for rival in ("unilora_ext", "peft-lora", "peft-unilora")
        )
        lines.append(
            f"| a token of {ours['model']}, cache of 16 | {count} | {ours['median_ms']:.3g} ms "
            f"| {ours['ratio']:.2f} x the base model (PEFT LoRA {lora['ratio']:.2f} x) "
            f"| {peft['median_ms']:.3g} ms ({peft['ratio']:.2f} x) | {peft['median_ms'] / ours['median_ms']:.2f} |"
        )
    for step in load("step", "cpu"):
        if step["rival"] == "unilora_ext":
            peft = _pick(load("step", "cpu"), model=step["model"], rival="peft-unilora")
            lines.append(
                f"| training step, {step['model']} | {step['threads']} | {step['median_ms']:.3g} ms "
                f"| {step['ratio']:.2f} x PEFT LoRA | {peft['median_ms']:.3g} ms "
                f"| {peft['median_ms'] / step['median_ms']:.2f} |"
            )
    attach = load("attach", "cpu")
    ours = _pick(attach, rival="unilora_ext, attach and index")
    peft = _pick(attach, rival="PEFT UniLora, index alone")
    lines.append(
        f"| attach to {ours['model']}, index included | | {ours['median_ms']:.3g} ms | "
        f"| {peft['median_ms']:.3g} ms (index alone) | {peft['median_ms'] / ours['median_ms']:.1f} |"
    )
    kept = [_pick(attach, bench="memory", model="Llama2-7B", rival=rival) for rival in ("unilora_ext", "PEFT UniLora")]
    lines.append(
        f"| bytes kept an element of theta_D | | {kept[0]['bytes_per_element']:.0f} (0 computed) | "
        f"| {kept[1]['bytes_per_element']:.0f} | {kept[1]['bytes_per_element'] / kept[0]['bytes_per_element']:.0f} |"
    )
    return lines


def _peft() -> list[str]:
    versions = json.loads((RESULTS / "projection-cpu.json").read_text())["machine"]["versions"]
    passes = [
        [
            _pick(load("projection", "cpu"), **{"model": "Llama2-7B", "threads": 1, "pass": name, "rival": rival})
            for name in ("forward", "backward")
        ]
        for rival in ("unilora_ext uniform", "PEFT UniLora")
    ]
    ours, peft = (" / ".join(f"{row['median_ms']:.3g}" for row in rows) for rows in passes)
    shape = {"n": 1024, "tokens": 256, "r": 4, "threads": 1}
    layer = [_pick(load("lora_linear", "cpu"), **shape, rival=rival) for rival in ("unilora_ext", "peft-unilora")]
    kept = [
        _pick(load("attach", "cpu"), bench="memory", model="Llama2-7B", rival=rival)["bytes_per_element"]
        for rival in ("unilora_ext", "PEFT UniLora")
    ]
    return [
        f"PEFT {versions['peft']} has Uni-LoRA as well; its column says what its own code did when it was tried. Times "
        "are of one CPU thread.",
        "",
        "| | unilora_ext | PEFT's UniLora |",
        "| --- | --- | --- |",
        "| theta_D rebuilt | once a forward pass; not at all for the next token | two gathers in every layer |",
        f"| projection of Llama2-7B's theta_D, forward / backward | {ours} ms | {peft} ms |",
        f"| layer over the frozen layer, 1024 x 1024, 256 tokens | {layer[0]['ratio']:.2f} x "
        f"| {layer[1]['ratio']:.2f} x |",
        f"| bytes kept an element of theta_D | {kept[0]:.0f}, or 0 | {kept[1]:.0f} |",
        "| 4-bit and 8-bit bases | the adapter acts | no effect: 0 change, 0 gradient |",
        "| FSDP2 | d numbers reduced a step | TypeError in `fully_shard` |",
        "| merge, then unmerge | weights equal to the bit | equal to rounding |",
    ]


def _family() -> list[str]:
    machine = json.loads((RESULTS / "family-cpu.json").read_text())["machine"]
    rows = load("family", "cpu")
    sizes = [row for row in rows if row["pass"] != "step"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, torch {machine['versions']['torch']}, commit "
        f"{machine['commit']}. Medians, one thread; 48 modules of 384 x 384, r = 4, d = 1,024 where it is free.",
        "Slopes are of log time over log D and log d, at the larger sizes: 1 is linear. The step is of MiniLM's shape "
        "(12 modules),",
        "batch 16 of 40 tokens, d = 2,048, on two threads, over one through the frozen model.",
        "",
        "| | D | d | P theta_d | P^T g | slope over D | slope over d | kept | a step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["projection"] for row in sizes):
        own = [row for row in sizes if row["projection"] == name]
        modules = sorted({row["D"] for row in own if row["axis"] == "D"})
        D = modules[2] if len(modules) > 2 else modules[-1]
        forward, transpose = (_pick(own, axis="D", D=D, **{"pass": what}) for what in ("forward", "transpose"))
        over_d = [row["slope"] for row in own if row["axis"] == "d" and row["d"] == max(r["d"] for r in own)]
        step = _pick(rows, projection=name, **{"pass": "step"})
        lines.append(
            f"| `{name}` | {D:,} | {forward['d']:,} | {forward['median_ms']:.3g} ms | {transpose['median_ms']:.3g} ms "
            f"| {forward['slope']:.2f}, {transpose['slope']:.2f} "
            f"| {', '.join(f'{slope:.2f}' for slope in over_d) or 'd is given'} "
            f"| {forward['nbytes'] / 2**20:.3g} MiB | {step['ratio']:.2f} x |"
        )
    return lines


def _model() -> list[str]:
    document = json.loads((RESULTS / "model-h100.json").read_text())
    rows = document["rows"]
    ranks = sorted({row["r"] for row in rows if row["what"] == "kernel"})
    of_ranks = " | ".join(f"r = {r}" for r in ranks)
    lines = [
        "A model's figures, for an H100 and bfloat16; none was measured. us, and what binds.",
        "",
        f"| a kernel, 4,096 x 4,096 numbers | {of_ranks} |",
        f"| --- |{' --- |' * len(ranks)}",
    ]
    for name in dict.fromkeys(row["kernel"] for row in rows if row["what"] == "kernel"):
        own = [_pick(rows, what="kernel", kernel=name, r=r) for r in ranks]
        bounds = [max(row["launches"], key=lambda launch: launch["us"])["bound"] for row in own]
        cells = " | ".join(f"{row['us']:.0f} ({bound})" for row, bound in zip(own, bounds, strict=True))
        lines.append(f"| `{name}` | {cells} |")
    for name in ("project", "project_transpose"):
        row = _pick(rows, what=name)
        kernels = ", ".join(f"{launch['kernel']} {launch['us']:.0f} ({launch['bound']})" for launch in row["launches"])
        lines.append(f"| `{name}`, all of {row['model']} | {kernels} |{' |' * (len(ranks) - 1)}")
    layers = [row for row in rows if row["what"] == "forward"]
    passes = [(name, first) for name in ("forward", "backward") for first in (False, True)]
    heads = " | ".join(f"{name}, update {'first' if first else 'after'}" for name, first in passes)
    lines += ["", f"| a layer over the frozen one | tokens | r | frozen | {heads} |", f"|{' --- |' * 8}"]
    for m, n, tokens, r in dict.fromkeys((row["m"], row["n"], row["tokens"], row["r"]) for row in layers):
        own = [_pick(rows, what=name, m=m, n=n, tokens=tokens, r=r, update_first=first) for name, first in passes]
        cells = " | ".join(f"{row['ratio']:.2f} x" for row in own)
        lines.append(f"| {m} x {n} | {tokens:,} | {r} | {own[0]['frozen_us']:,.0f} us | {cells} |")
    lines += [
        "",
        "| the linear layers of Llama2-7B, one token | launches | eager | CUDA graph |",
        "| --- | --- | --- | --- |",
    ]
    tokens = [row for row in rows if row["what"] == "decode"]
    frozen = tokens[0]
    lines.append(
        f"| frozen | {frozen['frozen_launches']} | {frozen['frozen_eager_ms']:.1f} ms "
        f"| {frozen['frozen_graph_ms']:.1f} ms |"
    )
    lines += [
        f"| r = {row['r']} | {row['launches']} | {row['eager_ms']:.1f} ms | {row['graph_ms']:.1f} ms |"
        for row in tokens
    ]
    lines += ["", "| assumed | | |", "| --- | --- | --- |"]
    for x in document["assumptions"]:
        value = f"{x['value']:g} {x['unit']}".strip()
        lines.append(f"| {x['name']} | {value} | {x['what']} |")
    return lines


TABLES = {
    "demo": ("demo.json", _demo),
    "decoder": ("decoder.json", _decoder),
    "situations": ("situations.json", _situations),
    "quantised": ("quantised-cpu.json", _quantised),
    "cpu": ("projection-cpu.json", _cpu),
    "family": ("family-cpu.json", _family),
    "peft": ("projection-cpu.json", _peft),
    "model": ("model-h100.json", _model),
}
"""By name: the file in results/ that must be there, and what writes the lines."""
