"""A solver is a table.

The velocity, the data prediction and the noise prediction are all linear in ``(x, v)``, so on a given grid
every explicit fixed-step solver is a list of rows

    y_j = sum_i a_ji y_i + sum_k b_jk v_k   (i, k < j),      v_j = v(y_j, t_j),

with ``y_0 = x_0`` and an end point of the same form. The table is computed in float64 by running the solver's
own formulas once on a :class:`~fewstep.solvers.tape.Tape`, which records the linear combinations instead of
evaluating a network. NFE is the number of rows. Substituting earlier states gives the dense lower-triangular form
over ``(x_0, v_0, v_1, …)`` (:meth:`Table.dense`), in which equal solvers are equal matrices.

Names: a number is how many values the predictor uses; ``-rho`` and ``-t`` name the variable of the polynomial where
it is not the usual one (``t`` for DEIS, ``lambda`` for UniPC), ``-bh1`` UniPC's other B, ``-reference`` the form
without the factor 2 that public DPM-Solver++(3M) code has. ``abm2`` is Adams-Bashforth 2 with the Adams-Moulton
corrector of order three, evaluated once per step (PEC): the call at the predicted state serves both.
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
from fewstep.solvers.forms import DataInLambda, DataInTime, NoiseInRho, NoiseInTime, VelocityInTime
from fewstep.solvers.multistep import Multistep, bh1, bh2, without_two
from fewstep.solvers.runge_kutta import RungeKutta
from fewstep.solvers.tape import Combination, Solver, Tape


@final
@dataclass(frozen=True, eq=False)
class Table:
    """A solver on a grid.

    Attributes:
        solver: its name.
        grid: the times between which it steps.
        times: where each row calls the network.
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
        rows = len(self.times)
        a, b = np.zeros(rows + 1), np.zeros((rows + 1, rows))
        for j, combination in enumerate([*self.points, self.nodes[-1]]):
            for (kind, i), coefficient in combination.terms.items():
                if kind == "v":
                    b[j, i] += coefficient
                elif i == j:
                    a[j] += coefficient  # row 0 is x_0 itself
                else:
                    a[j] += coefficient * a[i]
                    b[j] += coefficient * b[i]
        return a, b


LINEAR = Linear()

SOLVERS: dict[str, Solver] = {
    "euler": RungeKutta(a=((),), b=(1.0,), order=1),
    "midpoint": RungeKutta(a=((), (0.5,)), b=(0.0, 1.0), order=2),
    "heun": RungeKutta(a=((), (1.0,)), b=(0.5, 0.5), order=2),
    "rk4": RungeKutta(a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), order=4),
    "ab2": Multistep(VelocityInTime, values=2, order=2),
    "ab3": Multistep(VelocityInTime, values=3, order=3),
    "ab4": Multistep(VelocityInTime, values=4, order=4),
    "abm2": Multistep(VelocityInTime, values=2, order=3, corrector=True),
    "ddim": Multistep(DataInLambda, values=1, order=1),
    "deis2": Multistep(NoiseInTime, values=2, order=2),
    "deis3": Multistep(NoiseInTime, values=3, order=3),
    "deis2-rho": Multistep(NoiseInRho, values=2, order=2),
    "deis3-rho": Multistep(NoiseInRho, values=3, order=3),
    "dpm++2m": Multistep(DataInLambda, values=2, order=2, rule=bh2),
    "dpm++3m": Multistep(DataInLambda, values=3, order=3, rule=bh2),
    "dpm++3m-reference": Multistep(DataInLambda, values=3, order=2, rule=without_two),
    "unipc1": Multistep(DataInLambda, values=1, order=2, corrector=True, rule=bh2),
    "unipc2": Multistep(DataInLambda, values=2, order=3, corrector=True, rule=bh2),
    "unipc3": Multistep(DataInLambda, values=3, order=4, corrector=True, rule=bh2),
    "unipc1-bh1": Multistep(DataInLambda, values=1, order=2, corrector=True, rule=bh1),
    "unipc2-bh1": Multistep(DataInLambda, values=2, order=3, corrector=True, rule=bh1),
    "unipc3-bh1": Multistep(DataInLambda, values=3, order=4, corrector=True, rule=bh1),
    "unipc1-t": Multistep(DataInTime, values=1, order=2, corrector=True),
    "unipc2-t": Multistep(DataInTime, values=2, order=3, corrector=True),
    "unipc3-t": Multistep(DataInTime, values=3, order=4, corrector=True),
}

VALUED: dict[str, Callable[[float], Solver]] = {}  # solvers that take a value, as in ``name:value``


def find_solver(name: str) -> Solver:
    """Look a solver up by its name, or ``name:value`` (``ddim:0.5``) where the name is in :data:`VALUED`.

    Raises:
        UserError: unknown name; a value that is no number, out of range, or given to a solver that takes none.
    """
    word, colon, value = name.partition(":") if isinstance(name, str) else ("", "", "")
    if word not in SOLVERS:
        raise unknown("solver", name, SOLVERS)
    return VALUED[word](_value(name, word, value)) if colon and _takes_value(name, word) else SOLVERS[word]


def _takes_value(name: str, word: str) -> bool:
    if word in VALUED:
        return True
    raise UserError(
        f"solver {word!r} takes no value, got {name!r}: write {word!r}. With a value: {', '.join(sorted(VALUED))}."
    )


def _value(name: str, word: str, text: str) -> float:
    """The number after the colon."""
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"solver {name!r}: {text!r} is not a number. Write for example '{word}:0.5'.") from error
    if not (math.isfinite(value) and value >= 0.0):
        raise UserError(f"solver {name!r}: the value must be a finite number from 0 up.")
    return value


def table(solver: str, grid: Grid, path: AffinePath = LINEAR) -> Table:
    """Compute the table of ``solver`` on ``grid`` (times in either direction) for fields trained on ``path``.

    ``solver`` is a name or ``name:value``.

    Raises:
        UserError: unknown solver; a grid that turns round or leaves [0, 1].
    """
    method = find_solver(solver)
    check_times(grid)
    tape = Tape()
    start = Combination({("y", 0): 1.0})
    nodes = method.nodes(tape, start, grid, path)
    return Table(solver, grid, tuple(tape.times), tuple(tape.points), tuple(nodes))
