"""Consistency models on the flow's path: one endpoint along a whole trajectory (arXiv:2303.01469).

    f(x, t) = x + (1 - t) F_theta(x, t),        L = E d( f(x_t, t), sg f(x_r, r) ),        f(x, 1) = x,

``r = min(t + gap, 1)``. The gap shrinks while training goes on (easy consistency tuning, arXiv:2406.14548): large gaps
carry the data's end to the noise quickly, small ones make the optimum, F = u(x, t, 1), exact. From a teacher
(consistency distillation) ``x_r`` is one Heun step of its flow; from data (consistency training) both lie on the line
of one pair, and the squared distance is the one whose optimum is then the mean over the pairs.

One call makes a sample. More calls restart: the guess of the endpoint is taken back to a time of the path with fresh
noise, which keeps every marginal where f is exact; Euler steps would not.
"""

from __future__ import annotations

import math
from typing import Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Independent, Pair
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.flow.paths import Linear, expand_time
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.base import Batches, Objective, Options, Phase, Plan, SampleRule, Spec, Stage, Teacher
from fewstep.methods.batches import DataBatches
from fewstep.methods.consistency_fm import heun_step
from fewstep.methods.distances import find_distance


class ConsistencyOptions(Options):
    """Options of ``method: consistency``."""

    samples: int = Field(800_000, gt=0, description="samples seen in the stage")
    gaps: tuple[float, float] = Field((0.25, 0.02), description="r - t, first and last")
    shrink: float = Field(0.6, ge=0, le=1, description="share of the samples in which the gap shrinks")
    time: str = Field("uniform", description="law of t")
    loss: Literal["l2", "l1", "huber"] = "l2"
    guidance: float = Field(1.0, ge=0, description="teacher's guidance, baked in")

    @model_validator(mode="after")
    def _sound(self) -> ConsistencyOptions:
        make_time_law(self.time)
        first, last = self.gaps
        if not 0 < last <= first <= 1:
            raise ValueError(f"gaps shrink from at most 1 to more than 0, got {list(self.gaps)}")
        if self.guidance != 1.0 and self.teacher is None:
            raise ValueError("guidance is baked in from a teacher: add 'teacher: STAGE', or leave it out")
        return self


@final
class EndConsistency(Objective):
    """The loss above.

    Args:
        student: ``F(x, t, **cond)``.
        gaps: ``r - t``, first and last.
        shrink: steps over which the gap shrinks, geometrically.
        law: of t.
        distance: ``d``, by name.
        teacher: whose flow leads from x_t to x_r; None for the line of the pair.
    """

    def __init__(
        self,
        student: nn.Module,
        gaps: tuple[float, float],
        shrink: int,
        law: TimeLaw,
        distance: str = "l2",
        teacher: Velocity | None = None,
    ) -> None:
        self.modules = {"student": student}
        self.gaps, self.shrink, self.law = gaps, shrink, law
        self.distance, self.teacher = find_distance(distance), teacher
        self.taken = torch.zeros((), dtype=torch.long)
        self.state = {"taken": self.taken}

    def gap(self) -> float:
        """``r - t`` at this step."""
        first, last = self.gaps
        share = min(1.0, int(self.taken) / self.shrink) if self.shrink else 1.0
        return first * math.exp(share * math.log(last / first))

    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        path, gap = Linear(), self.gap()
        self.taken.add_(1)
        t = self.law.sample(draws.uniform()).to(batch.x1)
        r = (t + gap).clamp(max=1.0)
        x_t = path.interpolate(batch.x0, batch.x1, t)
        with torch.no_grad():
            if self.teacher is None:
                x_r = path.interpolate(batch.x0, batch.x1, r)
            else:
                x_r = heun_step(self.teacher, x_t, t, r, batch)
            target = self._end(x_r, r, batch)
        return {"loss": self.distance(self._end(x_t, t, batch), target), "gap": t.new_tensor(gap)}

    def _end(self, x: Tensor, t: Tensor, batch: Pair) -> Tensor:
        return x + expand_time(1 - t, x) * self.modules["student"](x, t, **batch.cond)


def plan(options: ConsistencyOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: a teacher whose states are not those of noised data, or on another path.
    """
    student, teacher = stage.build(), stage.teacher
    if teacher is not None and not (teacher.independent and teacher.path == "linear"):
        raise UserError(
            f"method 'consistency' learns from a teacher at noised data, and {teacher.name!r} does not pass through "
            "those (it was trained on dependent pairs, or on another path than 'linear'): learn from a flow_matching "
            "stage."
        )

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        batches = DataBatches(
            stage.data, Independent(stage.source), stage.conditional, stage.dequantise, (stage.seed, stage.name)
        )
        velocity = None if teacher is None else teacher.guided(options.guidance)
        shrink = round(options.shrink * options.samples / options.batch_size)
        law = make_time_law(options.time)
        return EndConsistency(student, options.gaps, shrink, law, options.loss, velocity), batches

    facts = Facts(
        independent=False,
        deterministic=True,
        teacher=None if teacher is None else teacher.digest,
        guidance=None if options.guidance == 1.0 else options.guidance,
        gaussian=stage.source.gaussian,
    )
    rule = SampleRule(kind="map", sampler="restart", default_steps=1)
    return Plan(student, [Phase("train", options.samples, prepare)], rule, facts)


SPEC = Spec(
    options=ConsistencyOptions,
    plan=plan,
    summary="one call, or a few with fresh noise: one endpoint along the whole trajectory, from data or from a teacher",
    needs="data, or teacher and data",
    makes="map",
    cite=("song2023consistency",),
    online_calls=lambda options: 0 if options.teacher is None else 2,
)
