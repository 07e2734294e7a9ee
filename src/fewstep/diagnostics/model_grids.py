"""Time grids that are made from a field: ``error`` and ``dp``.

``error`` gives every step of Euler's method the same local error, as it arrives at the end (:meth:`Diagnosis.grid`).
``dp`` finds the steps whose jumps from the exact trajectory are smallest in sum, by dynamic programming (GITS,
arXiv:2405.11326). Both add up errors of single steps, while errors of consecutive steps partly cancel; the error of a
solver on a grid is measured by a pilot run (:func:`fewstep.tune`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.diagnostics.diagnose import diagnose
from fewstep.errors import UserError, unknown
from fewstep.flow.field import Velocity
from fewstep.flow.grids import FROM_MODEL, Grid, check_steps
from fewstep.solvers.solve import check_start, solve

POINTS = 60  # intervals of the reference trajectory; grids are chosen among their ends
DISCOUNT = 1.15  # weight of what comes after a jump (arXiv:2405.11326, sec. 3.3)


def model_grid(name: str, v: Velocity, x0: Tensor, steps: int, *, cond: Mapping[str, Any] | None = None) -> Grid:
    """The grid of that name for a field: ``error`` or ``dp``.

    Args:
        name: ``error`` or ``dp``.
        v: ``v(x, t, **cond)``.
        x0: base samples, (M, ...); 256 will do.
        steps: number of steps.
        cond: conditions, tensors with one row per sample.

    Returns:
        ``steps + 1`` increasing times from 0 to 1.

    Raises:
        UserError: an unknown name; what :func:`dp_grid` or :func:`~fewstep.diagnostics.diagnose.diagnose` refuses.
    """
    if name not in FROM_MODEL:
        raise unknown("grid of a model", name, FROM_MODEL)
    if name == "dp":
        return dp_grid(v, x0, steps, cond=cond)
    found = diagnose(v, x0, cond=cond, stiffness=False)
    return found.grid(steps, weighted=found.weighted_error is not None)


@torch.no_grad()
def dp_grid(v: Velocity, x0: Tensor, steps: int, *, cond: Mapping[str, Any] | None = None) -> Grid:
    r"""The steps with the least ``c_(0, i) + gamma (c_(i, j) + gamma (...))``, by dynamic programming.

    ``c_ij`` is the root mean square over samples and dimensions of ``x(t_i) + (t_j - t_i) v(x(t_i), t_i) - x(t_j)``,
    the error of one Euler step between two of 61 even times on the exact trajectory; ``gamma = 1.15``.

    Args:
        v: ``v(x, t, **cond)``.
        x0: base samples, (M, ...).
        steps: number of steps, at most 60.
        cond: conditions, tensors with one row per sample.

    Returns:
        ``steps + 1`` increasing times from 0 to 1. Source: GITS, arXiv:2405.11326, sec. 3.3.

    Raises:
        UserError: steps below 1 or above 60, a start that :func:`fewstep.solve` refuses.
    """
    check_start(x0)
    steps = check_steps(steps)
    if steps > POINTS:
        raise UserError(f"grid 'dp' chooses among {POINTS} even steps, and {steps} are asked for: take 'uniform'.")
    cond = dict(cond or {})
    solution = solve(v, x0, solver="rk4", steps=POINTS, cond=cond, trajectory=True)
    assert solution.trajectory is not None
    states = solution.trajectory
    cost = np.full((POINTS + 1, POINTS + 1), np.inf)
    for i in range(POINTS):
        velocity = v(states[i], x0.new_full((len(x0),), solution.times[i]), **cond)
        for j in range(i + 1, POINTS + 1):
            jump = states[i] + (solution.times[j] - solution.times[i]) * velocity
            cost[i, j] = float((jump - states[j]).double().square().mean().sqrt())
    return tuple(solution.times[k] for k in cheapest_path(cost, steps))


def cheapest_path(cost: np.ndarray, steps: int) -> list[int]:
    """Indices ``0 = k_0 < … < k_N`` with the least ``sum_m DISCOUNT^m cost[k_m, k_(m+1)]``.

    Args:
        cost: (P + 1, P + 1), infinite on and below the diagonal.
        steps: N.
    """
    last = len(cost) - 1
    rest = cost[:, last].copy()  # cost from every point to the end, first with one step, then with one more each time
    choices = []
    for _ in range(steps - 1):
        total = cost + DISCOUNT * rest[None, :]
        choices.append(total.argmin(1))
        rest = total.min(1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [*path, last]
