"""A solver is a table.

The velocity, the data prediction and the noise prediction are all linear in ``(x, v)``, so on a given grid
every explicit fixed-step solver is a list of rows

    y_j = sum_i a_ji y_i + sum_k b_jk v_k   (i, k < j),      v_j = v(y_j, t_j),

with ``y_0 = x_0`` and an end point of the same form. The table is computed in float64 by running the solver's
own formulas once on a :class:`Tape`, which records the linear combinations instead of evaluating a network.
NFE is the number of rows. Substituting earlier states gives the dense lower-triangular form over
``(x_0, v_0, v_1, …)`` (:meth:`Table.dense`), in which equal solvers are equal matrices.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from fewstep.errors import unknown
from fewstep.flow.grids import Grid, check_times

Atom = tuple[str, int]  # ("y", j): the state of row j; ("v", j): the velocity evaluated there


@final
@dataclass(frozen=True)
class Combination:
    """A linear combination of states and velocities: ``terms`` maps each atom to its coefficient."""

    terms: dict[Atom, float]

    def __add__(self, other: Combination) -> Combination:
        terms = dict(self.terms)
        for atom, coefficient in other.terms.items():
            terms[atom] = terms.get(atom, 0.0) + coefficient
        return Combination(terms)

    def __mul__(self, factor: float) -> Combination:
        return Combination({atom: coefficient * factor for atom, coefficient in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other: Combination) -> Combination:
        return self + other * -1.0


@final
class Tape:
    """Records a solver's formulas; see :class:`Table` for the result."""

    def __init__(self) -> None:
        self.points: list[Combination] = []
        self.times: list[float] = []

    def evaluate(self, point: Combination, t: float) -> tuple[Combination, Combination]:
        """Record a network call at ``(point, t)``; return the state and the velocity as new atoms."""
        j = len(self.points)
        self.points.append(point)
        self.times.append(float(t))
        return Combination({("y", j): 1.0}), Combination({("v", j): 1.0})


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


@final
@dataclass(frozen=True)
class RungeKutta:
    """An explicit Runge-Kutta method by its Butcher tableau; it validates itself.

    Attributes:
        a: the stages' rows (the first is empty).
        b: the weights.
        order: its nominal order of convergence.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        assert len(self.a) == len(self.b), "one row per stage"
        assert all(len(row) == i for i, row in enumerate(self.a)), "explicit: row i uses stages before i"
        assert abs(sum(self.b) - 1.0) < 1e-14, "consistent: weights sum to one"

    @property
    def c(self) -> tuple[float, ...]:
        """The stages' times within a step: ``c_i = sum_j a_ij``."""
        return tuple(sum(row) for row in self.a)

    def step(self, tape: Tape, x: Combination, t: float, s: float) -> Combination:
        """One step from ``(x, t)`` to time ``s``."""
        h = s - t
        slopes: list[Combination] = []
        for i, (row, c) in enumerate(zip(self.a, self.c, strict=True)):
            point = x
            for weight, slope in zip(row, slopes, strict=True):
                if weight:
                    point = point + (h * weight) * slope
            # the last stage of Heun and RK4 lies at s exactly, not at t + (s - t)
            state, slope = tape.evaluate(point, s if c == 1.0 else t + c * h)
            slopes.append(slope)
            if i == 0:
                x = state
        end = x
        for weight, slope in zip(self.b, slopes, strict=True):
            if weight:
                end = end + (h * weight) * slope
        return end

    def nodes(self, tape: Tape, x: Combination, grid: Grid) -> list[Combination]:
        """The states at every grid time after the first."""
        nodes = []
        for t, s in itertools.pairwise(grid):
            x = self.step(tape, x, t, s)
            nodes.append(x)
        return nodes


SOLVERS: dict[str, RungeKutta] = {
    "euler": RungeKutta(a=((),), b=(1.0,), order=1),
    "midpoint": RungeKutta(a=((), (0.5,)), b=(0.0, 1.0), order=2),
    "heun": RungeKutta(a=((), (1.0,)), b=(0.5, 0.5), order=2),
    "rk4": RungeKutta(a=((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), b=(1 / 6, 1 / 3, 1 / 3, 1 / 6), order=4),
}


def find_solver(name: str) -> RungeKutta:
    """Look a solver up by name."""
    if not isinstance(name, str) or name not in SOLVERS:
        raise unknown("solver", name, SOLVERS)
    return SOLVERS[name]


def table(solver: str, grid: Grid) -> Table:
    """Compute the table of ``solver`` on ``grid`` (times in either direction).

    Raises:
        UserError: unknown solver; a grid that turns round or leaves [0, 1].
    """
    method = find_solver(solver)
    check_times(grid)
    tape = Tape()
    start = Combination({("y", 0): 1.0})
    nodes = method.nodes(tape, start, grid)
    return Table(solver, grid, tuple(tape.times), tuple(tape.points), tuple(nodes))
