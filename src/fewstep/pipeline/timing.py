"""How long a network's training steps and calls take on a device, from small batches within a few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.flow.noise import isolated_rng
from fewstep.pipeline.stage_networks import build_network

GROWTH = 4  # between the sizes of two timed batches; chosen, not tuned
RUNS = 3.0  # of one batch: two training steps and a call
MAX_REPEATED = 2.0  # seconds of a network's first step, below which it is timed again; chosen, not tuned
BACKWARD = 3.0  # a training step over a call, where there is no time to measure both: forward plus twice for backward


@final
@dataclass(frozen=True)
class Timing:
    """What was measured of one network.

    Attributes:
        batches: batch sizes, ascending.
        steps: seconds of a forward and a backward at these sizes.
        called: seconds of one row in a call without gradients, at the largest size.
    """

    batches: tuple[int, ...]
    steps: tuple[float, ...]
    called: float

    def trained(self, batch: int) -> float:
        """Seconds of one row in a training step of ``batch`` rows: along the line through the two largest sizes."""
        if batch <= self.batches[-1] or len(self.batches) == 1:
            seconds = float(np.interp(batch, self.batches, self.steps))
            return seconds / min(batch, self.batches[-1])
        slope = (self.steps[-1] - self.steps[-2]) / (self.batches[-1] - self.batches[-2])
        seconds = self.steps[-1] + max(slope, 0.0) * (batch - self.batches[-1])
        return seconds / batch


@final
@dataclass(frozen=True)
class TimedNetwork:
    """What to time: a network, what it is called with, and where.

    Attributes:
        build: makes the network, on the device.
        cond: makes the conditions of so many rows, each (B, ...), on the device.
        shape: of one sample.
        batch: the largest batch that is of interest.
        timed: whether it is called with a time, which feature networks are not.
        device: where it runs.
        bf16: whether it trains under autocast to bf16.
    """

    build: Callable[[], nn.Module]
    cond: Callable[[int], Mapping[str, Tensor]]
    shape: tuple[int, ...]
    batch: int
    timed: bool
    device: torch.device
    bf16: bool

    def measure(self, seconds: float) -> Timing:
        """Time batches of 1, 4, 16 … rows until the next would not fit into ``seconds``, which one batch may exceed."""
        ends = time.perf_counter() + seconds
        module = self.build()
        batches: list[int] = []
        steps: list[float] = []
        batch = 1
        while True:
            step = self._step(module, batch)
            taken = self._seconds(step)
            if not batches and taken < MAX_REPEATED:  # the first step sets up kernels and memory: it is no measurement
                taken = self._seconds(step)
            if time.perf_counter() + taken < ends:
                taken = min(taken, self._seconds(step))
            batches.append(batch)
            steps.append(taken)
            following = min(batch * GROWTH, self.batch)
            if following == batch or time.perf_counter() + RUNS * taken * following / batch > ends:
                break
            batch = following
        return Timing(tuple(batches), tuple(steps), self._called(module, batch, steps[-1], ends))

    def _called(self, module: nn.Module, batch: int, step: float, ends: float) -> float:
        """Seconds of one row in a call without gradients."""
        if time.perf_counter() + step > ends:
            return step / BACKWARD / batch
        inputs, cond = self._inputs(batch)
        with torch.no_grad():
            return self._seconds(lambda: module(*inputs, **cond)) / batch

    def _step(self, module: nn.Module, batch: int) -> Callable[[], object]:
        """A forward and a backward of ``batch`` rows."""
        inputs, cond = self._inputs(batch)

        def step() -> None:
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16):
                loss = module(*inputs, **cond).square().mean()
            loss.backward()

        return step

    def _inputs(self, batch: int) -> tuple[tuple[Tensor, ...], Mapping[str, Tensor]]:
        """Samples, times and conditions of the right shapes."""
        x = torch.full((batch, *self.shape), 0.5, device=self.device)
        t = (torch.linspace(0, 1, batch, device=self.device),) if self.timed else ()
        return (x, *t), self.cond(batch)

    def _seconds(self, work: Callable[[], object]) -> float:
        """Time of one call: on a CPU the smaller one of wall and CPU time, because other processes add to the first
        and several threads to the second.
        """
        if self.device.type == "cpu":
            start, busy = time.perf_counter(), time.process_time()
            work()
            return min(time.perf_counter() - start, time.process_time() - busy)
        torch.accelerator.synchronize()
        start = time.perf_counter()
        work()
        torch.accelerator.synchronize()
        return time.perf_counter() - start


def blank_network(network: Mapping[str, Any]) -> nn.Module:
    """A network without memory for its weights: enough to count its parameters."""
    with isolated_rng(), torch.device("meta"):
        return build_network(network)


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Give a module without values some: a call takes as long whatever they are, unless they are denormal."""
    for value in (*module.parameters(), *module.buffers()):
        value.fill_(0.01 if value.is_floating_point() else 0)


def time_networks(works: Mapping[str, TimedNetwork], seconds: float) -> dict[str, Timing]:
    """Time every network in an equal share of what is left of ``seconds``."""
    ends, found = time.perf_counter() + seconds, {}
    for number, (key, work) in enumerate(works.items()):
        left = max(0.0, ends - time.perf_counter())
        found[key] = work.measure(left / (len(works) - number))
    return found
