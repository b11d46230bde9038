"""The dispatch table: which row is chosen, and that every row computes the same."""

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import pytest

from kernels import isa

ROOT = Path(__file__).resolve().parents[2]
X86 = pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="needs x86-64")
OPS = ("gemm", "conv2d", "winograd", "low_rank", "attention", "norm", "activations", "arrays")
RUN_ROW = """
import sys
import pytest
from kernels import isa
assert isa.tile().name == sys.argv[1], isa.tile()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def rows():
    """Processes that run the tests of all ops with kernels compiled for another CPU; on three threads, for once."""
    runs = {}
    for cpu, row in (("haswell", "avx2"), ("generic", "generic")):
        environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_NUM_THREADS": "3"}
        environment.pop("NUMBA_CPU_FEATURES", None)
        command = [sys.executable, "-c", RUN_ROW, row, *(str(Path(__file__).with_name(f"test_{op}.py")) for op in OPS)]
        runs[row] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield runs
    for run in runs.values():
        run.kill()
        run.wait()


@X86
@pytest.mark.parametrize("row", ["avx2", "generic"])
def test_kernels_are_right_on_every_row(rows, row):
    output, _ = rows[row].communicate(timeout=600)
    assert rows[row].returncode == 0, output[-4000:]


def choose(monkeypatch, cpu, features="", triple=None):
    """Which row the table gives for a CPU, asked for as NUMBA_CPU_NAME and NUMBA_CPU_FEATURES do."""
    monkeypatch.setattr(numba.config, "CPU_NAME", cpu)
    monkeypatch.setattr(numba.config, "CPU_FEATURES", features)
    if triple is not None:
        llvm.initialize_all_targets()
        llvm.initialize_all_asmprinters()
        monkeypatch.setattr(llvm, "get_process_triple", lambda: triple)
    return isa.tile.__wrapped__()


@X86
@pytest.mark.parametrize(
    ("cpu", "row", "native_f16"),
    [
        ("generic", "generic", False),
        ("x86-64-v2", "generic", False),
        ("sandybridge", "generic", False),  # AVX without fused multiply-add
        ("haswell", "avx2", True),
        ("znver3", "avx2", True),
        ("x86-64-v3", "avx2", True),
        ("znver4", "avx512", True),
        ("sapphirerapids", "avx512", True),
    ],
)
def test_row_of_x86(monkeypatch, cpu, row, native_f16):
    tile = choose(monkeypatch, cpu)
    assert (tile.name, tile.native_f16) == (row, native_f16)


def test_row_of_arm(monkeypatch):
    tile = choose(monkeypatch, "cortex-a72", triple="aarch64-unknown-linux-gnu")
    assert tile == isa.Tile("neon", 4, 4, native_f16=True)


@X86
def test_row_follows_features(monkeypatch):
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "-fma")
    assert choose(monkeypatch, "haswell", "-fma").name == "generic"
    assert choose(monkeypatch, "generic", "+avx2,+fma").name == "avx2"


@X86
def test_a_named_cpu_has_its_own_features(monkeypatch):
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    assert choose(monkeypatch, "generic", None).name == "generic"
    assert numba.config.CPU_FEATURES == ""


def test_tile_is_frozen_and_consistent():
    tile = isa.tile()
    assert tile is isa.tile()
    assert tile.width == tile.lanes * tile.vectors
    with pytest.raises(dataclasses.FrozenInstanceError):
        tile.lanes = 1


def test_register_tiles_fit_the_register_file():
    registers = {"avx512": 32, "avx2": 16, "neon": 32, "generic": 16}
    for name, (_, vectors) in isa._ROWS.items():
        assert 6 * vectors + vectors + 1 <= registers[name]


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, float("inf")),
        ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, float("inf")),
        ({"/sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2.5),
        ({"/sys/fs/cgroup/cpu.max": "garbage"}, float("inf")),
        (
            {"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            float("inf"),
        ),
        ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
    ],
)
def test_cgroup_quota(monkeypatch, files, cpus):
    def read_text(path):
        if path.as_posix() not in files:
            raise FileNotFoundError(path)
        return files[path.as_posix()]

    monkeypatch.setattr(isa.Path, "read_text", read_text)
    assert isa._cgroup_cpus() == cpus


def test_physical_cores(monkeypatch):
    """Two hyper-threads are one core; a quota of less than one CPU still leaves one thread."""

    def read_text(path):
        cpu = int(path.parts[-3].removeprefix("cpu"))
        return f"{cpu % 2},{cpu % 2 + 2}\n"

    monkeypatch.setattr(isa.os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(isa.Path, "read_text", read_text)
    for quota, cores in ((float("inf"), 2), (1.5, 1), (0.5, 1)):
        monkeypatch.setattr(isa, "_cgroup_cpus", lambda quota=quota: quota)
        assert isa.physical_cores.__wrapped__() == cores
    monkeypatch.setattr(isa.os, "sched_getaffinity", lambda _: {1, 3})
    monkeypatch.setattr(isa, "_cgroup_cpus", lambda: float("inf"))
    assert isa.physical_cores.__wrapped__() == 1


def test_shared_cache():
    assert 64 << 10 <= isa.shared_cache() <= 4 << 30
