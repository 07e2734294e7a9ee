"""Consistency models on the flow: ``f(x, t) = x + (1 - t) v(x, t)`` maps every point to the data.

**Discrete** (distillation: arXiv:2303.01469; tuning with a shrinking gap: arXiv:2406.14548). For a step from x_t to x_r
of mean velocity w, a teacher's (distillation) or that of the same data and noise (tuning), and weights without gradient
on the right,

    L(theta) = E a d( v_theta(x_t, t) / a,  sg[ a w + (1 - a) v(x_r, r) ] / a ),
    r = min(t + g, 1),   a = (r - t) / (1 - t),

which is ``f(x_t, t) = f(x_r, r)`` divided by r - t. The gap g is 1 at first, where the target is w, flow matching's own
(a teacher's: one step of it), and is halved until it is 2^-stages. d is the squared distance or the pseudo-Huber one.
The rows that reach r = 1 hold the map to the data, and the target's weights are a short average of the student's: on
digits, training with small gaps ran away without that. (The second paper's gap is a share of the noise level (1 - t)/t,
and its target has the student's own weights.)

**Continuous** (arXiv:2410.11081; with the flow-matching term that keeps it stable: arXiv:2507.03738). The limit g -> 0:

    L(theta) = E d( u_theta(x_t, t, r),  sg[ w + rho (r - t) du/dt ] ),       du/dt = ∂_t u + (∂_x u) w,

with r = 1 and, for a share ``anchor`` of the rows, r = t, where u is the flow's velocity. The network is a two-time
one, so that it can tell the two. rho rises from 0 to 1 over the first half of training; in a tenth, with a quarter
of the rows for the anchor, training ran away on digits.

Samples take one call, or several with fresh noise between them (``restart``). Euler steps would not do: v points to the
end of a trajectory, not along it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.derivatives import Derivative, Way
from fewstep.flow.noise import Draws
from fewstep.flow.paths import expand_time
from fewstep.flow.precision import full_precision
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.contract.objective import Batches, Objective
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.consistency_target import Steps, consistent, neighbour, step_calls, step_velocity
from fewstep.methods.families.distances import Distance, find_distance, pseudo_huber_rows
from fewstep.methods.families.flow_map import Announcement, Times, caller, derivative_target
from fewstep.methods.families.target_average import Progress, TargetAverage, in_full
from fewstep.methods.families.velocity_source import (
    LawOfTime,
    MapOptions,
    VelocitySource,
    refuse_dropout,
    teacher_calls,
    two_time,
    velocity_source,
)
from fewstep.methods.meanflow import FEW_VALUES
from fewstep.solvers.maps import SampleRule

SHRINKING = 0.5  # share of the training in which the gap shrinks
WARMING = 0.5  # share of the training in which the derivative's weight rises


def square_rows(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of every row, (B,)."""
    return (x - y).flatten(1).square().mean(1)


ROWS: dict[str, Distance] = {"l2": square_rows, "huber": pseudo_huber_rows}


class ConsistencyOptions(MapOptions):
    """Options of ``method: consistency``."""

    target: Literal["discrete", "continuous"] = Field("discrete", description="a step away, or the limit of none")
    stages: int = Field(6, ge=0, le=12, description="discrete: the gap is halved this many times from 1")
    steps: Steps = Field("heun", description="discrete: the teacher's step: heun (two calls) or euler")
    target_ema: float = Field(0.9, ge=0, lt=1, description="discrete: decay of the target's weight average; 0: none")
    anchor: float = Field(0.5, ge=0, lt=1, description="continuous: share of rows that learn the velocity")
    derivative: Way = Field("auto", description="continuous: forward mode, or finite differences")
    time: LawOfTime = Field("uniform", description="law of t: uniform, logit_normal:m,s, …")
    loss: Literal["l2", "huber"] = "l2"

    @model_validator(mode="before")
    @classmethod
    def _slower_without_steps(cls, fields: Any) -> Any:
        """At the usual rate one digits run of three fell apart when the derivative had its full weight."""
        continuous = isinstance(fields, Mapping) and fields.get("target") == "continuous"
        return {"lr": 1e-3, **fields} if continuous else fields

    @model_validator(mode="after")
    def _of_its_target(self) -> ConsistencyOptions:
        other = ("anchor", "derivative") if self.target == "discrete" else ("stages", "steps", "target_ema")
        for name in other:
            if name in self.model_fields_set:
                needed = "continuous" if self.target == "discrete" else "discrete"
                raise ValueError(f"{name} belongs to 'target: {needed}': set that, or leave {name} out")
        return self


def gap_at(done: float, stages: int) -> float:
    """``2^-k``: stages k = 0 … stages - 1 share the first half of the training alike, the last one has the rest."""
    return 2.0 ** -min(stages, math.floor(done / SHRINKING * stages)) if stages else 1.0


@final
class Consistency(Objective):
    """The discrete loss.

    Args:
        student: ``v(x, t, **cond)``.
        source: where the steps come from.
        law: the law of t.
        total: optimiser steps of the training.
        stages: halvings of the gap.
        steps: of a teacher.
        target_ema: decay of the target's average.
        distance: ``l2`` or ``huber``, of rows.
    """

    def __init__(
        self,
        student: nn.Module,
        source: VelocitySource,
        law: TimeLaw,
        total: int,
        stages: int = 6,
        *,
        steps: Steps = "heun",
        target_ema: float = 0.9,
        distance: str = "l2",
    ) -> None:
        self.modules = {"student": student}
        self.source, self.law, self.stages, self.steps = source, law, stages, steps
        self.rows = ROWS[distance]
        self.follower, self.progress = TargetAverage(student, target_ema), Progress(total)
        self.state = {**self.follower.state, **self.progress.state}

    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        self.follower.update()
        gap = gap_at(self.progress.step(), self.stages)
        t = self.law.sample(draws.uniform()).to(batch.x1)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, t)
        target = self.target(batch, x_t, t, gap)
        v = in_full(self.modules["student"], x_t, t, **batch.cond)
        share = gap / (1 - t).clamp(min=gap)
        a = expand_time(share, v)
        return {"loss": (share * self.rows(v / a, target / a)).mean(), "gap": torch.tensor(gap)}

    def target(self, batch: Pair, x_t: Tensor, t: Tensor, gap: float) -> Tensor:
        """``a w + (1 - a) v(x_r, r)``, (B, ...), without a graph."""
        r = (t + gap).clamp(max=1.0)
        w = step_velocity(self.source, batch, x_t, t, r, self.steps)
        if gap == 1.0:
            return w
        v_r = self.follower(neighbour(x_t, w, t, r), r, **batch.cond)
        return consistent(w, v_r, t, r, torch.ones_like(t))


@final
class ContinuousConsistency(Objective):
    """The continuous loss; in float32 whatever the stage's precision.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        source: where the velocity comes from.
        law: the law of t.
        total: optimiser steps of the training.
        anchor: share of rows with r = t.
        distance: ``l2`` or ``huber``.
        way: how the derivative is taken.
        say: told once if that is not forward mode.
    """

    def __init__(
        self,
        student: nn.Module,
        source: VelocitySource,
        law: TimeLaw,
        total: int,
        anchor: float = 0.5,
        *,
        distance: str = "l2",
        way: Way = "auto",
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.modules = {"student": student}
        self.source, self.law, self.anchor = source, law, anchor
        self.distance = find_distance(distance)
        self.derivative = Derivative(caller(self.modules), way)
        self.announce, self.progress = Announcement(say), Progress(total)
        self.state = self.progress.state

    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        rise = min(1.0, self.progress.step() / WARMING)
        t = self.law.sample(draws.uniform()).to(batch.x1)
        anchored = (draws.uniform() < self.anchor).to(t.device)
        times = Times(t, torch.where(anchored, t, 1.0), anchored)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, t)
        target = self.target(batch, x_t, times, rise)
        u = in_full(self.modules["student"], x_t, t, r=times.r, **batch.cond)
        return {"loss": self.distance(u, target)}

    def target(self, batch: Pair, x_t: Tensor, times: Times, rise: float) -> Tensor:
        """``w + rho (r - t) du/dt``, (B, ...), without a graph."""
        w = self.source.velocity_at(batch, x_t, times.t)
        with full_precision(x_t):
            full = derivative_target(self.derivative, x_t, times, w, batch.cond)
        self.announce(self.derivative.used)
        return w.lerp(full, rise)


def plan(options: ConsistencyOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: as :func:`~fewstep.methods.families.velocity_source.velocity_source`; finite differences of a
            network with dropout.
    """
    source, student = velocity_source(options, stage), stage.build()
    refuse_dropout(stage, options.derivative)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        return make_objective(options, stage, student, source), source.batches()

    rule = SampleRule(kind="map", default_steps=1, sampler="restart")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, source.facts, path=source.path_name)


def make_objective(options: ConsistencyOptions, stage: Stage, student: nn.Module, source: VelocitySource) -> Objective:
    """The loss that the options name."""
    law, total = make_time_law(options.time), -(-options.samples // options.batch_size)
    if options.target == "continuous":
        way, say = options.derivative, stage.world.say
        return ContinuousConsistency(
            student, source, law, total, options.anchor, distance=options.loss, way=way, say=say
        )
    return Consistency(
        student.to(stage.world.device),
        source,
        law,
        total,
        options.stages,
        steps=options.steps,
        target_ema=options.target_ema,
        distance=options.loss,
    )


def changes(options: ConsistencyOptions, shape: tuple[int, ...]) -> dict[str, Any]:
    """A two-time network for the continuous loss.

    Raises:
        UserError: a robust loss on the targets of pairs in few dimensions.
    """
    if options.loss == "huber" and options.teacher is None and math.prod(shape) < FEW_VALUES:
        raise UserError(
            "'loss: huber' is drawn from the mean of the targets to their middle, and data pairs have many targets: "
            f"in {math.prod(shape)} dimension(s) another map would be learned. Take 'l2', or learn from a teacher."
        )
    return two_time(options, shape) if options.target == "continuous" else {}


def online_calls(options: ConsistencyOptions) -> int:
    """The teacher's network calls per sample seen."""
    return teacher_calls(options) if options.target == "continuous" else step_calls(options, options.steps)


SPEC = Spec(
    options=ConsistencyOptions,
    plan=plan,
    summary="one call, or a few with fresh noise between: every point of a trajectory knows its end",
    needs="data; teacher optional",
    makes="map",
    cite=("song2023consistency", "geng2025consistency", "lu2025simplifying", "peng2025flow"),
    changes=changes,
    online_calls=online_calls,
)
