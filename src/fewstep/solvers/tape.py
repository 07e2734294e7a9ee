"""Linear combinations of states, velocities and noise, the tape that records them, and the base class of solvers.

A solver's formulas run once on a :class:`Tape`. Where a network would be evaluated, the tape returns a symbol (an atom)
for the velocity. :mod:`fewstep.solvers.tables` makes a table from the result.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from fewstep.flow.grids import Grid
from fewstep.flow.paths import AffinePath

# ("y", j): the state of row j; ("v", j): the velocity evaluated there; ("z", k): fresh noise number k, N(0, I)
Atom = tuple[str, int]


@final
@dataclass(frozen=True)
class Combination:
    """A linear combination of states, velocities and noise: ``terms`` maps each atom to its coefficient."""

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
    """Records a solver's formulas; see :class:`~fewstep.solvers.tables.Table` for the result."""

    def __init__(self) -> None:
        self.points: list[Combination] = []
        self.times: list[float] = []
        self.noises = 0

    def evaluate(self, point: Combination, t: float) -> tuple[Combination, Combination]:
        """Record a network call at ``(point, t)``; return the state and the velocity as new atoms."""
        j = len(self.points)
        self.points.append(point)
        self.times.append(float(t))
        return Combination({("y", j): 1.0}), Combination({("v", j): 1.0})

    def noise(self) -> Combination:
        """Fresh noise N(0, I), independent of everything else, as a new atom."""
        self.noises += 1
        return Combination({("z", self.noises - 1): 1.0})


class Solver(ABC):
    """A fixed-step solver: formulas that run on a tape.

    Attributes:
        order: order of convergence on smooth fields, away from singular ends and after start-up.
        b: weights of a step's calls on a constant field; they sum to one.
        formula: one step in one line, in the notation of :data:`fewstep.solvers.show.NOTATION`.
        source: the paper or book, and the place in it.
    """

    order: int
    b: tuple[float, ...]
    formula: str
    source: str

    @property
    def stochastic(self) -> bool:
        """Whether its steps add fresh noise."""
        return False

    @property
    def converges(self) -> bool:
        """Whether it converges to the flow of every smooth field, and not of fields with straight trajectories only."""
        return True

    @property
    def calls(self) -> int:
        """Network calls per step."""
        return len(self.b)

    @abstractmethod
    def nodes(self, tape: Tape, x: Combination, grid: Grid, path: AffinePath) -> list[Combination]:
        """Run the formulas on ``tape`` from state ``x`` at ``grid[0]``.

        Args:
            tape: records the network calls.
            x: the start.
            grid: the times, increasing or decreasing.
            path: the affine path on which the field was trained.

        Returns:
            The state at every grid time after the first.
        """
