"""Drives CMake and Ninja. Sources, flags and libraries are listed in CMakeLists.txt alone."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "unilora_ext"


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"unilora_ext: building needs the Python package '{name}', which {sys.executable} does not have. "
            f"Drop --no-build-isolation, or install it first: pip install {name}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def program(name: str) -> str:
    """A build program: the pip package of that name (also in a venv that is not activated), else PATH."""
    suffix = ".exe" if os.name == "nt" else ""
    spec = importlib.util.find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        folder = Path(next(iter(spec.submodule_search_locations)))
        for candidate in (folder / "data/bin", folder, Path(sys.executable).parent):
            if (candidate / f"{name}{suffix}").is_file():
                return str(candidate / f"{name}{suffix}")
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"unilora_ext: building needs {name}: pip install {name}")
    return found


class CMakeBuild(build_ext):
    """Configures, builds and installs the CMake project into the package folder."""

    def run(self) -> None:
        target = ROOT / PACKAGE if self.inplace else Path(self.build_lib).resolve() / PACKAGE
        build = Path(self.build_temp).resolve()
        cmake, ninja = program("cmake"), program("ninja")
        configure = [
            cmake,
            *("--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)),
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DUNILORA_TORCH_DIR={package_folder('torch')}",
            f"-DUNILORA_VERSION={self.distribution.get_version()}",
            f"-DUNILORA_CUDA={os.environ.get('UNILORA_CUDA', 'AUTO')}",
        ]
        if importlib.util.find_spec("pybind11"):
            configure.append(f"-DUNILORA_PYBIND11_INCLUDE={package_folder('pybind11') / 'include'}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        self.check_call(configure)
        jobs = os.environ.get("MAX_JOBS")
        self.check_call([cmake, "--build", str(build), *(["--parallel", jobs] if jobs else [])])
        self.check_call([cmake, "--install", str(build), "--prefix", str(target)])

    def check_call(self, command: list[str]) -> None:
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"unilora_ext: the build stopped in: {' '.join(command)}") from error

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / PACKAGE
        return [str(path) for path in folder.glob("_C*")]


# The one extension stands for the whole CMake project, so that wheels are marked as platform wheels.
setup(ext_modules=[Extension(f"{PACKAGE}._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
