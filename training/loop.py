"""The training loop: learning rate, averaged weights, and on a GPU a compiled step in one CUDA graph."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .optimizer import Optimizer

AVERAGE_EVERY = 4
WARM_STEPS = 4  # before a step is recorded
SYNCHRONISE_EVERY = 50  # so that measured times are right

Loss = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """Duration and learning rate of a training run.

    Attributes
    ----------
    steps : int
    minutes : float
        Whichever comes first; the learning rate falls to its floor until then.
    rate, floor : float
        Learning rate after the warm-up, and the share of it that is left at the end, on half a cosine.
    warmup : int
        Steps on which the rate rises.
    average : float
        What each step keeps of the averaged weights.
    muon : bool
        The optimizer for matrices; see `optimizer.py`.
    """

    steps: int
    minutes: float
    rate: float
    floor: float = 0.02
    warmup: int = 400
    average: float = 0.9996
    muon: bool = True

    def rate_at(self, step: int, progress: float) -> float:
        """Return the learning rate of a step, with the progress from 0 to 1."""
        falling = self.floor + (1 - self.floor) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, progress)))
        return self.rate * min(1.0, (step + 1) / self.warmup) * falling


class Average:
    """An exponential moving average of parameters."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter], keep: float):
        self._parameters, self._keep = parameters, keep
        self._values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def update(self, step: int, every: int = 1) -> None:
        """Update the average with the parameters after `step` steps, `every` steps after the last update."""
        keep = min(self._keep, (1 + step) / (10 + step)) ** every
        torch._foreach_lerp_(self._values, [parameter.detach() for parameter in self._parameters], 1 - keep)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averages and the parameters."""
        for parameter, value in zip(self._parameters, self._values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def train(
    loss: Loss,
    inputs: Mapping[str, torch.Tensor],
    feed: Callable[[], None],
    modules: Mapping[str, torch.nn.Module],
    plan: Plan,
    report_every: int = 500,
) -> Iterator[int]:
    """Train modules; at the end they hold their averaged weights.

    Parameters
    ----------
    loss
        Gives the loss of `inputs`, as keyword arguments.
    inputs
        Tensors of one size, in which `feed` puts another batch before each step.
    feed
        Called before each step.
    modules
        What to train, on the device of the inputs.
    plan
        How.
    report_every
        Steps between lines of progress.

    Yields
    ------
    int
        The number of steps so far, with each line of progress; while the caller has it, the averaged weights are in
        place.
    """
    named = [(f"{m}.{n}", p) for m, module in modules.items() for n, p in module.named_parameters() if p.requires_grad]
    parameters = [parameter for _, parameter in named]
    device = parameters[0].device
    optimizer, average = Optimizer(named, plan.muon), Average(parameters, plan.average)
    total = torch.zeros((), device=device)
    on_gpu = device.type == "cuda"
    compiled = torch.compile(loss, dynamic=False) if on_gpu else loss

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            value = compiled(**inputs)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True if on_gpu else None)
        optimizer.step()
        total.add_(value.detach())

    start, number, reported, progress = time.perf_counter(), 0, 0, 0.0
    if on_gpu:
        optimizer.set_rate(plan.rate_at(0, 0.0))
        repeat = _record(step, feed, optimizer)
        print(f"compiled in {time.perf_counter() - start:.0f} s", flush=True)
    else:
        repeat = _forgetful(step, optimizer)
    total.zero_()
    start = time.perf_counter()
    while progress < 1:
        feed()
        optimizer.set_rate(plan.rate_at(number, progress))
        repeat()
        number += 1
        if number % AVERAGE_EVERY == 0:
            average.update(number, AVERAGE_EVERY)
        if on_gpu and number % SYNCHRONISE_EVERY == 0:
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        progress = max(number / plan.steps, elapsed / (60 * plan.minutes))
        if number % report_every == 0 or progress >= 1:
            value = total.item() / (number - reported)
            total.zero_()
            reported = number
            speed = f"{1e3 * elapsed / number:.1f} ms/step, {60 * plan.minutes - elapsed:.0f} s left at most"
            print(f"step {number}: loss {value:.5f}, {speed}", flush=True)
            average.swap()
            yield number
            if progress < 1:
                average.swap()


def _forgetful(step: Callable[[], None], optimizer: Optimizer) -> Callable[[], None]:
    def run() -> None:
        optimizer.zero_grad()
        step()

    return run


def _record(step: Callable[[], None], feed: Callable[[], None], optimizer: Optimizer) -> Callable[[], None]:
    """Record a step as a CUDA graph, which replays without Python between the kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_STEPS):
            feed()
            optimizer.zero_grad()
            step()
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()  # so that the graph allocates its own gradients and overwrites them each time
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
