"""What the CPU offers: one frozen record, decided once, read by every kernel.

The row is not guessed from CPU names. A 16-lane fused multiply-add, conversions and sums of products of bytes are
handed to the compiler that Numba uses, with Numba's own target settings, and the assembly says which registers and
instructions it chose. So the row is right for the code that Numba will emit, also under ``NUMBA_CPU_NAME`` and
``NUMBA_CPU_FEATURES``; and an instruction that the CPU lacks, which would end the process, is never asked for.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import llvmlite.binding as llvm
from numba import config

_PROBE = """
target triple = "{triple}"
declare <16 x float> @llvm.fma.v16f32(<16 x float>, <16 x float>, <16 x float>)
define void @fma(ptr %a, ptr %b) {{
  %x = load <16 x float>, ptr %a
  %y = load <16 x float>, ptr %b
  %z = call <16 x float> @llvm.fma.v16f32(<16 x float> %x, <16 x float> %y, <16 x float> %y)
  store <16 x float> %z, ptr %a
  ret void
}}
define void @widen(ptr %a, ptr %b) {{
  %x = load <16 x half>, ptr %a
  %y = fpext <16 x half> %x to <16 x float>
  store <16 x float> %y, ptr %b
  ret void
}}
define void @narrow(ptr %a, ptr %b) {{
  %x = load <16 x float>, ptr %a
  %y = fptrunc <16 x float> %x to <16 x bfloat>
  store <16 x bfloat> %y, ptr %b
  ret void
}}
"""
_PROBE_UNSIGNED = """
declare i32 @llvm.vector.reduce.add.v64i32(<64 x i32>)
define i32 @dot_unsigned(ptr %a, ptr %b) {{
  %x = load <64 x i8>, ptr %a
  %y = load <64 x i8>, ptr %b
  %u = zext <64 x i8> %x to <64 x i32>
  %v = sext <64 x i8> %y to <64 x i32>
  %p = mul <64 x i32> %u, %v
  %s = call i32 @llvm.vector.reduce.add.v64i32(<64 x i32> %p)
  ret i32 %s
}}
"""
_PROBE_SIGNED = """
declare <4 x i32> @llvm.vector.partial.reduce.add.v4i32.v16i32(<4 x i32>, <16 x i32>)
define <4 x i32> @dot_signed(ptr %a, ptr %b, <4 x i32> %c) {{
  %x = load <16 x i8>, ptr %a
  %y = load <16 x i8>, ptr %b
  %u = sext <16 x i8> %x to <16 x i32>
  %v = sext <16 x i8> %y to <16 x i32>
  %p = mul <16 x i32> %u, %v
  %s = call <4 x i32> @llvm.vector.partial.reduce.add.v4i32.v16i32(<4 x i32> %c, <16 x i32> %p)
  ret <4 x i32> %s
}}
"""


@dataclass(frozen=True)
class Tile:
    """One row of the dispatch table.

    Attributes
    ----------
    name : str
        Name of the row.
    lanes : int
        Float32 lanes of a vector register.
    vectors : int
        Vectors that a panel of packed weights is wide; the register tile is 6 rows by this.
    native_f16 : bool
        Whether the CPU converts half precision by itself.
    bf16 : bool
        Whether it adds up products of pairs of bfloat16.
    int8 : bool
        Whether it adds up products of four bytes.
    """

    name: str
    lanes: int
    vectors: int
    native_f16: bool
    bf16: bool = False
    int8: bool = False

    @property
    def width(self) -> int:
        """Columns of a panel of packed weights."""
        return self.lanes * self.vectors

    @property
    def native_scale(self) -> bool:
        """Whether one instruction scales by a power of two, handling overflow and underflow."""
        return self.name == "avx512"

    @property
    def zero_point(self) -> int:
        """The byte that stands for 0 in left factors: x86 multiplies unsigned bytes by signed ones, ARM signed ones."""
        return 0 if self.name == "neon" else 128

    @property
    def precisions(self) -> tuple[str, ...]:
        """See `precisions`."""
        return ("f32", *(("bf16",) if self.bf16 else ()), *(("int8",) if self.int8 else ()))


# 6 rows x `vectors` accumulators, `vectors` weights and one broadcast must fit the register file:
# 6*4+4+1 of 32 zmm, 6*2+2+1 of 16 ymm, 6*4+4+1 of 32 NEON, 6*2+2+1 of 16 xmm.
_ROWS = {"avx512": (16, 4), "avx2": (8, 2), "neon": (4, 4), "generic": (4, 2)}
# What the assembly has if the row's registers can hold sums of products of bytes.
_DOTS = {"avx512": r"vpdpbusd.*zmm", "avx2": r"vpdpbusd.*ymm", "neon": r"\bsdot\b", "generic": "$^"}


def _assembly() -> str:
    """Compile the probe the way that Numba compiles kernels and return its assembly."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    triple = llvm.get_process_triple()
    name = config.CPU_NAME or llvm.get_host_cpu_name()
    features = llvm.get_host_cpu_features().flatten() if config.CPU_FEATURES is None else config.CPU_FEATURES
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=name, features=features, opt=3)
    dots = _PROBE_SIGNED if triple.startswith(("aarch64", "arm64")) else _PROBE_UNSIGNED
    return machine.emit_assembly(llvm.parse_assembly((_PROBE + dots).format(triple=triple)))


@lru_cache(maxsize=1)
def tile() -> Tile:
    """Return the row of the dispatch table for the CPU that Numba compiles for."""
    if config.CPU_NAME and "NUMBA_CPU_FEATURES" not in os.environ:
        config.CPU_FEATURES = ""  # a CPU asked for by name has its own features, not the host's
    assembly = _assembly()
    if "vfmadd" in assembly:
        name = "avx512" if "zmm" in assembly else "avx2"
    elif "fmla" in assembly:
        name = "neon"
    else:
        name = "generic"
    lanes, vectors = _ROWS[name]
    return Tile(
        name,
        lanes,
        vectors,
        native_f16="vcvtph2ps" in assembly or "fcvtl" in assembly,
        bf16=name == "avx512" and re.search(r"\bvcvtneps2bf16\b", assembly) is not None,
        int8=re.search(_DOTS[name], assembly) is not None,
    )


def precisions() -> tuple[str, ...]:
    """Return the precisions of products that this CPU has instructions for: ``f32``, perhaps ``bf16`` and ``int8``."""
    return tile().precisions


def _cgroup_cpus() -> float:
    """Return the CPU quota of this process's control group (infinity without one)."""
    for quota_file, period_file in (
        ("/sys/fs/cgroup/cpu.max", None),
        ("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "/sys/fs/cgroup/cpu/cpu.cfs_period_us"),
    ):
        try:
            words = Path(quota_file).read_text().split()
            if period_file is not None:
                words += Path(period_file).read_text().split()
            quota, period = words[0], float(words[1])
            return float("inf") if quota in {"max", "-1"} else float(quota) / period
        except (OSError, ValueError, IndexError):
            continue
    return float("inf")


@lru_cache(maxsize=1)
def physical_cores() -> int:
    """Return how many physical cores this process may use (affinity and control group respected)."""
    every = set(range(os.cpu_count() or 1))
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every
    cores = set()
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(siblings.read_text().strip())
        except OSError:
            cores.add(str(cpu))
    return max(1, int(min(len(cores), _cgroup_cpus())))


@lru_cache(maxsize=1)
def shared_cache() -> int:
    """Return the bytes of the largest cache that a core can use; 16 MB if the system does not tell."""
    sizes = []
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        try:
            sizes.append(int(size.read_text().strip().removesuffix("K")) << 10)
        except (OSError, ValueError):
            continue
    return max(sizes, default=16 << 20)
