"""Explicit Runge-Kutta methods, from their Butcher tableaux.

    k_i = v(x + h sum_j a_ij k_j, t + c_i h),      x(t + h) = x + h sum_i b_i k_i.

(Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, section II.1.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import final

from fewstep.flow.grids import Grid
from fewstep.flow.paths import AffinePath
from fewstep.solvers.tape import Combination, Solver, Tape


@final
@dataclass(frozen=True)
class RungeKutta(Solver):
    """An explicit Runge-Kutta method, given by its Butcher tableau, which is checked for consistency.

    Attributes:
        a: the stages' rows (the first is empty).
        b: the weights.
        order: its nominal order of convergence.
        formula, source: see :class:`~fewstep.solvers.tape.Solver`.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    formula: str
    source: str = "Hairer et al., Solving ODEs I, II.1"

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
            # a stage with c = 1 is evaluated at s itself, because t + (s - t) may differ from s by rounding
            state, slope = tape.evaluate(point, s if c == 1.0 else t + c * h)
            slopes.append(slope)
            if i == 0:
                x = state
        end = x
        for weight, slope in zip(self.b, slopes, strict=True):
            if weight:
                end = end + (h * weight) * slope
        return end

    def nodes(self, tape: Tape, x: Combination, grid: Grid, path: AffinePath) -> list[Combination]:
        """The states at every grid time after the first. The path is not used."""
        nodes = []
        for t, s in itertools.pairwise(grid):
            x = self.step(tape, x, t, s)
            nodes.append(x)
        return nodes
