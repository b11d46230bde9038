"""Pytest's option ``--benchmark``: run the kernel benchmarks of ``bench/`` instead of the tests."""

from __future__ import annotations

import os
from typing import Any

import pytest

_MEASURED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option; an exact name wins over the names of pytest-benchmark's options that begin alike."""
    text = "run the kernel benchmarks of bench/ instead of the tests"
    parser.getgroup("benchmark").addoption("--benchmark", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Collect benchmarks, not tests, and time them."""
    if not config.option.benchmark:
        return
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(config.rootpath / "bench")]
    for setting, pattern in (("python_files", "bench_*.py"), ("python_functions", "bench_*")):
        config.getini(setting).clear()
        config.addinivalue_line(setting, pattern)
    # pyproject.toml turns timing off, for the tests; here only the command line may.
    config.option.benchmark_disable = "--benchmark-disable" in config.invocation_params.args
    # NumPy's OpenBLAS keeps its threads spinning for a tenth of a second after a product, which takes half of this
    # machine from whatever is measured next. Read when NumPy is imported, so it is set before any benchmark is.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_group_stats(
    config: pytest.Config, benchmarks: list[dict[str, Any]]
) -> list[tuple[None, list[dict[str, Any]]]] | None:
    """Keep what was measured for our own table; the plugin's is for comparisons and the like only."""
    option = config.option
    if not option.benchmark:
        return None
    # A path means an earlier run to compare with, no extra_info one that was interrupted.
    config.stash[_MEASURED] = [entry for entry in benchmarks if entry["path"] is None and entry["extra_info"]]
    wants_more = option.benchmark_compare or option.benchmark_histogram or option.benchmark_cprofile
    return None if wants_more else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table of `bench.common`."""
    measured = config.stash.get(_MEASURED, [])
    if measured:
        from bench.common import table  # noqa: PLC0415  # only now, because it imports Numba

        terminalreporter.ensure_newline()
        terminalreporter.write_line(table(measured))
