"""Every fixed-step solver as a table of numbers, and the list of them.

The velocity, the data prediction and the noise prediction are all linear in ``(x, v)``. So on a given grid every
explicit fixed-step solver is a list of rows

    y_j = sum_i a_ji y_i + sum_k b_jk v_k   (i, k < j),      v_j = v(y_j, t_j),

with ``y_0 = x_0`` and an end point of the same form. Stochastic solvers add ``sum_l c_jl z_l``, ``z_l ~ N(0, I)``. The
table is computed in float64: the solver's formulas run once on a :class:`~fewstep.solvers.tape.Tape`, which records the
linear combinations and evaluates no network. NFE is the number of rows. Substituting earlier states gives the dense
lower-triangular form over ``(x_0, v_0, v_1, …)`` (:meth:`Table.dense`), in which equal solvers are equal matrices.

Names: the number is how many values the predictor uses. ``-rho`` and ``-t`` name the variable of the polynomial if it
is not the usual one (``t`` for DEIS, ``lambda`` for UniPC). ``-bh1`` is UniPC with the function B_1. ``-reference`` is
DPM-Solver++(3M) as in its released code, which lacks a factor 2. ``abm2`` is Adams-Bashforth 2 with the Adams-Moulton
corrector of order three in PEC mode: one call per step, at the predicted state, serves the corrector and the next step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from fewstep.errors import UserError, unknown
from fewstep.flow.grids import Grid, check_times
from fewstep.flow.paths import AffinePath, Linear
from fewstep.solvers.anchored import Anchored
from fewstep.solvers.forms import DataInLambda, DataInTime, NoiseInRho, NoiseInTime, VelocityInTime
from fewstep.solvers.multistep import Multistep, bh1, bh2, halved_second_moment
from fewstep.solvers.runge_kutta import RungeKutta
from fewstep.solvers.stochastic import Ancestral, EulerMaruyama, StochasticMultistep
from fewstep.solvers.tape import Combination, Solver, Tape


@final
@dataclass(frozen=True, eq=False)
class Table:
    """A solver on a grid.

    Attributes:
        solver: the solver's name.
        grid: the times between which it steps.
        times: the time of each row's network call.
        points: the rows' states as combinations of earlier states and velocities (row 0 is ``x_0``).
        nodes: the state at every grid time after the first; the last one is the end point.
    """

    solver: str
    grid: Grid
    times: tuple[float, ...]
    points: tuple[Combination, ...]
    nodes: tuple[Combination, ...]

    @cached_property
    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """``(a, b)``: evaluation points and, last, the end point as ``a_j x_0 + sum_k b_jk v_k``.

        Returns:
            ``a`` of shape (J + 1,) and ``b`` of shape (J + 1, J), float64, ``b`` strictly lower triangular.
        """
        a, b, _ = self._matrices
        return a, b

    @cached_property
    def noise(self) -> np.ndarray:
        """``c`` of shape (J + 1, K): stochastic solvers add ``sum_l c_jl z_l`` to the dense form."""
        return self._matrices[2]

    @cached_property
    def stochastic(self) -> bool:
        """Whether any state contains fresh noise."""
        return any(kind == "z" for state in self._states for kind, _ in state.terms)

    @property
    def _states(self) -> list[Combination]:
        return [*self.points, self.nodes[-1]]

    @cached_property
    def _matrices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = len(self.times)
        noises = 1 + max((i for state in self._states for kind, i in state.terms if kind == "z"), default=-1)
        a, b, c = np.zeros(rows + 1), np.zeros((rows + 1, rows)), np.zeros((rows + 1, noises))
        for j, state in enumerate(self._states):
            for (kind, i), coefficient in state.terms.items():
                if kind == "v":
                    b[j, i] += coefficient
                elif kind == "z":
                    c[j, i] += coefficient
                elif i == j:
                    a[j] += coefficient  # row 0 is x_0 itself
                else:
                    a[j] += coefficient * a[i]
                    b[j] += coefficient * b[i]
                    c[j] += coefficient * c[i]
        return a, b, c


LINEAR = Linear()

ADAMS = "Hairer et al., Solving ODEs I, III.1"
DEIS = "arXiv:2204.13902"
UNIPC = "arXiv:2302.04867, alg. 1"
NOISE_STEP = "x_b = (alpha_b / alpha_a) x_a + alpha_b int P d(sigma / alpha)"
DATA_EULER = "x* = (sigma_b / sigma_a) x_a + alpha_b (1 - exp(-H)) m_a"
DATA_STEP = "x_b = (sigma_b / sigma_a) x_a + sigma_b int P d(alpha / sigma)"

SOLVERS: dict[str, Solver] = {
    "euler": RungeKutta(a=((),), b=(1.0,), order=1, formula="x_b = x_a + h v_a"),
    "midpoint": RungeKutta(
        a=((), (0.5,)), b=(0.0, 1.0), order=2, formula="x_b = x_a + h v(x_a + (h / 2) v_a, t_a + h / 2)"
    ),
    "heun": RungeKutta(
        a=((), (1.0,)), b=(0.5, 0.5), order=2, formula="x_b = x_a + (h / 2) (v_a + v(x_a + h v_a, t_b))"
    ),
    "rk4": RungeKutta(
        a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
        order=4,
        formula="x_b = x_a + (h / 6) (v_a + 2 k_2 + 2 k_3 + k_4); k_2 = v(x_a + (h / 2) v_a, t_a + h / 2); "
        "k_3 = v(x_a + (h / 2) k_2, t_a + h / 2); k_4 = v(x_a + h k_3, t_b)",
    ),
    "ab2": Multistep(
        VelocityInTime,
        values=2,
        order=2,
        formula="x_b = x_a + int P dt; P(t) through v_a, v_1; on equal steps x_b = x_a + (h / 2) (3 v_a - v_1)",
        source=ADAMS,
    ),
    "ab3": Multistep(
        VelocityInTime,
        values=3,
        order=3,
        formula="x_b = x_a + int P dt; P(t) through v_a, v_1, v_2; "
        "on equal steps x_b = x_a + (h / 12) (23 v_a - 16 v_1 + 5 v_2)",
        source=ADAMS,
    ),
    "ab4": Multistep(
        VelocityInTime,
        values=4,
        order=4,
        formula="x_b = x_a + int P dt; P(t) through v_a, v_1, v_2, v_3; "
        "on equal steps x_b = x_a + (h / 24) (55 v_a - 59 v_1 + 37 v_2 - 9 v_3)",
        source=ADAMS,
    ),
    "abm2": Multistep(
        VelocityInTime,
        values=2,
        order=3,
        formula="x* = ab2 step; x_b = x_a + int P dt; P(t) through v_a, v_1, v*; "
        "on equal steps x_b = x_a + (h / 12) (5 v* + 8 v_a - v_1)",
        source=f"{ADAMS}, PEC mode",
        corrector=True,
    ),
    "ddim": Multistep(
        DataInLambda, values=1, order=1, formula="x_b = alpha_b m_a + sigma_b e_a", source="arXiv:2010.02502, eq. 12"
    ),
    "deis2": Multistep(
        NoiseInTime, values=2, order=2, formula=f"{NOISE_STEP}; P(t) through e_a, e_1", source=f"{DEIS}, tAB-DEIS"
    ),
    "deis3": Multistep(
        NoiseInTime, values=3, order=3, formula=f"{NOISE_STEP}; P(t) through e_a, e_1, e_2", source=f"{DEIS}, tAB-DEIS"
    ),
    "deis4": Multistep(
        NoiseInTime,
        values=4,
        order=4,
        formula=f"{NOISE_STEP}; P(t) through e_a, e_1, e_2, e_3",
        source=f"{DEIS}, tAB-DEIS",
    ),
    "deis2-rho": Multistep(
        NoiseInRho,
        values=2,
        order=2,
        formula=f"{NOISE_STEP}; P(sigma / alpha) through e_a, e_1",
        source=f"{DEIS}, rhoAB-DEIS",
    ),
    "deis3-rho": Multistep(
        NoiseInRho,
        values=3,
        order=3,
        formula=f"{NOISE_STEP}; P(sigma / alpha) through e_a, e_1, e_2",
        source=f"{DEIS}, rhoAB-DEIS",
    ),
    "deis4-rho": Multistep(
        NoiseInRho,
        values=4,
        order=4,
        formula=f"{NOISE_STEP}; P(sigma / alpha) through e_a, e_1, e_2, e_3",
        source=f"{DEIS}, rhoAB-DEIS",
    ),
    "dpm++2m": Multistep(
        DataInLambda,
        values=2,
        order=2,
        formula="x_b = (sigma_b / sigma_a) x_a + alpha_b (1 - exp(-H)) (m_a + (H / (2 H_1)) (m_a - m_1))",
        source="arXiv:2211.01095, alg. 2",
        rule=bh2,
    ),
    "dpm++3m": Multistep(
        DataInLambda,
        values=3,
        order=3,
        formula=f"{DATA_STEP}; P(lambda) through m_a, m_1, m_2",
        source="arXiv:2211.01095; UniP-3 of arXiv:2302.04867",
        rule=bh2,
    ),
    "dpm++3m-reference": Multistep(
        DataInLambda,
        values=3,
        order=2,
        formula="x_b = (sigma_b / sigma_a) x_a + (sigma_b / 2) (int P d(alpha / sigma) + int T d(alpha / sigma)); "
        "P(lambda) through m_a, m_1, m_2; T tangent to P at lambda_a",
        source="arXiv:2211.01095, the authors' released code",
        rule=halved_second_moment,
    ),
    "unipc1": Multistep(
        DataInLambda,
        values=1,
        order=2,
        formula=f"{DATA_EULER}; x_b = x* + (alpha_b / 2) (1 - exp(-H)) (m* - m_a)",
        source=f"{UNIPC}, B_2",
        corrector=True,
        rule=bh2,
    ),
    "unipc2": Multistep(
        DataInLambda,
        values=2,
        order=3,
        formula=f"x* = dpm++2m step; {DATA_STEP}; P(lambda) through m_a, m_1, m*",
        source=f"{UNIPC}, B_2",
        corrector=True,
        rule=bh2,
    ),
    "unipc3": Multistep(
        DataInLambda,
        values=3,
        order=4,
        formula=f"x* = dpm++3m step; {DATA_STEP}; P(lambda) through m_a, m_1, m_2, m*",
        source=f"{UNIPC}, B_2",
        corrector=True,
        rule=bh2,
    ),
    "unipc1-bh1": Multistep(
        DataInLambda,
        values=1,
        order=2,
        formula=f"{DATA_EULER}; x_b = x* + (alpha_b / 2) H (m* - m_a)",
        source=f"{UNIPC}, B_1",
        corrector=True,
        rule=bh1,
    ),
    "unipc2-bh1": Multistep(
        DataInLambda,
        values=2,
        order=3,
        formula="x* = (sigma_b / sigma_a) x_a + alpha_b ((1 - exp(-H)) m_a + (H^2 / (2 H_1)) (m_a - m_1)); "
        f"{DATA_STEP}; P(lambda) through m_a, m_1, m*",
        source=f"{UNIPC}, B_1",
        corrector=True,
        rule=bh1,
    ),
    "unipc3-bh1": Multistep(
        DataInLambda,
        values=3,
        order=4,
        formula=f"x* = dpm++3m step; {DATA_STEP}; P(lambda) through m_a, m_1, m_2, m*; first steps as unipc2-bh1",
        source=f"{UNIPC}, B_1",
        corrector=True,
        rule=bh1,
    ),
    "unipc1-t": Multistep(
        DataInTime,
        values=1,
        order=2,
        formula=f"{DATA_EULER}; {DATA_STEP}; P(t) through m_a, m*",
        source=f"{UNIPC}, with t for lambda",
        corrector=True,
    ),
    "unipc2-t": Multistep(
        DataInTime,
        values=2,
        order=3,
        formula="x* = (sigma_b / sigma_a) x_a + sigma_b int Q d(alpha / sigma); Q(t) through m_a, m_1; "
        f"{DATA_STEP}; P(t) through m_a, m_1, m*",
        source=f"{UNIPC}, with t for lambda",
        corrector=True,
    ),
    "unipc3-t": Multistep(
        DataInTime,
        values=3,
        order=4,
        formula="x* = (sigma_b / sigma_a) x_a + sigma_b int Q d(alpha / sigma); Q(t) through m_a, m_1, m_2; "
        f"{DATA_STEP}; P(t) through m_a, m_1, m_2, m*",
        source=f"{UNIPC}, with t for lambda",
        corrector=True,
    ),
    "dpm++sde": StochasticMultistep(),
    "sde": EulerMaruyama(1.0),
    "anchored": Anchored(),
}

VALUED: dict[str, Callable[[float], Solver]] = {"ddim": Ancestral, "sde": EulerMaruyama}  # as ``name:value``

EXAMPLES = {"ddim": "ddim:0.5", "sde": "sde:1", "dopri5": "dopri5:1e-5", "rk45": "rk45:1e-5"}
ADAPTIVE_NAMES = ("dopri5", "rk45")  # solvers of fewstep.solvers.adaptive, which have no table


def find_solver(name: str) -> Solver:
    """Look a solver up by its name, or ``name:value`` (``ddim:0.5``) where the name is in :data:`VALUED`.

    Raises:
        UserError: unknown name; an adaptive solver, which has no table; a value that is not a number, is out of range,
            or is given to a solver that takes none.
    """
    word, value = solver_words(name)
    if word in ADAPTIVE_NAMES:
        raise UserError(
            f"solver {word!r} chooses its own steps, so it has no table and no fixed number of network calls: "
            "name a fixed-step solver here ('rk4')."
        )
    return SOLVERS[word] if value is None else VALUED[word](value)


def solver_words(name: str) -> tuple[str, float | None]:
    """Split ``name`` or ``name:value``, for all solvers, adaptive ones included (``rk45:1e-4``).

    Raises:
        UserError: as :func:`find_solver`, adaptive solvers excepted.
    """
    word, colon, text = name.partition(":") if isinstance(name, str) else ("", "", "")
    if word not in SOLVERS and word not in ADAPTIVE_NAMES:
        raise unknown("solver", name, [*SOLVERS, *ADAPTIVE_NAMES])
    if not colon:
        return word, None
    valued = sorted([*VALUED, *ADAPTIVE_NAMES])
    if word not in valued:
        raise UserError(f"solver {word!r} takes no value, got {name!r}: write {word!r}. With one: {', '.join(valued)}.")
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"solver {name!r}: {text!r} is not a number. Write for example {EXAMPLES[word]!r}.") from error
    if not math.isfinite(value):
        raise UserError(f"solver {name!r}: the value must be finite.")
    return word, value


def table(solver: str, grid: Grid, path: AffinePath = LINEAR) -> Table:
    """Compute the table of ``solver`` on ``grid`` (times in either direction) for fields trained on ``path``.

    ``solver`` is a name or ``name:value``.

    Raises:
        UserError: unknown solver; a grid that is not monotone or leaves [0, 1].
    """
    method = find_solver(solver)
    check_times(grid)
    tape = Tape()
    start = Combination({("y", 0): 1.0})
    nodes = method.nodes(tape, start, grid, path)
    return Table(solver, grid, tuple(tape.times), tuple(tape.points), tuple(nodes))
