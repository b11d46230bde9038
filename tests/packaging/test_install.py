"""What is installed, and that it gets along with Hugging Face's kernels; one copy of each module in a checkout."""

from __future__ import annotations

import json
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import ROOT, run

pytestmark = pytest.mark.packaging

OURS = """
import sd_numba
import numpy as np
from sd_numba.kernels import conv2d
out = conv2d(np.ones((1, 4, 4, 2), np.float32), np.ones((3, 2, 3, 3), np.float32), padding=1)
assert out.shape == (1, 4, 4, 3) and out[0, 1, 1, 0] == 18, out
print(sd_numba.__file__)
"""
THEIRS = """
import kernels
from kernels import get_kernel
assert get_kernel.__module__.startswith("kernels."), get_kernel.__module__
assert not hasattr(kernels, "conv2d")
"""
# Prints the source files of kernels that more than one module object was made from.
COPIES = """
import collections, json, os, sys
found = collections.defaultdict(set)
for name, module in list(sys.modules.items()):
    if name.split(".")[0] in ("kernels", "sd_numba") and getattr(module, "__file__", None):
        found[os.path.realpath(module.__file__)].add(id(module))
print(json.dumps({"files": len(found), "copies": [file for file, modules in found.items() if len(modules) > 1]}))
"""


def wheel_names(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def is_found(environment, name):
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}) is not None)"
    return environment.python("-c", code).strip() == "True"


def package_files():
    """The files of the package in the checkout, as paths that start with sd_numba/."""
    files = [(path, "sd_numba" / path.relative_to(ROOT / "sd_numba")) for path in (ROOT / "sd_numba").rglob("*")]
    files += [(path, "sd_numba" / path.relative_to(ROOT)) for path in (ROOT / "kernels").rglob("*")]
    return {name.as_posix() for path, name in files if path.is_file() and "__pycache__" not in path.parts}


def test_the_wheel_holds_the_package_and_nothing_else(dists):
    wheel, _, _ = dists
    names = wheel_names(wheel)
    info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
    assert {name.split("/")[0] for name in names} == {"sd_numba", info}
    assert {name for name in names if name.startswith("sd_numba/")} == package_files()
    assert {
        "sd_numba/kernels/conv2d.py",
        "sd_numba/kernels/machine/jit.py",
        "sd_numba/models/clip/merges.txt.gz",
        "sd_numba/models/emoji-world/unet/diffusion_pytorch_model.safetensors",
        "sd_numba/py.typed",
    } <= set(names)


def test_the_sdist_holds_the_package_and_its_tests(dists):
    _, sdist, _ = dists
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    names = {member.name.split("/", 1)[1] for member in members if member.isfile()}
    assert not [member.name for member in members if member.issym() or member.islnk()]
    assert {name for name in names if name.startswith("sd_numba/")} == package_files()
    assert {"pyproject.toml", "conftest.py", "LICENSE", "tests/reference.py"} <= names
    assert not [name for name in names if name.startswith("kernels/")]


def test_the_sdist_installs_what_the_checkout_installs(dists):
    wheel, _, again = dists
    assert wheel_names(again) == wheel_names(wheel)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_kernels_of_hugging_face(dists, theirs, environment, first):
    """`pip install kernels` and ours in one environment, in both orders; each is uninstalled again."""
    install = ("install", "--quiet", "--no-deps", "--no-index")
    for wheel in (dists[0], theirs) if first == "ours" else (theirs, dists[0]):
        environment.pip(*install, wheel)
    environment.python("-c", OURS + THEIRS)

    environment.pip("uninstall", "--quiet", "--yes", "kernels")
    assert Path(environment.python("-c", OURS).strip()).is_relative_to(environment.folder)
    assert not is_found(environment, "kernels")

    environment.pip(*install, theirs)
    environment.pip("uninstall", "--quiet", "--yes", "sd-numba")
    environment.python("-c", THEIRS)
    assert not is_found(environment, "sd_numba")


# What a script may do first with either name; each then has one copy of every module.
FIRST = [
    "from kernels import conv2d",
    "import kernels.gemm",
    "import kernels.machine.jit",
    "import sd_numba.kernels, kernels",
    "import sd_numba.kernels.winograd, kernels.winograd",
    "import importlib, kernels; importlib.reload(kernels)",
]


def check_one_copy(python, first, **where):
    code = (
        f"{first}\nimport importlib, pkgutil, sys\nimport kernels, sd_numba.kernels\n"
        "assert kernels is sd_numba.kernels and kernels.conv2d is sd_numba.kernels.conv2d\n"
        "for found in pkgutil.walk_packages(sd_numba.kernels.__path__, 'sd_numba.kernels.'):\n"
        "    ours = importlib.import_module(found.name)\n"
        "    assert importlib.import_module(found.name.removeprefix('sd_numba.')) is ours, found.name\n" + COPIES
    )
    report = json.loads(python("-c", code, **where))
    assert report["copies"] == []
    assert report["files"] > 25


@pytest.mark.parametrize("first", FIRST)
def test_a_checkout_has_one_copy(checkout, environment, first):
    check_one_copy(environment.python, first, cwd=checkout)


def test_a_checkout_that_is_not_installed(checkout, environment, tmp_path):
    where = {"cwd": tmp_path, "PYTHONPATH": str(checkout)}
    assert Path(environment.python("-c", OURS, **where).strip()) == checkout / "sd_numba/__init__.py"
    check_one_copy(environment.python, FIRST[0], **where)


def test_a_module_that_nothing_imports(checkout, environment):
    """A new file of kernels that `__init__` does not import is one module under both names as well."""
    new = checkout / "kernels/products/not_imported.py"
    new.touch()
    try:
        for order in ("kernels, sd_numba.kernels", "sd_numba.kernels, kernels"):
            code = "".join(f"import {name.strip()}.products.not_imported\n" for name in order.split(",")) + COPIES
            assert json.loads(environment.python("-c", code, cwd=checkout))["copies"] == []
    finally:
        new.unlink()


def test_an_editable_install(checkout, build_tools, environment, tmp_path):
    arguments = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--editable", checkout)
    environment.pip("install", *arguments, PYTHONPATH=str(build_tools))
    printed = environment.python("-c", OURS, cwd=tmp_path)
    assert Path(printed.strip()) == checkout / "sd_numba/__init__.py"
    check_one_copy(environment.python, FIRST[0], cwd=checkout)
    check_one_copy(environment.python, FIRST[0], cwd=tmp_path)


@pytest.mark.parametrize("options", [(), ("--benchmark",)])
def test_pytest_loads_one_copy(checkout, tmp_path, options):
    """Collecting imports every test and benchmark."""
    code = "\n".join("    " + line for line in COPIES.strip().splitlines())
    (tmp_path / "copies.py").write_text(f"def pytest_unconfigure():\n{code}\n")
    command = (sys.executable, "-m", "pytest", "-p", "copies", "-p", "no:cacheprovider", "--collect-only", *options)
    printed = run(*command, cwd=checkout, PYTHONPATH=str(tmp_path))
    report = json.loads(printed.splitlines()[-1])
    assert report["copies"] == []
    assert report["files"] > 25
