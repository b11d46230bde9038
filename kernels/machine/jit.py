"""The one way to compile a kernel: flags, signature, cache, threads.

``@kernel(n)`` makes a parallel kernel of n integers (addresses, sizes, strides), so each kernel has exactly one
signature and one compiled form. ``@inline`` makes a helper that kernels call, and ``@inline_fast`` one for elementwise
loops, whose arithmetic LLVM may reorder; explicit vector code must not be reordered.

Numba frees an array after the last block of code, such as the part before a loop, that names it, though its address may
still be used: a kernel must name an array where it ends, or in the loop, that uses the memory.

Compiled code is kept in a folder of the user's cache, named after a fingerprint of all the sources in this package.
Numba's own cache watches only the file that holds the function, and the vector code comes from ``emit.py``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FunctionType
from typing import Any

import numba
import numpy as np
from numba import prange, types
from numba.core import registry
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from . import isa

log = logging.getLogger(__name__)

# GNU OpenMP spins for milliseconds at the end of a parallel region. On a machine that also does other work the spinning
# keeps the thread that it waits for from running: 20 steps of the small model took 13 s instead of 1. Spin for about
# 10 microseconds, then sleep. Read when Numba loads OpenMP, at the first launch.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# Reassociation lets sums and products of elementwise loops vectorise; NaN and infinity keep their meaning.
FAST = {"reassoc", "contract", "nsz", "arcp"}

_FEW = 4  # kernels from which a second process is worth starting
_registry: dict[str, Kernel] = {}
_launch_lock = threading.Lock()


@lru_cache(maxsize=1)
def _fingerprint() -> str:
    """Hash of every source file of this package and of the CPU that Numba compiles for.

    Each CPU has its own folder, because two processes that add code for two CPUs to one index file could mix them up.
    """
    digest = hashlib.sha256(repr(registry.cpu_target.target_context.codegen().magic_tuple()).encode())
    package = Path(__file__).parents[1]
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


def user_cache() -> Path | None:
    """Return the folder that holds the user's caches; None if the user has no home."""
    user = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    if sys.platform == "darwin":
        user = "~/Library/Caches"
    elif sys.platform == "win32":
        user = os.environ.get("LOCALAPPDATA", "~")
    user = os.path.expanduser(user)
    return Path(user) if os.path.isabs(user) else None


@lru_cache(maxsize=1)
def cache_folder() -> Path | None:
    """Return the folder for compiled kernels: ``NUMBA_CACHE_DIR`` or the user's cache; None if none can be written."""
    if numba.config.CACHE_DIR:
        bases = [Path(numba.config.CACHE_DIR)]
    else:
        owner = os.getuid() if hasattr(os, "getuid") else "user"
        bases = [*filter(None, [user_cache()]), Path(tempfile.gettempdir()) / f"cache-{owner}"]
    for base in bases:
        folder = base / "sd-numba" / _fingerprint()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
                continue  # cached code is executed: never take it from someone else's folder
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            continue
        return folder
    log.warning("no writable cache folder (%s): kernels compile anew in each process", ", ".join(map(str, bases)))
    return None


class _Locator(_CacheLocator):
    """Tells Numba where a function's compiled code lies and when it is stale."""

    def __init__(self, function: Callable[..., Any], file: str) -> None:
        self._py_file, self._lineno = file, function.__code__.co_firstlineno
        self._name = function.__name__

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> _Locator:
        return cls(py_func, py_file)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return _fingerprint()

    def get_disambiguator(self) -> str:
        return self._name


class _CacheImpl(CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _Cache(FunctionCache):
    _impl_class = _CacheImpl


class Kernel:
    """A parallel kernel with one signature: integers in, nothing out."""

    def __init__(self, function: Callable[..., None], arity: int, precision: str = "f32", packed: bool = False) -> None:
        self.name = function.__name__.lstrip("_")
        self.precision = precision
        self._packed = packed  # whether the function takes the integers as one tuple
        self._signature = types.void(*[types.UniTuple(types.intp, arity)] if packed else [types.intp] * arity)
        self._dispatcher = numba.njit(parallel=True, fastmath=FAST, error_model="numpy")(function)

    def __call__(self, *args: int) -> None:
        """Run it on at most `threads()` threads."""
        with _launch_lock:  # one of Numba's threading layers cannot be entered twice at once
            self.compile()
            if numba.get_num_threads() > threads():
                numba.set_num_threads(threads())
            if self._packed:
                self._dispatcher(args)
            else:
                self._dispatcher(*args)

    def _attach_cache(self) -> _Cache | None:
        if cache_folder() is None:
            return None
        if not isinstance(self._dispatcher._cache, _Cache):
            self._dispatcher._cache = _Cache(self._dispatcher.py_func)
        return self._dispatcher._cache

    @property
    def ready(self) -> bool:
        """Whether it can run without being compiled: it is loaded, or in the cache for this CPU."""
        if self._dispatcher.overloads:
            return True
        cache, codegen = self._attach_cache(), registry.cpu_target.target_context.codegen()
        return cache is not None and cache._index_key(self._signature.args, codegen) in cache._cache_file._load_index()

    def compile(self) -> None:
        """Load it from the cache, or compile it and put it there."""
        if self._dispatcher.overloads:
            return
        self._attach_cache()
        try:
            self._dispatcher.compile(self._signature.args)
        except OSError as error:  # compiled, but the cache could not be written
            log.warning("could not write compiled kernels to %s: %s", cache_folder(), error)
        self._dispatcher.disable_compile()  # other types of arguments would be a mistake


_limit = 0


def threads() -> int:
    """Return how many threads kernels run on at most."""
    return _limit or min(isa.physical_cores(), numba.config.NUMBA_NUM_THREADS)


def set_threads(count: int) -> None:
    """Set how many threads kernels run on; 0 or less means all physical cores available to the process."""
    global _limit  # noqa: PLW0603
    _limit = max(0, min(count, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(threads())


def kernel(arity: int, precision: str = "f32", packed: bool = False) -> Callable[[Callable[..., None]], Kernel]:
    """Make a parallel kernel of `arity` integers, and register it for `warmup` with a precision of products."""

    def wrap(function: Callable[..., None]) -> Kernel:
        made = Kernel(function, arity, precision, packed)
        if made.name in _registry:
            raise ValueError(f"two kernels are called {made.name}")
        _registry[made.name] = made
        return made

    return wrap


def _share_tasks(parameters):  # compiled
    counter = np.zeros(1, np.int64)
    for worker in prange(parameters[-1]):
        _work(parameters, worker, counter.ctypes.data)  # type: ignore[name-defined]  # noqa: F821 -- see `task_kernel`


def task_kernel(name: str, arity: int, work: Callable[..., None], precision: str = "f32") -> Kernel:
    """Make a kernel whose workers share its tasks, and register it.

    Parameters
    ----------
    name : str
    arity : int
        Number of integers that it takes. The last one is the number of workers.
    work : callable
        What a worker does, made by `inline`: ``work(parameters, worker, counter)`` gets the integers as a tuple, the
        worker's number, and the address of the counter of tasks.
    precision : str
        Of its products.
    """
    # `work` is a global of the function, not a cell of a closure: Numba would hash that anew in each process.
    function = FunctionType(_share_tasks.__code__, {**globals(), "_work": work}, name)
    function.__qualname__ = name
    return kernel(arity, precision, packed=True)(function)


_definitions: Counter[tuple[str, str]] = Counter()


def _inline(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a decorator of helpers, which get names of their own even if one function makes several of them.

    Names are symbols of the compiled code. Numba tells helpers of one name apart by a number that depends on what a
    process has compiled before; of two of the same number that come from the cache, one would take the other's place.
    """
    compiled = numba.njit(error_model="numpy", **options)

    def wrap(function: Callable[..., Any]) -> Any:
        key = function.__module__, function.__qualname__
        _definitions[key] += 1
        if _definitions[key] > 1:
            function.__qualname__ += f".{_definitions[key]}"
        return compiled(function)

    return wrap


inline = _inline()  # takes over the caller's `FAST`
inline_exact = _inline(fastmath=False)
inline_fast = _inline(fastmath=FAST)


def warmup(*precisions: str) -> Iterator[tuple[int, int, str]]:
    """Compile the kernels that are not yet in the cache for this CPU; yields (index, total, name) before each.

    Those of ``f32`` products, and of the other precisions named. If there are a few of them, a second process compiles
    every other one into the cache meanwhile.
    """
    wanted = {"f32", *precisions} & set(isa.tile().precisions)
    names = [name for name, made in _registry.items() if made.precision in wanted and not made.ready]
    ours, theirs = names, list[str]()
    if len(names) >= _FEW and isa.physical_cores() > 1 and cache_folder() is not None:
        ours, theirs = names[::2], names[1::2]
    with _compiling_elsewhere(theirs) as process:
        for index, name in enumerate([*ours, *theirs]):
            yield index, len(names), name
            while index >= len(ours) and process and process.poll() is None and not _registry[name].ready:
                time.sleep(0.05)
            _registry[name].compile()


@contextmanager
def _compiling_elsewhere(names: list[str]) -> Iterator[subprocess.Popen[bytes] | None]:
    """Compile kernels in another process, which ends with the block; failures are ignored."""
    if not names:
        yield None
        return
    # The first entry of the path is the working folder, which may hold anything: the folder that this package was
    # imported from takes its place. It is not resolved: in a checkout sd_numba/kernels is a link.
    root = str(Path(os.path.abspath(__file__)).parents[3])
    code = f"import sys; sys.path[0] = sys.argv[1]; from {__name__} import compile_kernels as go; go(sys.argv[2:])"
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code, root, *names],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    except OSError:
        yield None
        return
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def compile_kernels(names: Sequence[str]) -> None:
    """Compile kernels into the cache, in this order."""
    for name in names:
        _registry[name].compile()
