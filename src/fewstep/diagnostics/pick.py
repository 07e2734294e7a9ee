"""Pick the best solver and grid for a number of network calls: ``solver="auto"``.

No fixed (solver, grid) is near the best for every field and every number of calls: which quantity is smooth, in which
variable, and where along t, differs from model to model. So all of them are run on a pilot of noises whose true
endpoints are known (:class:`~fewstep.diagnostics.pilot.Pilot`), first on a few noises, the better ones on all. The
grids of the best are then refined time by time, and a refined grid is kept only if it is better on held-out noises than
the same solver on a uniform grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, final

import numpy as np

from fewstep.diagnostics.pilot import Evaluation, Pilot, evaluations_of, shared
from fewstep.errors import UserError
from fewstep.flow.grids import Grid, check_steps, make_grid
from fewstep.flow.paths import AffinePath
from fewstep.solvers.numeric import numeric_table
from fewstep.solvers.tables import LINEAR, SOLVERS, Table, table

SCANNED_GRIDS = (
    "uniform", "shift:0.33", "shift:0.5", "shift:0.67", "shift:1.5", "shift:2", "shift:3",
    "quadratic:1.5", "quadratic:-1.5", "quadratic:-2", "logit_normal:0,1.5",
)  # fmt: skip
FITTED = "fitted"
FIRST = 64  # noises of the first round
KEPT = 24  # combinations of solver and grid that are run on all noises
REFINED = 3  # solvers whose grids are refined
SWEEPS = 4  # sweeps of coordinate descent
REACH = 0.5  # in the first sweep a time is moved by this share of the gap to its neighbour
SHRINK = 0.6  # factor of that share from sweep to sweep
GAIN = 0.99  # a table replaces a simpler one when its error on held-out noises is at most this share of the other's


@final
@dataclass(frozen=True, eq=False)
class Choice:
    """A sampler chosen for a field and a number of network calls.

    Attributes:
        table: how to sample: ``fs.solve(v, x0, solver=choice.table)``.
        solver: the solver the table is of, ``fitted`` for free coefficients.
        grid: its times.
        origin: the named grid it was refined from.
        calls: network evaluations per sample.
        error: root mean square endpoint error per dimension on held-out noises.
        pilot_error: the same on the noises it was chosen on.
        uniform: the same of the solver (of the solver it started from) on the uniform grid.
        euler: the same of Euler on the uniform grid.
        spread: root mean square deviation of the endpoints from their mean, per dimension.
        nfe: network evaluations per sample spent on the choice.
        notes: what was reduced to stay within the network rows that were allowed.
    """

    table: Table
    solver: str
    grid: Grid
    origin: str
    calls: int
    error: float
    pilot_error: float
    uniform: float
    euler: float
    spread: float
    nfe: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which :func:`restore` makes the choice again."""
        values = {name: value for name, value in vars(self).items() if name != "table"}
        values |= {"grid": list(self.grid), "notes": list(self.notes)}
        if self.solver == FITTED:
            a, b = self.table.dense
            values |= {"a": a.tolist(), "b": b.tolist()}
        return values


def restore(values: Mapping[str, Any], path: AffinePath = LINEAR) -> Choice:
    """The choice that :meth:`Choice.as_dict` describes, for a field trained on ``path``.

    Raises:
        UserError: missing values or values of another type, as in a damaged file.
    """
    try:
        known = {field.name: values[field.name] for field in fields(Choice) if field.name not in ("table", "notes")}
        known["notes"] = tuple(str(note) for note in values.get("notes", ()))  # absent in files of earlier versions
        known["grid"] = tuple(float(t) for t in values["grid"])
        if known["solver"] == FITTED:
            made = numeric_table(FITTED, known["grid"][:-1], np.array(values["a"]), np.array(values["b"]))
        else:
            made = table(known["solver"], known["grid"], path)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"a stored sampler cannot be read ({error}): delete its file, and it is computed again."
        ) from error
    return Choice(table=made, **known)


@dataclass(frozen=True)
class Candidate:
    """A solver on a grid with its error on a pilot."""

    error: float
    solver: str
    grid: str
    table: Table


def candidates(calls: int, path: AffinePath = LINEAR) -> Iterator[tuple[str, str, Table]]:
    """Every solver that can use exactly ``calls`` network calls, on every scanned grid.

    Stochastic solvers are left out, as their endpoint is not a function of the noise, and so are solvers that converge
    to the flow on straight trajectories only.

    Args:
        calls: network evaluations per sample.
        path: the path the field was trained on.

    Returns:
        Names of solver and grid, and the table.
    """
    for name, solver in SOLVERS.items():
        if calls % solver.calls or solver.stochastic or not solver.converges:
            continue
        for grid in SCANNED_GRIDS if calls > solver.calls else ("uniform",):
            yield name, grid, table(name, make_grid(grid, calls // solver.calls), path)


@lru_cache(maxsize=16)
def distinct(calls: int, path: AffinePath = LINEAR) -> tuple[tuple[str, str, Table], ...]:
    """The candidates without repetition.

    Tables that are equal (DDIM and Euler on the line, ...) are kept once, under the name that comes first.
    """
    found: dict[tuple[bytes, bytes, tuple[float, ...]], tuple[str, str, Table]] = {}
    for solver, grid, made in candidates(calls, path):
        a, b = made.dense
        found.setdefault((np.round(a, 10).tobytes(), np.round(b, 10).tobytes(), made.times), (solver, grid, made))
    return tuple(found.values())


def scan(pilot: Pilot, calls: int, path: AffinePath = LINEAR) -> list[Candidate]:
    """The candidates of the second round with their errors on the whole pilot, best first.

    Args:
        pilot: noises the candidates are run on.
        calls: network evaluations per sample.
        path: the path the field was trained on.
    """
    first = pilot.part(FIRST) if len(pilot) > FIRST else pilot
    found = [Candidate(first.error(made), solver, grid, made) for solver, grid, made in distinct(calls, path)]
    found.sort(key=lambda c: c.error)
    if first is pilot:
        return found
    again = [Candidate(pilot.error(c.table), c.solver, c.grid, c.table) for c in found[:KEPT]]
    return sorted(again, key=lambda c: c.error)


def refine(pilot: Pilot, solver: str, grid: Grid, path: AffinePath = LINEAR) -> tuple[Grid, float]:
    """Move the inner times of ``grid`` one by one while the endpoint error on the pilot falls.

    Coordinate descent: in every sweep each inner time is moved by a share of the gap to its left and to its right
    neighbour, and stays where the error is least; the share shrinks from sweep to sweep.

    Returns:
        The grid and its error on the pilot, which is biased low; its error on other noises is not computed here.
    """
    times, best = list(grid), pilot.error(table(solver, grid, path))
    share = REACH
    for _ in range(SWEEPS):
        for i in range(len(times) - 2, 0, -1):
            here = times[i]
            for moved in (here + share * (times[i + 1] - here), here - share * (here - times[i - 1])):
                tried = (*times[:i], moved, *times[i + 1 :])
                error = pilot.error(table(solver, tried, path))
                if error < best:
                    best, times[i] = error, moved
        share *= SHRINK
    return tuple(times), best


def pick(pilot: Pilot, held_out: Pilot, calls: int, path: AffinePath = LINEAR, refined: int = REFINED) -> Choice:
    """The best solver and grid for ``calls`` network calls, refined where refinement holds on other noises.

    Args:
        pilot: noises the candidates are run and refined on.
        held_out: other noises, on which a refined grid must beat the named one, and both the uniform one.
        calls: network evaluations per sample.
        path: the path the field was trained on.
        refined: how many of the best solvers have their grids refined.

    Returns:
        The choice of the least error on the held-out noises.

    Raises:
        UserError: ``calls`` below 1.
    """
    calls = check_steps(calls)
    ranked = scan(pilot, calls, path)
    best: tuple[float, Candidate] | None = None
    for first in _first_of_each_solver(ranked)[:refined]:
        kept, error = _gated(pilot, held_out, first, calls, path)
        if best is None or error < best[0]:
            best = (error, kept)
    assert best is not None, "Euler spends any number of calls"
    error, kept = best
    return _choice(pilot, held_out, kept, error, calls, path)


def _first_of_each_solver(ranked: list[Candidate]) -> list[Candidate]:
    found: dict[str, Candidate] = {}
    for candidate in ranked:
        found.setdefault(candidate.solver, candidate)
    return list(found.values())


def _gated(
    pilot: Pilot, held_out: Pilot, candidate: Candidate, calls: int, path: AffinePath
) -> tuple[Candidate, float]:
    """Uniform, named or refined grid of one solver: each must beat the simpler one on held-out noises."""
    kept = _on_uniform(candidate.solver, calls, path)
    error = held_out.error(kept.table)
    refined, on_pilot = refine(pilot, candidate.solver, candidate.table.grid, path)
    tried = Candidate(on_pilot, candidate.solver, candidate.grid, table(candidate.solver, refined, path))
    for other in (candidate, tried):
        held = held_out.error(other.table)
        if held <= GAIN * error:
            kept, error = other, held
    return kept, error


def _on_uniform(solver: str, calls: int, path: AffinePath) -> Candidate:
    made = table(solver, make_grid("uniform", calls // SOLVERS[solver].calls), path)
    return Candidate(math.nan, solver, "uniform", made)


def _choice(pilot: Pilot, held_out: Pilot, kept: Candidate, error: float, calls: int, path: AffinePath) -> Choice:
    return Choice(
        table=kept.table,
        solver=kept.solver,
        grid=kept.table.grid,
        origin=kept.grid,
        calls=calls,
        error=error,
        pilot_error=pilot.error(kept.table),
        uniform=held_out.error(_on_uniform(kept.solver, calls, path).table),
        euler=held_out.error(_on_uniform("euler", calls, path).table),
        spread=held_out.spread,
        nfe=pilot.nfe,
    )


def scan_rows(noises: int, calls: int, path: AffinePath = LINEAR) -> int:
    """Evaluations, summed over noises, that :func:`scan` takes at most; its first round is exact."""
    first, before, tables = 0, list[Evaluation](), distinct(calls, path)
    for _, _, made in tables:
        rows = evaluations_of(made.times, *made.dense)
        first, before = first + len(rows) - shared(rows, before), rows
    if noises <= FIRST:
        return noises * first
    return FIRST * first + noises * (1 + min(KEPT, len(tables)) * (calls - 1))


def pick_rows(noises: int, held_out: int, calls: int, path: AffinePath = LINEAR, refined: int = REFINED) -> int:
    """Evaluations, summed over noises, that :func:`pick` takes at most.

    The first evaluation, at the noise itself, is common to all tables. Moving time i of a solver with one call a step
    leaves the i evaluations before it, and other solvers evaluate less. Between sweeps all but the first are repeated.
    """
    again = calls - 1
    sweeps = SWEEPS * calls * again + (SWEEPS - 1) * max(0, calls - 2)
    on_pilot = refined * (again + sweeps) + again
    return scan_rows(noises, calls, path) + noises * on_pilot + held_out * (1 + (3 * refined + 2) * again)
