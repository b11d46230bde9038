"""Builds of this checkout, and environments to install them into."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "bench", "kernels", "sd_numba", "tests", "training",
    "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "conftest.py", "pyproject.toml",
)  # fmt: skip


def run(*command, cwd=None, **environment):
    """Run a command without what the caller's environment adds to Python's path; return what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=inherited | environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def pip(*arguments, **environment):
    return run(sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments, **environment)


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees what this one has installed, except sd-numba."""

    folder: Path

    def pip(self, *arguments, **environment):
        return pip("--python", self.folder / "bin/python", *arguments, **environment)

    def python(self, *arguments, cwd=None, **environment):
        return run(self.folder / "bin/python", *arguments, cwd=cwd or self.folder, **environment)


def fetch(*arguments):
    """Run pip with the package index; without one, fail in CI and skip elsewhere."""
    try:
        pip(*arguments)
    except AssertionError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(f"needs the package index: {str(error).splitlines()[-1]}")


@pytest.fixture(scope="session")
def checkout(tmp_path_factory):
    """A copy of the checkout: builds may not leave files in the real one."""
    if not (ROOT / "kernels").is_dir():
        pytest.skip("runs from a checkout: an sdist has no folder kernels/")
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", "data")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="session")
def build_tools(tmp_path_factory):
    """A folder with the build backend, for builds without isolation: pip would fetch it for each."""
    folder = tmp_path_factory.mktemp("build-tools")
    fetch("install", "--quiet", "--target", folder, "hatchling", "editables")
    return folder


@pytest.fixture(scope="session")
def dists(checkout, build_tools, tmp_path_factory):
    """The wheel, the sdist, and the wheel built from the sdist."""
    folder = tmp_path_factory.mktemp("dists")
    hatchling = (sys.executable, "-m", "hatchling", "build")
    run(*hatchling, "-d", folder, cwd=checkout, PYTHONPATH=str(build_tools))
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    run(*hatchling, "-t", "wheel", "-d", folder / "again", cwd=unpacked, PYTHONPATH=str(build_tools))
    (again,) = (folder / "again").glob("*.whl")
    return wheel, sdist, again


@pytest.fixture(scope="session")
def theirs(tmp_path_factory):
    """Hugging Face's distribution that is called kernels, as a wheel."""
    folder = tmp_path_factory.mktemp("theirs")
    fetch("download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder, "kernels")
    (wheel,) = folder.glob("kernels-*.whl")
    return wheel


@pytest.fixture
def environment(tmp_path):
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    linked = folder / "linked"
    linked.mkdir()
    for installed in {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}:
        for entry in installed.iterdir():
            if not entry.name.startswith(("sd_numba", "_sd_numba", "kernels", "pip")) and entry.suffix != ".pth":
                (linked / entry.name).symlink_to(entry)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "linked.pth").write_text(f"{linked}\n")
    return Environment(folder)
