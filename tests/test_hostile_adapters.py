"""Damaged and hostile adapters whose checksums are right: an error of the package that says what is wrong, or an
adapter that works; never a changed model, another exception, or a load without end."""

import hashlib
import json
import os
import shutil
import time
from contextlib import contextmanager

import pytest
import safetensors.torch
import torch
from hostile_adapters import HANGS, RAW, run
from models import Tower, assert_unchanged, snapshot, tokens

import unilora_ext as ul

CONFIG = ul.UniLoRAConfig(r=3, d=64, target_modules=["up", "down"], seed=11, modules_to_save=["head"], alpha=2.0)


class Counted(Tower):
    """A head with buffers of all kinds."""

    def __init__(self):
        super().__init__()
        self.head.register_buffer("steps", torch.tensor(2**40))
        self.head.register_buffer("mask", torch.tensor([True, False]))
        self.head.register_buffer("phase", torch.tensor([1 + 2j]))


@pytest.fixture
def folder(tmp_path):
    ul.attach(Counted(), CONFIG).save(tmp_path / "adapter", {"labels": ["a"]})
    return tmp_path / "adapter"


def refused(folder, message, seconds=5.0):
    model = Counted()
    before, started = snapshot(model), time.perf_counter()
    with pytest.raises(ul.AdapterFileError, match=message) as error:
        ul.load(model, folder)
    assert time.perf_counter() - started < seconds and str(folder) in str(error.value)
    assert_unchanged(model, before)


def sign(folder, record, replace=str):
    """Writes a record with its checksum; `replace` changes both texts."""
    record.pop("checksum", None)
    text = replace(json.dumps(record, sort_keys=True, separators=(",", ":")))
    record["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "adapter.json").write_text(replace(json.dumps(record)))


def record_of(folder):
    return json.loads((folder / "adapter.json").read_text())


def write_tensors(folder, kind, change):
    record = record_of(folder)
    entry = record["files"][kind]
    tensors = safetensors.torch.load((folder / entry["name"]).read_bytes())
    change(tensors)
    data = safetensors.torch.save(tensors)
    (folder / entry["name"]).write_bytes(data)
    entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    sign(folder, record)


def test_a_thousand_mutated_adapters(tmp_path, fresh_seed):
    outcomes, failures = run(1000, fresh_seed, tmp_path)
    assert failures == []
    assert outcomes["refused"] > 500 and outcomes["works"] > 50


# ---- the record -----------------------------------------------------------------------------------------------------

FIELDS = {
    "a size that is no number": (("d",), "64", r"adapter\.json: d: expected 'int', got 'str'"),
    "a size that is a truth value": (("config", "r"), True, r"config\.r: expected 'int', got 'bool'"),
    "a size that is a float": (("D",), 384.0, "D: expected 'int', got 'float'"),
    "a size beyond the operators": (("D",), 2**63, "D: expected 'int' <= 9007199254740992"),
    "a negative size": (("modules", 0, 1), -20, r"modules\[0\]\[1\]: expected 'int' >= 1"),
    "a float beyond all floats": (("scaling",), 10**300 * 10**100, "expected an integer of at most 1024 bits"),
    "a module of two parts": (("modules", 2), ["a", 1], r"modules\[2\]: expected 'array' of length 3, got 2"),
    "no modules": (("modules",), [], "modules: expected 'array' of length >= 1"),
    "a list as a name": (("projection", "name"), ["uniform"], r"projection\.name: expected 'str', got 'array'"),
    "a projection of another name": (("config", "projection"), "x", "config: projection: expected one of"),
    "a number as a name": (("base_model",), 3, "base_model: expected 'str | null', got 'int'"),
    "no configuration": (("config",), None, "config: expected 'object', got 'null'"),
    "an unknown option": (("config", "gain"), 2, "config: object contains unknown field 'gain'"),
    "an unknown field": (("extra",), 2, "object contains unknown field 'extra'"),
    "an expression that is none": (("config", "target_modules"), "(", "config: .*a regular expression"),
    "a dropout of 1": (("config", "dropout"), 1.0, r"config: .*dropout: expected a number in \[0, 1\)"),
    "files that are a list": (("files",), [], "files: expected 'object', got 'array'"),
    "no size": (("files", "theta_d", "bytes"), None, r"files\.theta_d\.bytes: expected 'int', got 'null'"),
    "no name": (("files", "theta_d", "name"), None, r"files\.theta_d\.name: expected 'str', got 'null'"),
    "a path": (("files", "theta_d", "name"), "../theta_d-0.safetensors", "name: expected 'str' matching regex"),
    "a null character": (("files", "theta_d", "name"), "theta_d-\0.safetensors", "name: expected 'str' matching"),
    "metadata that is a list": (("metadata",), [], "metadata: expected 'object', got 'array'"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_of_the_wrong_kind(folder, case):
    (*above, last), value, message = FIELDS[case]
    record = record_of(folder)
    part = record
    for key in above:
        part = part[key]
    part[last] = value
    sign(folder, record)
    refused(folder, message)


@pytest.mark.parametrize("name", sorted(RAW.keys() - {"<level 90>"}))
def test_json_that_programs_read_differently(folder, name):
    record = record_of(folder)
    record["metadata"] = {"x": name}
    sign(folder, record, lambda text: text.replace(json.dumps(name), RAW[name]))
    refused(folder, "expected JSON, the file is truncated or damaged")


def test_a_name_given_twice(folder):
    path = folder / "adapter.json"
    path.write_text(path.read_text().replace('"d": 64', '"d": 63, "d": 64'))
    refused(folder, "a name is given twice")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected JSON"),
        (b"\xff\xfe", "expected JSON, .* can't decode"),
        ("{}".encode("utf-16"), "expected JSON"),
        (b" " * (65 << 20), "expected at most 67108864 bytes of JSON, got 68157440"),
    ],
)
def test_a_file_that_is_no_text_of_json(folder, data, message):
    (folder / "adapter.json").write_bytes(data)
    refused(folder, message)


@pytest.mark.parametrize("name", ["adapter.json", "theta_d"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.mkdir(), "expected a regular file, got a folder or a device"),
        (os.mkfifo, "expected a regular file, got a folder or a device"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "found none|missing"),
    ],
)
def test_something_else_in_the_place_of_a_file(folder, name, make, message):
    path = next(folder.glob(name + "*"))
    path.unlink()
    make(path)
    refused(folder, message)


@contextmanager
def without_rights(path):
    path.chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read all the same
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(0o700)


def test_a_folder_that_may_not_be_read(folder):
    model = Counted()
    before = snapshot(model)
    with without_rights(folder), pytest.raises(ul.AdapterFileError, match="Permission denied"):
        ul.load(model, folder)
    assert_unchanged(model, before)


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000])
def test_a_path_that_cannot_be(path):
    with pytest.raises(ul.AdapterFileError, match=r"found none|File name too long"):
        ul.read(path)


def test_a_hostile_expression_is_not_run(folder):
    """A saved adapter lists its modules; the expression is kept and that is all."""
    record = record_of(folder)
    record["config"]["target_modules"] = HANGS
    sign(folder, record)
    model, x = Counted(), tokens()
    model.add_module("a_name_that_is_long_enough_for_it", torch.nn.Identity())
    adapter = ul.load(model, folder)
    assert adapter.config.target_modules == HANGS and list(adapter.layers) == [name for name, _, _ in record["modules"]]
    assert model(x).shape == (6, 5)


def test_names_in_the_place_of_an_expression_are_whole_names(tmp_path):
    """'up' is the ending of 'deep.up' too."""
    plain = torch.nn.Sequential()
    plain.add_module("up", torch.nn.Linear(6, 6))
    plain.add_module("deep", torch.nn.Sequential())
    plain.deep.add_module("up", torch.nn.Linear(6, 6))
    adapter = ul.attach(plain, ul.UniLoRAConfig(r=2, d=10, target_modules="u."))
    adapter.save(tmp_path)
    adapter.detach()
    assert list(ul.load(plain, tmp_path).layers) == ["up"]


def test_an_expression_still_says_which_modules_are_missing(tmp_path):
    ul.attach(Tower(), ul.UniLoRAConfig(r=3, d=64, target_modules=".*(up|down)")).save(tmp_path)
    other = Tower(depth=2)
    before = snapshot(other)
    with pytest.raises(ul.AdapterFileError, match=r"(?s)differ in 2 places.*'blocks.2.up': .*, not in the model"):
        ul.load(other, tmp_path)
    assert_unchanged(other, before)


# ---- the tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_theta_d_of_the_types_that_work(folder, dtype):
    write_tensors(folder, "theta_d", lambda tensors: tensors.update(theta_d=tensors["theta_d"].to(dtype)))
    model = Counted()
    assert ul.load(model, folder).theta_d.dtype == dtype
    model(tokens()).sum().backward()


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_theta_d_of_other_types(folder, dtype):
    write_tensors(folder, "theta_d", lambda tensors: tensors.update(theta_d=tensors["theta_d"].to(dtype)))
    refused(folder, rf"theta_d: expected float16, .*float64 of shape \[64\], got {dtype}")


def test_more_than_theta_d_in_its_file(folder):
    write_tensors(folder, "theta_d", lambda tensors: tensors.update(other=torch.zeros(1)))
    refused(folder, r"expected \['theta_d'\] in the file of theta_d, got also \['other'\]")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("head.weight", torch.int64),
        ("head.weight", torch.bool),
        ("head.bias", torch.complex64),
        ("head.steps", torch.float32),
        ("head.steps", torch.int32),
        ("head.mask", torch.float32),
        ("head.mask", torch.uint8),
        ("head.phase", torch.float32),
    ],
)
def test_a_trained_module_of_another_kind(folder, name, dtype):
    expected = Counted().state_dict()[name].dtype
    write_tensors(folder, "modules_to_save", lambda tensors: tensors.update({name: tensors[name].real.to(dtype)}))
    refused(folder, f"modules_to_save: '{name}': expected {expected}, as in the model, got {dtype}")


def test_a_trained_module_in_another_floating_type(folder):
    write_tensors(folder, "modules_to_save", lambda t: t.update({"head.weight": t["head.weight"].double()}))
    model = Counted()
    ul.load(model, folder)
    assert model.head.weight.dtype == torch.float32
    model(tokens()).sum().backward()


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "X"])
def test_a_type_that_torch_may_not_have(folder, dtype):
    record = record_of(folder)
    entry = record["files"]["theta_d"]
    data = (folder / entry["name"]).read_bytes()
    changed = data.replace(b'"F32"', f'"{dtype}"'.encode())
    changed = (int.from_bytes(data[:8], "little") + len(changed) - len(data)).to_bytes(8, "little") + changed[8:]
    (folder / entry["name"]).write_bytes(changed)
    entry.update(bytes=len(changed), sha256=hashlib.sha256(changed).hexdigest())
    sign(folder, record)
    refused(folder, "expected safetensors|theta_d: expected float16")


def test_a_huge_file_is_not_read(folder):
    """A terabyte, all of it a hole."""
    try:
        os.truncate(next(folder.glob("theta_d-*")), 1 << 40)
    except OSError:
        pytest.skip("no such files here")
    refused(folder, r"expected \d+ bytes, got 1099511627776: truncated or overwritten", seconds=1.0)


def test_a_load_that_is_interrupted_leaves_the_model(folder, monkeypatch):
    model = Counted()
    before, copy_, copied = snapshot(model), ul.loading.copy_, []

    def interrupted(target, value):
        if len(copied) == 2:
            raise KeyboardInterrupt
        copied.append(copy_(target, value))

    monkeypatch.setattr(ul.loading, "copy_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ul.load(model, folder)
    assert len(copied) == 2
    assert_unchanged(model, before)


def test_an_adapter_that_was_copied_through_links(folder, tmp_path):
    """As the cache of the Hugging Face hub holds it."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        blob = tmp_path / f"blob-{path.stem}"
        shutil.copy(path, blob)
        (linked / path.name).symlink_to(blob)
    assert torch.equal(ul.read(linked).theta_d, ul.read(folder).theta_d)
