"""MeanFlow: the average velocity from its own derivative (Geng et al., arXiv:2505.13447), and its relatives.

    L(theta) = E w | u_theta(x_t, t, r) - sg[ y ] |^2,   t <= r,      y = v + (r - t) (∂_t u_theta + (∂_x u_theta) v),

with v the velocity of the data pair, ``x1 - x0``, or of a teacher, and ``w = (|.|^2 + c)^-p`` without gradient. (The
paper's time is 1 - t, so its sign is the opposite.) A share ``diagonal`` of the rows has r = t; its target is v. The
tangent of the derivative is the same v as the first term: y is linear in v, so with pairs its mean given x_t is right.
Other targets y for r > t:

- ``improved`` (arXiv:2512.02012): the tangent is the network's ``u(x_t, t, t)``, which has less variance than a pair's
  velocity. With a teacher v has no such variance.
- ``alpha`` (arXiv:2510.20771), without a derivative: the first part of the step, a share a of it, is along v. With
  ``q = t + a (r - t)``,

      y = a v + (1 - a) u(x_t + (q - t) v, q, r),      weight 1 / a.

  In training a decreases from 1, where y = v, along a sigmoid. In the limit a = 0 the loss has the gradient of the
  target with the derivative.
- ``split`` (arXiv:2507.16884), without a derivative: the first part is the network's, and q is uniform between t and r,

      y = a u(x_t, t, q) + (1 - a) u(x_t + (q - t) u(x_t, t, q), q, r),   a = (q - t) / (r - t).

Without a teacher, ``guidance: s`` is learned during training (arXiv:2505.13447, sec. 4.2): v is replaced by

    s (1 - k) v + (1 - s) (1 - k) u(x_t, t, t | no label) + k u(x_t, t, t | label).

Its fixed point is the velocity with guidance weight s, for every share k of the network's own velocity. In rows whose
label was replaced by the null label the target is v.

With p > 0 rows of large error have less weight, which moves u from the mean of the targets towards their mode. With
pairs in few dimensions that is another map, so it is refused; in many dimensions precision rises and recall falls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.derivatives import Derivative, Mode
from fewstep.flow.field import Velocity, null_rows
from fewstep.flow.noise import Draws
from fewstep.flow.paths import expand_time
from fewstep.flow.precision import full_precision, in_full
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.options import baked_in
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.consistency_loss import consistent, neighbour
from fewstep.methods.families.derivative_mode import settle_derivative
from fewstep.methods.families.distances import FEW_VALUES
from fewstep.methods.families.flow_map import (
    Times,
    composition_target,
    derivative_target,
    draw_times,
    replace_off_diagonal,
    weighted_square,
    where_rows,
)
from fewstep.methods.families.straight_line import drop_conditions
from fewstep.methods.families.velocity_source import (
    PairOfTimesOptions,
    VelocitySource,
    map_needs,
    two_time_network,
    velocity_source,
)
from fewstep.solvers.maps import SampleRule

STEEPNESS = 25.0  # of the sigmoid along which a decreases; not tuned here
MIN_ALPHA = 5e-3  # least a; above 1 - MIN_ALPHA, a is set to 1; not tuned here
DERIVATIVE_TARGETS = ("derivative", "improved")

Target = Literal["derivative", "improved", "alpha", "split"]


class MeanflowOptions(PairOfTimesOptions):
    """Options of ``method: meanflow``."""

    guides_itself: ClassVar[bool] = True

    target: Target = Field("derivative", description="target for r > t: derivative, improved, alpha or split")
    p: float = Field(
        0.0, ge=0, le=1, description="power of the weight (|e|^2 + c)^-p of each row; 0: none; .5: as pseudo-Huber"
    )
    c: float = Field(1e-3, gt=0, description="added to the squared error in that weight")
    own: float = Field(0.5, ge=0, lt=1, description="guidance without a teacher: share k of the network's own velocity")
    label_dropout: float = Field(0.1, gt=0, lt=1, description="guidance without a teacher: share of null labels")

    @model_validator(mode="after")
    def _of_what_there_is(self) -> MeanflowOptions:
        if self.target == "improved" and self.teacher is not None:
            raise ValueError(
                "'target: improved' reduces the variance of the pairs' velocity, and a teacher's velocity has none: "
                "leave it out"
            )
        for name in ("own", "label_dropout"):
            if name in self.model_fields_set and (self.teacher is not None or self.guidance == 1.0):
                raise ValueError(f"{name} belongs to guidance without a teacher: leave it out, or set 'guidance'")
        return self


def alpha_at(done: float) -> float:
    """``a = 1 / (1 + exp(25 (done - 1/2)))`` after a share ``done`` of the training; 1 above .995, and at least .005.

    Source: the sigmoid schedule of arXiv:2510.20771.

    >>> alpha_at(0.0), alpha_at(0.5), alpha_at(1.0)
    (1.0, 0.5, 0.005)
    """
    alpha = 1 / (1 + math.exp(STEEPNESS * (done - 0.5)))
    return 1.0 if alpha > 1 - MIN_ALPHA else max(alpha, MIN_ALPHA)


@final
class SelfGuidance:
    """The velocity of data pairs with guidance, computed with the student's own velocities.

    Args:
        scale: the guidance weight s.
        own: the share k.
        nulls: what replaces a condition in a row without one, by name.
        dropout: probability with which the conditions of a row are replaced.

    Source: arXiv:2505.13447, sec. 4.2.
    """

    def __init__(self, scale: float, own: float, nulls: Mapping[str, Any], dropout: float) -> None:
        self.scale, self.own, self.nulls, self.dropout = scale, own, nulls, dropout

    def drop(self, batch: Pair, draws: Draws) -> Pair:
        """The batch with nulls in place of some rows' conditions; ``beside["dropped"]`` says in which, (B,)."""
        cond, dropped = drop_conditions(batch.cond, self.nulls, self.dropout, draws)
        assert dropped is not None, "guidance has conditions to leave out"
        return replace(batch, cond=cond, beside={**batch.beside, "dropped": dropped})

    def __call__(
        self, u: Velocity, v: Tensor, x: Tensor, t: Tensor, cond: Mapping[str, Any], dropped: Tensor
    ) -> Tensor:
        """``s (1 - k) v + (1 - s) (1 - k) u_null + k u_cond``, and v in rows without conditions; (B, ...).

        Args:
            u: the student, ``u(x, t, r=r, **cond)``.
            v: velocities without guidance, (B, ...).
            x, t: the points (B, ...) and times (B,) of v.
            cond: conditions of the rows.
            dropped: rows whose conditions are nulls, (B,).
        """
        with full_precision(x):
            u_null = u(x, t, r=t, **{**cond, **null_rows(self.nulls, cond)}).to(v)
            u_cond = u(x, t, r=t, **cond).to(v)
        guided = u_null.lerp(v, self.scale).lerp(u_cond, self.own)
        return where_rows(dropped, v, guided)


@final
class MeanFlow(Objective):
    """The loss of the module's docstring.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        source: the velocity v, a teacher's or the data pairs'.
        law: the law of t and r.
        diagonal: share of rows with r = t.
        target: the target for r > t.
        p, c: constants of the weight w.
        guide: guidance without a teacher; None for none.
        derivative: how du/dt is computed.
    """

    def __init__(
        self,
        student: nn.Module,
        source: VelocitySource,
        law: TimeLaw,
        diagonal: float = 0.5,
        *,
        target: Target = "derivative",
        p: float = 0.0,
        c: float = 1e-3,
        guide: SelfGuidance | None = None,
        derivative: Mode = "auto",
    ) -> None:
        self.modules = {"student": student}
        self.source, self.law, self.diagonal, self.kind, self.p, self.c = source, law, diagonal, target, p, c
        self.guide, self.derivative = guide, derivative

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        if self.guide is not None:
            batch = self.guide.drop(batch, draws)
        times = draw_times(self.law, self.diagonal, draws, batch.x1)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, times.t)
        student = nets["student"]
        if self.kind != "alpha":
            target = self.target(student, batch, x_t, times, draws)
            u = student(x_t, times.t, r=times.r, **batch.cond)
            return {"loss": weighted_square(u - target, self.p, self.c)}
        alpha = alpha_at(done)
        target = self.target(student, batch, x_t, times, draws, alpha)
        u = in_full(student, x_t, times.t, r=times.r, **batch.cond)
        scale = expand_time(torch.where(times.diagonal, 1.0, alpha**-0.5), u)
        return {"loss": weighted_square(scale * (u - target), self.p, self.c), "alpha": torch.tensor(alpha)}

    def target(self, u: Velocity, batch: Pair, x_t: Tensor, times: Times, draws: Draws, alpha: float = 1.0) -> Tensor:
        """The target of u, (B, ...), without a graph: v on the diagonal, y elsewhere.

        Args:
            u: the student.
            batch: the pairs.
            x_t: (B, ...) at ``times.t``.
            times: t and r.
            draws: random numbers of q.
            alpha: the share a of ``target: alpha``.
        """
        v = self.source.velocity_at(batch, x_t, times.t)
        if self.guide is not None:
            v = self.guide(u, v, x_t, times.t, batch.cond, batch.beside["dropped"])
        share = draws.uniform().to(x_t) if self.kind == "split" else None

        def make(rows: Tensor, x: Tensor, off: Times, cond: Mapping[str, Any]) -> Tensor:
            if share is not None:
                q = off.t + share[rows] * (off.r - off.t)
                return composition_target(u, x, off, q, cond)
            if self.kind == "alpha":
                q = off.t + alpha * (off.r - off.t)
                following = u(neighbour(x, v[rows], off.t, q), q, r=off.r, **cond).to(x)
                return consistent(v[rows], following, off.t, q, off.r)
            along = u(x, off.t, r=off.t, **cond).to(x) if self.kind == "improved" else None
            return derivative_target(Derivative(u, self.derivative), x, off, v[rows], cond, along)

        return replace_off_diagonal(v, x_t, times, batch.cond, make)


def plan(options: MeanflowOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: as :func:`~fewstep.methods.families.velocity_source.velocity_source`; finite differences of a
            network with dropout; guidance without labels.
    """
    source, student = velocity_source(options, stage), stage.build()
    alone = options.teacher is None and options.guidance != 1.0
    if alone and not stage.nulls:
        raise UserError(
            f"guidance {options.guidance:g} compares velocities with and without conditions, and none of this "
            "network's conditions can be left out: set 'conditional: true' for labels, or name a null, "
            "fs.adapt(…, null={…})."
        )
    facts = replace(source.facts, guidance=baked_in(options.guidance)) if alone else source.facts

    guide = SelfGuidance(options.guidance, options.own, stage.nulls, options.label_dropout) if alone else None
    if options.p > 0 and options.teacher is None:
        stage.world.say(f"note: p: {options.p:g} with data pairs lowers recall and raises precision; p: 0 is exact.")

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        needed = options.target in DERIVATIVE_TARGETS
        objective = MeanFlow(
            student,
            source,
            make_time_law(options.time),
            options.diagonal,
            target=options.target,
            p=options.p,
            c=options.c,
            guide=guide,
            derivative=settle_derivative(stage, student, source, options.derivative) if needed else "auto",
        )
        return objective, source.batches()

    rule = SampleRule(kind="map", default_steps=1, sampler="chain")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, facts, path=source.path_name)


def network(options: MeanflowOptions, data: DataSet, config: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """The resolved configuration of the two-time network.

    Raises:
        UserError: p > 0 without a teacher, for data with few values.
    """
    size = math.prod(data.shape)
    if options.p > 0 and options.teacher is None and size < FEW_VALUES:
        raise UserError(
            f"p: {options.p:g} weights rows by their own error, and with data pairs in {size} dimension(s) that "
            "error is mostly noise: another map would be learned. Leave p out, or learn from a teacher."
        )
    return two_time_network(options, data, config, classes)


SPEC = Spec(
    options=MeanflowOptions,
    plan=plan,
    summary="any number of steps from one: learns the average velocity, with a derivative of the network or without",
    learns_from="data; teacher optional",
    makes="map",
    cite=("geng2025mean", "guo2025splitmeanflow", "geng2025improved", "zhang2026alphaflow"),
    needs=map_needs,
    network=network,
)
