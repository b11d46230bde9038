"""The dispatch table: which row is chosen, and that every row computes the same."""

import dataclasses
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import llvmlite.binding as llvm
import numba
import pytest
from llvmlite import ir

from sd_numba.kernels.machine import emit, isa

ROOT = Path(__file__).resolve().parents[3]
X86 = pytest.mark.skipif(platform.machine() not in {"x86_64", "AMD64"}, reason="needs x86-64")
ARM = "aarch64-unknown-linux-gnu"
TESTS = Path(__file__).parents[1]
OPS = (
    *(("", op) for op in ("gemm", "quantize", "conv2d", "low_rank", "attention", "norm", "activations", "checks")),
    ("products", "operands"),
    ("winograd", "winograd"),
    ("winograd", "winograd_coarse"),
)
RUN_ROW = """
import sys
import pytest
from sd_numba.kernels.machine import isa
assert isa.tile().name == sys.argv[1], isa.tile()
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.fixture(scope="module")
def rows():
    """Processes that run the tests of all ops with kernels compiled for another CPU; on three threads, for once.

    Left out is one that computes as this CPU does: the tests of this process show that.
    """
    runs = {}
    for cpu, row in (("haswell", "avx2"), ("generic", "generic")):
        with pytest.MonkeyPatch.context() as monkeypatch:
            if choose(monkeypatch, cpu) == isa.tile():
                continue
        environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_NUM_THREADS": "3"}
        environment.pop("NUMBA_CPU_FEATURES", None)
        command = [sys.executable, "-c", RUN_ROW, row, *(str(TESTS / folder / f"test_{op}.py") for folder, op in OPS)]
        runs[row] = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield runs
    for run in runs.values():
        run.kill()
        run.wait()


@X86
@pytest.mark.parametrize("row", ["avx2", "generic"])
def test_kernels_are_right_on_every_other_row(rows, row):
    if row not in rows:
        pytest.skip("this CPU has the same row, and the other tests run it")
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


@X86
@pytest.mark.parametrize(
    ("cpu", "row", "precisions"),
    [
        ("generic", "generic", ("f32",)),
        ("haswell", "avx2", ("f32",)),
        ("znver3", "avx2", ("f32",)),
        ("alderlake", "avx2", ("f32", "int8")),  # AVX-VNNI
        ("sierraforest", "avx2", ("f32", "int8")),
        ("skylake-avx512", "avx512", ("f32",)),
        ("cascadelake", "avx512", ("f32", "int8")),
        ("icelake-server", "avx512", ("f32", "int8")),
        ("cooperlake", "avx512", ("f32", "bf16", "int8")),
        ("sapphirerapids", "avx512", ("f32", "bf16", "int8")),
        ("znver4", "avx512", ("f32", "bf16", "int8")),
    ],
)
def test_precisions_of_x86(monkeypatch, cpu, row, precisions):
    tile = choose(monkeypatch, cpu)
    assert (tile.name, tile.precisions, tile.zero_point) == (row, precisions, 128)
    assert (tile.bf16, tile.int8) == ("bf16" in precisions, "int8" in precisions)


def test_row_of_arm(monkeypatch):
    tile = choose(monkeypatch, "cortex-a72", triple=ARM)
    assert tile == isa.Tile("neon", 4, 4, native_f16=True)


@pytest.mark.parametrize(
    ("cpu", "int8"), [("cortex-a53", False), ("cortex-a76", True), ("neoverse-n1", True), ("apple-m1", True)]
)
def test_precisions_of_arm(monkeypatch, cpu, int8):
    tile = choose(monkeypatch, cpu, triple=ARM)
    assert (tile.name, tile.bf16, tile.int8, tile.zero_point) == ("neon", False, int8, 0)
    assert tile.precisions == (("f32", "int8") if int8 else ("f32",))


@pytest.mark.parametrize(
    ("cpu", "triple", "step", "instruction"),
    [
        pytest.param("alderlake", None, "int8", r"vpdpbusd\s+.*%ymm", marks=X86),
        pytest.param("sierraforest", None, "int8", r"vpdpbusd\s+.*%ymm", marks=X86),
        pytest.param("icelake-server", None, "int8", r"vpdpbusd\s+.*%zmm", marks=X86),
        pytest.param("sapphirerapids", None, "bf16", r"vdpbf16ps\s+.*%zmm", marks=X86),
        ("cortex-a76", ARM, "int8", r"\bsdot\s+v"),
    ],
)
def test_steps_of_products_compile(monkeypatch, cpu, triple, step, instruction):
    """What the tests of the kernels cannot run here: a step of a sum is the one instruction that the row promises."""
    row = choose(monkeypatch, cpu, triple=triple)
    assert step in row.precisions
    monkeypatch.setattr(isa, "tile", lambda: row)
    monkeypatch.setattr(emit, "LANES", row.lanes)
    for name, kind in (("vec", ir.FloatType()), ("ivec", ir.IntType(32))):
        monkeypatch.setattr(emit, name, ir.VectorType(kind, row.lanes))
    module = ir.Module()
    module.triple = llvm.get_process_triple()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [ir.PointerType()] * 3), "step")
    builder = ir.IRBuilder(function.append_basic_block())
    factors = [builder.load(pointer, align=4, typ=emit.vec) for pointer in function.args]
    builder.store({"int8": emit.dot_int8, "bf16": emit.dot_bf16}[step](builder, *factors), function.args[0], align=4)
    builder.ret_void()
    target = llvm.Target.from_triple(module.triple).create_target_machine(cpu=cpu, features="", opt=3)
    assembly = target.emit_assembly(llvm.parse_assembly(str(module)))
    assert len(re.findall(instruction, assembly)) == 1, assembly
    assert "call" not in assembly


REFUSALS = """
import numpy as np
from sd_numba import kernels
x, w = np.ones((3, 8), np.float32), kernels.quantize(np.ones((4, 8), np.float32))
q = np.ones((1, 3, 8), np.float32)
print(*kernels.precisions())
for precision in ("bf16", "int8"):
    for call in (
        lambda: kernels.linear(x, w, precision=precision),
        lambda: kernels.pack_linear(w, precision=precision),
        lambda: kernels.attention(q, q, q, 2, precision=precision),
    ):
        try:
            call()
        except ValueError as error:
            print(error)
"""


@X86
@pytest.mark.parametrize("cpu", ["skylake-avx512", "haswell"])
def test_what_the_cpu_lacks_is_refused(cpu):
    """In one line, and before an instruction that would end the process."""
    environment = os.environ | {"NUMBA_CPU_NAME": cpu}
    environment.pop("NUMBA_CPU_FEATURES", None)
    run = subprocess.run(
        [sys.executable, "-c", REFUSALS], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    expected = [f"precision: found {p!r}, expected one of those of this CPU: f32" for p in ("bf16", "int8")]
    assert run.stdout.splitlines() == ["f32", *[line for line in expected for _ in range(3)]]


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
