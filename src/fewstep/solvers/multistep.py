r"""Linear multistep solvers: Adams, DDIM, DEIS, DPM-Solver++ and UniPC from one formula.

With the constants of :mod:`fewstep.solvers.forms`, a step with nodes ``z_j`` (earlier values of ``q``) is

    x_b = [step with q constant] + sum_j c_j (q_j - q_a),      sum_j c_j r_j^k = M_k,  k = 1, …, number of nodes,

``r_j = (z_j - z_a) / (z_b - z_a)``. It is exact if ``q`` is a polynomial in ``z`` whose degree is at most the number of
nodes. A *corrector* (UniPC, arXiv:2302.04867, alg. 1; Adams-Moulton for ``v`` in ``t``) repeats the step after the
network was called at the predicted ``x_b``, with ``q_b`` (``r = 1``) as a further node. The next step uses the same
call, so N steps cost N calls. Because the step is linear, the corrected state is the predicted one plus a short sum
over nodes.

The first steps have fewer earlier values, so their order is lower. If the last step is singular in the form (data forms
end at sigma = 0), the order falls to one towards the end: a step with ``r`` steps to go, itself included, has at most
``r - 1`` nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import final

import numpy as np

from fewstep.flow.grids import Grid
from fewstep.flow.paths import AffinePath
from fewstep.solvers.forms import Form, Schedule
from fewstep.solvers.tape import Combination, Solver, Tape

# Two nodes closer than this share of the step are merged: their weights grow like its inverse. Chosen, not tuned.
MIN_NODE_DISTANCE = 1e-4

Rule = Callable[[Form, int, int], list[float]]  # (form, step, number of nodes) -> the moments to match


def exact(form: Form, i: int, count: int) -> list[float]:
    """The moments ``M_1, …, M_count``, as integrals."""
    return form.moments(i, count)


def bh2(form: Form, i: int, count: int) -> list[float]:
    """With one node ``M_1 = M_0 / 2``, which is DPM-Solver++(2M) (arXiv:2211.01095, alg. 2) and UniPC's B_2."""
    total = form.total(i)
    return form.moments(i, count) if count != 1 or total is None else [total / 2]


def bh1(form: Form, i: int, count: int) -> list[float]:
    """With one node ``M_1 = alpha_b h / 2``: UniPC's B_1 (arXiv:2302.04867, sec. 3.4)."""
    return form.moments(i, count) if count != 1 else [form.total_at_end_density(i) / 2]


def halved_second_moment(form: Form, i: int, count: int) -> list[float]:
    """As :func:`bh2`, but with ``M_2 / 2`` for two nodes, as in the released code of DPM-Solver++(3M).

    Its second difference ``(D_10 - D_11) / (r_0 + r_1)`` is half of ``h^2 m''`` (a divided difference is half the
    second derivative), so the result is of order two only.
    """
    moments = bh2(form, i, count)
    return [moments[0], moments[1] / 2] if count == 2 else moments


@final
@dataclass(frozen=True)
class Multistep(Solver):
    """A linear multistep solver.

    Attributes:
        form: the predicted quantity ``q`` and the variable ``z`` of the polynomial.
        values: how many values of ``q`` the predictor uses, its own included.
        order: order of convergence on smooth fields, away from singular ends and after start-up.
        corrector: whether each step is corrected with the next network call.
        rule: the moments that the coefficients match.
        formula, source: see :class:`~fewstep.solvers.tape.Solver`.
    """

    form: type[Form]
    values: int
    order: int
    formula: str
    source: str
    corrector: bool = False
    rule: Rule = exact
    b: tuple[float, ...] = field(default=(1.0,), init=False)

    def nodes(self, tape: Tape, x: Combination, grid: Grid, path: AffinePath) -> list[Combination]:
        """The predicted states at every grid time after the first; the network is called at these."""
        form = self.form(Schedule(path, grid))
        last = len(grid) - 2
        falling = not form.regular(last)
        past: list[tuple[float, Combination]] = []  # z and q of earlier rows, newest first
        step: _Step | None = None
        nodes = []
        for i in range(last + 1):
            state, v = tape.evaluate(x, grid[i])
            q, z = form.quantity(state, v, i), form.position(i)
            x = form.constant(state, v, i)
            if step is not None and self.corrector and (correction := step.corrected(q, z)) is not None:
                x = x + form.carry(i) * correction
            allowed = min(self.values, last - i + 1 if falling else self.values) - 1
            step = _Step(form, self.rule, i, q, past[:allowed] if form.regular(i) else [])
            x = x + step.change
            nodes.append(x)
            if z is not None:
                past = [(z, q), *past][: self.values - 1]
        return nodes


@final
class _Step:
    """One step's ``sum_j c_j (q_j - q_a)`` and its correction."""

    def __init__(self, form: Form, rule: Rule, i: int, q: Combination, past: list[tuple[float, Combination]]) -> None:
        self.form, self.rule, self.i, self.q = form, rule, i, q
        self.past = self._apart(past)
        self.coefficients = self._solve([z for z, _ in self.past])
        self.change = self._sum(self.coefficients, [value for _, value in self.past])

    def corrected(self, q_b: Combination, z_b: float | None) -> Combination | None:
        """Corrected minus predicted state; None if the measure of the step is infinite."""
        values = [*(value for _, value in self.past), q_b]
        if self.form.regular(self.i):
            assert z_b is not None
            weights = self._solve([*(z for z, _ in self.past), z_b])
        else:  # a singular start: one node with M_1 = M_0 / 2
            total = self.form.total(self.i)
            if total is None:
                return None
            weights = [total / 2]
        change = [w - c for w, c in zip(weights, [*self.coefficients, 0.0], strict=True)]
        return self._sum(change, values)

    def _apart(self, past: list[tuple[float, Combination]]) -> list[tuple[float, Combination]]:
        """The nodes without those too close to a newer one or to ``z_a``, whose difference would be rounding error."""
        kept, newest = [], 0.0
        for z, value in past:
            (r,) = self._ratios([z])
            if abs(r - newest) > MIN_NODE_DISTANCE:
                kept.append((z, value))
                newest = r
        return kept

    def _ratios(self, nodes: list[float]) -> np.ndarray:
        """``r_j = (z_j - z_a) / (z_b - z_a)``."""
        a, b = self.form.position(self.i), self.form.position(self.i + 1)
        assert a is not None, "a regular step"
        assert b is not None, "a regular step"
        return (np.array(nodes) - a) / (b - a)

    def _solve(self, nodes: list[float]) -> list[float]:
        """The coefficients ``c_j`` that match the moments."""
        if not nodes:
            return []
        powers = self._ratios(nodes) ** np.arange(1, len(nodes) + 1)[:, None]
        return np.linalg.solve(powers, self.rule(self.form, self.i, len(nodes))).tolist()

    def _sum(self, coefficients: list[float], values: list[Combination]) -> Combination:
        result = Combination({})
        for coefficient, value in zip(coefficients, values, strict=True):
            result = result + coefficient * (value - self.q)
        return result
