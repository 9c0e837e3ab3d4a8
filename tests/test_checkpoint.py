"""The adapter file: small, checked, atomic; a load that fails leaves the model as it was."""

import copy
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from models import Tower, assert_unchanged, snapshot, tokens

import unilora_ext as ul

CONFIG = ul.UniLoRAConfig(r=3, d=64, target_modules=["up", "down"], seed=11, modules_to_save=["head"], alpha=2.0)


def trained(tmp_path, config=CONFIG, metadata=None):
    """A model with a trained adapter and head, and its saved folder."""
    model = Tower()
    adapter = ul.attach(model, config)
    with torch.no_grad():
        adapter.theta_d.normal_()
        model.head.weight.normal_()
    adapter.save(tmp_path / "adapter", metadata)
    return model, tmp_path / "adapter"


def base_of(model):
    """A plain model with the same frozen weights and a fresh head."""
    plain = Tower()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("unilora", "head"))}
    plain.load_state_dict(state, strict=False)
    return plain


@pytest.mark.parametrize("projection", ["uniform", "balanced"])
def test_round_trip(tmp_path, projection):
    config = ul.UniLoRAConfig(**{**vars(CONFIG), "projection": projection})
    model, folder = trained(tmp_path, config, {"labels": ["no", "yes"]})
    fresh, x = base_of(model), tokens()
    adapter = ul.load(fresh, folder)
    assert torch.equal(fresh(x), model(x)) and adapter.config == config
    assert torch.equal(adapter.theta_d, ul.get_adapter(model).theta_d) and adapter.theta_d.requires_grad
    assert ul.read(folder).metadata == {"labels": ["no", "yes"]}


def test_d_plus_one_numbers(tmp_path):
    _, folder = trained(tmp_path)
    (theta_file,) = folder.glob("theta_d-*.safetensors")
    assert theta_file.stat().st_size <= 4 * 64 + 4096
    assert set(safetensors.torch.load_file(theta_file)) == {"theta_d"}
    assert not any(p.suffix in (".pkl", ".pt", ".bin") for p in folder.iterdir()) and len(list(folder.iterdir())) == 3


def test_float64_is_kept(tmp_path):
    model = Tower().double()
    adapter = ul.attach(model, CONFIG)
    adapter.save(tmp_path)
    assert ul.read(tmp_path).theta_d.dtype == torch.float64
    assert torch.equal(ul.load(Tower().double(), tmp_path).theta_d, adapter.theta_d)


def test_saving_again_replaces_the_adapter_and_leaves_other_files(tmp_path):
    model, folder = trained(tmp_path)
    (folder / "notes.txt").write_text("mine")
    adapter = ul.get_adapter(model)
    with torch.no_grad():
        adapter.theta_d.add_(1)
    adapter.save(folder)
    assert torch.equal(ul.read(folder).theta_d, adapter.theta_d)
    assert len(list(folder.glob("*.safetensors"))) == 2 and (folder / "notes.txt").read_text() == "mine"


def test_saving_while_disabled_or_merged_keeps_the_trained_values(tmp_path):
    model, folder = trained(tmp_path)
    adapter, before = ul.get_adapter(model), ul.read(folder)
    with adapter.disable():
        adapter.save(tmp_path / "disabled")
    adapter.merge()
    adapter.save(tmp_path / "merged")
    for name in ("disabled", "merged"):
        again = ul.read(tmp_path / name)
        assert torch.equal(again.theta_d, before.theta_d)
        assert torch.equal(again.modules_to_save["head.weight"], before.modules_to_save["head.weight"])


def test_metadata_is_read_back_as_it_was(tmp_path):
    metadata = {
        "z": [1, -2.5, 1e-300, True, None, "é漢🙂\n\0"], "a": {"": {}, "b": []}, "2": 2**70, "deep": nested(98),
    }  # fmt: skip
    _, folder = trained(tmp_path, metadata=metadata)
    assert ul.read(folder).metadata == metadata and list(ul.read(folder).metadata) == list(metadata)
    ul.get_adapter(trained(tmp_path)[0]).save(folder, {"pair": (1, (2, 3))})
    assert ul.read(folder).metadata == {"pair": [1, [2, 3]]}


@pytest.mark.parametrize(
    ("name", "stored"), [("org/model", "org/model"), (Path("/a/b"), "/a/b"), ("/m\udcff", "/m?"), ("", None)]
)
def test_the_name_of_the_base_model_never_keeps_an_adapter_from_being_saved(tmp_path, name, stored):
    model = Tower()
    model.config = SimpleNamespace(_name_or_path=name)
    ul.attach(model, CONFIG).save(tmp_path)
    assert ul.read(tmp_path).record["base_model"] == stored


def nested(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


CIRCLE: list = []
CIRCLE.append(CIRCLE)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({1: "a"}, r"metadata: expected strings as keys, which JSON makes of all of them; got 1"),
        ({"a": [{None: 1}]}, r"metadata\['a'\]: expected strings as keys, .*; got None"),
        ({"a": {"b": float("nan")}}, r"metadata\['a'\]\['b'\]: expected a finite number, got nan"),
        ({"a": [float("-inf")]}, r"metadata\['a'\]: expected a finite number, got -inf"),
        ({"a": "\ud800"}, r"metadata\['a'\]: expected Unicode text"),
        ({"\udfff": 1}, "metadata: expected Unicode text"),
        ({"a": {1, 2}}, r"metadata\['a'\]: expected a JSON value, got \{1, 2\} \(set\)"),
        ({"a": torch.zeros(())}, r"expected a JSON value, got tensor\(0\.\) \(Tensor\)"),
        ({"a": 10**5000}, r"metadata\['a'\]: expected an integer of at most 1024 bits, got 16610"),
        ({"a": nested(99)}, r"metadata\['a'\]: expected at most 100 levels of nesting"),
        ({"a": CIRCLE}, "expected at most 100 levels of nesting"),
        ([1], "metadata: expected 'object', got 'array'"),
        ("text", "metadata: expected 'object', got 'str'"),
    ],
)
def test_metadata_that_would_not_be_read_back_is_refused(tmp_path, metadata, message):
    model, folder = trained(tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target in (folder, tmp_path / "new"):
        with pytest.raises(ul.UniLoRAError, match=message):
            ul.get_adapter(model).save(target, metadata)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_a_failed_save_leaves_the_old_adapter_whole(tmp_path, monkeypatch):
    model, folder = trained(tmp_path)
    before, replace, calls = ul.read(folder), os.replace, []

    for fail_at in (1, 2, 3):
        del calls[:]

        def failing(source, target, fail_at=fail_at):
            calls.append(target)
            if len(calls) == fail_at:
                raise OSError("No space left on device")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with torch.no_grad():
            ul.get_adapter(model).theta_d.add_(1)
            model.head.bias.add_(1)
        with pytest.raises(OSError, match="No space left"):
            ul.get_adapter(model).save(folder)
        monkeypatch.undo()
        assert torch.equal(ul.read(folder).theta_d, before.theta_d)
        assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*.tmp"))
    ul.get_adapter(model).save(folder)
    assert len(list(folder.glob("*.safetensors"))) == 2


SAVE_FOREVER = """
import sys, torch, unilora_ext as ul
sys.path.insert(0, sys.argv[2])
from models import Tower
model = Tower()
config = ul.UniLoRAConfig(r=64, d=9000, target_modules=["up", "down"], seed=11, modules_to_save=["head"])
adapter = ul.attach(model, config)
step = 0
while True:
    step += 1
    with torch.no_grad():
        adapter.theta_d.fill_(step)
        model.head.bias.fill_(step)
    adapter.save(sys.argv[1])
    print(step, flush=True)
"""


def test_killed_in_mid_save_the_folder_still_loads(tmp_path):
    """SIGKILL at random moments of a process that does nothing but save."""
    command = [sys.executable, "-c", SAVE_FOREVER, tmp_path / "adapter", Path(__file__).parent]
    for _ in range(5):
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(float(torch.rand(())) * 0.3)
        process.send_signal(signal.SIGKILL)
        last = max([1, *map(int, process.communicate()[0].split())])
        file = ul.read(tmp_path / "adapter")
        step = float(file.theta_d[0])
        assert (file.theta_d == step).all() and (file.modules_to_save["head.bias"] == step).all()
        assert step in (last, last + 1), (step, last)
    trained(tmp_path)
    assert len(list((tmp_path / "adapter").iterdir())) == 3, "what the killed saves left"


# ---- files that must be refused -------------------------------------------------------------------------------------


def edit_json(folder, change, sign=True):
    path = folder / "adapter.json"
    record = json.loads(path.read_text())
    change(record)
    if sign:  # a consistent checksum: what is refused then is the content
        record.pop("checksum", None)
        text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
        record["checksum"] = hashlib.sha256(text).hexdigest()
    path.write_text(json.dumps(record))


def theta_file(folder):
    return next(folder.glob("theta_d-*.safetensors"))


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def foreign_tensors(folder):
    data = safetensors.torch.save({"theta_d": torch.zeros(63)})
    theta_file(folder).write_bytes(data)
    entry = {"name": theta_file(folder).name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(folder, lambda r: r["files"].update(theta_d=entry))


def not_safetensors(folder):
    data = b"\x80\x04pickle"
    theta_file(folder).write_bytes(data)
    entry = {"name": theta_file(folder).name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_json(folder, lambda r: r["files"].update(theta_d=entry))


def peft_folder(folder):
    (folder / "adapter.json").unlink()
    (folder / "adapter_config.json").write_text("{}")


REFUSED = {
    "no such folder": (lambda f: f.rename(f.parent / "moved"), "expected a Uni-LoRA adapter folder with adapter.json"),
    "another library's": (peft_folder, "it holds a PEFT adapter"),
    "truncated JSON": (
        lambda f: (f / "adapter.json").write_text("{"),
        "expected JSON, the file is truncated or damaged",
    ),
    "another format": (
        lambda f: (f / "adapter.json").write_text("[]"),
        "expected format 'unilora_ext adapter', got 'list'",
    ),
    "a newer version": (
        lambda f: edit_json(f, lambda r: r.update(format_version=3, library_version="9.9")),
        "expected format version 2 or 1, got 3; it was written by unilora_ext 9.9",
    ),
    "edited by hand": (
        lambda f: edit_json(f, lambda r: r["projection"].update(seed=12), sign=False),
        "does not match its checksum: it was changed",
    ),
    "an unknown algorithm": (
        lambda f: edit_json(f, lambda r: r["projection"].update(version=7)),
        "projection.version: expected 1, got 7",
    ),
    "a missing entry": (lambda f: edit_json(f, lambda r: r.pop("modules")), "missing required field 'modules'"),
    "contradicting sizes": (lambda f: edit_json(f, lambda r: r.update(D=5)), "D: expected .*, got 5"),
    "tensors missing": (lambda f: theta_file(f).unlink(), "expected this file, as adapter.json says; it is missing"),
    "tensors truncated": (
        lambda f: theta_file(f).write_bytes(theta_file(f).read_bytes()[:-7]),
        "truncated or overwritten",
    ),
    "tensors changed": (lambda f: flip_a_byte(theta_file(f)), "does not match its SHA-256"),
    "tensors of another length": (
        foreign_tensors,
        r"theta_d: expected float16, .* of shape \[64\], got .* \[63\]",
    ),
    "not safetensors": (not_safetensors, "expected safetensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_damaged_and_foreign_folders_are_refused(tmp_path, case):
    damage, message = REFUSED[case]
    model, folder = trained(tmp_path)
    damage(folder)
    fresh = base_of(model)
    before = snapshot(fresh)
    with pytest.raises(ul.AdapterFileError, match=message):
        ul.load(fresh, folder)
    assert_unchanged(fresh, before)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            Tower(depth=2),
            r"(?s)adapted modules differ in 2 places.*'blocks.2.up': in the adapter \[22, 12\], not in the model",
        ),
        (Tower(depth=4), r"(?s)differ in 2 places.*'blocks.3.down': in the model \[12, 23\], not in the adapter"),
        (
            Tower(hidden=21),
            r"(?s)differ in 6 places.*'blocks.0.up': in the adapter \[20, 12\], in the model \[21, 12\]",
        ),
        (
            Tower(classes=4),
            r"(?s)modules_to_save differ in 2 places.*'head.bias': in the adapter \[5\], in the model \[4\]",
        ),
        (
            torch.nn.Sequential(torch.nn.Linear(3, 3)),
            "does not fit this Sequential: modules_to_save: no module .* named 'head'",
        ),
    ],
)
def test_another_model_is_refused_with_the_differences(tmp_path, other, message):
    _, folder = trained(tmp_path)
    before = snapshot(other)
    with pytest.raises(ul.UniLoRAError, match=message):
        ul.load(other, folder)
    assert_unchanged(other, before)


def test_a_given_index_cannot_be_saved(tmp_path):
    model, folder = trained(tmp_path)
    vector = ul.get_adapter(model).vector
    vector.projection = ul.OneHotProjection(vector.projection.index, 64)
    before = ul.read(folder)
    with pytest.raises(ul.UniLoRAError, match="a given index has no seed"):
        ul.get_adapter(model).save(folder)
    assert torch.equal(ul.read(folder).theta_d, before.theta_d)


@pytest.mark.parametrize("loader", ["ours", "PEFT"])
def test_modules_to_save_of_a_model_without_memory(tmp_path, loader):
    """Their trained values would be lost in to_empty() and load_state_dict(): load afterwards, says the error."""
    base, x = Tower(), tokens()
    teacher = copy.deepcopy(base)
    options = dict(r=2, d=16, target_modules=["up"], modules_to_save=["head"], projection="peft")
    adapter = ul.attach(teacher, ul.UniLoRAConfig(**options))
    with torch.no_grad():
        teacher.head.weight.add_(1)
    if loader == "ours":
        adapter.save(tmp_path)
        load = ul.load
    else:
        pytest.importorskip("peft.tuners.unilora")
        ul.integrations.peft.to_peft(adapter, tmp_path)
        load = ul.integrations.peft.from_peft
    with torch.device("meta"):
        model = Tower()
    before = {name: type(m) for name, m in model.named_modules()}
    message = r"modules_to_save: 'head.weight' is on the meta device.*\(to_empty, load_state_dict\), then load"
    with pytest.raises(ul.AttachError, match=message):
        load(model, tmp_path)
    assert {name: type(m) for name, m in model.named_modules()} == before
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict())
    loaded = load(model, tmp_path)
    assert torch.equal(model(x), teacher(x))
    with loaded.disable():
        assert torch.equal(model(x), base(x))


def test_original_modules_to_save_that_were_never_known():
    """attach() on the meta device, then memory and weights: the adapter cannot be switched off, and says why."""
    base, x = Tower(), tokens()
    with torch.device("meta"):
        model = Tower()
    adapter = ul.attach(model, ul.UniLoRAConfig(r=2, d=16, target_modules=["up"], modules_to_save=["head"]))
    model.to_empty(device="cpu")
    model.load_state_dict(base.state_dict(), strict=False)
    y = model(x)
    message = r"expected the values of 'head.weight' from before attach\(\), which are not known"
    for call in (adapter.disable, adapter.detach):
        with pytest.raises(ul.UniLoRAError, match=message):
            call()
        assert adapter.vector.enabled and torch.equal(model(x), y)
    adapter.merge()
    with pytest.raises(ul.UniLoRAError, match=message):
        adapter.detach()
    assert adapter.merged
    assert type(adapter.detach(merge=True).head) is torch.nn.Linear
