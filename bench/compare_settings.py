"""Compare ways to run a model: ``python -m bench.compare_settings SETTING SETTING ... [--runs 5]``.

A SETTING is a model, then its options after commas: ``packed`` (weights packed beforehand), ``lora=FILE``,
``taesd=FILE``, ``tiled``, ``precision=bf16`` or ``int8``. All are open in one process and take turns; the table has the
median of each, and the median of its ratio to the first SETTING in the same turn.

    python -m bench.compare_settings sd15 sd15-f16 sd15-f16,lora=style.safetensors
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np

from sd_numba import StableDiffusionPipeline, kernels


def open_setting(setting: str) -> StableDiffusionPipeline:
    """Open the pipeline that a setting describes."""
    model, *options = setting.split(",")
    named = dict(option.split("=", 1) for option in options if "=" in option)
    pipe = StableDiffusionPipeline.from_pretrained(
        model, weights="packed" if "packed" in options else "mmap", taesd=named.get("taesd"),
        vae_tiling="on" if "tiled" in options else "off", precision=named.get("precision", "f32"),
    )  # fmt: skip
    if "lora" in named:
        pipe.load_lora_weights(named["lora"])
    return pipe


def make_work(pipe: StableDiffusionPipeline, size: int) -> dict[str, Callable[[], object]]:
    """The calls to time: a step with guidance, decoding a picture, encoding two prompts."""
    random = np.random.default_rng(0)
    side = size // pipe.vae.factor
    latents = random.standard_normal((1, 4, side, side), np.float32)
    ids = pipe.tokenizer(["a cat on a beach", ""])
    context = pipe.unet.encode_context(pipe.text_encoder(ids))
    tiling = pipe.vae_tiling == "on"
    return {
        "text": lambda: pipe.text_encoder(ids),
        "step": lambda: pipe.unet(latents, 500, context),
        "decode": lambda: pipe.vae.decode(latents, tiling=tiling),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to run one model against each other.")
    parser.add_argument("settings", nargs="+", metavar="SETTING")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", type=int, default=512, help="pixels on each side")
    parser.add_argument("--work", nargs="+", choices=["text", "step", "decode"], default=["text", "step", "decode"])
    arguments = parser.parse_args()
    work = {setting: make_work(open_setting(setting), arguments.size) for setting in arguments.settings}
    seconds: dict[tuple[str, str], list[float]] = {(s, name): [] for s in work for name in arguments.work}
    for run in range(arguments.runs + 1):  # the first to warm up
        for name in arguments.work:
            for setting, calls in work.items():
                with kernels.reuse():
                    start = time.perf_counter()
                    calls[name]()
                if run:
                    seconds[setting, name].append(time.perf_counter() - start)
    first = arguments.settings[0]
    print(f"{kernels.threads()} threads, {arguments.size} px, {arguments.runs} runs, {time.strftime('%F')}")
    for name in arguments.work:
        print(f"\n{name:<60}{'median':>10}{'ratio':>8}{'from .. to':>16}")
        for setting in arguments.settings:
            times = seconds[setting, name]
            ratios = [a / b for a, b in zip(times, seconds[first, name], strict=True)]
            print(
                f"{setting:<60}{statistics.median(times):>8.3f} s{statistics.median(ratios):>8.2f}"
                f"{min(ratios):>8.2f} .. {max(ratios):.2f}"
            )


if __name__ == "__main__":
    main()
