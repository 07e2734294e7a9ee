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

import math
from typing import Literal, final

import torch
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws
from fewstep.flow.paths import expand_time
from fewstep.flow.precision import in_full
from fewstep.flow.time_laws import TimeLaw
from fewstep.methods.contract.objective import Networks, Objective, Terms
from fewstep.methods.families.distances import Distance, pseudo_huber_rows
from fewstep.methods.families.target_average import TargetAverage
from fewstep.methods.families.velocity_source import MapOptions, VelocitySource, teacher_calls

TeacherStep = Literal["euler", "heun"]
SHRINKING = 0.5  # share of the training in which the gap shrinks; chosen, not tuned


def step_velocity(
    source: VelocitySource, batch: Pair, x: Tensor, t: Tensor, r: Tensor, steps: TeacherStep = "heun"
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


def step_calls(options: MapOptions, steps: TeacherStep) -> int:
    """The teacher's network calls per sample seen."""
    return teacher_calls(options) * (2 if steps == "heun" else 1)


def square_rows(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of every row, (B,)."""
    return (x - y).flatten(1).square().mean(1)


ROWS: dict[str, Distance] = {"l2": square_rows, "huber": pseudo_huber_rows}


def gap_at(done: float, halvings: int) -> float:
    """The gap ``2^-k`` after a share ``done`` of the training.

    ``k = 0 … halvings - 1`` share the first half of the training equally; ``k = halvings`` has the second half.
    """
    return 2.0 ** -min(halvings, math.floor(done / SHRINKING * halvings)) if halvings else 1.0


@final
class Consistency(Objective):
    """The discrete loss.

    Args:
        student: ``v(x, t, **cond)``.
        source: where the steps come from.
        law: the law of t.
        halvings: of the gap.
        teacher_step: by which a teacher goes from t to r.
        target_ema: decay of the target's average.
        distance: ``l2`` or ``huber``, of rows.
    """

    def __init__(
        self,
        student: nn.Module,
        source: VelocitySource,
        law: TimeLaw,
        halvings: int = 6,
        *,
        teacher_step: TeacherStep = "heun",
        target_ema: float = 0.9,
        distance: str = "l2",
    ) -> None:
        self.modules = {"student": student}
        self.source, self.law, self.halvings, self.teacher_step = source, law, halvings, teacher_step
        self.rows = ROWS[distance]
        self.target_average = TargetAverage(student, target_ema)
        self.state = self.target_average.state

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        gap = gap_at(done, self.halvings)
        t = self.law.sample(draws.uniform()).to(batch.x1)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, t)
        target = self.target(batch, x_t, t, gap)
        v = in_full(nets["student"], x_t, t, **batch.cond)
        share = gap / (1 - t).clamp(min=gap)
        a = expand_time(share, v)
        return {"loss": (share * self.rows(v / a, target / a)).mean(), "gap": torch.tensor(gap)}

    def after_step(self, role: str) -> None:
        self.target_average.update()

    def target(self, batch: Pair, x_t: Tensor, t: Tensor, gap: float) -> Tensor:
        """``a w + (1 - a) v(x_r, r)``, (B, ...), without a graph."""
        r = (t + gap).clamp(max=1.0)
        w = step_velocity(self.source, batch, x_t, t, r, self.teacher_step)
        if gap == 1.0:
            return w
        v_r = self.target_average(neighbour(x_t, w, t, r), r, **batch.cond)
        return consistent(w, v_r, t, r, torch.ones_like(t))
