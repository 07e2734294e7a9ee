"""MeanFlow: the average velocity from its own derivative (Geng et al., arXiv:2505.13447), or by splitting.

    L(theta) = E w | u_theta(x_t, t, r) - sg[ v + (r - t) (∂_t u_theta + (∂_x u_theta) v) ] |^2,   t <= r,

with v the velocity of the data pair, ``x1 - x0``, or of a teacher, and ``w = (|.|^2 + c)^-p`` without gradient. (The
paper's time is 1 - t, hence its other sign.) A share ``diagonal`` of the rows has r = t and learns v itself. The
derivative's tangent is the same v as in front: the equation is linear in it, so pairs give its conditional mean.

``target: split`` needs no derivative (SplitMeanFlow, arXiv:2507.16884): for q uniform between t and r,

    sg[ a u(x_t, t, q) + (1 - a) u(x_t + (q - t) u(x_t, t, q), q, r) ],   a = (q - t) / (r - t).

The weight with p > 0 is a robust one: it draws u from the mean of the targets to their mode. With pairs in few
dimensions that is another map, so there it is refused; in many dimensions it trades recall for precision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, final

from pydantic import Field
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.flow.couplings import Pair
from fewstep.flow.derivatives import Derivative
from fewstep.flow.noise import Draws
from fewstep.flow.time_laws import TimeLaw, make_time_law
from fewstep.methods.base import Batches, Objective, Phase, Plan, SampleRule, Spec, Stage, Teacher
from fewstep.methods.flow_map import (
    Announcement,
    Lesson,
    PairOfTimesOptions,
    Times,
    Way,
    caller,
    composition_target,
    derivative_target,
    draw_times,
    lesson,
    off_diagonal,
    refuse_dropout,
    teacher_calls,
    two_time,
    weighted_square,
)

FEW_VALUES = 50  # below, a robust weight on noisy targets changes the solution


class MeanflowOptions(PairOfTimesOptions):
    """Options of ``method: meanflow``."""

    target: Literal["derivative", "split"] = Field("derivative", description="MeanFlow's target, or SplitMeanFlow's")
    p: float = Field(0.0, ge=0, le=1, description="power of the adaptive weight; 0: none, .5: as pseudo-Huber")
    c: float = Field(1e-3, gt=0, description="added to the squared error in the weight")


@final
class MeanFlow(Objective):
    """The loss above.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        taught: where the velocity comes from.
        law: the law of both times.
        diagonal: share of rows with r = t.
        split: take the split target.
        p, c: of the weight.
        way: how the derivative is taken.
        say: told once if that is not forward mode.
    """

    def __init__(
        self,
        student: nn.Module,
        taught: Lesson,
        law: TimeLaw,
        diagonal: float = 0.5,
        *,
        split: bool = False,
        p: float = 0.0,
        c: float = 1e-3,
        way: Way = "auto",
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.modules = {"student": student}
        self.taught, self.law, self.diagonal, self.split, self.p, self.c = taught, law, diagonal, split, p, c
        self.average = caller(self.modules)
        self.derivative = Derivative(self.average, way)
        self.announce = Announcement(say)

    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        times = draw_times(self.law, self.diagonal, draws, batch.x1)
        x_t = self.taught.path.interpolate(batch.x0, batch.x1, times.t)
        target = self.target(batch, x_t, times, draws)
        u = self.modules["student"](x_t, times.t, r=times.r, **batch.cond)
        return {"loss": weighted_square(u - target, self.p, self.c)}

    def target(self, batch: Pair, x_t: Tensor, times: Times, draws: Draws) -> Tensor:
        """What u is drawn to: v on the diagonal, the equation's right side elsewhere; without a graph."""
        v = self.taught.velocity_at(batch, x_t, times.t)
        share = draws.uniform().to(x_t) if self.split else None

        def make(rows: Tensor, x: Tensor, apart: Times, cond: Mapping[str, Any]) -> Tensor:
            if share is None:
                found = derivative_target(self.derivative, x, apart, v[rows], cond)
                self.announce(self.derivative.used)
                return found
            q = apart.t + share[rows] * (apart.r - apart.t)
            return composition_target(self.average, x, apart, q, cond)

        return off_diagonal(v, x_t, times, batch.cond, make)


def plan(options: MeanflowOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: as :func:`~fewstep.methods.flow_map.lesson`; finite differences of a network with dropout.
    """
    taught, student = lesson(options, stage), stage.build()
    refuse_dropout(stage, options.derivative)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        objective = MeanFlow(
            student,
            taught,
            make_time_law(options.time),
            options.diagonal,
            split=options.target == "split",
            p=options.p,
            c=options.c,
            way=options.derivative,
            say=stage.world.say,
        )
        return objective, taught.batches()

    rule = SampleRule(kind="map", default_steps=1, sampler="chain")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, taught.facts, path=taught.path_name)


def changes(options: MeanflowOptions, shape: tuple[int, ...]) -> dict[str, Any]:
    """A two-time network.

    Raises:
        UserError: a robust weight on the targets of pairs in few dimensions.
    """
    size = 1
    for side in shape:
        size *= side
    if options.p > 0 and options.teacher is None and size < FEW_VALUES:
        raise UserError(
            f"p: {options.p:g} weighs rows by their own error, and with data pairs in {size} dimension(s) that "
            "error is mostly noise: another map would be learned. Leave p out, or learn from a teacher."
        )
    return two_time(options, shape)


SPEC = Spec(
    options=MeanflowOptions,
    plan=plan,
    summary="any number of steps from one: the average velocity, by its derivative or by splitting",
    needs="data; teacher optional",
    makes="map",
    cite=("geng2025mean", "guo2025splitmeanflow"),
    changes=changes,
    online_calls=teacher_calls,
)
