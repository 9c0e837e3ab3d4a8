"""The build: what it says when something is missing, and what the distributions hold."""

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
TORCH = Path(torch.__file__).parent


def environment(**changes):
    kept = {k: v for k, v in os.environ.items() if k not in ("UNILORA_CUDA", "TORCH_CUDA_ARCH_LIST", "CMAKE_ARGS")}
    return {**kept, **changes}


def configure(tmp_path, *arguments, **variables):
    """Runs CMake's configure step alone; returns (exit status, what it printed in one line)."""
    cmake = pytest.importorskip("cmake")
    ninja = pytest.importorskip("ninja")
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build"]
    command += [f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}", f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-DUNILORA_TORCH_DIR={TORCH}", *arguments]
    result = subprocess.run(command, env=environment(**variables), capture_output=True, text=True)
    return result.returncode, " ".join((result.stdout + result.stderr).split())


def test_without_nvcc_the_cpu_library_is_built_and_that_is_said(tmp_path):
    status, printed = configure(tmp_path, CUDACXX="/nowhere/nvcc")
    assert status == 0 and "no nvcc on PATH, in CUDA_HOME or in CUDACXX: building the CPU library only" in printed
    assert "_C_cuda" not in (tmp_path / "build/build.ninja").read_text()


def test_cuda_asked_for_without_nvcc_is_an_error(tmp_path):
    status, printed = configure(tmp_path, "-DUNILORA_CUDA=ON", CUDACXX="/nowhere/nvcc")
    assert status != 0 and "UNILORA_CUDA=ON asks for the CUDA library, but there is no nvcc" in printed


def test_cuda_off(tmp_path):
    status, _ = configure(tmp_path, "-DUNILORA_CUDA=OFF")
    assert status == 0 and "_C_cuda" not in (tmp_path / "build/build.ninja").read_text()


def test_wrong_architecture_and_wrong_torch_are_named(tmp_path):
    status, printed = configure(tmp_path, TORCH_CUDA_ARCH_LIST="Hopper", CUDACXX=sys.executable)
    assert (
        status != 0 and "TORCH_CUDA_ARCH_LIST: expected compute capabilities" in printed and "got 'Hopper'" in printed
    )
    status, printed = configure(tmp_path, "-DUNILORA_TORCH_DIR=/nowhere")
    assert status != 0 and "must be the folder of torch >= 2.11" in printed and "got '/nowhere'" in printed


@pytest.mark.slow
def test_sdist_builds_and_the_wheel_holds_no_sources(tmp_path):
    if any(importlib.util.find_spec(name) is None for name in ("build", "wheel", "setuptools")):
        pytest.skip("needs build, wheel and setuptools")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, ROOT]
    result = subprocess.run(command, env=environment(UNILORA_CUDA="OFF"), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    sources = {name for name in tracked if name.startswith(("csrc/", "cmake/", "unilora_ext/", "tests/"))}
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "README.md", *sources} <= inside

    (wheel,) = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("unilora_ext/_C.") for name in files) and "unilora_ext/py.typed" in files
    assert not [
        name for name in files if name.endswith((".cpp", ".h", ".cu", ".cuh", ".txt")) and "dist-info" not in name
    ]
    assert not [name for name in files if name.startswith(("tests", "csrc", "benchmarks"))]
