"""Consistency models on the flow: ``f(x, t) = x + (1 - t) v(x, t)`` maps every point to the end of its trajectory.

**Discrete** (distillation: arXiv:2303.01469; tuning with a decreasing gap: arXiv:2406.14548). Let w be the mean
velocity of a step from x_t to x_r, a teacher's step (distillation) or one along the data pair of x_t (tuning), and sg:
without gradient. Then

    L(theta) = E a d( v_theta(x_t, t) / a,  sg[ a w + (1 - a) v(x_r, r) ] / a ),
    r = min(t + g, 1),   a = (r - t) / (1 - t),

which makes ``f(x_t, t) = f(x_r, r)``, divided by r - t. The gap g is 1 at first. Then the target is w: flow matching,
or with a teacher one solver step of it to t = 1. In the first half of the training g is halved ``halvings`` times. d is
the squared or the pseudo-Huber distance. In rows with r = 1 the target is w whatever the network predicts; they fix the
end of the map at the data. The target is computed with an average of the student's weights over the last few steps;
with the present weights, training on digits with small gaps diverged. (In arXiv:2406.14548 the gap is a share of the
noise level (1 - t)/t, and the target has the present weights.)

**Continuous** (arXiv:2410.11081; with the flow-matching term that keeps it stable: arXiv:2507.03738). The limit g -> 0:

    L(theta) = E d( u_theta(x_t, t, r),  sg[ w + rho (r - t) du/dt ] ),       du/dt = ∂_t u + (∂_x u) w,

with r = 1 and, for a share ``anchor`` of the rows, r = t, where u is the flow's velocity. The network has r as an
input, so that it can represent both. rho rises from 0 to 1 over the first half of the training. On digits, training
diverged when rho rose over the first tenth and a quarter of the rows had r = t.

A sample takes one call, or several with fresh noise between them (``restart``). Several Euler steps would give wrong
samples, because v points to the end of a trajectory and not along it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.data.dataset import DataSet
from fewstep.flow.couplings import Pair
from fewstep.flow.derivatives import Derivative, Mode, Way
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.flow.precision import full_precision, in_full
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.stage import Needs, Phase, Plan, Spec, Stage, velocity_network
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.consistency_loss import (
    Consistency,
    TeacherStep,
    step_calls,
)
from fewstep.methods.families.derivative_mode import settle_derivative
from fewstep.methods.families.distances import ROBUST, find_distance, require_many_values
from fewstep.methods.families.flow_map import Times, derivative_target
from fewstep.methods.families.velocity_source import (
    LawOfTime,
    MapOptions,
    VelocitySource,
    teacher_calls,
    two_time_network,
    velocity_source,
)
from fewstep.solvers.maps import SampleRule

RISE_SHARE = 0.5  # share of the training in which rho rises to 1; with a tenth of it training diverged on digits


class ConsistencyOptions(MapOptions):
    """Options of ``method: consistency``."""

    old_names: ClassVar[Mapping[str, str]] = {"stages": "halvings", "steps": "teacher_step"}

    target: Literal["discrete", "continuous"] = Field(
        "discrete", description="discrete: r - t is a finite gap; continuous: its limit 0, with a derivative"
    )
    halvings: int = Field(6, ge=0, le=12, description="discrete: the gap is halved this many times from 1")
    teacher_step: TeacherStep = Field(
        "heun", description="discrete: the teacher's step from t to r: heun (two calls) or euler (one)"
    )
    target_ema: float = Field(
        0.9, ge=0, lt=1, description="discrete: decay, per step, of the target's weight average; 0: present weights"
    )
    anchor: float = Field(0.5, ge=0, lt=1, description="continuous: share of rows with r = t, which learn the velocity")
    derivative: Way = Field(
        "auto", description="continuous: forward, finite_difference, or auto: forward where the network supports it"
    )
    time: LawOfTime = Field("uniform", description="law of t: uniform, logit_normal:m,s, …")
    loss: Literal["l2", "huber"] = Field("l2", description="distance of the prediction to its target")

    @model_validator(mode="before")
    @classmethod
    def _slower_without_steps(cls, fields: Any) -> Any:
        """The continuous target has half the usual lr: at the usual one, one digits run of three diverged."""
        continuous = isinstance(fields, Mapping) and fields.get("target") == "continuous"
        return {"lr": 1e-3, **fields} if continuous else fields

    @model_validator(mode="after")
    def _of_its_target(self) -> ConsistencyOptions:
        other = ("anchor", "derivative") if self.target == "discrete" else ("halvings", "teacher_step", "target_ema")
        for name in other:
            if name in self.model_fields_set:
                needed = "continuous" if self.target == "discrete" else "discrete"
                raise ValueError(f"{name} belongs to 'target: {needed}': set that, or leave {name} out")
        return self


@final
class ContinuousConsistency(Objective):
    """The continuous loss ``E d(u(x_t, t, r), sg[w + rho (r - t) du/dt])``, in float32 for every ``precision``.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        source: the velocity w, a teacher's or the data pairs'.
        law: the law of t.
        anchor: share of rows with r = t; the others have r = 1.
        distance: d, ``l2`` or ``huber``.
        derivative: how du/dt is computed.
    """

    def __init__(
        self,
        student: nn.Module,
        source: VelocitySource,
        law: TimeLaw,
        anchor: float = 0.5,
        *,
        distance: str = "l2",
        derivative: Mode = "auto",
    ) -> None:
        self.modules = {"student": student}
        self.source, self.law, self.anchor = source, law, anchor
        self.distance, self.derivative = find_distance(distance), derivative

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        rise = min(1.0, done / RISE_SHARE)
        t = self.law.sample(draws.uniform()).to(batch.x1)
        anchored = (draws.uniform() < self.anchor).to(t.device)
        times = Times(t, torch.where(anchored, t, 1.0), anchored)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, t)
        target = self.target(nets["student"], batch, x_t, times, rise)
        u = in_full(nets["student"], x_t, t, r=times.r, **batch.cond)
        return {"loss": self.distance(u, target)}

    def target(self, network: Velocity, batch: Pair, x_t: Tensor, times: Times, rise: float) -> Tensor:
        """``w + rho (r - t) du/dt``, (B, ...), without a graph.

        Args:
            network: ``u(x, t, r=r, **cond)``.
            batch: the pairs.
            x_t: (B, ...) at ``times.t``.
            times: t and r.
            rise: rho.
        """
        w = self.source.velocity_at(batch, x_t, times.t)
        with full_precision(x_t):
            full = derivative_target(Derivative(network, self.derivative), x_t, times, w, batch.cond)
        return w.lerp(full, rise)


def plan(options: ConsistencyOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: as :func:`~fewstep.methods.families.velocity_source.velocity_source`; finite differences of a
            network with dropout.
    """
    source, student = velocity_source(options, stage), stage.build()

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        return make_objective(options, stage, student, source), source.batches()

    rule = SampleRule(kind="map", default_steps=1, sampler="restart")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, source.facts, path=source.path_name)


def make_objective(options: ConsistencyOptions, stage: Stage, student: nn.Module, source: VelocitySource) -> Objective:
    """The loss of the options: :class:`ContinuousConsistency` or the discrete one.

    Raises:
        UserError: the derivative needs finite differences, and the network has dropout.
    """
    law = make_time_law(options.time)
    if options.target == "continuous":
        mode = settle_derivative(stage, student, source, options.derivative)
        return ContinuousConsistency(student, source, law, options.anchor, distance=options.loss, derivative=mode)
    return Consistency(
        student.to(stage.world.device),
        source,
        law,
        options.halvings,
        teacher_step=options.teacher_step,
        target_ema=options.target_ema,
        distance=options.loss,
    )


def network(options: ConsistencyOptions, data: DataSet, config: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """A velocity network, or for the continuous loss a two-time one.

    Raises:
        UserError: ``loss: huber`` without a teacher, on data with few values.
    """
    robust = options.loss in ROBUST and options.teacher is None
    require_many_values(f"loss: {options.loss}", robust, data.shape, "take 'l2', or learn from a teacher")
    resolved = two_time_network if options.target == "continuous" else velocity_network
    return resolved(options, data, config, classes)


def needs(options: ConsistencyOptions) -> Needs:
    """The needs of a stage: per sample seen, the calls of one teacher's step, or of one velocity if continuous."""
    calls = teacher_calls(options) if options.target == "continuous" else step_calls(options, options.teacher_step)
    return Needs(guidance=options.guidance, other_calls=calls)


SPEC = Spec(
    options=ConsistencyOptions,
    plan=plan,
    summary="one call, or a few with fresh noise between: from every point the network predicts its trajectory's end",
    learns_from="data; teacher optional",
    makes="map",
    cite=("song2023consistency", "geng2025consistency", "lu2025simplifying", "peng2025flow"),
    needs=needs,
    network=network,
)
