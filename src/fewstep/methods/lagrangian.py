"""Lagrangian flow maps: the map's end point moves with the flow's velocity (arXiv:2406.07507; from data alone:
arXiv:2505.18825).

    X(x, t, r) = x + (r - t) u_theta(x, t, r),
    L(theta) = E | ∂_r X(x_t, t, r) - sg[ v(X(x_t, t, r), r) ] |^2,      ∂_r X = u + (r - t) ∂_r u,   t <= r.

The derivative is in r alone; no derivative in x is needed. The gradient passes through it. With a teacher, v is the
teacher's velocity. Without one, v is ``u(., r, r)``, computed with an average of the student's weights; with the
present weights, training on digits diverged. A share ``diagonal`` of the rows has r = t. There
``∂_r X = u(x_t, t, t)``, and without a teacher the target is the velocity of the data pair, ``d/dt x_t``: so
``u(., r, r)`` is learned from the data. With a teacher these rows regress ``v(x_t, t)``, because X = x_t there.
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

    target_ema: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="without a teacher: decay, per step, of the target's weight average; 0: present weights",
    )

    @model_validator(mode="after")
    def _its_own_target(self) -> LagrangianOptions:
        if self.teacher is not None and "target_ema" in self.model_fields_set:
            raise ValueError("target_ema is of the target without a teacher, and there is a teacher: leave it out")
        return self


@final
class Lagrangian(Objective):
    """The loss of the module's docstring, in float32 for every ``precision``, because of the derivative.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        source: the velocity v, a teacher's or on the diagonal the data pairs'.
        law: the law of t and r.
        diagonal: share of rows with r = t.
        target_ema: decay, per step, of the weight average that computes the target without a teacher.
        derivative: how ``∂_r X`` is computed.
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
            end, derivative = EndDerivative(nets["student"], self.derivative)(x_t, times, batch.cond)
        return {"loss": weighted_square(derivative - self.target(batch, end.detach(), times))}

    def after_step(self, role: str) -> None:
        if self.target_average is not None:
            self.target_average.update()

    def target(self, batch: Pair, end: Tensor, times: Times) -> Tensor:
        """The velocity at the map's end point, (B, ...), without a graph.

        Args:
            batch: the pairs.
            end: ``X(x_t, t, r)``, (B, ...).
            times: t and r.
        """
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
    summary="any number of steps from one: the derivative of the map in its end time is the velocity there",
    learns_from="data; teacher optional",
    makes="map",
    cite=("boffi2025flow", "boffi2025build"),
    needs=map_needs,
    network=two_time_network,
)
