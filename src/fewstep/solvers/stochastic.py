r"""Stochastic solvers: every step replaces a part of its noise by fresh noise.

On an affine path ``x_t = alpha x1 + sigma x0`` with the predictions ``m = E[x1 | x_t]`` and ``e = E[x0 | x_t]``, a step
from ``t_a`` to ``t_b`` with ``rho = sigma / alpha`` and ``z ~ N(0, I)`` is one of

    ancestral   x_b = alpha_b m + sqrt(sigma_b^2 - s^2) e + s z,     s = eta sigma_b sqrt(1 - (rho_b / rho_a)^2)
    SDE         dx = (v + (g^2 / 2) score) dt + g dW,                g^2 = 2 c sigma,     score = -e / sigma.

Divided by ``alpha``, the path is ``x1 + rho x0``. There the posterior of the state at ``rho_b``, given the state at
``rho_a`` and ``x1``, has variance ``rho_b^2 (1 - (rho_b / rho_a)^2)``. This is ``(s / alpha_b)^2`` for ``eta = 1``, on
every affine path (DDIM, arXiv:2010.02502, eq. 16, where ``alpha^2 + sigma^2 = 1``). For every ``g`` the SDE has the
same marginal distributions as the flow (arXiv:2011.13456, app. D.1; arXiv:2303.08797, sec. 2.4). With ``g^2 = 2 c
sigma`` its drift is ``v - c e``, which is linear in ``(x, v)`` and regular. No coefficient is infinite at an end: at
alpha = 0 the ratio ``rho_b / rho_a`` is 0, and at sigma = 0 no noise is added.

SDE-DPM-Solver++ is the ancestral step with a data prediction extrapolated in ``lambda = -log rho``.

All of this uses ``score = -e / sigma``, which holds only for a Gaussian base that is independent of the data. For a
flow trained on other pairs (optimal transport, ReFlow) the samples have a wrong distribution, without any error
message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import final

from fewstep.errors import UserError
from fewstep.flow.grids import Grid
from fewstep.flow.paths import AffinePath
from fewstep.solvers.forms import DataInLambda, Schedule
from fewstep.solvers.multistep import MIN_NODE_DISTANCE
from fewstep.solvers.tape import Combination, Solver, Tape


@final
@dataclass(frozen=True)
class Ancestral(Solver):
    """``ddim:eta``: DDIM with a share of the posterior's noise (arXiv:2010.02502, eq. 12 and 16).

    ``eta = 0`` is DDIM; ``eta = 1`` is the ancestral sampler, which is also the first-order SDE-DPM-Solver++.

    Attributes:
        eta: from 0 to 1.
        order: order in which the distributions converge.
    """

    eta: float
    order: int = field(default=1, init=False)
    b: tuple[float, ...] = field(default=(1.0,), init=False)
    formula: str = field(
        default="x_b = alpha_b m_a + sqrt(sigma_b^2 - s^2) e_a + s z; "
        "s = eta sigma_b sqrt(1 - (sigma_b alpha_a / (alpha_b sigma_a))^2)",
        init=False,
    )
    source: str = field(default="arXiv:2010.02502, eq. 12 and 16", init=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise UserError(
                f"ddim:{self.eta:g}: eta is the share of the posterior's noise, from 0 (none: DDIM) to 1 (ancestral "
                "sampling). Write for example 'ddim:0.5'."
            )

    @property
    def stochastic(self) -> bool:
        return self.eta > 0.0

    def nodes(self, tape: Tape, x: Combination, grid: Grid, path: AffinePath) -> list[Combination]:
        """The states at every grid time after the first."""
        if self.stochastic:
            _check_forward(grid)
        schedule, nodes = Schedule(path, grid), []
        for i in range(len(grid) - 1):
            state, v = tape.evaluate(x, grid[i])
            fresh = self.eta * _fresh(schedule, i) if self.stochastic else 0.0
            x = schedule.ddim(state, v, i, math.sqrt(1.0 - fresh**2))
            x = _with_noise(x, fresh * schedule.sigma[i + 1], tape)
            nodes.append(x)
        return nodes


@final
@dataclass(frozen=True)
class StochasticMultistep(Solver):
    """``dpm++sde``: SDE-DPM-Solver++(2M) (arXiv:2211.01095, app. B), from ``lambda = log(alpha / sigma)``.

    With ``h = lambda_b - lambda_a``, ``h'`` the step before and ``m_1`` its data prediction,

        x_b = (sigma_b / sigma_a) e^-h x_a + alpha_b (1 - e^-2h) (m_a + (h / 2h') (m_a - m_1))
              + sigma_b sqrt(1 - e^-2h) z.

    At alpha = 0 it is re-noising, ``alpha_b m_a + sigma_b z``; the last step to sigma = 0 is ``m_a``.

    Attributes:
        order: order in which the distributions converge, on Gaussian data and away from the ends.
    """

    order: int = field(default=2, init=False)
    b: tuple[float, ...] = field(default=(1.0,), init=False)
    formula: str = field(
        default="x_b = (sigma_b / sigma_a) exp(-H) x_a + alpha_b s^2 D + sigma_b s z; "
        "s = sqrt(1 - exp(-2 H)); D = m_a + (H / (2 H_1)) (m_a - m_1)",
        init=False,
    )
    source: str = field(default="arXiv:2211.01095, app. B", init=False)

    @property
    def stochastic(self) -> bool:
        return True

    def nodes(self, tape: Tape, x: Combination, grid: Grid, path: AffinePath) -> list[Combination]:
        """The states at every grid time after the first."""
        _check_forward(grid)
        schedule, nodes = Schedule(path, grid), []
        form = DataInLambda(schedule)
        past: tuple[float, Combination] | None = None  # lambda and m of the step before
        for i in range(len(grid) - 1):
            state, v = tape.evaluate(x, grid[i])
            m, here, ahead = schedule.predict_data(state, v, i), form.position(i), form.position(i + 1)
            fresh = _fresh(schedule, i)
            x = schedule.ddim(state, v, i, math.sqrt(1.0 - fresh**2))
            if (
                past is not None
                and here is not None
                and ahead is not None
                and here - past[0] > MIN_NODE_DISTANCE * (ahead - here)
            ):
                ratio = (ahead - here) / (2.0 * (here - past[0]))
                x = x + (schedule.alpha[i + 1] * fresh**2 * ratio) * (m - past[1])
            x = _with_noise(x, fresh * schedule.sigma[i + 1], tape)
            nodes.append(x)
            past = None if here is None else (here, m)
        return nodes


@final
@dataclass(frozen=True)
class EulerMaruyama(Solver):
    """``sde:c``: Euler-Maruyama for ``dx = (v - c e) dt + sqrt(2 c sigma) dW``; the step to sigma = 0 is Euler's.

    Attributes:
        c: the amount of noise, 0 or more; 0 is Euler. A step multiplies an error of ``e`` by about ``1 - c h / sigma``,
            so the last steps of a uniform grid are stable for c below 2.
        order: order in which the distributions converge.
    """

    c: float
    order: int = field(default=1, init=False)
    b: tuple[float, ...] = field(default=(1.0,), init=False)
    formula: str = field(default="x_b = x_a + h (v_a - c e_a) + sqrt(2 c sigma_a h) z", init=False)
    source: str = field(default="arXiv:2303.08797, sec. 2.4", init=False)

    def __post_init__(self) -> None:
        if not 0.0 <= self.c < math.inf:
            raise UserError(
                f"sde:{self.c:g}: the amount of noise must be a number from 0 up. Write for example 'sde:1'."
            )

    @property
    def stochastic(self) -> bool:
        return self.c > 0.0

    def nodes(self, tape: Tape, x: Combination, grid: Grid, path: AffinePath) -> list[Combination]:
        """The states at every grid time after the first."""
        if self.stochastic:
            _check_forward(grid)
        schedule, nodes = Schedule(path, grid), []
        for i in range(len(grid) - 1):
            h = grid[i + 1] - grid[i]
            state, v = tape.evaluate(x, grid[i])
            x = state + h * v
            if self.stochastic and schedule.sigma[i + 1] > 0.0:
                x = x - (h * self.c) * schedule.predict_noise(state, v, i)
                x = _with_noise(x, math.sqrt(2.0 * self.c * schedule.sigma[i] * h), tape)
            nodes.append(x)
        return nodes


def _fresh(schedule: Schedule, i: int) -> float:
    """``sqrt(1 - (rho_b / rho_a)^2) = sqrt(1 - e^-2h)`` of step i: the share of fresh noise at its end, for eta = 1."""
    (alpha_a, alpha_b), (sigma_a, sigma_b) = schedule.alpha[i : i + 2], schedule.sigma[i : i + 2]
    kept = sigma_b * alpha_a / (alpha_b * sigma_a)
    return math.sqrt(1.0 - kept**2)


def _with_noise(x: Combination, scale: float, tape: Tape) -> Combination:
    return x + scale * tape.noise() if scale else x


def _check_forward(grid: Grid) -> None:
    if grid[0] > grid[-1]:
        raise UserError(
            "a stochastic solver runs from noise to data only, because its steps add fresh noise and have no inverse. "
            "Give increasing times, or invert with a deterministic solver ('ddim')."
        )
