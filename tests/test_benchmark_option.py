"""The option ``--benchmark`` of ``pytest``: benchmarks instead of tests."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SMALLEST = ("-k", "silu-2x1280")


def run_pytest(*arguments):
    command = [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", *arguments]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_without_it_only_tests_are_collected(request):
    assert not request.config.option.benchmark
    assert request.session.items
    assert all(item.originalname.startswith("test_") for item in request.session.items)


def test_only_benchmarks_are_collected():
    collected = run_pytest("--collect-only", "-q").split()
    files = {word.split(":")[0] for word in collected if ".py" in word}
    assert {"bench/bench_gemm.py", "bench/bench_winograd.py", "bench/bench_attention.py"} <= files
    assert all(file.startswith("bench/bench_") for file in files)


def test_a_case_is_measured(tmp_path):
    report = tmp_path / "report.json"
    printed = run_pytest(*SMALLEST, f"--benchmark-json={report}")
    row = next(line for line in printed.splitlines() if line.startswith("activation silu-2x1280"))
    assert "GB/s" in row
    assert "OPS" not in printed  # the plugin's own table
    (measured,) = json.loads(report.read_text())["benchmarks"]
    assert measured["stats"]["rounds"] > 1
    assert measured["extra_info"]["numpy_time_ratio"] > 0
    assert measured["extra_info"]["peak_gflops"] > 0


def test_timing_can_be_turned_off():
    printed = run_pytest("bench/bench_activations.py", *SMALLEST, "--benchmark-disable")
    assert "1 passed" in printed
    assert "GB/s" not in printed
