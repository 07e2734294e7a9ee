"""What a diagnosis or a tuning costs, in network rows: calls of the network times the samples in them.

Rows are counted from the numbers of nodes, steps and unknowns that the code runs with, before it runs. What they take
in seconds is measured by timing one call of the network and one derivative.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.derivatives import TRIED_ROWS, Derivative, rows_of
from fewstep.flow.field import Field

Watch = Callable[[int, int], None]  # progress(done, total), in network rows; the total may change
TRIES = 7  # evaluations with which a network's derivative is tried: two finite differences of three, and itself
TIMED_ROWS = 256  # rows of a timed call


@final
@dataclass(frozen=True)
class Cost:
    """Network rows.

    Attributes:
        velocities: rows of plain evaluations.
        derivatives: rows that are differentiated as well, forwards or in reverse; each takes the time of a few.

    >>> Cost(100, 20) + Cost(1)
    Cost(velocities=101, derivatives=20)
    """

    velocities: int = 0
    derivatives: int = 0

    @property
    def rows(self) -> int:
        """All of them."""
        return self.velocities + self.derivatives

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.velocities + other.velocities, self.derivatives + other.derivatives)

    def __mul__(self, factor: int) -> Cost:
        return Cost(self.velocities * factor, self.derivatives * factor)


@final
@dataclass(frozen=True)
class Speed:
    """Seconds that a network takes for one row.

    Attributes:
        velocity: of a plain evaluation.
        derivative: of a derivative along one direction.
    """

    velocity: float
    derivative: float

    def seconds(self, cost: Cost) -> float:
        """Estimated seconds of a cost."""
        return cost.velocities * self.velocity + cost.derivatives * self.derivative


@final
class RowCount(Field):
    """Count network evaluations of single samples: calls times rows.

    Args:
        field: the field whose calls are counted.

    Attributes:
        rows: evaluations so far, summed over samples.
        watch: called with ``rows`` after every call; None for nobody.
    """

    def __init__(self, field: Field) -> None:
        self.field = field
        self.rows = 0
        self.watch: Callable[[int], None] | None = None

    @property
    def calls(self) -> int:  # type: ignore[override]
        """Network calls of the field so far."""
        return self.field.calls

    def __call__(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        """The field's velocity in the dtype of ``x``."""
        before = self.field.calls
        v = self.field(x, t, **cond)
        self.rows += (self.field.calls - before) * len(x)
        if self.watch is not None:
            self.watch(self.rows)
        return v.to(x.dtype)


@final
class Allowance:
    """The network rows that a measurement may spend, what it has reduced for them, and how far it is.

    Args:
        field: the field whose rows are counted.
        limit: most rows to spend; None for no limit.
        progress: called as ``progress(done, total)`` after every network call, from the first known total on.

    Attributes:
        notes: what was reduced to stay within the limit.

    Raises:
        UserError: a limit that is no whole number of at least 1.
    """

    def __init__(self, field: RowCount, limit: int | None, progress: Watch | None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise UserError(f"max_rows must be a whole number of network rows of at least 1, got {limit!r}.")
        self.field, self.limit, self.progress = field, limit, progress
        self.notes: list[str] = []
        self._total = 0
        if progress is not None:
            field.watch = self._report

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self.limit is not None

    @property
    def left(self) -> int:
        """Network rows that may still be spent; without a limit, more than any measurement takes."""
        return sys.maxsize if self.limit is None else self.limit - self.field.rows

    def note(self, reduced: str) -> None:
        """Record that something was reduced."""
        self.notes.append(f"{reduced}, to stay within {self.limit:,} network rows")

    def expect(self, further: int) -> None:
        """Say how many rows are still to come."""
        self._total = self.field.rows + further

    def add(self, further: int) -> None:
        """Say that so many more rows are to come than was said before."""
        self._total += further

    def finish(self) -> None:
        """Report the rows spent as all there were."""
        if self.progress is not None:
            self.progress(self.field.rows, self.field.rows)

    def _report(self, done: int) -> None:
        if self.progress is not None and self._total:
            self._total = max(self._total, done)
            self.progress(done, self._total)


@torch.no_grad()
def measure_speed(field: Field, x: Tensor, cond: Mapping[str, Any], *, derivatives: bool = True) -> Speed:
    """Time two calls of the network and two derivatives on at most 256 of the rows, after one of each to warm up.

    Args:
        field: ``v(x, t, **cond)``.
        x: samples, (B, ...).
        cond: their conditions.
        derivatives: whether to time a derivative; its time is given as 0 otherwise.
    """
    few, some = x[:TIMED_ROWS], rows_of(cond, len(x), slice(TIMED_ROWS))
    t, before = few.new_full((len(few),), 0.5), field.calls
    v = field(few, t, **some)
    rows = len(few) * (field.calls - before)
    plain = _seconds(lambda: field(few, t, **some)) / rows
    if not derivatives:
        return Speed(plain, 0.0)
    derivative = Derivative(field)
    derivative(few, t, v, torch.ones_like(t), **some)
    each = 3 if derivative.used == "finite_difference" else 1
    seconds = _seconds(lambda: derivative(few, t, v, torch.ones_like(t), **some)[1])
    return Speed(plain, seconds / (rows * each))


def _seconds(run: Callable[[], Tensor]) -> float:
    """The shorter of two runs: other processes only lengthen one."""
    found = []
    for _ in range(2):
        began = time.perf_counter()
        float(run().flatten()[0])  # waits for a device that runs by itself
        found.append(time.perf_counter() - began)
    return min(found)


def trajectories(nodes: int, noises: int, derived: int) -> Cost:
    """RK4 trajectories on ``nodes`` steps: 4 evaluations a step, 2 at the end, and a derivative at every node."""
    return Cost(noises * (4 * nodes + 2), derived * (nodes + 1))


def sensitivities(nodes: int, derived: int) -> Cost:
    """The linear equation and its adjoint on ``nodes / 2`` panels, 3 derivatives each, and their comparison."""
    return Cost(0, derived * (2 * 3 * (nodes // 2) + 2))


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of noises, (M, ...), as a tuple.

    Raises:
        UserError: it is no sequence of at least two whole numbers of at least 1.
    """
    found = tuple(shape)
    if len(found) < 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in found):
        raise UserError(f"give the shape of the noises, (M, ...) like x0.shape, got {found}.")
    return found


def most_that_fits(least: int, most: int, cost: Callable[[int], int], limit: int) -> int | None:
    """The largest number from ``least`` to ``most`` whose cost, which increases, is at most ``limit``; None for none.

    >>> most_that_fits(1, 100, lambda n: 3 * n, 20)
    6
    """
    if cost(least) > limit:
        return None
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if cost(middle) <= limit else (least, middle - 1)
    return least


def tried_rows(first: int) -> int:
    """Rows on which a derivative is tried, where its first call has ``first`` rows."""
    return min(TRIED_ROWS, first)
