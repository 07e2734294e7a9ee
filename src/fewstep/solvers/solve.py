"""Solve ``dx/dt = v(x, t)`` with a named solver on a grid: ``fs.solve`` and ``fs.invert``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.field import Velocity, as_field
from fewstep.flow.grids import Grid, GridSpec, check_steps, explicit_times, make_grid
from fewstep.flow.noise import noise_rows
from fewstep.flow.paths import PATHS, AffinePath, make_path
from fewstep.solvers.adaptive import solve_adaptive
from fewstep.solvers.compiled import run_compiled
from fewstep.solvers.loop import Plan, run
from fewstep.solvers.tables import ADAPTIVE_NAMES, LINEAR, Table, find_solver, solver_words, table

DEFAULT_STEPS = 50
FIRST_DRAW = 2  # of a stochastic solver's noise; 0 and 1 are the samples' base noise and labels


@final
@dataclass(frozen=True)
class Solution:
    """The result of :func:`solve` or :func:`invert` for B samples.

    >>> sol = solve(lambda x, t: -x, torch.ones(1, 2), solver="heun", steps=4)
    >>> sol.nfe, sol.times
    (8, (0.0, 0.25, 0.5, 0.75, 1.0))

    Attributes:
        x: the end point, with the shape and dtype of the start, (B, ...).
        nfe: network evaluations per sample, counted; for an adaptive solver the mean over the samples, rounded up.
        times: the times between which the solver stepped, in order.
        trajectory: the states at ``times``, (len(times), B, ...), the last one ``x``; None unless asked for.
        nfe_each: evaluations of each sample by an adaptive solver, (B,) int64; None for other solvers.
    """

    x: Tensor
    nfe: int
    times: Grid
    trajectory: Tensor | None = None
    nfe_each: Tensor | None = None


def solve(
    v: Velocity,
    x0: Tensor,
    *,
    solver: str | Table = "euler",
    steps: int | None = None,
    grid: GridSpec = "uniform",
    path: AffinePath | str = LINEAR,
    cond: Mapping[str, Any] | None = None,
    trajectory: bool = False,
    grad: bool = False,
    seed: int = 0,
    row: int = 0,
    compile: bool = False,
) -> Solution:
    """Solve ``dx/dt = v(x, t, **cond)`` from ``x0``, by default from noise (t = 0) to data (t = 1).

    A step with the default solver is Euler's, ``x_b = x_a + (t_b - t_a) v(x_a, t_a)``. ``fewstep list solvers`` prints
    the formula of every solver.

    >>> solve(lambda x, t: -x, torch.ones(1, 2), steps=2).x  # two Euler steps: (1 - 1/2)^2
    tensor([[0.2500, 0.2500]])

    Args:
        v: any callable ``v(x, t, **cond)``; ``x`` is (B, ...), ``t`` is (B,) in [0, 1] in the dtype of ``x``. Its
            result has the shape of ``x`` and is converted to the dtype of ``x``. It is called exactly NFE times.
        x0: the start, (B, ...), floating point, in the units of the network; its dtype is kept.
        solver: a name of :data:`fewstep.solvers.tables.SOLVERS`, ``name:value`` for a solver with a parameter, or a
            :class:`~fewstep.solvers.tables.Table`, which has its own grid. Adaptive solvers (``rk45``, ``dopri5``)
            choose their own steps; their parameter is the tolerance (``rk45:1e-4``).
            **Stochastic solvers (``ddim:eta``, ``sde``, ``dpm++sde``) sample the right distribution only if the noise
            was Gaussian and independent of the data in training.** A bare callable does not tell, so this is not
            checked here.
        steps: solver steps; 50 by default on a named grid. Explicit times fix their number.
        grid: a grid's name, ``name:value``, or explicit times; decreasing times run from data to noise. For an adaptive
            solver the times are its ends and the times of the trajectory.
        path: the path on which ``v`` was trained, or its name. Solvers that use the data or the noise prediction
            (``ddim``, ``deis*``, ``dpm++*``, ``unipc*``) and stochastic ones need it; other solvers ignore it. A table
            was computed for its path and ignores it too.
        cond: keyword arguments of every call of ``v``. A tensor whose first size is B has one row per sample, and
            ``rk45`` cuts it when samples arrive. Keep a constant that may have that size by chance inside ``v``.
        trajectory: also return the states at the grid's times.
        grad: build the autograd graph through the solve. The steps of an adaptive solver are treated as constants.
        seed: seed of a stochastic solver's noise: step k adds to sample i a row that depends on (seed, i, k) alone
            (:func:`~fewstep.flow.noise.noise_rows`), so a sample does not depend on its batch.
        row: the number i of the first row of ``x0``.
        compile: run the whole loop under ``torch.compile``; it is compiled at the first call for each network, batch
            shape and set of conditions. Three hidden layers of 64, batch 64, 8 steps, one CPU thread: 0.34 ms a solve
            instead of 0.53, after 5 to 24 seconds of compiling. The gain is smaller for larger networks.

    Returns:
        A :class:`Solution`.

    Raises:
        UserError: unknown solver, grid or path; ``steps`` and ``grid`` that contradict each other, a table or an
            adaptive solver; a stochastic solver on decreasing times; a start that is not floating point, or not finite;
            a velocity that is no tensor or has another shape than its input; ``compile`` without a compiler, or with
            gradients.

    Source: arXiv:2210.02747, eq. 1; each solver's own source in ``fewstep list solvers``.
    """
    if isinstance(solver, str) and solver.partition(":")[0] in ADAPTIVE_NAMES:
        return _solve_adaptive(v, x0, solver, _ends(solver, grid, steps), cond, trajectory, grad, compile)
    made = plan(solver, grid, steps, path=path)
    noise = _noise(x0, seed, row) if made.table.stochastic else None
    return _solve(v, x0, made, cond, trajectory, grad, noise, compile)


def invert(
    v: Velocity,
    x1: Tensor,
    *,
    solver: str | Table = "euler",
    steps: int | None = None,
    grid: GridSpec = "uniform",
    path: AffinePath | str = LINEAR,
    cond: Mapping[str, Any] | None = None,
    trajectory: bool = False,
    grad: bool = False,
    compile: bool = False,
) -> Solution:
    """Solve ``dx/dt = v(x, t, **cond)`` backwards, from data ``x1`` to its noise, on the reversed grid.

    >>> x1 = solve(lambda x, t: -x, torch.ones(1, 2), solver="rk4", steps=20).x
    >>> invert(lambda x, t: -x, x1, solver="rk4", steps=20).x
    tensor([[1.0000, 1.0000]])

    Args:
        v: the velocity ``v(x, t, **cond)``, as in :func:`solve`.
        x1: data, (B, ...), floating point, in the units of the network; its dtype is kept.
        solver: a solver's name; a table is defined in one direction only and is refused.
        steps, path, cond, trajectory, grad, compile: as in :func:`solve`.
        grid: as in :func:`solve`; decreasing times are used as they are.

    Returns:
        A :class:`Solution`; ``x`` is the noise and ``times`` decrease.

    Raises:
        UserError: as in :func:`solve`; also a table, and a stochastic solver, whose steps have no inverse.

    Source: arXiv:2010.02502, sec. 4.3 (the flow's ODE run from data to noise).
    """
    if isinstance(solver, Table):
        raise UserError(
            f"solver is a table of {solver.solver!r} on a grid of its own, and cannot be run backwards: "
            f"name a solver (solver={solver.solver.partition(':')[0]!r})."
        )
    if isinstance(solver, str) and solver.partition(":")[0] in ADAPTIVE_NAMES:
        times = _ends(solver, grid, steps)
        times = times[::-1] if times[0] < times[-1] else times
        return _solve_adaptive(v, x1, solver, times, cond, trajectory, grad, compile)
    return _solve(v, x1, plan(solver, grid, steps, path=path, backward=True), cond, trajectory, grad, None, compile)


def plan(
    solver: str | Table,
    grid: GridSpec,
    steps: int | None,
    *,
    path: AffinePath | str = LINEAR,
    backward: bool = False,
) -> Plan:
    """The plan of a solver on a grid, from the cache where it was made before.

    What the cache would take for equal (``True`` and 1) or cannot hold (tensors) is settled first.
    """
    if isinstance(solver, Table):
        if steps is not None or not (isinstance(grid, str) and grid == "uniform"):
            raise UserError(
                f"solver is a table of {len(solver.grid) - 1} steps on a grid of its own: leave steps and grid out, "
                "or name a solver."
            )
        return _plan_of(solver)
    if type(solver) is str and type(grid) is str and (steps is None or type(steps) is int):
        return _plan(solver, grid, steps, _affine(path), backward)
    find_solver(solver)
    key = grid if isinstance(grid, str) else explicit_times(grid)
    assert key is not None, "times that are no string are explicit"
    return _plan(solver, key, None if steps is None else check_steps(steps), _affine(path), backward)


@lru_cache(maxsize=64)
def _plan(solver: str, grid: str | Grid, steps: int | None, path: AffinePath, backward: bool) -> Plan:
    """Cached, as making a plan costs more than a small network's call."""
    if steps is None and explicit_times(grid) is None:
        steps = DEFAULT_STEPS
    times = make_grid(grid, steps)
    if backward and times[0] < times[-1]:
        times = times[::-1]
    return Plan(table(solver, times, path))


@lru_cache(maxsize=64)
def _plan_of(table: Table) -> Plan:
    """Cached by the table's identity."""
    return Plan(table)


def _affine(path: AffinePath | str) -> AffinePath:
    if path is LINEAR:
        return LINEAR
    if isinstance(path, AffinePath):
        return path
    if not isinstance(path, str):
        raise UserError(f"path must be a path or its name ({', '.join(map(repr, PATHS))}), got {type(path).__name__}.")
    return make_path(path)


def _solve(
    v: Velocity,
    x: Tensor,
    plan: Plan,
    cond: Mapping[str, Any] | None,
    trajectory: bool,
    grad: bool,
    noise: Callable[[int], Tensor] | None,
    compile: bool,
) -> Solution:
    check_start(x)
    field = as_field(v)
    before = field.calls
    outside = torch.is_grad_enabled()
    torch.set_grad_enabled(outside and grad)  # as torch.no_grad() does it, in a third of its time
    try:
        if compile:
            if grad:
                raise UserError("compile=True keeps no autograd graph: leave compile or grad out.")
            end, states = run_compiled(plan, field, x, cond or {}, trajectory=trajectory)
        else:
            end, states = run(plan, field, x, cond or {}, trajectory=trajectory, noise=noise)
        return Solution(end, field.calls - before, plan.table.grid, torch.stack(states) if trajectory else None)
    finally:
        torch.set_grad_enabled(outside)


def _noise(x0: Tensor, seed: int, row: int) -> Callable[[int], Tensor]:
    """The fresh noise of every step, like ``x0``."""

    def draw(k: int) -> Tensor:
        rows = noise_rows(len(x0), x0.shape[1:], seed=seed, start=row, draw=FIRST_DRAW + k, dtype=x0.dtype)
        return rows.to(x0.device)

    return draw


def _ends(solver: str, grid: GridSpec, steps: int | None) -> Grid:
    """The times that an adaptive solver is given."""
    if steps is not None:
        raise UserError(f"solver {solver!r} chooses its own steps: leave steps out ('rk45:1e-4' sets its tolerance).")
    if isinstance(grid, str) and grid == "uniform":
        return (0.0, 1.0)
    times = explicit_times(grid)
    if times is None:
        raise UserError(
            f"solver {solver!r} chooses its own steps, so grid {grid!r} has no meaning for it: leave grid out, or give "
            "the times of the trajectory ('0,0.5,1')."
        )
    return times


def _solve_adaptive(
    v: Velocity,
    x: Tensor,
    solver: str,
    times: Grid,
    cond: Mapping[str, Any] | None,
    trajectory: bool,
    grad: bool,
    compile: bool,
) -> Solution:
    name, tolerance = solver_words(solver)
    check_start(x)
    if compile:
        raise UserError(f"compile=True unrolls a fixed number of steps, and {name!r} has none: leave compile out.")
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
        end, states, each = solve_adaptive(name, tolerance, as_field(v), x, times, cond or {}, trajectory=trajectory)
        mean = -(-int(each.sum()) // len(each))
        return Solution(end, mean, times, torch.stack(states) if trajectory else None, each)


def check_start(x: Tensor) -> None:
    """Refuse a start that is no floating-point batch, is empty, or holds NaN or infinities."""
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        what = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"the start must be a floating-point tensor of shape (B, ...), got {what}.")
    shape = x.shape
    if len(shape) < 2 or 0 in shape:
        raise UserError(f"the start must have shape (B, ...) with B >= 1 and no empty side, got {tuple(shape)}.")
    # One cheap reduction settles the usual case; an overflowing sum is looked at again row by row.
    if not math.isfinite(x.sum().item()) and not torch.isfinite(x).all():
        rows = int((~torch.isfinite(x)).flatten(1).any(1).sum())
        raise UserError(f"the start holds NaN or infinite values in {rows} of {len(x)} rows.")
