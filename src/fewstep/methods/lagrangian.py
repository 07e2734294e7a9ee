"""Lagrangian flow maps: the map's end moves with the flow (arXiv:2406.07507; from data alone: arXiv:2505.18825).

    X(x, t, r) = x + (r - t) u_theta(x, t, r),
    L(theta) = E | ∂_r X(x_t, t, r) - sg[ v(X(x_t, t, r), r) ] |^2,      ∂_r X = u + (r - t) ∂_r u,   t <= r.

The derivative is in r alone, none in x is needed, and the gradient goes through it. With a teacher, v is the
teacher's. Without one it is ``u(., r, r)`` of a slow average of the student's weights (with the weights as they are,
training ran away on digits), and the rows on the diagonal r = t, a share ``diagonal``, learn that from the data: there
``∂_r X = u(x_t, t, t)``, and the target is the pair's ``d/dt x_t``. With a teacher the same rows learn the teacher's
``v(x_t, t)``; they need no case of their own, since X = x_t there.
"""

from __future__ import annotations

from typing import final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.derivatives import Mode
from fewstep.flow.noise import Draws
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.derivative_mode import end_derivative, settle_derivative
from fewstep.methods.families.end_derivative import EndDerivative
from fewstep.methods.families.flow_map import Times, draw_times, weighted_square, where_rows
from fewstep.methods.families.target_average import TargetAverage
from fewstep.methods.families.velocity_source import (
    PairOfTimesOptions,
    VelocitySource,
    map_needs,
    two_time_network,
    velocity_source,
)
from fewstep.solvers.maps import SampleRule


class LagrangianOptions(PairOfTimesOptions):
    """Options of ``method: lagrangian``."""

    target_ema: float = Field(0.99, ge=0, lt=1, description="without a teacher: decay of the target's weight average")

    @model_validator(mode="after")
    def _its_own_target(self) -> LagrangianOptions:
        if self.teacher is not None and "target_ema" in self.model_fields_set:
            raise ValueError("target_ema belongs to a target without a teacher: leave it out")
        return self


@final
class Lagrangian(Objective):
    """The loss above; in float32 whatever the stage's precision, for the derivative needs the digits.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        source: where the velocity comes from.
        law: the law of both times.
        diagonal: share of rows with r = t.
        target_ema: decay of the average that is the target without a teacher.
        derivative: how the derivative is taken.
    """

    def __init__(
        self,
        student: nn.Module,
        source: VelocitySource,
        law: TimeLaw,
        diagonal: float = 0.5,
        *,
        target_ema: float = 0.99,
        derivative: Mode = "auto",
    ) -> None:
        self.modules = {"student": student}
        self.source, self.law, self.diagonal = source, law, diagonal
        self.derivative = derivative
        self.target_average = TargetAverage(student, target_ema) if source.velocity is None else None
        self.state = {} if self.target_average is None else self.target_average.state

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        times = draw_times(self.law, self.diagonal, draws, batch.x1)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, times.t)
        with torch.autocast(x_t.device.type, enabled=False):
            end, speed = EndDerivative(nets["student"], self.derivative)(x_t, times, batch.cond)
        return {"loss": weighted_square(speed - self.target(batch, end.detach(), times))}

    def after_step(self, role: str) -> None:
        if self.target_average is not None:
            self.target_average.update()

    def target(self, batch: Pair, end: Tensor, times: Times) -> Tensor:
        """The velocity at the map's end, (B, ...), without a graph."""
        if self.target_average is None:
            return self.source.velocity_at(batch, end, times.r)
        own = self.target_average(end, times.r, r=times.r, **batch.cond)
        return where_rows(times.diagonal, self.source.velocity_at(batch, end, times.t), own)


def plan(options: LagrangianOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: as :func:`~fewstep.methods.families.velocity_source.velocity_source`; finite differences of a
            network with dropout.
    """
    source, student = velocity_source(options, stage), stage.build()

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        objective = Lagrangian(
            student.to(stage.world.device),
            source,
            make_time_law(options.time),
            options.diagonal,
            target_ema=options.target_ema,
            derivative=settle_derivative(stage, student, source, options.derivative, end_derivative),
        )
        return objective, source.batches()

    rule = SampleRule(kind="map", default_steps=1, sampler="chain")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, source.facts, path=source.path_name)


SPEC = Spec(
    options=LagrangianOptions,
    plan=plan,
    summary="any number of steps from one: the map's end follows the flow",
    learns_from="data; teacher optional",
    makes="map",
    cite=("boffi2025flow", "boffi2025build"),
    needs=map_needs,
    network=two_time_network,
)
