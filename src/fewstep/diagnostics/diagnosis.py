"""The result of a diagnosis: its measures, the grids computed from them, and the error they predict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from fewstep.diagnostics.sensitivity import JUMP_SAMPLES, interpolated, with_jumps
from fewstep.errors import UserError
from fewstep.flow.grids import Grid, check_steps, check_times

FLOOR = 0.02  # local errors below this share of the largest count as this share; chosen, not tuned
WEIGHTED_FLOOR = 1e-4  # the same for the weighted error, whose range is wider: 1 to s^4 for a Gaussian of width s
STANDARD_ERRORS = (
    "straightness_error",
    "deviation_error",
    "curvature_error",
    "normal_curvature_error",
    "stiffness_error",
)
AT_STEPS = ("euler_error", "euler_error_trimmed", "euler_jumps")  # arrays over ``euler_steps``
AT_STIFFNESS_TIMES = ("stiffness", "stiffness_error", "contraction", "expansion")


@final
@dataclass(frozen=True)
class Diagnosis:
    """What :func:`~fewstep.diagnostics.diagnose.diagnose` measures; arrays run over ``times`` unless said.

    Sums run over dimensions: divide an RMS by ``sqrt(dimensions)`` for its value per dimension. What was not measured
    is None.

    Attributes:
        straightness: S, summed over dimensions.
        straightness_error: its standard error.
        relative_straightness: ``S / E|Z_1 - Z_0|^2``.
        displacement: ``E|Z_1 - Z_0|^2``.
        one_step_gap: RMS over samples of ``|Z_0 + v(Z_0, 0) - Z_1|``.
        relative_gap: the gap over the root of the displacement.
        path_length_ratio: mean length of the trajectory over that of its chord (1: geometrically straight).
        times: nodes of the measurement, (N + 1,): ends and middles of panels, denser where the velocity changes fast.
        deviation: ``E|(Z_1 - Z_0) - v|^2`` at every node; its integral is S.
        deviation_error: its standard error.
        curvature: RMS of ``|Z''|`` at every node.
        curvature_error: its standard error.
        normal_curvature: RMS of the normal part of ``Z''``.
        normal_curvature_error: its standard error.
        local_error: RMS error of an Euler step per ``h^2``: ``|Z''| / 2``.
        doubling_error: the same without derivatives: ``2 |two half steps - one step| / h^2``, h to the next node.
        weighted_error: the effect of the local error at t = 1: RMS of ``|Φ(1, t) Z''| / 2``.
        unit_error: RMS of ``|e(1)|``: Euler's endpoint error with N steps tends to ``unit_error / N``.
        unit_error_trimmed: the same without the 5 % largest samples.
        euler_steps: numbers of steps with which Euler's method was run.
        euler_error: RMS of ``|error|`` at t = 1, for every one of them.
        euler_error_trimmed: the same without the 5 % largest samples.
        euler_jumps: the part of ``euler_error^2`` made by samples that jump: whose error is more than 3 times first
            order's, because Euler's method carries them to another mode.
        stiffness_times: where eigenvalues λ of ``∂v/∂x`` were taken.
        stiffness: mean over samples of the largest ``|λ|`` at ``stiffness_times``.
        stiffness_error: its standard error.
        contraction: mean over samples of the smallest real part (negative: trajectories come together).
        expansion: mean over samples of the largest real part (positive: they go apart).
        derivatives: how derivatives were taken (``forward``, ``double_vjp``, ``finite_difference``).
        samples: noises measured.
        derivative_samples: those of them that derivatives were taken for.
        stiffness_samples: those of them that eigenvalues were taken for.
        dimensions: of one sample.
        nfe: network evaluations per sample spent, a derivative counted as the calls it makes.
        solver: how the trajectories were solved.
        notes: what was reduced to stay within the network rows that were allowed.

    >>> import torch
    >>> from fewstep.diagnostics.diagnose import diagnose
    >>> diagnose(lambda x, t: 0 * x + 2, torch.zeros(4, 1), nodes=8).grid(steps=2)
    (0.0, 0.5, 1.0)
    """

    straightness: float
    straightness_error: float
    relative_straightness: float
    displacement: float
    one_step_gap: float
    relative_gap: float
    path_length_ratio: float
    times: np.ndarray
    deviation: np.ndarray
    deviation_error: np.ndarray
    curvature: np.ndarray
    curvature_error: np.ndarray
    normal_curvature: np.ndarray
    normal_curvature_error: np.ndarray
    local_error: np.ndarray
    doubling_error: np.ndarray
    weighted_error: np.ndarray | None
    unit_error: float | None
    unit_error_trimmed: float | None
    euler_steps: np.ndarray | None
    euler_error: np.ndarray | None
    euler_error_trimmed: np.ndarray | None
    euler_jumps: np.ndarray | None
    stiffness_times: np.ndarray | None
    stiffness: np.ndarray | None
    stiffness_error: np.ndarray | None
    contraction: np.ndarray | None
    expansion: np.ndarray | None
    derivatives: str
    samples: int
    derivative_samples: int
    stiffness_samples: int
    dimensions: int
    nfe: int
    solver: str
    notes: tuple[str, ...] = ()

    def grid(self, steps: int, weighted: bool = False) -> Grid:
        """Times that give every Euler step the same local error.

        The step density is proportional to ``local_error^(1/2)`` (floored at 2 % of its largest value), which
        minimises the sum of the local errors for a given number of steps. Weighted, it is ``weighted_error^(1/2)``
        (floored at .01 % of its largest value), and the sum of the errors at t = 1 is least.

        Args:
            steps: number of steps.
            weighted: weigh every local error by its effect at t = 1.

        Returns:
            ``steps + 1`` increasing times from 0 to 1.

        Raises:
            UserError: steps below 1; weighted, where no sensitivity was measured.
        """
        steps = check_steps(steps)
        error, floor = self.local_error, FLOOR
        if weighted:
            if self.weighted_error is None:
                raise UserError(
                    "this diagnosis has no weighted error: it was made with sensitivity=False, or the network lets no "
                    "gradient through to its input. Leave weighted out, or diagnose again."
                )
            error, floor = self.weighted_error, WEIGHTED_FLOOR
        density = np.sqrt(np.maximum(error, floor * max(error.max(), 1e-12)))
        mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(self.times))])
        inner = np.interp(np.arange(1, steps) / steps * mass[-1], mass, self.times)
        times = (0.0, *(float(t) for t in inner), 1.0)
        check_times(times)
        return times

    def predicted_error(self, steps: int, trimmed: bool = True) -> float:
        """Endpoint error of Euler's method on ``steps`` equal steps: RMS over samples of ``|error|``.

        ``N error`` is interpolated in 1/N between the runs at ``euler_steps`` and their limit ``unit_error``. The limit
        alone is first order in 1/N, which is not enough where the velocity changes within one step.

        Without trimming, samples that Euler's method carries to another mode dominate: their mean square falls as 1/N,
        and it is added by that law. The prediction is then as uncertain as the number of such samples in the runs, a
        handful. On ten mixtures (2 modes of width .01 to .3 on the line, 8 modes of width .02 to .1 and of equal or
        unequal weight in the plane), over 200 draws of 500 noises, 90 % of the predictions were between .48 and 1.95
        times the true error for N = 16 to 64 (.44 for N = 8), and up to 3.3 times it at N = 256 where all weights are
        equal. The trimmed prediction from 300 noises is within 15 % from N = 8 on.

        Args:
            steps: N.
            trimmed: without the 5 % largest samples.

        Raises:
            UserError: steps below 1; no sensitivity was measured; untrimmed, with derivatives of fewer than 500
                samples.
        """
        steps = check_steps(steps)
        unit = self.unit_error_trimmed if trimmed else self.unit_error
        known = self.euler_error_trimmed if trimmed else self.euler_error
        if unit is None or known is None or self.euler_steps is None or self.euler_jumps is None:
            raise UserError("this diagnosis predicts no error: it was made with sensitivity=False.")
        if trimmed:
            return interpolated(steps, unit, self.euler_steps, known)
        if self.derivative_samples < JUMP_SAMPLES:
            raise UserError(
                f"the error over all samples depends on the few that Euler's method carries to another mode, and "
                f"derivatives of {self.derivative_samples} samples are too few to count them (at least {JUMP_SAMPLES} "
                "are needed; there are as many as make 32768 numbers). Take trimmed=True, diagnose more noises, or "
                f"measure the error itself with fewstep.solve(v, x0, steps={steps})."
            )
        return with_jumps(steps, unit, self.euler_steps, known, self.euler_jumps)

    def as_dict(self) -> dict[str, Any]:
        """The measures by name, as values that JSON can hold."""
        plain = vars(self) | {"notes": list(self.notes)}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in plain.items()}


def require_finite(d: Diagnosis) -> None:
    """Refuse a diagnosis with a measure that is NaN or infinite.

    The standard errors of a single sample are NaN and allowed.

    Raises:
        UserError: it names the measure and the times, or the numbers of Euler steps, at which it is not finite.
    """
    for name, value in vars(d).items():
        if value is None or isinstance(value, (str, tuple)) or (name in STANDARD_ERRORS and d.samples == 1):
            continue
        bad = ~np.isfinite(np.asarray(value, dtype=float))
        if bad.any():
            raise UserError(f"the diagnosis has no finite {name}{_where(d, name, bad)}: {_cause(name)}")


def _where(d: Diagnosis, name: str, bad: np.ndarray) -> str:
    if name in AT_STEPS and d.euler_steps is not None:
        return f" with {', '.join(map(str, d.euler_steps[bad]))} Euler steps"
    times = d.stiffness_times if name in AT_STIFFNESS_TIMES else d.times
    if bad.ndim == 0 or times is None:
        return ""
    found = times[bad]
    return f" at t = {found[0]:.4g}" if len(found) == 1 else f" at {len(found)} times from t = {found[0]:.4g}"


def _cause(name: str) -> str:
    if name in AT_STEPS or name.startswith(("unit_error", "weighted_error")):
        return (
            "steps that long leave the region where the velocity is defined, or errors grow beyond the range of "
            "the dtype. Pass sensitivity=False to measure the rest, or noises in float64."
        )
    return (
        "values grow beyond the range of the dtype, or the network gives NaN next to its trajectories. Check its "
        "weights and the scale of the start, or pass noises in float64."
    )
