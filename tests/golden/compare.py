"""What the golden tests share: building a case's models and comparing with its file."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bench.make_random_model import network_shapes, stored_names, write_safetensors
from sd_numba.checkpoints.weights import Weights
from tests.golden.cases import Case

# Miniature models are the same in all tests; they are made once and removed at the end of the run.
SCRATCH = tempfile.TemporaryDirectory(prefix="sd-numba-golden-")


def scratch() -> Path:
    """A folder for the whole run."""
    return Path(SCRATCH.name)


def weights_of(case: Case, component: str, dtype: str = "f32") -> Weights:
    """The random weights of one of a case's networks, stored in this dtype."""
    path = scratch() / f"{case.name}-{component}-{dtype}.safetensors"
    if not path.exists():
        shapes = network_shapes(component, case.configs[component])
        write_safetensors(path, stored_names(component, shapes, old_names=False), dtype)
    return Weights.open(path)


@functools.cache
def golden(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a golden file."""
    with np.load(path) as file:
        return dict(file)


def relative_error(found: Any, expected: np.ndarray) -> float:
    """Largest difference in units of the largest expected value; infinite if the shapes differ."""
    found = np.asarray(found)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found.astype(np.float64) - expected).max() / np.abs(expected).max())


def check(found: Any, expected: np.ndarray, tolerance: float, what: str) -> None:
    """Fail, with the measured error, if `found` is further from `expected` than the tolerance."""
    error = relative_error(found, expected)
    assert error <= tolerance, (
        f"{what}: relative error {error:.2e}, at most {tolerance:.0e} is allowed "
        f"(found shape {np.shape(found)}, expected {expected.shape})"
    )
