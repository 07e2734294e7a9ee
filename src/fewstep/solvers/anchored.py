r"""Steps that are anchored at the noise the sample began with (Lee et al., arXiv:2405.20320, released sampler).

On the linear path, with the data prediction ``m = x_t + (1 - t) v(x_t, t)``, a step from ``t`` to ``s`` is

    x_s = (1 - s) x_0 + s m,

where Euler's step is the same with the noise prediction ``x_t - t v`` in place of ``x_0``. Where trajectories are
straight the two are one. They are so for a flow of deterministic pairs only: of independent ones the state is *not* on
the line from its own start to its end, and no number of steps helps. For N(0, 1) to N(0, .7^2) the standard deviation
of the samples is .000, .329, .476, .581, .858 at 1, 2, 3, 4, 8 steps, and goes on growing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import final

from fewstep.errors import UserError
from fewstep.flow.grids import Grid
from fewstep.flow.paths import AffinePath, Linear
from fewstep.solvers.tape import Combination, Solver, Tape


@final
@dataclass(frozen=True)
class Anchored(Solver):
    """``x_s = (1 - s) x_0 + s (x_t + (1 - t) v)``; one call a step.

    Attributes:
        order: 0: it tends to the flow only where that is straight.
    """

    order: int = field(default=0, init=False)
    b: tuple[float, ...] = field(default=(1.0,), init=False)
    formula: str = field(default="x_b = (1 - t_b) x_0 + t_b (x_a + (1 - t_a) v_a)", init=False)
    source: str = field(default="arXiv:2405.20320, released sampler", init=False)

    @property
    def converges(self) -> bool:
        return False

    def nodes(self, tape: Tape, x: Combination, grid: Grid, path: AffinePath) -> list[Combination]:
        """The states at every grid time after the first.

        Raises:
            UserError: another path than the line; a grid that does not start at the noise.
        """
        if not isinstance(path, Linear):
            raise UserError(
                "solver 'anchored' draws the line from the noise to the data prediction, so it is for the linear path "
                f"only, and this flow is on {type(path).__name__}: take 'ddim' or 'euler'."
            )
        if grid[0] != 0.0:
            raise UserError(
                f"solver 'anchored' takes its start for the noise, so its grid starts at 0, not at {grid[0]:g}: take "
                "'euler' for a part of the way, or for the way back."
            )
        start: Combination | None = None
        nodes = []
        for t, s in itertools.pairwise(grid):
            state, v = tape.evaluate(x, t)
            start = state if start is None else start
            x = (1.0 - s) * start + s * (state + (1.0 - t) * v)
            nodes.append(x)
        return nodes
