r"""Steps from the initial noise to the current data prediction (Lee et al., arXiv:2405.20320, released sampler).

On the linear path, with the data prediction ``m = x_t + (1 - t) v(x_t, t)``, a step from ``t`` to ``s`` is

    x_s = (1 - s) x_0 + s m,

Euler's step is the same with the noise prediction ``x_t - t v`` in place of ``x_0``. The two steps are equal if the
trajectories are straight, as they are for a flow trained on deterministic pairs. For a flow trained on independent
pairs the state is *not* on the line from its start to its end, and the method does not converge: for N(0, 1) to N(0,
.7^2) the standard deviation of the samples is .000, .329, .476, .581, .858 at 1, 2, 3, 4, 8 steps, and increases
further.
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
        order: 0, because it converges to the flow only if the trajectories are straight.
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
                "solver 'anchored' is for the linear path only, because its steps lie on the line from the noise to "
                f"the data prediction; this flow is on {type(path).__name__}. Use 'ddim' or 'euler'."
            )
        if grid[0] != 0.0:
            raise UserError(
                f"solver 'anchored' uses its start as the noise, so its grid must start at 0, not at {grid[0]:g}. Use "
                "'euler' for a grid that starts elsewhere, or that decreases."
            )
        start: Combination | None = None
        nodes = []
        for t, s in itertools.pairwise(grid):
            state, v = tape.evaluate(x, t)
            start = state if start is None else start
            x = (1.0 - s) * start + s * (state + (1.0 - t) * v)
            nodes.append(x)
        return nodes
