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

from typing import Literal

import torch
from torch import Tensor

from fewstep.flow.couplings import Pair
from fewstep.flow.paths import expand_time
from fewstep.methods.families.velocity_source import MapOptions, VelocitySource, teacher_calls

Steps = Literal["euler", "heun"]


def step_velocity(
    source: VelocitySource, batch: Pair, x: Tensor, t: Tensor, r: Tensor, steps: Steps = "heun"
) -> Tensor:
    """The mean velocity w of a step from t to r, (B, ...), without a graph: a teacher's step, or the data pair's.

    Args:
        source: where the velocity comes from; data pairs are on the line, where theirs is constant.
        batch: the pairs.
        x: (B, ...) at t.
        t, r: (B,).
        steps: ``euler``, or ``heun``: ``(v(x, t) + v(x + (r - t) v(x, t), r)) / 2``.
    """
    first = source.velocity_at(batch, x, t)
    if source.velocity is None or steps == "euler":
        return first
    return 0.5 * (first + source.velocity_at(batch, x + expand_time(r - t, x) * first, r))


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
