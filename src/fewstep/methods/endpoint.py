r"""What consistency methods share: learning where a trajectory ends from a neighbouring point of the same trajectory.

With ``e`` the time where it ends (1, or the end of a segment), a network ``v(x, t)`` stands for the end point

    f(x, t) = x + (e - t) v(x, t),       f(x, e) = x,

and consistency asks that f be the same at two points of one trajectory, ``t < r <= e``. For a step
``x_r = x_t + (r - t) w`` of mean velocity w,

    f(x_t, t) - f(x_r, r) = (e - t) (v(x_t, t) - y),     y = a w + (1 - a) v(x_r, r),     a = (r - t) / (e - t),

so v is drawn to a mean of the step's velocity and its own, and at ``r = e`` to the step's velocity alone. The exact v
is the average velocity ``u(x, t, e)`` of the flow. The step is a teacher's, or that of the data pair, ``w = x1 - x0``,
whose mean given x_t is the flow's velocity: f is then right up to the order of r - t.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Literal, final

import torch
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.field import Velocity
from fewstep.flow.paths import expand_time
from fewstep.methods.flow_map import Lesson, MapOptions, full_precision, teacher_calls

Steps = Literal["euler", "heun"]


def step_velocity(taught: Lesson, batch: Pair, x: Tensor, t: Tensor, r: Tensor, steps: Steps = "heun") -> Tensor:
    """The mean velocity w of a step from t to r, (B, ...), without a graph: a teacher's step, or the data pair's.

    Args:
        taught: where the velocity comes from; data pairs are on the line, where theirs is constant.
        batch: the pairs.
        x: (B, ...) at t.
        t, r: (B,).
        steps: ``euler``, or ``heun``: ``(v(x, t) + v(x + (r - t) v(x, t), r)) / 2``.
    """
    first = taught.velocity_at(batch, x, t)
    if taught.velocity is None or steps == "euler":
        return first
    return 0.5 * (first + taught.velocity_at(batch, x + expand_time(r - t, x) * first, r))


def neighbour(x: Tensor, w: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """``x_r = x_t + (r - t) w``."""
    return x + expand_time(r - t, x) * w


def consistent(w: Tensor, v_r: Tensor, t: Tensor, r: Tensor, end: Tensor) -> Tensor:
    """``y = a w + (1 - a) v_r`` with ``a = (r - t) / (e - t)``, and w itself where ``t = e``.

    Args:
        w: mean velocity of the step, (B, ...).
        v_r: the network's velocity at (x_r, r).
        t, r, end: times (B,), ``t <= r <= e``.
    """
    left = end - t
    share = expand_time(torch.where(left > 0, (r - t) / torch.where(left > 0, left, 1.0), 1.0), w)
    return share * w + (1 - share) * v_r


def step_calls(options: MapOptions, steps: Steps) -> int:
    """The teacher's network calls per sample seen."""
    return teacher_calls(options) * (2 if steps == "heun" else 1)


@final
class Follower:
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
