"""An average of a network's weights, called where targets are made."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor, nn

from fewstep.flow.field import Velocity
from fewstep.flow.precision import full_precision


@final
class TargetAverage:
    """An average of a module's weights over the steps so far, called in its place where targets are made.

    ``w' <- d w' + (1 - d) w`` before every step; with d = 0 it is the module as it is. It is called without a graph, in
    full precision, and with the dropout that the module will draw next.

    Args:
        module: what is followed; on the device it is trained on.
        decay: d.

    Attributes:
        module: the average itself, frozen.
        state: its tensors, changed in place; a checkpoint must keep them.
    """

    def __init__(self, module: nn.Module, decay: float = 0.0) -> None:
        self.decay = decay
        self._leader = module
        self.module = copy.deepcopy(module).train().requires_grad_(False)
        self.state = {f"target.{name}": value for name, value in self.module.state_dict().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take a step towards the module's weights."""
        for name, value in self._leader.state_dict().items():
            kept = self.state[f"target.{name}"]
            if kept.dtype.is_floating_point:
                kept.lerp_(value, 1.0 - self.decay)
            else:
                kept.copy_(value)

    def __call__(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        with full_precision(x), same_dropout(x.device):
            out: Tensor = self.module(x, t, **cond).to(x)
        return out


@final
class Progress:
    """How much of the training is done, from 0 to 1.

    Args:
        total: optimiser steps.

    Attributes:
        state: the steps so far; a checkpoint must keep it.
    """

    def __init__(self, total: int) -> None:
        self.total = max(1, total)
        self.state = {"steps": torch.zeros((), dtype=torch.long)}

    def step(self) -> float:
        """The share before this step, which is counted."""
        done = int(self.state["steps"]) / self.total
        self.state["steps"].add_(1)
        return min(1.0, done)


@contextlib.contextmanager
def same_dropout(device: torch.device) -> Iterator[None]:
    """Afterwards the random state is as it was: the next call of a network drops the same values as the one inside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def in_full(network: Velocity, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
    """The network's velocity with its graph, in float32 whatever the stage's precision.

    It is compared with one nearly like it.
    """
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = network(x, t, **cond)
    return out
