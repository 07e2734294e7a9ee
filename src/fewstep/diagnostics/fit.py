r"""Fit a solver to a field: ``solver="fitted"``.

Every explicit fixed-step solver is ``y_j = a_j x_0 + sum_(k<j) b_jk v_k`` at times ``t_j``. With the network frozen
there are few such numbers (17, 32, 51 for 4, 6, 8 calls), and they can be fitted to the field, so that the mean square
distance of the end point to the true one is least on a pilot of noises (non-stationary solvers, arXiv:2403.01329;
generalised solvers, arXiv:2510.17699). The fit starts from the best picked and refined table; its result is kept only
where it is better on held-out noises.

The endpoint errors ``r(theta)`` of all noises and dimensions are a nonlinear least-squares problem in a few dozen
unknowns: Levenberg-Marquardt (Moré 1978) needs some ten iterations. The Jacobian comes from tangents carried along
the solve,

    dy_j = da_j x_0 + sum_k (db_jk v_k + b_jk dv_k),      dv_j = (∂v/∂x) dy_j + (∂v/∂t) dt_j,

one directional derivative of the network per unknown and later row; all unknowns of a row go through the network as one
batch. The last row needs none: the end point is linear in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import final

import numpy as np
import torch
from torch import Tensor

from fewstep.diagnostics.pilot import Pilot
from fewstep.solvers.numeric import numeric_table
from fewstep.solvers.tables import Table

FIRST = 512  # noises of the first iterations
ITERATIONS, LAST_ITERATIONS = 10, 2  # at most so many on the first noises, then on all
DAMPING = 1e-2  # damping of the first iteration, relative to the diagonal of the Gram matrix
STOP = 5e-3  # the fit ends after an iteration that lowers the error by a smaller share than this
DAMPING_LIMIT = 1e6  # an iteration is given up when its damping reaches this
DIFFERENCE = 3e-4  # step of difference quotients: RMS change of the state, or change of t
LEAST_TANGENT = 1e-3  # tangents shorter than this share of the mean length get a step as if they had this length
ROWS = 1 << 15  # most rows through the network at a time
APART = 1e-4  # least distance between consecutive times, and from the last time to 1


@final
class Unknowns:
    """The free numbers of a table: times, then ``a_j`` and ``b_jk`` of every row after the first.

    Args:
        calls: rows of the table.

    Attributes:
        entries: kind (``t``, ``a`` or ``b``), row j and column k of every number.
    """

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.entries: list[tuple[str, int, int]] = [("t", j, 0) for j in range(1, calls)]
        for j in range(1, calls + 1):
            self.entries += [("a", j, 0), *(("b", j, k) for k in range(j))]

    def read(self, table: Table) -> np.ndarray:
        """Their values in a table, (P,)."""
        a, b = table.dense
        values = {"t": lambda j, k: table.times[j], "a": lambda j, k: a[j], "b": lambda j, k: b[j, k]}
        return np.array([values[kind](j, k) for kind, j, k in self.entries])

    def table(self, theta: np.ndarray) -> Table | None:
        """The table with the values ``theta`` (P,); None when its times are not increasing."""
        times, a, b = np.zeros(self.calls + 1), np.ones(self.calls + 1), np.zeros((self.calls + 1, self.calls))
        times[-1] = 1.0
        for value, (kind, j, k) in zip(theta.tolist(), self.entries, strict=True):
            if kind == "t":
                times[j] = value
            elif kind == "a":
                a[j] = value
            else:
                b[j, k] = value
        if not _in_order(times):
            return None
        return numeric_table("fitted", times[:-1].tolist(), a, b)

    def row(self, index: int) -> int:
        """The first row whose state depends on the unknown of that index."""
        return self.entries[index][1]


def can_start(table: Table) -> bool:
    """Whether a fit can start from a table: its rows' times increase and stay below 1 (Heun's and RK4's do not)."""
    return _in_order(np.array([*table.times, 1.0]))


def _in_order(times: np.ndarray) -> bool:
    return bool(np.diff(times).min() >= APART)


def jacobian(pilot: Pilot, table: Table, unknowns: Unknowns) -> Tensor:
    """Derivatives of the end points with respect to the unknowns, (P, B * D), in the pilot's dtype.

    Args:
        pilot: noises and the field.
        table: where the derivatives are taken.
        unknowns: of tables with so many rows.
    """
    a, b = table.dense
    velocities = pilot.velocities(table)
    x0, number = pilot.x0, len(unknowns.entries)
    tangents = [x0.new_zeros(number, x0.numel()) for _ in range(unknowns.calls)]  # dv_j, filled in row by row
    for j in range(1, unknowns.calls):
        active = [p for p in range(number) if unknowns.row(p) <= j]
        dy = _row_tangent(j, active, b, x0, velocities, tangents, unknowns)
        dt = x0.new_tensor([1.0 if unknowns.entries[p][:2] == ("t", j) else 0.0 for p in active])
        tangents[j][active] = _through(pilot, pilot.state(a[j], b[j, :j]), velocities[j], table.times[j], dy, dt)
    return _row_tangent(unknowns.calls, list(range(number)), b, x0, velocities, tangents, unknowns)


def _row_tangent(
    j: int,
    active: list[int],
    b: np.ndarray,
    x0: Tensor,
    velocities: list[Tensor],
    tangents: list[Tensor],
    unknowns: Unknowns,
) -> Tensor:
    """``dy_j`` for the unknowns that have an effect there, (number, B * D)."""
    dy = x0.new_zeros(len(active), x0.numel())
    earlier = [k for k in range(len(active)) if unknowns.row(active[k]) < j]
    picked = [active[k] for k in earlier]
    carried = x0.new_zeros(len(picked), x0.numel())
    for k in range(1, j):
        carried.add_(tangents[k][picked], alpha=float(b[j, k]))
    dy[earlier] = carried
    for position, p in enumerate(active):
        kind, row, k = unknowns.entries[p]
        if row == j and kind != "t":
            dy[position] = (x0 if kind == "a" else velocities[k]).flatten()
    return dy


@torch.no_grad()
def _through(pilot: Pilot, state: Tensor, velocity: Tensor, t: float, dy: Tensor, dt: Tensor) -> Tensor:
    """``dv`` of several tangents at one state, (number, B * D).

    By differences, ``(v(y + h dy, t + h dt) - v(y, t)) / h``: a step of the fit needs no exact derivative, and this
    takes one network call where the forward mode takes the work of four.
    """
    piece = max(1, ROWS // len(state))
    parts = []
    for first in range(0, len(dy), piece):
        tangent, time = dy[first : first + piece].reshape(-1, *state.shape), dt[first : first + piece]
        # every sample has its own step: tangents of the few next to a boundary between modes are much longer
        size = torch.maximum(tangent.flatten(2).square().mean(2).sqrt(), time[:, None])
        h = DIFFERENCE / size.maximum(LEAST_TANGENT * size.mean(1, keepdim=True)).clamp_min(1e-12)
        wide = h.reshape(*h.shape, *(1,) * (state.ndim - 1))
        times = (t + h * time[:, None]).flatten()
        moved = (state + wide * tangent).flatten(0, 1)
        v = pilot.field(moved, times, **pilot.repeated(len(tangent))).reshape(tangent.shape)
        parts.append(((v.to(state.dtype) - velocity) / wide).flatten(1))
    return torch.cat(parts)


def fit(pilot: Pilot, held_out: Pilot, start: Table) -> Table:
    """Fit the numbers of a table, first on some of the pilot's noises, then on all of them.

    Args:
        pilot: noises the numbers are fitted on.
        held_out: noises on which the best iteration is chosen.
        start: a deterministic table from t = 0 to t = 1 that :func:`can_start` a fit.

    Returns:
        The table that is best on the held-out noises; ``start`` itself where no iteration is better than it.
    """
    some = pilot.part(FIRST)
    best, error = start, held_out.error(start)
    for noises, most in ((some, ITERATIONS), (pilot, LAST_ITERATIONS)):
        for table in levenberg_marquardt(noises, best, most):
            tried = held_out.error(table)
            if tried < error:
                best, error = table, tried
    return best


def levenberg_marquardt(pilot: Pilot, table: Table, most: int) -> Iterator[Table]:
    """Levenberg-Marquardt on the endpoint errors (Moré 1978): the table of every iteration that lowers the error.

    Args:
        pilot: noises the numbers are fitted on.
        table: where the fit starts.
        most: iterations, at most; fewer when one lowers the error by less than half a per cent.
    """
    unknowns = Unknowns(len(table.times))
    theta, error, damping = unknowns.read(table), pilot.error(table), DAMPING
    for _ in range(most):
        j = jacobian(pilot, table, unknowns)
        residual = (pilot.end(table) - pilot.x1).flatten()
        gram, slope = (j @ j.T).double().cpu().numpy(), (j @ residual).double().cpu().numpy()
        before = error
        while damping < DAMPING_LIMIT:
            scaled = gram + damping * np.diag(np.diag(gram) + 1e-12)
            moved = theta - np.linalg.lstsq(scaled, slope, rcond=None)[0]
            tried = unknowns.table(moved)
            if tried is not None and (tried_error := pilot.error(tried)) < error:
                theta, table, error = moved, tried, tried_error
                damping = max(damping / 5, 1e-9)
                break
            damping *= 4
        if error < before:
            yield table
        if error > (1 - STOP) * before:
            return


def fit_rows(noises: int, held_out: int, calls: int) -> int:
    """Evaluations, summed over noises, that :func:`fit` takes at most: with all iterations, and all dampings tried."""
    few = min(FIRST, noises)
    on_pilot = few * _iterations(calls, ITERATIONS) + noises * _iterations(calls, LAST_ITERATIONS)
    return on_pilot + held_out * (calls + (ITERATIONS + LAST_ITERATIONS) * (calls - 1))


def _iterations(calls: int, most: int) -> int:
    """Evaluations per noise of so many iterations: each has a Jacobian, and at most one of its tries succeeds.

    A try that fails multiplies the damping by 4, one that succeeds divides it by 5, and none is made above the limit.
    """
    unknowns = Unknowns(calls)
    tangents = sum(unknowns.row(p) <= j for j in range(1, calls) for p in range(len(unknowns.entries)))
    failed = math.ceil(math.log(DAMPING_LIMIT / DAMPING, 4) + most * math.log(5, 4))
    return calls + most * tangents + (most + failed) * (calls - 1)
