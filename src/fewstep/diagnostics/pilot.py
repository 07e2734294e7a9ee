"""A pilot: a few hundred noises with their true endpoints, on which samplers of one field are judged.

The reference endpoints are RK4's, with as many steps as it takes until twice as many no longer change them. A table
of any solver is then run in its dense form ``y_j = a_j x_0 + sum_k b_jk v_k``. Rows at the beginning that are equal in
two consecutive tables are evaluated once, which halves the cost of searches that move one time of a grid at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.derivatives import rows_of
from fewstep.flow.field import Field, Velocity, as_field, check_conditions
from fewstep.solvers.solve import check_start, solve
from fewstep.solvers.tables import Table

Evaluation = tuple[float, float, bytes]  # time and dense coefficients of a table's row
RK4_CALLS = 4  # network calls of a step of the reference
REFERENCE = (16, 32, 64, 128, 256)  # RK4 steps tried for the reference, in this order
TRIED = 256  # noises on which they are tried
CONVERGED = 2e-4  # change of the endpoints, as a share of their spread, at which the reference is accepted; not tuned


def evaluations_of(times: tuple[float, ...], a: np.ndarray, b: np.ndarray) -> list[Evaluation]:
    """What decides the state at every row of a table: its time, and its dense coefficients."""
    return [(t, float(a[j]), b[j, :j].tobytes()) for j, t in enumerate(times)]


def shared(rows: list[Evaluation], others: list[Evaluation]) -> int:
    """How many rows at the beginning are equal in both tables."""
    same = 0
    while same < min(len(rows), len(others)) and rows[same] == others[same]:
        same += 1
    return same


def reference_rows(steps: int, noises: int) -> int:
    """Evaluations, summed over noises, of finding and solving a reference of so many RK4 steps, at least 16."""
    tried = [number for number in REFERENCE if number <= 2 * steps]
    return RK4_CALLS * (min(TRIED, noises) * sum(tried) + noises * steps)


def reference_steps(
    field: Field, x0: Tensor, cond: Mapping[str, Any], affordable: Callable[[int, int], bool] | None = None
) -> tuple[int, bool]:
    """The fewest steps whose endpoints agree with those of twice as many.

    Args:
        field: ``v(x, t, **cond)``.
        x0: noises to try them on, (B, ...).
        cond: their conditions.
        affordable: whether a first number of steps may be tried, and a second one be the reference's; None for always.

    Returns:
        The number of RK4 steps, and whether it was not the last that could be afforded.

    Raises:
        UserError: endpoints that are not finite.
    """
    coarse = _solved(field, x0, cond, REFERENCE[0])
    for steps in REFERENCE[:-1]:
        if affordable is not None and not affordable(2 * steps, steps):
            return steps, False
        fine = _solved(field, x0, cond, 2 * steps)
        spread = (fine.double() - fine.double().mean(0)).square().mean().sqrt().clamp_min(1e-12)
        if float((fine - coarse).double().square().mean().sqrt() / spread) <= CONVERGED:
            return steps, True
        if affordable is not None and not affordable(0, 2 * steps):
            return steps, False
        coarse = fine
    return REFERENCE[-1], True


def _solved(field: Field, x0: Tensor, cond: Mapping[str, Any], steps: int) -> Tensor:
    x = solve(field, x0, solver="rk4", steps=steps, cond=cond).x
    if not bool(torch.isfinite(x).all()):
        raise UserError(
            f"the flow ends in NaN or infinite values after {steps} RK4 steps, so its samplers have no reference: "
            "check the network's weights, its conditions and the scale of the start."
        )
    return x


@final
class Pilot:
    """Noises, conditions and reference endpoints.

    Args:
        v: ``v(x, t, **cond)``.
        x0: base samples, (B, ...).
        cond: conditions, tensors with one row per sample; what is no tensor is handed on as it is.
        steps: RK4 steps of the reference; chosen from ``REFERENCE`` when absent.

    Attributes:
        x0, x1: starts and reference endpoints.
        spread: root mean square deviation of ``x1`` from its mean, per dimension.
        steps: RK4 steps of the reference.
        nfe: network evaluations per sample spent so far.

    Raises:
        UserError: a start that :func:`fewstep.solve` refuses; conditions of another length; endpoints that are not
            finite.
    """

    def __init__(
        self, v: Velocity, x0: Tensor, cond: Mapping[str, Any] | None = None, *, steps: int | None = None
    ) -> None:
        check_start(x0)
        check_conditions(cond or {}, len(x0))
        self.field: Field = as_field(v)
        self._before = self.field.calls
        self.x0, self.cond = x0, dict(cond or {})
        self._evaluated: list[Evaluation] = []  # the rows of the table evaluated last
        self._velocities: list[Tensor] = []
        if steps is None:
            steps, _ = reference_steps(self.field, x0[:TRIED], rows_of(self.cond, len(x0), slice(TRIED)))
        self.steps, self.x1 = steps, _solved(self.field, x0, self.cond, steps)
        centred = self.x1.double() - self.x1.double().mean(0)
        self.spread = max(float(centred.square().mean().sqrt()), 1e-12)

    @property
    def nfe(self) -> int:
        """Network evaluations per sample spent so far."""
        return self.field.calls - self._before

    def __len__(self) -> int:
        return len(self.x0)

    def part(self, count: int) -> Pilot:
        """The pilot of the first ``count`` noises; its reference is not solved again."""
        return self._rows_of(slice(count))

    def split(self, count: int) -> tuple[Pilot, Pilot]:
        """The pilots of the first ``count`` noises and of the others."""
        return self._rows_of(slice(count)), self._rows_of(slice(count, None))

    def _rows_of(self, rows: slice) -> Pilot:
        smaller = object.__new__(Pilot)
        smaller.field, smaller._before = self.field, self._before
        smaller.x0, smaller.x1 = self.x0[rows], self.x1[rows]
        smaller.cond = rows_of(self.cond, len(self.x0), rows)
        smaller.steps, smaller.spread = self.steps, self.spread
        smaller._evaluated, smaller._velocities = [], []
        return smaller

    def error(self, table: Table) -> float:
        """Root mean square endpoint error of a table, per dimension; infinite where it diverges."""
        error = float((self.end(table) - self.x1).double().square().mean().sqrt())
        return error if np.isfinite(error) else float("inf")

    @torch.no_grad()
    def end(self, table: Table) -> Tensor:
        """The endpoints of a deterministic table, (B, ...)."""
        a, b = table.dense
        self._evaluate(table.times, a, b)
        return self.state(a[-1], b[-1])

    @torch.no_grad()
    def velocities(self, table: Table) -> list[Tensor]:
        """The velocities that a table evaluates, one (B, ...) per row."""
        a, b = table.dense
        self._evaluate(table.times, a, b)
        return list(self._velocities)

    def _evaluate(self, times: tuple[float, ...], a: np.ndarray, b: np.ndarray) -> None:
        rows = evaluations_of(times, a, b)
        same = shared(rows, self._evaluated)
        del self._velocities[same:]
        for j in range(same, len(rows)):
            x = self.state(a[j], b[j, :j])
            self._velocities.append(self.field(x, x.new_full((len(x),), times[j]), **self.cond).to(x.dtype))
        self._evaluated = rows

    def state(self, a: float, b: np.ndarray) -> Tensor:
        """``a x_0 + sum_k b_k v_k`` with the velocities of the table evaluated last."""
        x = self.x0 * float(a)
        for weight, velocity in zip(b.tolist(), self._velocities, strict=False):
            x.add_(velocity, alpha=weight)
        return x

    def repeated(self, number: int) -> dict[str, Any]:
        """The conditions of ``number`` copies of the pilot, one after the other."""
        return {
            name: value.repeat(number, *(1,) * (value.ndim - 1)) if isinstance(value, Tensor) else value
            for name, value in self.cond.items()
        }
