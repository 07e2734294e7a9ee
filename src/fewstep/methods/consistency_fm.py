"""Consistency flow matching: one step per segment of time (Yang et al., arXiv:2407.02398, eq. 6 and sec. 3.3).

[0, 1] is cut into K equal segments; ``e(t)`` is the end of the one that t is in (of the later one, at a knot). With
``f(x, t) = x + (e - t) v(x, t)`` and a neighbour ``x_r`` of x_t on the same trajectory, ``r = min(t + gap, e)``,

    L(theta) = E | f_theta(x_t, t) - f_target(x_r, r) |^2 + alpha E[ | v_theta(x_t, t) - v_target(x_r, r) |^2 ; r < e ],

where the target's weights are an average of the student's, without gradient, and ``f(x, e) = x``. The neighbour comes
from the same data pair, or from a step of a teacher. With alpha = 0 the solution is the flow's average velocity to the
segment's end, ``v = u(x, t, e)``, so that K Euler steps are the exact flow map, and more are worse: v points to the end
of a trajectory and is constant along it only where that is straight, which the second term asks for. Its weight is
therefore small.

From data the stage begins, for a share ``regression`` of its samples, with ``r = e``: flow matching with the weight
(e - t)^2. A student of a teacher starts from the teacher's weights instead.
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

    segments: int = Field(2, gt=0, description="segments of time, K: one call each")
    gap: float = Field(0.05, gt=0, le=1, description="r - t")
    alpha: float = Field(1e-5, ge=0, description="weight of velocity consistency")
    target_ema: float = Field(0.9, ge=0, lt=1, description="decay of the target's weight average, per step; 0: none")
    teacher_step: TeacherStep = Field("heun", description="the teacher's step from t to r: heun (two calls) or euler")
    regression: float = Field(1 / 3, ge=0, lt=1, description="share of samples that begin, without a teacher")

    @model_validator(mode="after")
    def _gap_inside_a_segment(self) -> ConsistencyFMOptions:
        if self.gap * self.segments >= 1.0:
            raise ValueError(
                f"segments: {self.segments} are 1/{self.segments} long, and gap: {self.gap:g} reaches every segment's "
                "end: no row would ever be compared with another one, which is plain flow matching. Lower gap below "
                f"{1 / self.segments:g}, or take fewer segments"
            )
        return self


def segment_end(t: Tensor, segments: int) -> Tensor:
    """The first knot ``k / K`` after t, (B,): a knot belongs to the segment that starts there; 1 for t = 1."""
    return ((window_start(t, segments) * segments).round() + 1) / segments


@final
class ConsistencyFM(Objective):
    """The loss above.

    Args:
        student: ``v(x, t, **cond)``.
        source: where the steps come from.
        segments: K.
        gap: r - t, where it stays within the segment; 1 is regression of the segments' ends.
        alpha: weight of velocity consistency.
        target_ema: decay of the target's average.
        teacher_step: by which a teacher goes from t to r.
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
        v_r = w  # of no weight where every r is an end
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
    summary="K calls, one per segment of time: neighbours on a trajectory agree on its end",
    learns_from="data; teacher optional",
    makes="map",
    cite=("yang2024consistency",),
    needs=lambda options: Needs(guidance=options.guidance, teacher_calls=step_calls(options, options.teacher_step)),
)
