"""Compiling, the cache of compiled code, and threads."""

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from sd_numba import kernels
from sd_numba.kernels import activations
from sd_numba.kernels.machine import isa, jit
from tests.kernels.common import assert_same_bits, normal

PACKAGE = Path(kernels.__file__).parent

# Runs in a process of its own: says what the cache holds, runs one kernel, says what that took.
PROBE = """
import json
import numpy as np
from sd_numba import kernels
from sd_numba.kernels import activations
from sd_numba.kernels.machine import jit
made = activations._geglu
report = {"package": kernels.__file__, "folder": str(jit.cache_folder()), "ready": made.ready}
report["result"] = kernels.geglu(np.full((3, 4), 2, np.float32)).ravel().tolist()
stats = made._dispatcher.stats
report["hits"], report["misses"] = sum(stats.cache_hits.values()), sum(stats.cache_misses.values())
report["ready after"] = made.ready
report["left"] = sum(not made.ready for made in jit._registry.values())
print(json.dumps(report))
"""


def probe(package_parent, **environment):
    """Run the probe with a copy of the package and some environment variables."""
    inherited = {k: v for k, v in os.environ.items() if k not in {"NUMBA_CACHE_DIR", "XDG_CACHE_HOME"}}
    environment = inherited | {"PYTHONPATH": str(package_parent), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    command = [sys.executable, "-c", PROBE]
    run = subprocess.run(
        command, cwd=package_parent, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert Path(report["package"]).parents[2] == package_parent
    assert np.allclose(report["result"], 3.9089994)
    return report, run.stderr


@pytest.fixture
def copy(tmp_path):
    """A copy of the kernels by themselves, in a folder to import ``sd_numba`` from, which is returned."""
    package = tmp_path / "site" / "sd_numba"
    shutil.copytree(PACKAGE, package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    return tmp_path / "site"


def test_cache_is_used_again_until_a_source_changes(copy, tmp_path):
    cache = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    before = sorted((path, path.read_bytes()) for path in copy.rglob("*.py"))

    first, _ = probe(copy, **cache)
    assert not first["ready"]
    assert (first["hits"], first["misses"]) == (0, 1)
    assert first["ready after"]
    assert Path(first["folder"]).parent == tmp_path / "cache" / "sd-numba"

    second, _ = probe(copy, **cache)
    assert second["ready"]
    assert (second["hits"], second["misses"]) == (1, 0)
    assert second["folder"] == first["folder"]

    assert sorted((path, path.read_bytes()) for path in copy.rglob("*") if path.is_file()) == before, "wrote to itself"

    with (copy / "sd_numba/kernels/machine/emit.py").open("a") as source:
        source.write("# an edit\n")
    third, _ = probe(copy, **cache)
    assert not third["ready"]
    assert third["misses"] == 1
    assert third["folder"] != first["folder"]


@pytest.mark.parametrize("name", sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")))
def test_fingerprint_covers_every_source(copy, name, monkeypatch):
    monkeypatch.setattr(jit, "__file__", str(copy / "sd_numba/kernels/machine/jit.py"))
    before = jit._fingerprint.__wrapped__()
    with (copy / "sd_numba/kernels" / name).open("a") as source:
        source.write("# an edit\n")
    assert jit._fingerprint.__wrapped__() != before


@pytest.mark.parametrize("folder", ["", "products", "products/new"])
def test_fingerprint_covers_new_and_renamed_files(copy, folder, monkeypatch):
    monkeypatch.setattr(jit, "__file__", str(copy / "sd_numba/kernels/machine/jit.py"))
    place = copy / "sd_numba/kernels" / folder
    place.mkdir(exist_ok=True)
    seen = [jit._fingerprint.__wrapped__()]
    (place / "first.py").touch()
    seen.append(jit._fingerprint.__wrapped__())
    (place / "first.py").rename(place / "second.py")
    seen.append(jit._fingerprint.__wrapped__())
    assert len(set(seen)) == 3


def test_unwritable_cache_falls_back(copy, tmp_path):
    """A file where the cache folder should be: chmod would not stop root."""
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    variables = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp"), "LOCALAPPDATA": "/"}
    if sys.platform == "linux":
        first, log = probe(copy, **variables)
        assert Path(first["folder"]).is_relative_to(tmp_path / "tmp")
        assert first["ready after"]
        assert log == ""

    report, log = probe(copy, NUMBA_CACHE_DIR=str(tmp_path / "file"))
    assert report["folder"] == "None"
    assert not report["ready"]
    assert report["ready after"]
    assert log.count("no writable cache folder") == 1


def cache_folder(monkeypatch, base):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(base))
    return jit.cache_folder.__wrapped__()


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users")
def test_cache_folder_of_someone_else_is_not_used(monkeypatch, tmp_path):
    folder = cache_folder(monkeypatch, tmp_path)
    assert folder == tmp_path / "sd-numba" / jit._fingerprint()
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(jit.os, "getuid", lambda: folder.stat().st_uid + 1)
    assert cache_folder(monkeypatch, tmp_path) is None


def test_a_full_disk_only_costs_the_cache(monkeypatch, caplog):
    """If the compiled code cannot be saved, the kernel runs all the same."""

    def fill(address, size):
        """Fill some memory with ones."""
        for i in numba.prange(size):
            numba.carray(activations.float_pointer(address + 4 * i), 1)[0] = 1

    made = jit.Kernel(fill, 2, "f32")
    assert not made.ready

    def no_space(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jit._Cache, "save_overload", no_space)
    out = np.zeros(5, np.float32)
    made(out.ctypes.data, out.size)
    assert (out == 1).all()
    assert "No space left on device" in caplog.text


def test_two_kernels_of_one_name_are_refused():
    def _geglu():
        pass

    with pytest.raises(ValueError, match="two kernels are called geglu"):
        jit.kernel(0)(_geglu)


def test_warmup_compiles_what_is_missing(monkeypatch):
    class Fake:
        precision = "f32"

        def __init__(self, ready):
            self.ready = ready

        def compile(self):
            self.ready = True

    registry = {"a": Fake(True), "b": Fake(False), "c": Fake(False)}
    monkeypatch.setattr(jit, "_registry", registry)
    steps = []
    for step in kernels.warmup():
        steps.append(step)
        assert not registry[step[2]].ready, "yielded before it compiles"
    assert steps == [(0, 2, "b"), (1, 2, "c")]
    assert all(made.ready for made in registry.values())
    assert list(kernels.warmup()) == []


def test_compiled_functions_have_names_of_their_own():
    """Of two that share one, compiled in two processes, a third that loads both from the cache may take the wrong one.

    A name is a module, a qualified name, and a number that Numba counts anew in each process.
    """
    found, rest = {}, [made._dispatcher for made in jit._registry.values()]
    while rest:
        function = rest.pop().py_func
        name = function.__module__, function.__qualname__
        if found.setdefault(name, function) is not function:
            raise AssertionError(f"two functions are called {name}")
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        captured = [cell.cell_contents for cell in function.__closure__ or ()]
        for other in (*named, *captured):
            if isinstance(other, Dispatcher) and other.py_func not in found.values():
                rest.append(other)
    assert len(found) > 60
    assert sum("_make_work" in name for _, name in found) == 5


@pytest.mark.parametrize(
    ("able", "asked", "compiled"),
    [
        (("bf16", "int8"), (), ["a"]),
        (("bf16", "int8"), ("f32",), ["a"]),
        (("bf16", "int8"), ("bf16",), ["a", "b"]),
        (("bf16", "int8"), ("int8", "bf16"), ["a", "b", "c"]),
        (("int8",), ("int8", "bf16"), ["a", "c"]),
        ((), ("int8", "bf16"), ["a"]),
    ],
)
def test_warmup_compiles_no_more_than_it_is_asked_for(monkeypatch, able, asked, compiled):
    """Nor what this CPU lacks the instructions for."""

    class Fake:
        ready = False

        def __init__(self, precision):
            self.precision = precision

        def compile(self):
            self.ready = True

    registry = {"a": Fake("f32"), "b": Fake("bf16"), "c": Fake("int8")}
    monkeypatch.setattr(jit, "_registry", registry)
    tile = isa.Tile("avx512", 16, 4, native_f16=True, bf16="bf16" in able, int8="int8" in able)
    monkeypatch.setattr(jit.isa, "tile", lambda: tile)
    assert [name for *_, name in kernels.warmup(*asked)] == compiled
    assert [name for name, made in registry.items() if made.ready] == compiled


def test_kernels_are_registered_with_their_precision():
    low = {name: made.precision for name, made in jit._registry.items() if made.precision != "f32"}
    assert low == {
        "multiply_pairs": "bf16", "pack_pairs": "bf16", "to_pairs": "bf16", "pair_rows": "bf16", "attend_pairs": "bf16",
        "multiply_bytes": "int8", "pack_bytes": "int8", "to_bytes": "int8",
        "transform_inputs_pairs": "bf16", "multiply_tiles_pairs": "bf16",
        "transform_inputs_bytes": "int8", "multiply_tiles_bytes": "int8", "measure_filters": "int8",
    }  # fmt: skip


def test_two_processes_compile_all(tmp_path):
    """Each kernel is in the cache afterwards; the second process's share is loaded from there."""
    code = (
        "from sd_numba import kernels\nfrom sd_numba.kernels.machine import jit\n"
        "for n in [n for n in jit._registry if n not in ('geglu', 'layer_norm', 'group_norm', 'pack_transposed')]:\n"
        "    del jit._registry[n]\n"
        "print(sorted(name for *_, name in kernels.warmup()), all(made.ready for made in jit._registry.values()))\n"
        "print(list(kernels.warmup()))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.splitlines() == ["['geglu', 'group_norm', 'layer_norm', 'pack_transposed'] True", "[]"]


def test_a_second_process_that_fails_is_replaced(monkeypatch):
    class Fake:
        precision, ready = "f32", False

        def compile(self):
            self.ready = True

    registry = {f"no such kernel {i}": Fake() for i in range(6)}
    monkeypatch.setattr(jit, "_registry", registry)
    monkeypatch.setattr(jit, "cache_folder", lambda: "somewhere")
    monkeypatch.setattr(jit.isa, "physical_cores", lambda: 2)
    assert [index for index, *_ in kernels.warmup()] == list(range(6))
    assert all(made.ready for made in registry.values())


def test_every_kernel_is_registered_under_its_name():
    assert set(jit._registry) >= {"multiply", "pack", "attend", "group_norm", "layer_norm", "activate", "geglu"}
    assert all(name == made.name for name, made in jit._registry.items())


def test_set_threads():
    available = numba.config.NUMBA_NUM_THREADS
    default = min(isa.physical_cores(), available)
    try:
        kernels.set_threads(0)
        assert kernels.threads() == default
        kernels.set_threads(1)
        assert kernels.threads() == numba.get_num_threads() == 1
        kernels.set_threads(10**6)
        assert kernels.threads() == numba.get_num_threads() == available
        kernels.set_threads(-3)
        assert kernels.threads() == numba.get_num_threads() == default
    finally:
        kernels.set_threads(0)


def test_kernels_run_in_several_threads_at_once():
    """Scratch memory belongs to a thread; launches wait for each other."""
    x, w, q = normal(0, 60, 100), normal(1, 90, 100), normal(2, 1, 50, 64)
    expected = kernels.linear(x, w), kernels.attention(q, q, q, 4)
    failures = []

    def work():
        try:
            for _ in range(20):
                assert_same_bits(kernels.linear(x, w), expected[0])
                assert_same_bits(kernels.attention(q, q, q, 4), expected[1])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures


def test_a_kernel_is_compiled_for_one_signature_only():
    kernels.silu(np.ones(3, np.float32))
    made = jit._registry["activate"]
    x = np.ones(4, np.float32)
    made(x.ctypes.data, x.ctypes.data, 4, True)  # a bool where an integer belongs
    assert len(made._dispatcher.overloads) == 1


def test_no_home_is_no_error(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where neither HOME nor the user is known
    assert jit.user_cache() is None or sys.platform == "win32"


def test_numpy_integers_are_integers():
    x = normal(0, 1, 4, 8)
    assert_same_bits(kernels.attention(x, x, x, np.int64(2)), kernels.attention(x, x, x, 2))
    image, w = normal(1, 1, 4, 4, 8), normal(2, 3, 8, 3, 3)
    assert_same_bits(kernels.conv2d(image, w, None, np.int32(2), np.int64(0)), kernels.conv2d(image, w, None, 2, 0))
    ones = np.ones(8, np.float32)
    assert_same_bits(kernels.group_norm(image, np.int64(4), ones, ones), kernels.group_norm(image, 4, ones, ones))
