"""Processes that save into one folder, readers beside them, and what killed and failing savers leave."""

import fcntl
import json
import os
import threading
import time

import pytest
import torch
from models import Tower
from saving_together import reads_beside_a_saver, two_savers

import unilora_ext as ul
from unilora_ext import files
from unilora_ext.integrations.peft import export_lora

CONFIG = ul.UniLoRAConfig(r=3, d=64, target_modules=["up", "down"], modules_to_save=["head"])


def saved(folder, value=1.0):
    model = Tower()
    adapter = ul.attach(model, CONFIG)
    return save(adapter, folder, value)


def save(adapter, folder, value):
    with torch.no_grad():
        adapter.theta_d.fill_(value)
        adapter.model.head.bias.fill_(value)
    adapter.save(folder)
    return adapter


def test_two_savers_of_one_folder(tmp_path):
    assert two_savers(tmp_path / "adapter", 60) == []


def test_a_reader_beside_a_saver(tmp_path):
    failures, saves = reads_beside_a_saver(tmp_path / "adapter", 3000)
    assert failures == [] and saves > 0


@pytest.mark.parametrize("then", [2.0, 1.0])
def test_a_reader_looks_again_when_the_adapter_was_replaced(tmp_path, monkeypatch, then):
    """Between a reader's look at adapter.json and its look at the tensors another adapter is saved; then, maybe, the
    first one again, whose adapter.json has the same bytes."""
    adapter = saved(tmp_path)
    read_tensors = ul.checkpoint._read_tensors

    def overtaken(*arguments):
        monkeypatch.undo()
        save(adapter, tmp_path, 2.0)
        with pytest.raises(ul.AdapterFileError, match="missing") as error:
            read_tensors(*arguments)
        save(adapter, tmp_path, then)
        raise error.value

    monkeypatch.setattr(ul.checkpoint, "_read_tensors", overtaken)
    file = ul.read(tmp_path)
    assert (file.theta_d == then).all() and (file.modules_to_save["head.bias"] == then).all()


def test_a_reader_does_not_look_for_ever(tmp_path, monkeypatch):
    adapter = saved(tmp_path)
    parse, steps = ul.checkpoint.parse, iter(range(2, 1000))
    inside = []

    def overtaken(*arguments):
        result = parse(*arguments)
        if not inside:  # save() parses too
            inside.append(True)
            save(adapter, tmp_path, next(steps))
            inside.clear()
        return result

    monkeypatch.setattr(ul.checkpoint, "parse", overtaken)
    with pytest.raises(ul.AdapterFileError, match="expected one adapter, got 100 in turn"):
        ul.read(tmp_path)


def test_a_saver_waits_for_another_one_and_not_for_ever(tmp_path, monkeypatch):
    adapter = saved(tmp_path)
    monkeypatch.setattr(files, "PATIENCE", 0.2)
    with files.locked(tmp_path) as alone:
        assert alone
        with pytest.raises(ul.UniLoRAError, match=r"expected to write into it, got another process .* for 0\.2 s"):
            save(adapter, tmp_path, 2.0)
        assert (ul.read(tmp_path).theta_d == 1).all()
        monkeypatch.setattr(files, "PATIENCE", 60.0)
        thread = threading.Thread(target=save, args=(adapter, tmp_path, 3.0))
        thread.start()
        time.sleep(0.1)
        assert (ul.read(tmp_path).theta_d == 1).all()
    thread.join()
    assert (ul.read(tmp_path).theta_d == 3).all()


LEFT = {
    ".adapter-0123abcd.tmp": "a killed save",
    ".theta_d-0123abcd-89abcdef.tmp": "a killed save",
    ".modules_to_save-0123abcd-89abcdef.tmp": "a killed save",
    "theta_d-01234567.safetensors": "a save that was killed before its adapter.json",
}
OTHERS = [".adapter-mine.tmp", "theta_d-best.safetensors", "notes.txt", ".adapter_model-0123abcd.tmp"]


@pytest.mark.parametrize("locks", [True, False])
def test_what_killed_saves_left_is_swept(tmp_path, monkeypatch, locks):
    """Without locks the young ones stay: they may be another writer's."""
    adapter = saved(tmp_path)
    if not locks:

        def none_here(*_):
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(fcntl, "flock", none_here)
    for name in [*LEFT, *OTHERS]:
        (tmp_path / name).write_text("left")
    save(adapter, tmp_path, 2.0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names.isdisjoint(LEFT) == locks and names.issuperset(OTHERS)
    for path in tmp_path.iterdir():
        os.utime(path, (time.time() - 2 * files.STALE,) * 2)
    save(adapter, tmp_path, 3.0)
    names = {path.name for path in tmp_path.iterdir()}
    assert names.isdisjoint(LEFT) and names.issuperset(OTHERS) and len(names) == 3 + len(OTHERS)
    assert (ul.read(tmp_path).theta_d == 3).all()


def test_a_peft_folder_is_swept_and_written_by_one_at_a_time(tmp_path, monkeypatch):
    adapter = saved(tmp_path / "own")
    left = tmp_path / "lora" / ".adapter_model-0123abcd.tmp"
    left.parent.mkdir()
    left.write_text("left")
    export_lora(adapter, tmp_path / "lora")
    assert not left.exists() and len(list(left.parent.iterdir())) == 2
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with files.locked(left.parent), pytest.raises(ul.UniLoRAError, match="another process"):
        export_lora(adapter, left.parent)


def test_a_file_of_the_same_name_and_other_content_is_not_touched_before_its_time(tmp_path, monkeypatch):
    """The first digits of two hashes may agree. The old file is needed until the new adapter.json is in place."""
    adapter = saved(tmp_path / "a")
    save(adapter, tmp_path / "b", 2.0)
    name = next((tmp_path / "b").glob("theta_d-*")).name
    old = next((tmp_path / "a").glob("theta_d-*"))
    record = json.loads((tmp_path / "a" / "adapter.json").read_text())
    record["files"]["theta_d"]["name"] = name
    del record["checksum"]
    record["checksum"] = ul.record.digest(record)
    old.rename(old.with_name(name))
    (tmp_path / "a" / "adapter.json").write_text(json.dumps(record))
    assert (ul.read(tmp_path / "a").theta_d == 1).all()

    def full_disk(path, data, replace=ul.checkpoint.replace_file):
        if path.name == "adapter.json":
            raise OSError(28, "No space left on device")
        replace(path, data)

    monkeypatch.setattr(ul.checkpoint, "replace_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(adapter, tmp_path / "a", 2.0)
    assert (ul.read(tmp_path / "a").theta_d == 1).all()
    monkeypatch.undo()
    save(adapter, tmp_path / "a", 2.0)
    assert (ul.read(tmp_path / "a").theta_d == 2).all()
    assert len(list((tmp_path / "a").iterdir())) == 3


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    adapter = saved(tmp_path / "adapter")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        adapter.save(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        adapter.save(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"

    def read_only(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(PermissionError):
        save(adapter, tmp_path / "adapter", 2.0)
    monkeypatch.undo()
    assert (ul.read(tmp_path / "adapter").theta_d == 1).all() and len(list((tmp_path / "adapter").iterdir())) == 3
