"""What all kernels share: the checks of arguments, `widen`, and no access outside of the arrays."""

import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sd_numba import kernels
from sd_numba.kernels import checks
from tests import reference
from tests.kernels.common import STORED, misaligned, normal, store

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("error")


def run_guard_pages(*args):
    command = [sys.executable, "-m", "tests.kernels.guard_pages", *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_no_kernel_reads_or_writes_out_of_bounds():
    run = run_guard_pages()
    assert run.returncode == 0, f"died of {run.returncode} in: {run.stdout.splitlines()[-1:]}\n{run.stderr}"
    assert run.stdout.endswith("done\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs mprotect")
def test_guard_pages_catch_an_overrun():
    assert run_guard_pages("overrun").returncode < 0


@pytest.mark.parametrize("how", STORED)
def test_widen(how):
    for shape in ((), (1,), (0, 3), (3, 4, 5)):
        w = store(normal(0, *shape), how) if shape else np.array(store(normal(0, 1), how)[0])
        wide = kernels.widen(w)
        assert wide.dtype == np.float32
        assert wide.shape == shape
        assert wide.flags.c_contiguous
        assert wide.flags.writeable
        assert not np.may_share_memory(wide, w)
        np.testing.assert_array_equal(wide, reference.widen(w))


@pytest.mark.parametrize("how", STORED)
def test_widen_takes_any_layout(how):
    w = store(normal(0, 6, 8), how)
    np.testing.assert_array_equal(kernels.widen(w.T), kernels.widen(w).T)
    np.testing.assert_array_equal(kernels.widen(w[::2, 1::3]), kernels.widen(w)[::2, 1::3])
    np.testing.assert_array_equal(kernels.widen(misaligned(w, 1)), kernels.widen(w))
    assert kernels.widen(w.T).flags.c_contiguous


def test_widen_special_values():
    half = np.array([0, -0.0, np.inf, -np.inf, np.nan, 6e-8, -6e-5, 65504], np.float16)
    np.testing.assert_array_equal(kernels.widen(half), half.astype(np.float32))
    brain = np.array([0x7F80, 0xFF80, 0x7FC0, 0x0001, 0x3F80], np.uint16)
    np.testing.assert_array_equal(kernels.widen(brain), np.array([np.inf, -np.inf, np.nan, 2.0**-133, 1], np.float32))


@pytest.mark.parametrize("w", [None, 1.0, [1.0], np.zeros(3), np.zeros(3, np.int16), np.zeros(3, ">f2")])
def test_widen_refuses(w):
    with pytest.raises(TypeError, match=r"^w: found .*, expected"):
        kernels.widen(w)


def test_messages_say_what_was_found_and_expected():
    cases = [
        (lambda: checks.check_array("x", [1]), "x: found list, expected a NumPy array"),
        (lambda: checks.check_array("x", np.zeros(2)), r"x: found dtype float64, expected float32; convert it"),
        (lambda: checks.check_array("x", normal(0, 2, 3), 4), r"x: found 2 dimensions \(2, 3\), expected 4"),
        (lambda: checks.check_array("x", normal(0, 2, 3), (3, 4)), r"x: found 2 dimensions \(2, 3\), expected 3 or 4"),
        (lambda: checks.check_array("x", normal(0, 2, 3).T), "x: found a non-contiguous array, expected C order; use"),
        (lambda: checks.check_shape("b", normal(0, 2), (3,)), r"b: found shape \(2,\), expected \(3,\)"),
        (
            lambda: checks.check_weight("w", np.zeros(2), 1),
            "w: found dtype float64, expected float32, float16, or uint16",
        ),
    ]
    for call, message in cases:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            call()


def test_output_may_be_the_input_itself_only_if_allowed():
    x = normal(0, 8)
    assert checks.output(x, (8,), same=x) is x
    view = x[:]
    assert checks.output(view, (8,), same=x) is view
    for out, options in ((x, {}), (x[1:5], {"same": x[:4]}), (x[:4], {"same": x[1:5]})):
        with pytest.raises(ValueError, match="shares memory"):
            checks.output(out, out.shape, *([] if options else [x]), **options)
    assert checks.output(None, (2, 3), x).shape == (2, 3)
    assert checks.output(x[4:], (4,), x[:4]).base is x


def test_memory_mapped_arrays_are_taken(tmp_path):
    w = normal(0, 20, 30)
    (tmp_path / "w").write_bytes(b"\0\0" + w.tobytes())
    mapped = np.memmap(tmp_path / "w", np.float32, "r", 2, w.shape)
    x = normal(1, 5, 30)
    np.testing.assert_array_equal(kernels.linear(x, mapped), kernels.linear(x, w))


def test_public_functions_of_the_reference_are_names_of_kernels():
    functions = {name for name, value in vars(reference).items() if inspect.isfunction(value) and name[0] != "_"}
    own = {name for name in functions if getattr(reference, name).__module__ == reference.__name__}
    emulations = {"round_bf16", "round_rows", "winograd2"}  # of low precision and of one algorithm, for tests only
    assert own - emulations <= set(kernels.__all__)
