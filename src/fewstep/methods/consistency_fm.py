"""Consistency flow matching: endpoints of K segments of time, consistent along the flow (arXiv:2407.02398).

[0, 1] is cut into K equal segments. With ``e`` the end of the segment that t falls into, the network says where the
flow leads by then,

    f(x, t) = x + (e - t) v_theta(x, t),
    L = E | f(x_t, t) - sg f(x_r, r) |^2 + alpha E | v_theta(x_t, t) - sg v_theta(x_r, r) |^2,    r = min(t + gap, e),

with f(x, e) = x. The optimum, as ``alpha`` and ``gap`` go to 0, is the exact flow map to the segment's end,
v_theta(x, t) = u(x, t, e): constant along no trajectory, and crossed in one Euler step. So samples are made with
exactly K steps; more of them walk along chords and leave the law.

From a teacher, ``x_r`` is one Heun step of its flow. From data, ``x_t`` and ``x_r`` lie on one line between a noise and
a data row; near the end of a segment (beyond the share ``boundary`` of it) the line's own point at ``e`` is the target,
and a first phase has it everywhere (flow matching, weighed by (e - t)^2).
"""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Independent, Pair
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.flow.paths import Linear, expand_time
from fewstep.methods.base import Batches, Objective, Options, Phase, Plan, SampleRule, Spec, Stage, Teacher
from fewstep.methods.batches import DataBatches
from fewstep.methods.piecewise import window_start


class ConsistencyFMOptions(Options):
    """Options of ``method: consistency_fm``."""

    samples: int = Field(800_000, gt=0, description="samples seen in the stage, over its phases")
    segments: int = Field(2, gt=0, description="K; sampled with exactly K steps")
    gap: float = Field(0.05, gt=0, le=0.5, description="r - t")
    alpha: float = Field(1e-5, ge=0, description="weight of the velocities' consistency")
    boundary: float = Field(0.9, ge=0, le=1, description="from data: share of a segment beyond which its end is given")
    first: float = Field(0.35, ge=0, lt=1, description="from data: share of the samples in the first phase")
    guidance: float = Field(1.0, ge=0, description="teacher's guidance, baked in")

    @model_validator(mode="after")
    def _guided_teacher(self) -> ConsistencyFMOptions:
        if self.guidance != 1.0 and self.teacher is None:
            raise ValueError("guidance is baked in from a teacher: add 'teacher: STAGE', or leave it out")
        return self


@final
class SegmentConsistency(Objective):
    """The loss above.

    Args:
        student: ``v(x, t, **cond)``.
        segments: K.
        gap: ``r - t``.
        alpha: weight of the velocities' consistency.
        teacher: whose flow leads from x_t to x_r; None for the line of the pair.
        boundary: without a teacher, share of a segment beyond which the line's point at its end is the target.
    """

    def __init__(
        self,
        student: nn.Module,
        segments: int,
        gap: float,
        alpha: float = 0.0,
        teacher: Velocity | None = None,
        boundary: float = 1.0,
    ) -> None:
        self.modules = {"student": student}
        self.segments, self.gap, self.alpha = segments, gap, alpha
        self.teacher, self.boundary = teacher, boundary

    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        path, width = Linear(), 1.0 / self.segments
        t = draws.uniform().to(batch.x1)
        start = window_start(t, self.segments)
        end = start + width
        r = torch.minimum(t + self.gap, end)
        x_t = path.interpolate(batch.x0, batch.x1, t)
        with torch.no_grad():
            if self.teacher is None:
                x_r, known = path.interpolate(batch.x0, batch.x1, r), r >= start + self.boundary * width
                x_end = path.interpolate(batch.x0, batch.x1, end)
            else:
                x_r, known = heun_step(self.teacher, x_t, t, r, batch), r >= end
                x_end = x_r
            v_r = self.modules["student"](x_r, r, **batch.cond)
            given = known.view(-1, *(1,) * (x_t.ndim - 1))
            target = torch.where(given, x_end, x_r + expand_time(end - r, x_t) * v_r)
        v_t = self.modules["student"](x_t, t, **batch.cond)
        found = x_t + expand_time(end - t, x_t) * v_t
        terms = {"endpoint": (found - target).square().mean() * self.segments**2}
        if self.alpha:
            apart = (v_t - v_r).square().flatten(1).mean(1)
            terms["velocity"] = self.alpha * torch.where(known, 0.0, apart).mean()
        return {"loss": torch.stack(list(terms.values())).sum(), **{k: term.detach() for k, term in terms.items()}}


def heun_step(velocity: Velocity, x: Tensor, t: Tensor, r: Tensor, batch: Pair) -> Tensor:
    """One step of Heun's rule from t to r, both (B,)."""
    h = expand_time(r - t, x)
    slope = velocity(x, t, **batch.cond)
    return x + h / 2 * (slope + velocity(x + h * slope, r, **batch.cond))


def plan(options: ConsistencyFMOptions, stage: Stage) -> Plan:
    """From a teacher one phase; from data flow matching first, then consistency.

    Raises:
        UserError: a teacher whose states are not those of noised data, or on another path.
    """
    student, teacher = stage.build(), stage.teacher
    if teacher is not None and not (teacher.independent and teacher.path == "linear"):
        raise UserError(
            f"method 'consistency_fm' learns from a teacher at noised data, and {teacher.name!r} does not pass through "
            "those (it was trained on dependent pairs, or on another path than 'linear'): learn from a flow_matching "
            "stage."
        )
    velocity = None if teacher is None else teacher.guided(options.guidance)

    def phase(name: str, samples: int, boundary: float) -> Phase:
        def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
            key = (stage.seed, stage.name, name)
            batches = DataBatches(stage.data, Independent(stage.source), stage.conditional, stage.dequantise, key)
            loss = SegmentConsistency(student, options.segments, options.gap, options.alpha, velocity, boundary)
            return loss, batches

        return Phase(name, samples, prepare)

    first = 0 if teacher is not None else round(options.first * options.samples)
    phases = [phase("matching", first, 0.0)] if first else []
    phases.append(phase("consistency", options.samples - first, options.boundary))
    facts = Facts(
        independent=False,
        deterministic=True,
        teacher=None if teacher is None else teacher.digest,
        guidance=None if options.guidance == 1.0 else options.guidance,
        gaussian=stage.source.gaussian,
    )
    steps = options.segments
    return Plan(student, phases, SampleRule(kind="map", steps=(steps,), default_steps=steps), facts)


SPEC = Spec(
    options=ConsistencyFMOptions,
    plan=plan,
    summary="K calls: consistent endpoints of K segments, from data or from a teacher",
    needs="data, or teacher and data",
    makes="map",
    cite=("yang2024consistency",),
    online_calls=lambda options: 0 if options.teacher is None else 2,
)
