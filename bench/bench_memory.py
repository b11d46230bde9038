"""Memory of whole runs: ``python -m bench.bench_memory MODEL ... [--sizes 512 768]``.

Each MODEL, size, precision and policy of `--weights` is a process of its own that makes a picture in one step: more
steps need no more memory. The table has the most anonymous memory (what a system must really have) and the most
resident memory (with the pages of the mapped file, which the system gives back when it needs them), sampled ten times a
second, which slows the run.
"""

import argparse
import itertools
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sd_numba.networks.layers import PRECISIONS

FIELDS = ("Anonymous", "Rss")


def peak_memory(command: list[str]) -> tuple[dict[str, float], float]:
    """Run a command; return its peak of each kind of memory in MB, and its duration in seconds."""
    most = dict.fromkeys(FIELDS, 0.0)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has just ended
                continue
            for line in lines:
                field, _, value = line.partition(":")
                if field in FIELDS:
                    most[field] = max(most[field], int(value.split()[0]) / 1024)
            time.sleep(0.1)
        if process.returncode:
            sys.exit(f"{' '.join(command)}: {process.stderr.read() if process.stderr else ''}")
    return most, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory of whole runs, by model, size and policy for weights.")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 768, 1024])
    parser.add_argument("--weights", nargs="+", choices=["auto", "mmap", "packed"], default=["auto", "packed"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["f32"])
    parser.add_argument("--tiling", nargs="+", choices=["auto", "on", "off"], default=["auto"])
    parser.add_argument(
        "--options", default="", help="more options of sd-numba generate, such as '--hires 2 --steps 2'"
    )
    arguments = parser.parse_args()
    columns = f"{'model':<24}{'pixels':>7}{'precision':>11}{'weights':>9}{'tiling':>8}"
    print(f"{columns}{'anonymous':>11}{'resident':>10}{'seconds':>9}")
    with tempfile.TemporaryDirectory() as folder:
        runs = itertools.product(
            arguments.models, arguments.sizes, arguments.precisions, arguments.weights, arguments.tiling
        )
        for model, size, precision, weights, tiling in runs:
            command = [
                sys.executable, "-m", "sd_numba", "generate", "a cat", "-m", str(model), "--steps", "1",
                "--sampler", "euler", "-W", str(size), "-H", str(size), "--precision", precision,
                "--weights", weights, "--vae-tiling", tiling,
                "-o", f"{folder}/picture.png", "-s", "1", "--no-metadata", *shlex.split(arguments.options),
            ]  # fmt: skip
            most, seconds = peak_memory(command)
            print(
                f"{model.name:<24}{size:>7}{precision:>11}{weights:>9}{tiling:>8}"
                f"{most['Anonymous']:>8.0f} MB{most['Rss']:>7.0f} MB{seconds:>9.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
