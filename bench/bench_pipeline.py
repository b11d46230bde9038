"""Times and memory of the networks at full size: ``python -m bench.bench_pipeline FOLDER [--runs 5]``.

FOLDER is a Stable Diffusion 1.5 model; `bench/make_random_model.py` makes one with random weights. Each network runs
once to warm up, then in turn with the others; the table gives medians, the share of the peak that was measured in the
same run, and what the process holds in memory, its own and mapped from files apart.
"""

import argparse
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sd_numba import StableDiffusionPipeline, kernels
from sd_numba.generation.model import PRODUCTS
from sd_numba.kernels.machine.peak import measure_peak
from sd_numba.tools.profile import profile, table


def held(field: str) -> float:
    """Return the process's memory of one kind, ``Rss`` or ``Anonymous``, in MB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def memory() -> str:
    """Return the process's current and peak memory."""
    anonymous, peak = held("Anonymous"), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return f"anonymous {anonymous:.0f} MB, file-backed {held('Rss') - anonymous:.0f} MB, peak resident {peak:.0f} MB"


def most_anonymous(call: Callable[[], object]) -> float:
    """Return the most anonymous memory, in MB, that the process holds during a call: sampled, which slows the call."""
    samples, done = [held("Anonymous")], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            samples.append(held("Anonymous"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(samples)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times and memory of the networks at full size.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", type=int, default=512, help="pixels on each side")
    parser.add_argument("--batch", type=int, default=2, help="of the UNet")
    parser.add_argument("--precision", choices=tuple(PRODUCTS), default="f32")
    parser.add_argument("--weights", choices=["auto", "mmap", "packed"], default="auto")
    arguments = parser.parse_args()

    pipe = StableDiffusionPipeline.from_pretrained(
        arguments.folder, weights=arguments.weights, precision=arguments.precision
    )
    for index, total, name in kernels.warmup(*PRODUCTS[arguments.precision]):
        print(f"compiling kernel {index + 1} of {total}: {name}")
    work = make_work(pipe, arguments)
    with kernels.reuse():  # as the pipeline does for a whole picture
        measure(work, arguments.runs)
    for name, call in work.items():
        print(f"most anonymous memory, {name}: {most_anonymous(call):.0f} MB")


def make_work(pipe: StableDiffusionPipeline, arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    random = np.random.default_rng(0)
    side = arguments.size // pipe.vae.factor
    latents = random.standard_normal((arguments.batch, 4, side, side), np.float32)
    ids = pipe.tokenizer(["a cat on a beach", ""])
    text = pipe.text_encoder(ids)
    context = pipe.unet.encode_context(text[np.arange(arguments.batch) % 2])
    work: dict[str, Callable[[], object]] = {
        "text encoder, 2x77": lambda: pipe.text_encoder(ids),
        f"UNet pass, {arguments.size} px, batch {arguments.batch}": lambda: pipe.unet(latents, 500, context),
        f"VAE decode to {arguments.size} px": lambda: pipe.vae.decode(latents[:1]),
    }
    if arguments.batch == 2:
        work[f"step with guidance, {arguments.size} px"] = lambda: pipe.unet(latents[:1], 500, context)
    return work


def measure(work: dict[str, Callable[[], object]], runs: int) -> None:
    """Run everything once to warm up, then in turn; print the times, and the last run by kind of kernel."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    rows, peaks = {}, []
    for run in range(runs + 1):
        peaks.append(measure_peak())
        for name, call in work.items():
            with profile() as rows[name]:
                call()
            if run:
                seconds[name].append(rows[name]["everything"].seconds)
            elif name.startswith("UNet"):
                print(f"after the first UNet pass: {memory()}")
    peak = statistics.median(peaks)
    spread = f"{min(peaks):.0f} .. {max(peaks):.0f}"
    print(f"{kernels.threads()} threads, peak {peak:.0f} GFLOP/s ({spread}), {time.strftime('%F')}")
    for name, times in seconds.items():
        median = statistics.median(times)
        share = 100 * rows[name]["everything"].gflop / median / peak
        print(f"\n{name}: median {median:.2f} s ({min(times):.2f} .. {max(times):.2f}), {share:.0f}% of peak")
        print(table(rows[name], peak))
    print(f"\nat the end: {memory()}")


if __name__ == "__main__":
    main()
