"""Piecewise rectified flow: straight within each of K windows of time (PeRFlow, Yan et al., arXiv:2405.07510).

The windows are ``[tau_k, tau_k+1)`` with ``tau_k = k / K``. A window's start comes from the forward process, so only
the window itself is solved, with the frozen teacher and anew for every batch of data:

    x_start = alpha(tau_k) x1 + sigma(tau_k) x0,     x_end = Phi_teacher(x_start; tau_k -> tau_k+1),
    L(theta) = E_{x0, x1, t} | v_theta(x_t, t) - u |^2,     u = K (x_end - x_start),     x_t = x_start + (t - tau_k) u,

with k the window that t falls into. Alg. 1 draws t uniformly. The field jumps at the knots, though, where one window
ends and another one starts, and a network that is smooth in t averages the two just where Euler steps call it. So t is
drawn from the times that samples are made at, ``inner`` to a window; ``inner: 0`` is uniform.

Within a window the coupling is deterministic, so one Euler step crosses it, and K of them make a sample. With K = 1 it
is one-step distillation (``inner: 0``: ReFlow), the teacher being solved for every batch.

The loss is right only where the forward process has the teacher's own marginals: x0 independent of x1, on the teacher's
path. A teacher that was itself trained on dependent pairs (ReFlow, optimal transport) is refused. Windows after the
first are trained on noised data and fed with the student's own endpoints: the two laws agree only as far as the student
is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.flow.couplings import Facts, Independent, Pair
from fewstep.flow.field import Velocity, calls_at
from fewstep.flow.noise import Draws, generator_for
from fewstep.flow.paths import AffinePath, expand_time, make_path
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.options import Options, baked_in, require_teacher, require_whole_steps
from fewstep.methods.contract.stage import Needs, Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.time_windows import window_start
from fewstep.methods.training_pairs.batches import DataBatches
from fewstep.methods.training_pairs.generate import PILOT, relative_error
from fewstep.solvers.maps import SampleRule
from fewstep.solvers.solve import solve
from fewstep.solvers.tables import find_solver


class PiecewiseOptions(Options):
    """Options of ``method: piecewise``."""

    samples: int = Field(500_000, gt=0, description="samples seen in the stage")
    segments: int = Field(4, gt=0, description="windows of time, K")
    solver: Literal["rk4", "heun", "euler"] = Field("rk4", description="carries the teacher through a window")
    inner: int = Field(1, ge=0, description="Euler steps per window to train for; 0: any number, t uniform")
    nfe: int = Field(8, gt=0, description="teacher's network calls per window, for every sample seen")
    tolerance: float = Field(0.02, gt=0, description="relative error of the windows' ends from which to warn")
    guidance: float = Field(1.0, ge=0, description="teacher's guidance, baked in")

    @model_validator(mode="after")
    def _needs_teacher(self) -> PiecewiseOptions:
        require_teacher(self)
        return self

    @model_validator(mode="after")
    def _whole_steps(self) -> PiecewiseOptions:
        require_whole_steps(self.solver, self.nfe)
        return self

    @property
    def steps(self) -> int:
        """Solver steps per window."""
        return self.nfe // find_solver(self.solver).calls


@final
class Windows:
    """Carries states to the ends of their windows along a velocity.

    Args:
        velocity: ``v(x, t, **cond)``.
        segments: number of windows, K.
        solver: a Runge-Kutta solver's name.
        steps: solver steps per window.
    """

    def __init__(self, velocity: Velocity, segments: int, solver: str, steps: int) -> None:
        self.velocity, self.segments, self.solver, self.steps = velocity, segments, solver, steps

    def end(self, x: Tensor, start: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """``Phi(x; start -> start + 1/K)``, a window of its own per row: ``dx/ds = v(x, start + s/K) / K``.

        Args:
            x: states (B, ...).
            start: their knots, (B,).
            cond: conditions of the rows.

        Returns:
            (B, ...), without a graph, in full precision whatever is around it.
        """
        width = 1.0 / self.segments

        def within(x: Tensor, s: Tensor, **cond: Tensor) -> Tensor:
            return width * self.velocity(x, (start + width * s).clamp(max=1.0), **cond)

        with torch.autocast(x.device.type, enabled=False):
            return solve(within, x, solver=self.solver, steps=self.steps, cond=cond).x


@final
class PiecewiseRegression(Objective):
    """The loss above.

    Args:
        student: the network that learns.
        windows: the teacher's windows.
        path: the forward process, that of the teacher.
        inner: Euler steps per window; 0 for any number.
    """

    def __init__(self, student: nn.Module, windows: Windows, path: AffinePath, inner: int = 0) -> None:
        self.modules = {"student": student}
        self.windows, self.path, self.inner = windows, path, inner

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        t = draws.uniform().to(batch.x1)
        if self.inner:
            t = window_start(t, self.windows.segments * self.inner)
        start = window_start(t, self.windows.segments)
        x_start = self.path.interpolate(batch.x0, batch.x1, start)
        target = self.windows.segments * (self.windows.end(x_start, start, batch.cond) - x_start)
        x_t = x_start + expand_time(t - start, x_start) * target
        v = nets["student"](x_t, t, **batch.cond)
        return {"loss": (v - target).square().mean()}


def plan(options: PiecewiseOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: a teacher whose marginals are not those of its path with independent noise; guidance it cannot take.
    """
    teacher = stage.teacher
    assert teacher is not None
    teacher.require_noised_data(options.method)
    student, path = stage.build(), make_path(teacher.path)
    windows = Windows(teacher.guided(options.guidance), options.segments, options.solver, options.steps)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        key = (stage.seed, stage.name)
        batches = DataBatches(stage.data, Independent(stage.source), stage.conditional, stage.dequantise, key)
        check_windows(options, stage, windows, path, batches)
        return PiecewiseRegression(student, windows, path, options.inner), batches

    facts = Facts(
        independent=False,
        deterministic=True,
        teacher=teacher.digest,
        guidance=baked_in(options.guidance),
        gaussian=stage.source.gaussian,
    )
    each = [d for d in range(1, options.inner + 1) if options.inner % d == 0] or [1]
    steps = tuple(options.segments * d for d in each)
    rule = SampleRule(kind="map", steps=steps, default_steps=steps[0], multiple=options.inner == 0)
    return Plan(student, [Phase("train", options.samples, prepare)], rule, facts)


def check_windows(
    options: PiecewiseOptions, stage: Stage, windows: Windows, path: AffinePath, batches: Batches
) -> None:
    """Solve some windows with twice the steps too, and warn when the ends differ by more than ``tolerance``."""
    pair = batches.batch(0, PILOT, generator_for(stage.seed, stage.name, "windows")).to(stage.world.device)
    start = window_start(torch.linspace(0, 1, PILOT, device=stage.world.device), options.segments)
    x, cond = path.interpolate(pair.x0, pair.x1, start), pair.cond
    finer = Windows(windows.velocity, options.segments, options.solver, 2 * options.steps)
    error = relative_error(windows.end(x, start, cond), finer.end(x, start, cond))
    if not error <= options.tolerance:
        stage.world.say(
            f"warning: the ends of windows are off by {error:.3g} of their spread when solved with twice the steps "
            f"(tolerance {options.tolerance:g}): raise nfe (now {options.nfe} calls of {options.solver!r} per window)."
        )


def needs(options: PiecewiseOptions) -> Needs:
    """The calls of one window per sample seen."""
    return Needs(guidance=options.guidance, teacher_calls=options.nfe * calls_at(options.guidance))


SPEC = Spec(
    options=PiecewiseOptions,
    plan=plan,
    summary="straight within K windows of time, learned from the teacher window by window",
    learns_from="teacher, data",
    makes="map",
    cite=("yan2024perflow",),
    needs=needs,
)
