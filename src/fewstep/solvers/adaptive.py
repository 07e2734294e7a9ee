r"""Adaptive solvers, whose step size is controlled by an error estimate and a tolerance.

An embedded pair of Runge-Kutta methods shares its stages,

    k_i = v(x + h sum_j a_ij k_j, t + c_i h),    x' = x + h sum_i b_i k_i,    error = h sum_i (b_i - b^_i) k_i,

and a step is accepted if the error, divided by ``tolerance (1 + max(|x|, |x'|))`` per entry, has a root mean square
``e`` of at most 1. The next step is ``h min(10, max(1/5, 0.9 e^(-1/5)))``. (Hairer, Nørsett & Wanner, Solving Ordinary
Differential Equations I, section II.4, eqs. 4.10-4.13, rtol = atol = tolerance.)

``rk45`` is Dormand and Prince's 5(4) (table II.5.2), whose last stage is the first stage of the next step. Every sample
has its own time and step size, and leaves the batch when it reaches the end, so its result and its number of calls do
not depend on the other samples. States at given times come from the pair's continuous extension of order four (section
II.6), so the trajectory costs no further calls. ``dopri5`` is torchdiffeq's, with one step size and one error norm for
the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from fewstep.errors import UserError, require_extra, unknown
from fewstep.flow.field import Field
from fewstep.flow.grids import Grid, check_times
from fewstep.solvers.loop import _like

TOLERANCE = 1e-5
MAX_CALLS = 20_000  # evaluations per sample after which the solve is stopped with an error; chosen, not tuned
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0  # factors of the next step size: safety, smallest, largest (Hairer, eq. 4.13)

A: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
B = (*A[-1], 0.0)
B_HAT = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
C = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
ERROR = tuple(b - b_hat for b, b_hat in zip(B, B_HAT, strict=True))
# coefficients d_i of the continuous extension, of the term theta^2 (1 - theta)^2
DENSE = (
    -12715105075 / 11282082432,
    0.0,
    87487479700 / 32700410799,
    -10690763975 / 1880347072,
    701980252875 / 199316789632,
    -1453857185 / 822651844,
    69997945 / 29380423,
)

Run = Callable[["Problem"], tuple[Tensor, list[Tensor], Tensor]]


@final
@dataclass(frozen=True)
class Adaptive:
    """An adaptive solver.

    Attributes:
        order: of the solution that is carried on.
        per_sample: whether every sample has its own steps.
        extra: the optional dependency it needs, if any.
        run: solves a :class:`Problem`.
        formula, source: see :class:`~fewstep.solvers.tape.Solver`.
    """

    order: int
    per_sample: bool
    extra: str | None
    run: Run
    formula: str = (
        "x_b = x_a + h sum_i b_i k_i; k_i = v(x_a + h sum_j a_ij k_j, t_a + c_i h), i = 1, ..., 7; "
        "error = h sum_i (b_i - b^_i) k_i"
    )
    source: str = "Hairer et al., Solving ODEs I, table II.5.2"


@final
@dataclass(frozen=True)
class Problem:
    """The arguments of an adaptive solver; see :func:`solve_adaptive`."""

    name: str
    tolerance: float
    field: Field
    x0: Tensor
    times: Grid
    cond: Mapping[str, Any]
    trajectory: bool

    def not_finite(self, t: float) -> UserError:
        """The error for a velocity that is NaN or infinite."""
        return UserError(
            f"the network's velocity is NaN or infinite near t = {t:.6g}, and {self.name} cannot continue with "
            f"any tolerance (here {self.tolerance:g}). Check the network's weights, its conditions and the scale of "
            "the start."
        )

    def lost(self, why: str) -> UserError:
        """The error for a solve that cannot continue."""
        return UserError(
            f"{self.name} with tolerance {self.tolerance:g} {why}. Raise the tolerance, give x0 in float64, or use a "
            "fixed-step solver ('rk4')."
        )


def solve_adaptive(
    name: str,
    tolerance: float | None,
    field: Field,
    x0: Tensor,
    times: Grid,
    cond: Mapping[str, Any],
    *,
    trajectory: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Solve from ``times[0]`` to ``times[-1]``; the field is evaluated between these times only.

    Args:
        name: a name of :data:`ADAPTIVE`.
        tolerance: absolute and relative tolerance of one step's error, default 1e-5; at least the resolution of
            x0's dtype. Data of spread s, and errors in them, are stretched by 1/s on the way to the noise, so inversion
            needs a tolerance much smaller than s.
        field: the velocity field, whose calls are counted.
        x0: start, (B, ...), floating point; its dtype is kept.
        times: in either direction.
        cond: keyword arguments of the field; tensors whose first size is B have one row per sample and are indexed like
            the samples, others are handed on as they are.
        trajectory: also return the states at ``times``.

    Returns:
        The end point (B, ...), the states at ``times`` (an empty list if not asked for), and the network evaluations
        of every sample, rejected steps included, (B,) int64 on the CPU.

    Raises:
        UserError: unknown name, missing extra, a tolerance that is not positive or below the resolution of x0's
            dtype, a velocity that is NaN or infinite, a step below the resolution of t, more than 20000 evaluations.
    """
    if name not in ADAPTIVE:
        raise unknown("adaptive solver", name, ADAPTIVE)
    check_times(times)
    tolerance = _check_tolerance(name, TOLERANCE if tolerance is None else tolerance, x0.dtype)
    return ADAPTIVE[name].run(Problem(name, tolerance, field, x0, times, cond, trajectory))


def _check_tolerance(name: str, tolerance: float, dtype: torch.dtype) -> float:
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise UserError(f"tolerance must be a number such as 1e-5, got {tolerance!r}.")
    if not (math.isfinite(tolerance) and tolerance > 0.0):
        raise UserError(f"tolerance must be a positive number such as 1e-5, got {tolerance}.")
    if tolerance < torch.finfo(dtype).eps:
        raise UserError(
            f"{name} cannot reach tolerance {tolerance:g} in {dtype}, which resolves {torch.finfo(dtype).eps:.1e}: "
            "raise the tolerance, or give x0 in float32 or float64."
        )
    return float(tolerance)


@final
class _Samples:
    """The samples that have not reached the end: their rows in the batch, states, velocities, times and steps.

    Times and steps are float64 for every dtype of the states; ``h`` is positive in both directions.
    """

    def __init__(self, problem: Problem) -> None:
        x0 = problem.x0
        self.problem = problem
        self.batch = len(x0)
        self.last = problem.times[-1]
        self.length = abs(self.last - problem.times[0])
        self.sign = 1.0 if self.last > problem.times[0] else -1.0
        self.smallest = 4.0 * torch.finfo(x0.dtype).eps
        self.nfe = torch.zeros(self.batch, dtype=torch.int64)
        self.rows = torch.arange(self.batch, device=x0.device)
        self.cond = dict(problem.cond)
        self.own = {name: c for name, c in self.cond.items() if isinstance(c, Tensor) and c.shape[:1] == x0.shape[:1]}
        self.x = x0
        self.t = torch.full((self.batch,), problem.times[0], dtype=torch.float64, device=x0.device)
        self.v = self.evaluate(self.x, self.t)
        if not torch.isfinite(self.v).all():
            raise problem.not_finite(problem.times[0])
        self.h = self._first_step()
        self.after_rejection = torch.zeros_like(self.rows, dtype=torch.bool)

    def evaluate(self, x: Tensor, t: Tensor) -> Tensor:
        """The field at these samples; the calls are counted for each of them."""
        field = self.problem.field
        before = field.calls
        v = _like(field(x, t.to(x.dtype), **self.cond), x)
        self.nfe[self.rows.cpu()] += field.calls - before
        if self.nfe.max() > MAX_CALLS:
            raise self.problem.lost(f"has used more than {MAX_CALLS} network evaluations for a sample")
        return v

    @torch.no_grad()
    def _first_step(self) -> Tensor:
        """Hairer's starting step size (II.4), from the change of v over a small Euler step."""
        scale = self.problem.tolerance * (1.0 + self.x.abs())
        size, speed = _rms(self.x / scale), _rms(self.v / scale)
        # over a smaller trial step the change of v would be rounding error
        floor = math.sqrt(self.smallest)
        trial = (0.01 * size / speed).nan_to_num(0.0, posinf=1.0).clamp(floor, 1.0).clamp(max=self.length)
        ahead = self.evaluate(self.x + _wide(self.sign * trial, self.x) * self.v, self.t + self.sign * trial)
        change = _rms((ahead - self.v) / scale) / trial
        rate = torch.maximum(speed, change).nan_to_num(math.inf)
        step = torch.where(rate > 1e-15, (0.01 / rate) ** 0.2, 1.0)
        return torch.minimum(100.0 * trial, step).clamp(self.smallest, self.length)

    def attempt(self) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """One step of every sample: the new times, slopes and states, and the errors relative to the tolerance."""
        rest = (self.last - self.t).abs()
        arrives = self.h * 1.01 >= rest  # a remainder below 1 % is included in this step
        end = torch.where(arrives, self.last, self.t + self.sign * self.h)
        h = _wide(end - self.t, self.x)
        slopes, x = [self.v], self.x
        for row, c in zip(A[1:], C[1:], strict=True):
            x = self.x + h * _sum(row, slopes)
            slopes.append(self.evaluate(x, end if c == 1.0 else self.t + c * (end - self.t)))
        with torch.no_grad():
            scale = self.problem.tolerance * (1.0 + torch.maximum(self.x.abs(), x.abs()))
            error = _rms(h * _sum(ERROR, slopes) / scale)
        return end, slopes, x, error

    def advance(self, end: Tensor, slopes: list[Tensor], x: Tensor, error: Tensor) -> Tensor:
        """Take the accepted steps and choose the next step sizes; return which samples were accepted."""
        finite = torch.isfinite(error)
        accepted = error <= 1.0
        factor = torch.where(finite, SAFETY * error.clamp(min=1e-10) ** -0.2, SHRINK).clamp(SHRINK, GROW)
        factor = torch.where(accepted & ~self.after_rejection, factor, factor.clamp(max=1.0))
        self.h = (end - self.t).abs() * factor
        stuck = ~accepted & (self.h < self.smallest)
        if stuck.any():
            time = float(self.t[stuck][0])
            if not finite[stuck].all():
                raise self.problem.not_finite(time)
            raise self.problem.lost(f"needs steps below the resolution of t in {x.dtype} near t = {time:.6g}")
        self.h = self.h.clamp(min=self.smallest)
        wide = _wide(accepted, x)
        self.x, self.v = torch.where(wide, x, self.x), torch.where(wide, slopes[-1], self.v)
        self.t = torch.where(accepted, end, self.t)
        self.after_rejection = ~accepted
        return accepted

    def keep(self, under_way: Tensor) -> None:
        """Keep only the samples ``under_way``."""
        self.rows, self.x, self.v = self.rows[under_way], self.x[under_way], self.v[under_way]
        # indexed from the whole batch: a condition may have as many rows as there are samples left, by chance
        self.cond = {**self.problem.cond, **{name: value[self.rows] for name, value in self.own.items()}}
        self.t, self.h = self.t[under_way], self.h[under_way]
        self.after_rejection = self.after_rejection[under_way]


def _rk45(problem: Problem) -> tuple[Tensor, list[Tensor], Tensor]:
    """Dormand-Prince 5(4), every sample with its own steps."""
    samples = _Samples(problem)
    end = torch.empty_like(problem.x0)
    inner = problem.times[1:-1] if problem.trajectory else ()
    states = [torch.empty_like(problem.x0) for _ in inner]
    while len(samples.rows):
        rows, t, x = samples.rows, samples.t, samples.x
        step = samples.attempt()
        accepted = samples.advance(*step)
        for time, state in zip(inner, states, strict=True):
            crossed = accepted & ((time - t) * samples.sign > 0) & ((step[0] - time) * samples.sign >= 0)
            if crossed.any():
                theta = ((time - t) / (step[0] - t))[crossed]
                slopes = [slope[crossed] for slope in step[1]]
                state[rows[crossed]] = dense(theta, (step[0] - t)[crossed], x[crossed], slopes)
        arrived = samples.t == samples.last
        if arrived.any():
            end[rows[arrived]] = samples.x[arrived]
            samples.keep(~arrived)
    return end, [problem.x0, *states, end] if problem.trajectory else [], samples.nfe


def dense(theta: Tensor, h: Tensor, x: Tensor, slopes: list[Tensor]) -> Tensor:
    """The state at ``t + theta h`` within a step: order four, and smooth where steps meet.

    With ``m = sum_i b_i k_i``: ``x + h theta [m + (1 - theta) (k_1 - m + theta (2 m - k_1 - k_7 + (1 - theta)
    sum_i d_i k_i))]`` (Hairer, section II.6).
    """
    mean = _sum(B, slopes)
    s = _wide(theta, x)
    bend = slopes[0] - mean
    inner = mean - slopes[-1] - bend + (1 - s) * _sum(DENSE, slopes)
    return x + _wide(h, x) * s * (mean + (1 - s) * (bend + s * inner))


def _dopri5(problem: Problem) -> tuple[Tensor, list[Tensor], Tensor]:
    """torchdiffeq's Dormand-Prince, one error norm (the root mean square) over the batch."""
    torchdiffeq = require_extra("torchdiffeq", "adaptive")
    field, x0, times = problem.field, problem.x0, problem.times
    low, high = min(times[0], times[-1]), max(times[0], times[-1])
    before = field.calls

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        if field.calls - before > MAX_CALLS:
            raise problem.lost(f"has used more than {MAX_CALLS} network evaluations for a sample")
        v = _like(field(x, t.clamp(low, high).to(x.dtype).expand(len(x)).contiguous(), **problem.cond), x)
        if not torch.isfinite(v).all():
            raise problem.not_finite(float(t))
        return v

    asked = times if problem.trajectory else (times[0], times[-1])
    grid = torch.tensor(asked, dtype=torch.float64, device=x0.device)
    # step_t makes the last step end at the end rather than beyond it
    options = {"step_t": grid[-1:]}
    try:
        states = torchdiffeq.odeint(
            velocity, x0, grid, rtol=problem.tolerance, atol=problem.tolerance, method="dopri5", options=options
        )
    except AssertionError as error:
        raise problem.lost(f"needs steps below the resolution of t ({error})") from error
    nfe = torch.full((len(x0),), field.calls - before, dtype=torch.int64)
    return states[-1], list(states.unbind(0)) if problem.trajectory else [], nfe


def _sum(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    """``sum_i w_i k_i`` over the weights that are not zero."""
    terms = [slope * weight for weight, slope in zip(weights, slopes, strict=True) if weight]
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _rms(x: Tensor) -> Tensor:
    """Root mean square over a sample's own dimensions, (B,) float64."""
    return x.flatten(1).double().square().mean(1).sqrt()


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …), numbers in the dtype of ``like``."""
    values = values if values.dtype is torch.bool else values.to(like.dtype)
    return values.reshape(-1, *(1,) * (like.ndim - 1))


ADAPTIVE: dict[str, Adaptive] = {
    "rk45": Adaptive(order=5, per_sample=True, extra=None, run=_rk45),
    "dopri5": Adaptive(order=5, per_sample=False, extra="adaptive", run=_dopri5),
}
