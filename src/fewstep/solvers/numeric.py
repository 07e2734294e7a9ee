"""Tables from arrays of coefficients: fitted solvers, and tables read from a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fewstep.errors import UserError
from fewstep.flow.grids import check_times
from fewstep.solvers.tables import Table
from fewstep.solvers.tape import Combination


def numeric_table(solver: str, times: Sequence[float], a: np.ndarray, b: np.ndarray) -> Table:
    """The table with rows ``y_j = a_j x_0 + sum_k b_jk v_k`` at ``times`` and, last, the end point at t = 1.

    Args:
        solver: the solver's name.
        times: times of the rows' network calls, (J,), the first one 0.
        a: (J + 1,), the first one 1.
        b: (J + 1, J), strictly lower triangular.

    Raises:
        UserError: shapes that do not fit, coefficients that are not finite, a first row that is not the start, a row
            that uses its own velocity or a later one.
    """
    rows, a, b = len(times), np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if rows < 1 or a.shape != (rows + 1,) or b.shape != (rows + 1, rows):
        raise UserError(
            f"a table of {rows} rows needs a of shape ({rows + 1},) and b of shape ({rows + 1}, {rows}), got "
            f"{a.shape} and {b.shape}."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"the table {solver!r} holds coefficients that are not finite: fit it again.")
    if a[0] != 1.0 or np.triu(b).any():
        raise UserError(
            f"the table {solver!r} is not explicit: row 0 is the start, and row j uses velocities before j."
        )
    grid = (*map(float, times), 1.0)
    check_times(grid)
    states = [
        Combination({("y", 0): float(a[j]), **{("v", k): float(b[j, k]) for k in range(min(j, rows))}})
        for j in range(rows + 1)
    ]
    points = (Combination({("y", 0): 1.0}), *states[1:rows])
    return Table(solver, grid, grid[:-1], points, (*points[1:], states[rows]))
