"""Damaged and hostile adapters, made from a good one, and what must come of each: an error of this package and an
unchanged model, or an adapter that works and can be taken off.

    python tests/hostile_adapters.py --count 10000 --seed 1
"""

import argparse
import copy
import hashlib
import json
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import safetensors.torch
import torch
from models import Tower, assert_unchanged, snapshot

import unilora_ext as ul

SECONDS = 10
"""That a load may take: a hostile expression takes for ever."""
HANGS = r"(([a-z.]|\w|\d)+)+!"
"""An expression that a long name does not match, after all ways to try."""
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
DTYPES += [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64]

RAW = {  # JSON that json.dumps does not write, by the string that stands for it
    "<deep list>": "[" * 100_000 + "]" * 100_000,
    "<deep object>": '{"a":' * 3000 + "1" + "}" * 3000,
    "<level 90>": "[" * 90 + "]" * 90,
    "<long number>": "9" * 5000,
    "<infinite>": "1e999",
    "<nan>": "NaN",
    "<minus infinity>": "-Infinity",
    "<surrogate>": '"\\ud800"',
}
JUNK = [
    None, True, False, -1, 0, 1, 2, 3, 64, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
    0.0, -0.0, 1.0, 0.5, 1e-320, 1e308, -1e308, "", "x" * 5000, "\0", "a\0b", "../../etc/passwd", "/etc/passwd", ".",
    "adapter.json", "\u202e", "0", "64", "nan", "uniform", "balanced", "peft", "onehot", "all-linear", "(" * 2000, "(",
    "a{99999999999}", HANGS, [], {}, [[]], [None], [0], ["up"], ["up", "down"], ["head"], {"a": 1},
    [["up", 1, 1]], *RAW,
]  # fmt: skip


class Timeout(BaseException):
    """Not an Exception, which something on the way might handle."""


class Source:
    """A good adapter and the plain model it fits. A long name is in it for the expressions."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.x = Tower(width=4, hidden=5, depth=2, classes=3), torch.randint(0, 50, (2, 3))
        self.model.add_module("a.name.of.many.letters.that.is.not.adapted".replace(".", "_"), torch.nn.Identity())
        adapted = copy.deepcopy(self.model)
        config = ul.UniLoRAConfig(r=2, d=16, target_modules=["up", "down"], modules_to_save=["head"], alpha=3.0)
        with tempfile.TemporaryDirectory() as folder:
            ul.attach(adapted, config).save(folder, {"labels": ["no", "yes"], "count": 3})
            record = json.loads((Path(folder) / "adapter.json").read_text())
            self.files = {kind: (Path(folder) / entry["name"]).read_bytes() for kind, entry in record["files"].items()}
        record.pop("checksum")
        self.record = record


# ---- the mutations --------------------------------------------------------------------------------------------------


def _places(value, where=()):
    """The paths of all parts of a JSON value."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*where, key)
        yield from _places(part, (*where, key))


def change_record(rng, record, contents):
    """Deletes, replaces, retypes, wraps, enlarges, repeats, renames, exchanges or adds something."""
    *above, last = rng.choice(list(_places(record)))
    parent = record
    for key in above:
        parent = parent[key]
    value, how = parent[last], rng.randrange(12)
    if how == 0:
        del parent[last]
    elif how <= 4:
        parent[last] = copy.deepcopy(rng.choice(JUNK))
    elif how == 5:  # retyped
        parent[last] = rng.choice([str(value), [value], {"value": value}, bool(value)])
        if isinstance(value, (int, float)):
            parent[last] = rng.choice([float(value), str(value), -value, value + 1, value * 2**40])
    elif how == 6:  # enlarged
        if isinstance(value, (list, str)):
            parent[last] = value * rng.choice([2, 1000])
        elif isinstance(value, dict):
            value.update({f"key {i}": i for i in range(1000)})
    elif how == 7 and isinstance(parent, dict):  # renamed
        parent[rng.choice([last.upper(), last + "_", "", "a\0b", "\u202e"])] = parent.pop(last)
    elif how == 8 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), copy.deepcopy(rng.choice(parent)))
        rng.shuffle(parent)
    elif how == 9:  # exchanged
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[last], parent[other] = parent[other], parent[last]
    elif how == 10 and isinstance(parent, dict):  # added
        parent[rng.choice(["version", "extra", "d", "name", "__class__", "checksum"])] = copy.deepcopy(rng.choice(JUNK))
    else:  # of the configuration, in a form that it allows
        name = rng.choice(["r", "d", "seed", "alpha", "projection", "materialize", *["target_modules"] * 4])
        values = [HANGS, r"blocks\..*\.(up|down)", "nothing"] if name == "target_modules" else [*JUNK, 1, 2, 4]
        record["config"][name] = copy.deepcopy(rng.choice(values))


def agree(record):
    """Makes the record agree with its configuration, so that later checks are met."""
    with suppress(Exception):  # what is broken stays so
        config, modules = record["config"], record["modules"]
        record.update(d=config["d"], r=config["r"], D=sum((m + n) * config["r"] for _, m, n in modules))
        record["scaling"] = 1.0 if config["alpha"] is None else config["alpha"] / config["r"]
        record["projection"].update(name=config["projection"], seed=config["seed"])
        record["fingerprint"] = hashlib.sha256(canonical(modules)).hexdigest()


def change_tensors(rng, record, contents):
    """Another dtype, shape, name or value; one more or one less."""
    kind = rng.choice(list(contents))
    tensors = safetensors.torch.load(contents[kind])
    name, how = rng.choice(list(tensors)), rng.randrange(7)
    if how <= 2:
        tensors[name] = (tensors[name].real * 10).to(rng.choice(DTYPES))
    elif how == 3:
        flat = tensors[name].flatten()
        shapes = [flat, flat[:-1], flat[:0], flat[0], flat[None], tensors[name].T if tensors[name].dim() == 2 else flat]
        tensors[name] = rng.choice(shapes).contiguous()
    elif how == 4:
        tensors[rng.choice(["other", "head", "embed.weight", "", "a\0b"])] = tensors.pop(name)
    elif how == 5:
        tensors["other"] = torch.zeros(3)
    else:
        tensors[name] = torch.full_like(tensors[name], rng.choice([float("nan"), float("inf"), 1e30]))
    contents[kind] = safetensors.torch.save({key: value.clone() for key, value in tensors.items()})


def change_header(rng, record, contents):
    """A safetensors file whose header says something else."""
    kind = rng.choice(list(contents))
    data = contents[kind]
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    name = rng.choice(list(header))
    field, values = rng.choice(
        [
            ("dtype", ["F8_E8M0", "F4", "F6_E2M3", "C64", "U64", "X", "", 3]),
            ("shape", [[-1], [2**63], [0], [], [2**32, 2**32], None, "x"]),
            ("data_offsets", [[0, 0], [0, 2**63], [5, 3], [0, len(data)], [1, 9], [], None]),
        ]
    )
    header[name][field] = rng.choice(values)
    text = rng.choice([json.dumps(header).encode()] * 4 + [b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b""])
    length = rng.choice([len(text)] * 4 + [0, 2**63, len(data) + 1])
    contents[kind] = struct.pack("<Q", length) + text + data[8 + size :]


def change_bytes(rng, record, contents):
    """Cut, lengthened, a bit turned, or something else altogether."""
    kind = rng.choice(list(contents))
    data = bytearray(contents[kind])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    cut = rng.randrange(len(data))
    contents[kind] = rng.choice([bytes(data), contents[kind][:cut], contents[kind] + b"more", b"", b"\x80\x04pickle"])


MUTATIONS = [change_record] * 6 + [change_tensors] * 2 + [change_header, change_bytes]


def canonical(record):
    """What the checksum is of."""
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


def write_mutant(rng, source, folder):
    """One mutated adapter, with its checksums made again."""
    record, contents = copy.deepcopy(source.record), dict(source.files)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        with suppress(Exception):  # an earlier one may have left nothing to change
            rng.choice(MUTATIONS)(rng, record, contents)
    if rng.random() < 0.5:
        agree(record)
    names = {kind: source.record["files"][kind]["name"] for kind in contents}
    for kind, data in contents.items():
        (folder / names[kind]).write_bytes(data)
        if data != source.files[kind]:
            with suppress(Exception):  # the record may have no such entry any more
                record["files"][kind].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    digest = hashlib.sha256(canonical(record)).hexdigest()
    text = json.dumps({**record, "checksum": digest}, indent=rng.choice([None, 2]))
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    data = text.encode()
    if rng.random() < 0.05:  # a name given twice; the last one counts for the checksum
        data = data.replace(b'"format_version": 1', b'"format_version": 1, "format_version": 1')
    if rng.random() < 0.02:
        data = rng.choice([data[:-9], b"\xff" + data, data.decode().encode("utf-16"), b"", b"\xef\xbb\xbf" + data])
    (folder / "adapter.json").write_bytes(data)
    if rng.random() < 0.04:
        change_folder(rng, folder, folder / rng.choice([*names.values(), "adapter.json"]))


def change_folder(rng, folder, path):
    """A file that is missing, a folder, a link to itself, a link to nowhere, or one that may not be read."""
    how = rng.randrange(5)
    if how == 4:
        path.chmod(0)
        return
    path.unlink()
    if how == 1:
        path.mkdir()
    elif how == 2:
        path.symlink_to(path)
    elif how == 3:
        path.symlink_to(folder / "nowhere")


# ---- what comes of them ---------------------------------------------------------------------------------------------


def _stop(*_):
    raise Timeout(f"not done in {SECONDS} s")


def outcome(source, folder):
    """``"refused"`` or ``"works"``.

    Raises:
        AssertionError: the model is not as it was.
        BaseException: whatever is not an error of this package.
    """
    model, before = source.model, snapshot(source.model)
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        adapter = ul.load(model, folder)
    except ul.UniLoRAError as error:
        assert str(error) and len(str(error)) < 20_000
        assert_unchanged(model, before)
        return "refused"
    finally:
        signal.alarm(0)
    file = ul.read(folder)
    assert adapter.config == file.config and list(adapter.layers) == [name for name, _, _ in file.modules]
    assert torch.equal(adapter.theta_d.nan_to_num(), file.theta_d.nan_to_num())
    assert model(source.x).shape == (2, 3)
    adapter.detach()
    assert_unchanged(model, before)
    return "works"


def run(count, seed, folder):
    """Outcomes, and failures as (number, what), of `count` mutants; number n of a seed is always the same one."""
    source, outcomes, failures = Source(), Counter(), []
    for number in range(count):
        one = Path(folder) / str(number)
        one.mkdir()
        write_mutant(random.Random(f"{seed}/{number}"), source, one)
        try:
            outcomes[outcome(source, one)] += 1
        except (Exception, Timeout) as error:
            failures.append((number, f"{type(error).__name__}: {str(error)[:300]}"))
            source = Source()
        else:
            _remove(one)
    return outcomes, failures


def _remove(folder):
    for path in folder.iterdir():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    folder.rmdir()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder, started = tempfile.mkdtemp(prefix="hostile-"), time.perf_counter()
    outcomes, failures = run(arguments.count, arguments.seed, folder)
    for number, what in failures[:50]:
        print(f"{folder}/{number}: {what}")
    print(
        f"{arguments.count} mutated adapters of seed {arguments.seed} in {time.perf_counter() - started:.0f} s: "
        f"{dict(outcomes)}, {len(failures)} failures"
    )
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
