r"""The consistency family: learn the end of a trajectory from a neighbouring point of the same trajectory.

Let e be the time where the trajectory ends (1, or the end of a segment). The network ``v(x, t)`` predicts the end point

    f(x, t) = x + (e - t) v(x, t),       f(x, e) = x.

A consistency loss makes f equal at two points of one trajectory, at times ``t < r <= e``. For the step
``x_r = x_t + (r - t) w`` with mean velocity w,

    f(x_t, t) - f(x_r, r) = (e - t) (v(x_t, t) - y),     y = a w + (1 - a) v(x_r, r),     a = (r - t) / (e - t).

So the target y of v is a weighted mean of the step's velocity w and the network's velocity at x_r; at ``r = e`` it is w
alone. The exact solution is the average velocity ``u(x, t, e)`` of the flow. The step is made with a teacher's
velocity, or along the data pair, ``w = x1 - x0``. The pair's velocity has the flow's velocity as its mean given x_t;
the solution then has an error of the order r - t.
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
HALVING_SHARE = 0.5  # share of the training in which the gap is halved; chosen, not tuned


def step_velocity(
    source: VelocitySource, batch: Pair, x: Tensor, t: Tensor, r: Tensor, steps: TeacherStep = "heun"
) -> Tensor:
    """The mean velocity w of a step from t to r, without a graph.

    Args:
        source: a teacher's velocity, or that of the data pairs. A data pair has a constant velocity, so ``steps`` does
            not matter for it.
        batch: the pairs.
        x: (B, ...) at t.
        t, r: times (B,).
        steps: ``euler``: ``v(x, t)``, one call. ``heun``: ``(v(x, t) + v(x + (r - t) v(x, t), r)) / 2``, two calls.

    Returns:
        (B, ...).
    """
    first = source.velocity_at(batch, x, t)
    if source.velocity is None or steps == "euler":
        return first
    return 0.5 * (first + source.velocity_at(batch, x + expand_time(r - t, x) * first, r))


def neighbour(x: Tensor, w: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """``x_r = x_t + (r - t) w``, (B, ...).

    >>> neighbour(torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25]), torch.tensor([0.75]))
    tensor([[0.5000, 0.5000]])
    """
    return x + expand_time(r - t, x) * w


def consistent(w: Tensor, v_r: Tensor, t: Tensor, r: Tensor, end: Tensor) -> Tensor:
    """The target ``y = a w + (1 - a) v_r`` with ``a = (r - t) / (e - t)``, and w itself where ``t = e``.

    Args:
        w: mean velocity of the step, (B, ...).
        v_r: the network's velocity at (x_r, r), (B, ...).
        t, r, end: times (B,), ``t <= r <= e``.

    Returns:
        (B, ...).

    >>> t, r, end = torch.tensor([0.0]), torch.tensor([0.25]), torch.tensor([1.0])
    >>> consistent(torch.tensor([[4.0]]), torch.tensor([[8.0]]), t, r, end)
    tensor([[7.]])
    """
    left = end - t
    share = expand_time(torch.where(left > 0, (r - t) / torch.where(left > 0, left, 1.0), 1.0), w)
    return share * w + (1 - share) * v_r


def step_calls(options: MapOptions, steps: TeacherStep) -> int:
    """The teacher's network calls per sample seen: one step of ``steps``, twice as many calls with guidance."""
    return teacher_calls(options) * (2 if steps == "heun" else 1)


def square_rows(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of every row, (B,), of x and y (B, ...).

    >>> square_rows(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
    tensor([5.])
    """
    return (x - y).flatten(1).square().mean(1)


ROWS: dict[str, Distance] = {"l2": square_rows, "huber": pseudo_huber_rows}


def gap_at(done: float, halvings: int) -> float:
    """The gap ``2^-k`` after a share ``done`` of the training.

    In the first half of the training k takes the values ``0 … halvings - 1``, each for an equal time; in the second
    half ``k = halvings``.

    >>> [gap_at(done, 2) for done in (0.0, 0.3, 0.5)]
    [1.0, 0.5, 0.25]
    """
    return 2.0 ** -min(halvings, math.floor(done / HALVING_SHARE * halvings)) if halvings else 1.0


@final
class Consistency(Objective):
    """The discrete loss ``E a d(v(x_t, t) / a, y / a)`` with ``r = min(t + gap, 1)``, the end ``e = 1`` and y without
    gradient (:mod:`fewstep.methods.consistency`).

    Args:
        student: ``v(x, t, **cond)``.
        source: the velocity of the step, a teacher's or the data pair's.
        law: the law of t.
        halvings: the gap is 1 at first and is halved this many times (:func:`gap_at`).
        teacher_step: the solver step by which a teacher goes from t to r.
        target_ema: decay, per step, of the weight average that computes ``v(x_r, r)``.
        distance: d per row, ``l2`` or ``huber``.
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
        """``y = a w + (1 - a) v(x_r, r)``, (B, ...), without a graph.

        Args:
            batch: the pairs.
            x_t: (B, ...) at t (B,).
            t: times.
            gap: r - t, cut so that ``r <= 1``.
        """
        r = (t + gap).clamp(max=1.0)
        w = step_velocity(self.source, batch, x_t, t, r, self.teacher_step)
        if gap == 1.0:
            return w
        v_r = self.target_average(neighbour(x_t, w, t, r), r, **batch.cond)
        return consistent(w, v_r, t, r, torch.ones_like(t))
