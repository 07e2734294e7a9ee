"""Piecewise rectified flow: straight within each of K windows of time (PeRFlow, Yan et al., arXiv:2405.07510).

The windows are ``[tau_k, tau_k+1)`` with ``tau_k = k / K``. The state at a window's start is a noised data row, so only
the window itself is solved, with the frozen teacher, for every batch of data:

    x_start = alpha(tau_k) x1 + sigma(tau_k) x0,     x_end = Phi_teacher(x_start; tau_k -> tau_k+1),
    L(theta) = E_{x0, x1, t} | v_theta(x_t, t) - u |^2,     u = K (x_end - x_start),     x_t = x_start + (t - tau_k) u,

with k the window that contains t. Alg. 1 of the paper draws t uniformly. But the velocity is discontinuous in t at the
knots, and a network that is smooth in t learns a mean of both sides there, which is where Euler steps call it. So t is
drawn from the times of the Euler steps, ``inner`` of them per window; ``inner: 0`` draws it uniformly.

Within a window the coupling is deterministic, so one Euler step leads from its start to its end, and a sample takes K
steps. With K = 1 it is one-step distillation (with ``inner: 0``: ReFlow) in which the teacher is solved for every
batch.

The loss is right only if the noised data have the law of the teacher's flow, so x0 must be independent of x1, on the
teacher's path. A teacher that was trained on dependent pairs (ReFlow, optimal transport) is refused. Windows after the
first are trained from noised data, but in sampling they start at the student's endpoints. The two laws are equal only
if the student is exact.
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
from fewstep.methods.training_pairs.batches import stage_batches
from fewstep.methods.training_pairs.generate import PILOT, relative_error
from fewstep.solvers.maps import SampleRule
from fewstep.solvers.solve import solve
from fewstep.solvers.tables import find_solver


class PiecewiseOptions(Options):
    """Options of ``method: piecewise``."""

    samples: int = Field(500_000, gt=0, description="samples seen in the stage, over all phases")
    segments: int = Field(4, gt=0, description="number of windows of time, K")
    solver: Literal["rk4", "heun", "euler"] = Field("rk4", description="solver of the teacher's flow within a window")
    inner: int = Field(1, ge=0, description="Euler steps per window that the student is trained for; 0: t is uniform")
    nfe: int = Field(8, gt=0, description="teacher's network calls per window, for every sample seen")
    tolerance: float = Field(0.02, gt=0, description="relative error of the windows' ends above which to warn")
    guidance: float = Field(1.0, ge=0, description="weight of the teacher's guidance, learned by the student; 1: none")

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
    """Solves a flow from the start of a window to its end.

    Args:
        velocity: ``v(x, t, **cond)``.
        segments: number of windows, K.
        solver: a Runge-Kutta solver's name.
        steps: solver steps per window.
    """

    def __init__(self, velocity: Velocity, segments: int, solver: str, steps: int) -> None:
        self.velocity, self.segments, self.solver, self.steps = velocity, segments, solver, steps

    def end(self, x: Tensor, start: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """``Phi(x; start -> start + 1/K)``: solves ``dx/ds = v(x, start + s/K) / K`` for s from 0 to 1, in every row.

        Args:
            x: states (B, ...) at the windows' starts.
            start: the starts, knots ``k / K``, (B,).
            cond: conditions of the rows.

        Returns:
            (B, ...), without a graph, in full precision also within autocast.
        """
        width = 1.0 / self.segments

        def within(x: Tensor, s: Tensor, **cond: Tensor) -> Tensor:
            return width * self.velocity(x, (start + width * s).clamp(max=1.0), **cond)

        with torch.autocast(x.device.type, enabled=False):
            return solve(within, x, solver=self.solver, steps=self.steps, cond=cond).x


@final
class PiecewiseRegression(Objective):
    """The loss of the module's docstring.

    Args:
        student: the network ``v(x, t, **cond)``.
        windows: solves the teacher's flow within a window.
        path: the teacher's affine path, which gives the states at the windows' starts.
        inner: Euler steps per window that t is drawn from; 0 for uniform t.
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
        UserError: the teacher was trained on dependent pairs, or guidance is asked of one that cannot be guided.
    """
    teacher = stage.teacher
    assert teacher is not None
    teacher.require_noised_data(options.method)
    student, path = stage.build(), make_path(teacher.path)
    windows = Windows(teacher.guided(options.guidance), options.segments, options.solver, options.steps)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        batches = stage_batches(stage, Independent(stage.source))
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
    """Solve 256 windows with the stage's and with twice the steps, and warn if the ends differ above ``tolerance``."""
    pair = batches.batch(0, PILOT, generator_for(stage.seed, stage.name, "windows")).to(stage.world.device)
    start = window_start(torch.linspace(0, 1, PILOT, device=stage.world.device), options.segments)
    x, cond = path.interpolate(pair.x0, pair.x1, start), pair.cond
    finer = Windows(windows.velocity, options.segments, options.solver, 2 * options.steps)
    error = relative_error(windows.end(x, start, cond), finer.end(x, start, cond))
    if not error <= options.tolerance:
        stage.world.say(
            f"warning: the windows' ends change by {error:.3g} of their spread with twice the steps (tolerance "
            f"{options.tolerance:g}): raise nfe (now {options.nfe} calls of {options.solver!r} per window)."
        )


def needs(options: PiecewiseOptions) -> Needs:
    """The needs of a stage: the teacher's calls of one window per sample seen."""
    return Needs(guidance=options.guidance, other_calls=options.nfe * calls_at(options.guidance))


SPEC = Spec(
    options=PiecewiseOptions,
    plan=plan,
    summary="straight within K windows of time, learned from the teacher window by window",
    learns_from="teacher, data",
    makes="map",
    cite=("yan2024perflow",),
    needs=needs,
)
