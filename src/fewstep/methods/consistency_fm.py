"""Consistency flow matching: one step per segment of time (Yang et al., arXiv:2407.02398, eq. 6 and sec. 3.3).

[0, 1] is divided into K equal segments; ``e(t)`` is the end of the segment of t (of the later one, at a knot). With
``f(x, t) = x + (e - t) v(x, t)`` and a neighbour ``x_r`` of x_t on the same trajectory, ``r = min(t + gap, e)``,

    L(theta) = E | f_theta(x_t, t) - f_target(x_r, r) |^2 + alpha E[ | v_theta(x_t, t) - v_target(x_r, r) |^2 ; r < e ],

where the target is computed with an average of the student's weights, without gradient, and ``f(x, e) = x``. The
neighbour lies on the line of the same data pair, or a step of a teacher leads to it. With alpha = 0 the solution is the
flow's average velocity to the segment's end, ``v = u(x, t, e)``. Then K Euler steps are the exact flow map. More steps
give worse samples, because v points to the end of a trajectory, and it is constant along the trajectory only if that is
straight. The second term makes v constant along trajectories. It therefore changes the solution of a curved flow, and
its weight is small.

Without a teacher the stage begins with ``r = e`` for a share ``regression`` of its samples; that is flow matching with
the weight (e - t)^2. With a teacher the student starts from the teacher's weights instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, final

from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws
from fewstep.flow.paths import expand_time
from fewstep.flow.precision import in_full
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.stage import Needs, Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.consistency_loss import (
    TeacherStep,
    consistent,
    neighbour,
    step_calls,
    step_velocity,
)
from fewstep.methods.families.target_average import TargetAverage
from fewstep.methods.families.time_windows import window_start
from fewstep.methods.families.velocity_source import MapOptions, VelocitySource, velocity_source
from fewstep.solvers.maps import SampleRule


class ConsistencyFMOptions(MapOptions):
    """Options of ``method: consistency_fm``."""

    old_names: ClassVar[Mapping[str, str]] = {"steps": "teacher_step"}

    segments: int = Field(2, gt=0, description="number of segments of time, K, with one call each")
    gap: float = Field(0.05, gt=0, le=1, description="r - t; less before a segment's end")
    alpha: float = Field(1e-5, ge=0, description="weight of the term that makes v constant along trajectories")
    target_ema: float = Field(
        0.9, ge=0, lt=1, description="decay, per step, of the target's weight average; 0: present weights"
    )
    teacher_step: TeacherStep = Field(
        "heun", description="the teacher's step from t to r: heun (two calls) or euler (one)"
    )
    regression: float = Field(
        1 / 3, ge=0, lt=1, description="without a teacher: share of the samples in a first phase of flow matching"
    )

    @model_validator(mode="after")
    def _gap_inside_a_segment(self) -> ConsistencyFMOptions:
        if self.gap * self.segments >= 1.0:
            raise ValueError(
                f"segments: {self.segments} makes segments of length 1/{self.segments}, and gap: {self.gap:g} reaches "
                "the end of every one: the target would be the pair's velocity everywhere, which is flow matching. "
                f"Lower gap below {1 / self.segments:g}, or use fewer segments"
            )
        return self


def segment_end(t: Tensor, segments: int) -> Tensor:
    """The end ``e(t)`` of the segment of t: the first knot ``k / K`` after t, and 1 for t = 1.

    Args:
        t: times (B,) in [0, 1].
        segments: K.

    Returns:
        (B,).

    >>> import torch
    >>> segment_end(torch.tensor([0.0, 0.3, 0.5, 1.0]), 2)
    tensor([0.5000, 0.5000, 1.0000, 1.0000])
    """
    return ((window_start(t, segments) * segments).round() + 1) / segments


@final
class ConsistencyFM(Objective):
    """The loss of the module's docstring.

    Args:
        student: ``v(x, t, **cond)``.
        source: the velocity of the step, a teacher's or the data pairs'.
        segments: K.
        gap: r - t, or less if the segment ends before; with 1/K or more, r = e in every row.
        alpha: weight of the second term.
        target_ema: decay, per step, of the weight average that computes the target.
        teacher_step: the solver step by which a teacher goes from t to r.
    """

    def __init__(
        self,
        student: nn.Module,
        source: VelocitySource,
        segments: int = 2,
        gap: float = 0.05,
        *,
        alpha: float = 1e-5,
        target_ema: float = 0.9,
        teacher_step: TeacherStep = "heun",
    ) -> None:
        self.modules = {"student": student}
        self.source, self.segments, self.gap, self.alpha = source, segments, gap, alpha
        self.teacher_step = teacher_step
        self.target_average = TargetAverage(student, target_ema)
        self.state = self.target_average.state

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        t = draws.uniform().to(batch.x1)
        end = segment_end(t, self.segments)
        r = (t + self.gap).minimum(end)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, t)
        w = step_velocity(self.source, batch, x_t, t, r, self.teacher_step)
        v_r = w  # has the weight 0 where r = e, so it is not computed if that holds in every row
        if self.gap < 1 / self.segments:
            v_r = self.target_average(neighbour(x_t, w, t, r), r, **batch.cond)
        v = in_full(nets["student"], x_t, t, **batch.cond)
        endpoint = (expand_time(end - t, v) * (v - consistent(w, v_r, t, r, end))).square().mean()
        velocity = (expand_time(r < end, v) * (v - v_r)).square().mean()
        return {"loss": endpoint + self.alpha * velocity, "endpoint": endpoint.detach(), "velocity": velocity.detach()}

    def after_step(self, role: str) -> None:
        self.target_average.update()


def plan(options: ConsistencyFMOptions, stage: Stage) -> Plan:
    """Regression of the segments' ends, then consistency; the second alone with a teacher.

    Raises:
        UserError: as :func:`~fewstep.methods.families.velocity_source.velocity_source`.
    """
    source, student = velocity_source(options, stage), stage.build()

    def preparer(gap: float) -> Callable[[Teacher | None], tuple[Objective, Batches]]:
        def prepare(previous: Teacher | None) -> tuple[Objective, Batches]:
            if previous is not None:
                student.load_state_dict(previous.state)  # its average, not its last weights
            objective = ConsistencyFM(
                student.to(stage.world.device),
                source,
                options.segments,
                gap,
                alpha=options.alpha,
                target_ema=options.target_ema,
                teacher_step=options.teacher_step,
            )
            return objective, source.batches()

        return prepare

    first = 0 if source.velocity is not None else round(options.regression * options.samples)
    phases = [Phase("regression", first, preparer(1.0))] if first else []
    phases.append(Phase("consistency", max(1, options.samples - first), preparer(options.gap)))
    rule = SampleRule(kind="map", steps=(options.segments,), default_steps=options.segments)
    return Plan(student, phases, rule, source.facts, path=source.path_name)


SPEC = Spec(
    options=ConsistencyFMOptions,
    plan=plan,
    summary="K calls, one per segment of time: neighbours on a trajectory predict the same end of the segment",
    learns_from="data; teacher optional",
    makes="map",
    cite=("yang2024consistency",),
    needs=lambda options: Needs(guidance=options.guidance, other_calls=step_calls(options, options.teacher_step)),
)
