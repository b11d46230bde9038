"""The contestants of `bench/compare_peers.py`: our networks, PyTorch's and OpenVINO's, and the process each lives in.

All have the same interface, arrays to arrays: ``text(ids)``, ``context(text)`` (once a prompt, what depends on the text
alone), ``unet(sample, timestep, context)`` and ``decode(latents)``. The samples of the UNet are repeated if there are
more contexts.
"""

# ruff: noqa: PLC0415 - a contestant's process must import neither another contestant nor its thread pool

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("torch", "diffusers", "transformers", "openvino", "nncf")
PEERS = ("torch f32", "torch bf16", "openvino f32", "openvino bf16", "openvino int8")
PARTS = {"text": "text_encoder", "unet": "unet", "vae": "vae"}
WORKS = {
    "text": ("text",), "unet": ("unet",), "step": ("unet",), "vae": ("vae",), "image": ("text", "unet", "vae"),
}  # fmt: skip
SAMPLER, GUIDANCE = "dpm++2m-karras", 7.5


@dataclass(frozen=True)
class Job:
    """The work and the settings that all contestants of a table share."""

    work: str
    folder: Path
    cache: Path
    size: int
    steps: int
    threads: int

    @property
    def parts(self) -> tuple[str, ...]:
        return WORKS[self.work]

    def config(self, subfolder: str, file: str = "config.json") -> dict[str, Any]:
        return json.loads((self.folder / subfolder / file).read_text(encoding="utf-8"))

    def inputs(self, part: str) -> tuple[np.ndarray, ...]:
        """Return the arguments of a network: the same in every process."""
        text, random = self.config("text_encoder"), np.random.default_rng(0)
        tokens = text["max_position_embeddings"]
        if part == "text":
            return (random.integers(0, text["vocab_size"], (2, tokens)),)
        side = self.size // 2 ** (len(self.config("vae")["block_out_channels"]) - 1)
        latents = random.standard_normal((2, 4, side, side), np.float32)
        context = random.standard_normal((2, tokens, text["hidden_size"]), np.float32)
        return (latents, np.full(1, 500, np.float32), context) if part == "unet" else (latents[:1],)

    def model_path(self, part: str, *, int8: bool = False) -> Path:
        """Return the folder of the converted network, which depends on weights, sizes and versions."""
        weights = sorted((self.folder / PARTS[part]).glob("*.safetensors"))
        stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in weights]
        key = repr((stamps, [array.shape for array in self.inputs(part)], [*map(importlib.metadata.version, PACKAGES)]))
        name = f"{part}-int8" if int8 else part
        return self.cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}" / "model.xml"


class Ours:
    """This project. Whatever depends only on the text is computed once for each prompt, as in the pipeline."""

    def __init__(self, job: Job, precision: str) -> None:

        from sd_numba import StableDiffusionPipeline, kernels

        kernels.set_threads(job.threads)
        self.memory = kernels.reuse()  # for as long as the process lives, as the others keep theirs
        self.memory.__enter__()
        for _ in kernels.warmup("bf16", "int8"):
            pass
        pipe = StableDiffusionPipeline.from_pretrained(job.folder, precision=precision)
        self.text, self.context, self.unet, self.decode = (
            pipe.text_encoder, pipe.unet.encode_context, pipe.unet, pipe.vae.decode,
        )  # fmt: skip
        self.note = ""


class Peer:
    """Another implementation: a function for each part."""

    call: Callable[..., np.ndarray]
    note = ""

    def text(self, ids: np.ndarray) -> np.ndarray:
        return self.call("text", ids)

    def context(self, text: np.ndarray) -> np.ndarray:
        return text

    def unet(self, sample: np.ndarray, timestep: float, context: np.ndarray) -> np.ndarray:
        samples = np.concatenate([sample] * (len(context) // len(sample)))
        return self.call("unet", samples, np.full(1, timestep, np.float32), context)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        return self.call("vae", latents)


def load_module(job: Job, part: str, dtype: Any) -> Any:
    """Return a network of diffusers or transformers as a torch module that takes and returns bare tensors."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # the folder has all files
    import diffusers
    import torch
    import transformers

    warnings.simplefilter("ignore")
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    calls: dict[str, tuple[Any, Callable[..., Any]]] = {
        "text": (transformers.CLIPTextModel, lambda net, ids: net(ids, return_dict=False)[0]),
        "unet": (diffusers.UNet2DConditionModel, lambda net, *inputs: net(*inputs, return_dict=False)[0]),
        "vae": (diffusers.AutoencoderKL, lambda net, latents: net.decode(latents, return_dict=False)[0]),
    }
    kind, call = calls[part]

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = kind.from_pretrained(job.folder, subfolder=PARTS[part], torch_dtype=dtype)

        def forward(self, *inputs: Any) -> Any:
            return call(self.network, *inputs)

    return Bare().eval()


class Torch(Peer):
    """PyTorch, eager, in the memory layout that is faster."""

    def __init__(self, job: Job, precision: str) -> None:
        # PyTorch uses large pages only on request; they make a decode 5% faster.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        import torch

        torch.set_num_threads(job.threads)
        self.torch, self.dtype = torch, {"f32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.modules = {part: load_module(job, part, self.dtype) for part in job.parts}
        notes = [self._choose_layout(part, job.inputs(part)) for part in job.parts if part != "text"]
        self.note = "; ".join(notes)

    def call(self, part: str, *arrays: np.ndarray) -> np.ndarray:
        torch = self.torch
        with torch.inference_mode():
            # Not the timestep: bfloat16 would round 999 to 1000.
            tensors = map(torch.from_numpy, arrays)
            tensors = [x.to(self.dtype) if x.is_floating_point() and x.ndim > 1 else x for x in tensors]
            return self.modules[part](*tensors).float().numpy()

    def _choose_layout(self, part: str, arrays: tuple[np.ndarray, ...]) -> str:
        """Convert a network of convolutions to channels last if that is faster, and report the choice."""
        seconds = {}
        for layout in (self.torch.contiguous_format, self.torch.channels_last):
            self.modules[part].to(memory_format=layout)
            self.call(part, *arrays)
            start = time.perf_counter()
            self.call(part, *arrays)
            seconds[layout] = time.perf_counter() - start
        first, last = seconds.values()
        self.modules[part].to(memory_format=min(seconds, key=seconds.get))
        return f"{part}: channels {'last' if last < first else 'first'} ({first:.2f} s first, {last:.2f} s last)"


class OpenVino(Peer):
    """OpenVINO on the converted or quantised networks; in the latter, the rest is bf16 if the CPU supports it."""

    def __init__(self, job: Job, precision: str) -> None:
        import openvino

        int8 = precision == "int8"
        hint = "bf16" if int8 else precision
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "INFERENCE_NUM_THREADS": job.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        paths = {part: job.model_path(part, int8=int8) for part in job.parts}
        if not all(path.exists() for path in paths.values()):
            raise FileNotFoundError("no converted network in the cache; see the errors of the conversion")
        core = openvino.Core()
        self.networks = {part: core.compile_model(path, "CPU", settings) for part, path in paths.items()}
        for network in self.networks.values():
            found = network.get_property("INFERENCE_PRECISION_HINT").to_string()
            if found != hint and not int8:
                raise ValueError(f"asked for {hint}, OpenVINO computes in {found}")
        if int8:
            counts = "; ".join(count_int8(part, network) for part, network in self.networks.items())
            self.note = f"in int8 {counts}; the rest in {found}"

    def call(self, part: str, *arrays: np.ndarray) -> np.ndarray:
        return np.array(self.networks[part](list(arrays))[0])  # a copy, since the next call reuses the memory


def count_int8(part: str, network: Any) -> str:
    """Say how many layers of a compiled network compute in int8; raise ValueError if a tenth or more do not."""
    layers = []
    for operation in network.get_runtime_model().get_ops():
        info = operation.get_rt_info()
        if info["layerType"].astype(str) in {"Convolution", "FullyConnected"}:
            layers.append(info["runtimePrecision"].astype(str))
    count = sum(precision in {"i8", "u8"} for precision in layers)
    found = f"{count} of {len(layers)} convolutions and linear layers of the {part}"
    if count <= 0.9 * len(layers):
        raise ValueError(f"asked for int8, OpenVINO computes in it only {found}")
    return found


def convert(job: Job) -> None:
    """Convert the networks of a job that are not in the cache to OpenVINO; they keep their float32 weights."""
    import openvino
    import torch

    torch.set_num_threads(job.threads)
    for part in job.parts:
        path = job.model_path(part)
        if path.exists():
            continue
        report(f"converting {part} for OpenVINO")
        inputs = job.inputs(part)
        model = openvino.convert_model(
            load_module(job, part, torch.float32),
            example_input=tuple(map(torch.from_numpy, inputs)),
            input=[openvino.PartialShape(array.shape) for array in inputs],
        )
        save(model, path)


def save(model: Any, path: Path) -> None:
    """Write a network of OpenVINO; its folder appears only when complete."""
    import openvino

    cache = path.parent.parent
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache))
    try:
        openvino.save_model(model, unfinished / path.name, compress_to_fp16=False)
        os.rename(unfinished, path.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def picture(network: Any, job: Job) -> Callable[[], np.ndarray]:
    """Return a call that makes a whole picture and returns its last latents."""
    from sd_numba.samplers import make_sampler

    sampler = make_sampler(SAMPLER, job.config("scheduler", "scheduler_config.json"))
    scaling = job.config("vae").get("scaling_factor", 0.18215)
    (ids,), (noise,) = job.inputs("text"), job.inputs("vae")

    def call() -> np.ndarray:
        context = network.context(network.text(ids))
        plan = sampler.plan(job.steps)
        x, history = (noise * plan.init_noise_sigma).astype(np.float32), None
        for i in range(len(plan)):
            model_input = sampler.scale_model_input(x, plan, i)
            away, towards = np.split(network.unet(model_input, plan.timesteps[i], context), 2)
            x, history = sampler.step(away + np.float32(GUIDANCE) * (towards - away), x, plan, i, history, None)
        network.decode(x / np.float32(scaling))
        return x

    return call


def report(line: str) -> None:
    """Report progress to the user."""
    print(f"{time.strftime('%T')} {line}", file=sys.stderr, flush=True)


@dataclass
class Reply:
    """A process's answer: the duration and result of a call, and the state of the process."""

    seconds: float
    output: np.ndarray | None = None
    gflop: float = 0.0
    resident: float = 0.0  # MB, at most until now
    spun: float = 0.0  # seconds of CPU time while it waited for its turn
    note: str = ""


def prepare(job: Job, name: str) -> tuple[Callable[[], np.ndarray], str]:
    """Load a contestant; return the call to time, and notes on it."""
    kind, precision = name.split()
    network = {"ours": Ours, "torch": Torch, "openvino": OpenVino}[kind](job, precision)
    if job.work == "image":
        return picture(network, job), network.note
    inputs = job.inputs(WORKS[job.work][0])
    if job.work in {"unet", "step"}:
        sample, timestep, context = inputs[0], float(inputs[1][0]), network.context(inputs[2])
        if job.work == "step":
            sample = sample[:1]
        return lambda: network.unet(sample, timestep, context), network.note
    return lambda: (network.text if job.work == "text" else network.decode)(*inputs), network.note


def answer(call: Callable[[], np.ndarray], name: str, command: str) -> Reply:
    """Run a command: "first" call, next "call", or measure the machine's "peak" (GFLOP/s)."""
    if command == "peak":
        from sd_numba.kernels.machine.peak import measure_peak

        return Reply(0.0, gflop=measure_peak())
    if command == "first" and name.startswith("ours"):
        from sd_numba.tools.profile import profile

        with profile() as rows:
            output = call()
        return Reply(rows["everything"].seconds, output, rows["everything"].gflop)
    start = time.perf_counter()
    output = call()
    return Reply(time.perf_counter() - start, output if command == "first" else None)


def serve(connection: Connection, job: Job, name: str) -> None:
    """Load a contestant, then answer commands until told to stop: the main function of its process."""
    try:
        start = time.perf_counter()
        call, note = prepare(job, name)
        reply = Reply(time.perf_counter() - start, note=note)
        while True:
            status = Path("/proc/self/status").read_text().splitlines()
            reply.resident = next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))
            connection.send(reply)
            start = time.process_time()
            command = connection.recv()
            spun = time.process_time() - start
            if command == "stop":
                return
            reply = answer(call, name, command)
            reply.spun = spun
    except Exception as error:  # whatever it is, the others continue
        connection.send(f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0][:200])
