"""The one loop that runs any solver table.

A :class:`Plan` is a table prepared for running: for each row the terms to add, and the states and velocities that no
later row uses. Plans and time tensors are cached, because for small networks the time of the loop itself is a large
share of the solve.

There are two loops. The first adds a row's terms one by one; ``x + h v`` is one kernel. For longer rows and small
tensors the number of kernels decides the time, so the second loop uses the dense form of the table: all states are one
block, and one kernel adds a velocity to all later states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.field import CountedField, Field
from fewstep.solvers.tables import Table
from fewstep.solvers.tape import Atom

MAX_CACHED_SHAPES = 8  # batch shapes whose time tensors a plan keeps; chosen, not tuned
MAX_CACHED_TIMES = 1 << 20  # entries; larger blocks of times are not kept; chosen, not tuned
# Bounds for the dense form, within which it is faster than the terms one by one, and as accurate.
MAX_DENSE_ENTRIES = 1 << 16  # largest block of states
MAX_DENSE_ROWS = 256  # the dense form has the square of this number of entries
MIN_DENSE_OPERATIONS = 2.0  # tensor operations per row, in the mean
MAX_DENSE_COEFFICIENTS = 16.0  # sum of a row's absolute coefficients, by which rounding errors are multiplied


Noise = Callable[[int], Tensor]


class Row(NamedTuple):
    """How a state is formed.

    Slot ``2 j`` holds the state of row j, slot ``2 j + 1`` its velocity; behind those of all rows come the noises.
    """

    base: int  # the slot of the first term
    factor: float  # the coefficient of the first term, usually one
    terms: tuple[tuple[int, float], ...]  # the slots and coefficients of the other terms
    free: tuple[int, ...]  # slots that no later state uses
    keep: bool  # whether a later row uses this state itself
    node: bool  # whether this is the state at a grid time
    draw: tuple[int, ...]  # numbers of the noises that are first used in this state


class Work(NamedTuple):
    """Memory of the dense form, which holds all states."""

    block: Tensor  # (rows + 1, B, ...)
    states: tuple[Tensor, ...]  # the rows of the block
    later: tuple[Tensor, ...]  # for each row, the rows after it


@final
class Plan:
    """A solver table prepared for running.

    Attributes:
        table: the solver on its grid.
        rows: one per network call, in order; the first is the start itself.
        end: how the end point is formed.
    """

    def __init__(self, table: Table) -> None:
        self.table = table
        nodes = {id(node) for node in table.nodes}
        states = [*table.points, table.nodes[-1]]
        assert nodes <= {id(state) for state in states}, "every grid time's state is a row's or the end point"
        self.noises = 2 * len(table.points)  # slot of the first noise
        sums = [[(self._slot(atom), c) for atom, c in state.terms.items() if c] for state in states]
        free, draw = self._first_and_last(sums)
        kept = {slot for terms in sums[1:] for slot, _ in terms}
        rows = [
            Row(*self._terms(sums[j]), free[j], keep=2 * j in kept, node=j == 0 or id(state) in nodes, draw=draw[j])
            for j, state in enumerate(states)
        ]
        self.rows, self.end = tuple(rows[:-1]), rows[-1]
        noises = 1 + max((k for row in rows for k in row.draw), default=-1)
        self.slots = self.noises + noises
        self._times: dict[tuple[int, torch.dtype, torch.device], tuple[Tensor, int, tuple[Tensor, ...]]] = {}
        self._weights: dict[tuple[torch.dtype, int], tuple[Tensor, tuple[Tensor, ...]]] = {}
        self._work: dict[tuple[torch.Size, torch.dtype], Work] = {}
        self.dense = self._dense_wins()

    def _slot(self, atom: Atom) -> int:
        kind, j = atom
        return self.noises + j if kind == "z" else 2 * j + (kind == "v")

    def _terms(self, items: list[tuple[int, float]]) -> tuple[int, float, tuple[tuple[int, float], ...]]:
        """Base, factor and other terms: states first, and of them those with coefficient one."""
        assert items, "a state is never empty"
        first, *others = sorted(items, key=lambda item: (item[0] >= self.noises or item[0] % 2, item[1] != 1.0, item))
        return *first, tuple(others)

    def _first_and_last(self, sums: list[list[tuple[int, float]]]) -> tuple[list[tuple[int, ...]], ...]:
        """For every row the slots that no later row uses, and the noises that no earlier row uses."""
        last: dict[int, int] = {}
        first: dict[int, int] = {}
        for j, terms in enumerate(sums):
            for slot, _ in terms:
                last[slot] = j
                if slot >= self.noises:
                    first.setdefault(slot - self.noises, j)
        free: list[list[int]] = [[] for _ in sums]
        draw: list[list[int]] = [[] for _ in sums]
        for slot, j in last.items():
            if j > 0:  # row 0 is the start itself
                free[j].append(slot)
        for k, j in first.items():
            draw[j].append(k)
        return [tuple(slots) for slots in free], [tuple(numbers) for numbers in draw]

    def _dense_wins(self) -> bool:
        """Whether the dense form is faster for small problems, and as accurate."""
        rows = [*self.rows[1:], self.end]
        operations = sum(len(row.terms) + (row.factor != 1.0) for row in rows) / len(rows)
        if operations <= MIN_DENSE_OPERATIONS or len(rows) > MAX_DENSE_ROWS or self.table.stochastic:
            return False
        a, b = self.table.dense
        return bool((np.abs(a) + np.abs(b).sum(1)).max() <= MAX_DENSE_COEFFICIENTS)

    def weights(self, dtype: torch.dtype, dimensions: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``a`` and, for each row k, the column ``b_jk`` for j > k, shaped for states with so many axes."""
        found = self._weights.get((dtype, dimensions))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                a, b = (torch.from_numpy(part).to(dtype) for part in self.table.dense)
                a, b = a.reshape(-1, *([1] * dimensions)), b.reshape(*b.shape, *([1] * dimensions))
                found = a, tuple(b[k + 1 :, k] for k in range(b.shape[1]))
            self._weights[dtype, dimensions] = found
        return found

    def borrow(self, shape: torch.Size, dtype: torch.dtype) -> Work:
        """Memory for the dense form, for the caller's use alone until :meth:`give_back` stores it for the next solve.

        A network that solves with the same plan, or another thread, gets memory of its own.
        """
        found = self._work.pop((shape, dtype), None)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                block = torch.empty((len(self.rows) + 1, *shape), dtype=dtype)
                found = Work(block, block.unbind(0), tuple(block[k + 1 :] for k in range(len(self.rows))))
        return found

    def give_back(self, work: Work) -> None:
        """Store borrowed memory for the next solve."""
        if len(self._work) >= MAX_CACHED_SHAPES:
            self._work.clear()
        self._work[work.block.shape[1:], work.block.dtype] = work

    def times(self, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """One ``(batch,)`` tensor of times per row.

        They are views of one block and share its version counter: a block that a network wrote into is not reused.
        """
        key = (batch, dtype, device)
        found = self._times.get(key)
        if found is not None and found[0]._version == found[1]:
            return found[2]
        # not an inference tensor: a later solve with gradients may use it
        with torch.inference_mode(False), torch.no_grad():
            column = torch.tensor(self.table.times, dtype=torch.float64).to(dtype).to(device)
            block = column[:, None].repeat(1, batch)
            rows = block.unbind(0)
        if block.numel() <= MAX_CACHED_TIMES:
            if len(self._times) >= MAX_CACHED_SHAPES:
                self._times.clear()
            self._times[key] = (block, block._version, rows)
        return rows


def run(
    plan: Plan,
    field: Field,
    x0: Tensor,
    cond: Mapping[str, Any],
    *,
    trajectory: bool = False,
    noise: Noise | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Run a plan from ``x0``; return the end point and, if asked, the states at the grid's times.

    ``noise(k)`` returns noise number k of a stochastic solver, shaped like ``x0``. The states are not changed in place
    after the network has seen them, because a network may return its own input, and a caller may keep it.
    """
    if plan.dense and not torch.is_grad_enabled() and _small(plan, x0):
        return _run_dense(plan, field, x0, cond, trajectory)
    times = plan.times(x0.shape[0], x0.dtype, x0.device)
    return run_terms(plan.rows, plan.end, plan.slots, field, x0, times, cond, trajectory, noise)


def run_terms(
    rows: tuple[Row, ...],
    last: Row,
    slots: int,
    field: Field,
    x0: Tensor,
    times: tuple[Tensor, ...],
    cond: Mapping[str, Any],
    trajectory: bool = False,
    noise: Noise | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """:func:`run` term by term, on any device and in any dtype, with or without gradients."""
    dtype, call = x0.dtype, _uncounted(field)
    kept: list[Any] = [None] * slots
    path: list[Tensor] = []
    x, slot, noises = x0, 0, 2 * len(rows)
    for (base, factor, terms, free, keep, node, draw), t in zip(rows, times, strict=True):
        if slot:
            for k in draw:
                kept[noises + k] = _drawn(noise, k)
            x = _form(kept, base, factor, terms, free)
        if keep:
            kept[slot] = x
        if trajectory and node:
            path.append(x)
        velocity = call(x, t, **cond)
        if slot == 0 or velocity.dtype is not dtype:
            velocity = _like(velocity, x)
        kept[slot + 1] = velocity
        del velocity  # so that it is freed before the next call if no later row uses it
        slot += 2
    if call is not field:
        field.calls += len(rows)
    for k in last.draw:
        kept[noises + k] = _drawn(noise, k)
    x = _form(kept, last.base, last.factor, last.terms, last.free)
    if trajectory:
        path.append(x)
    return x, path


def _small(plan: Plan, x0: Tensor) -> bool:
    """Whether the dense form may be used for this start: by its size, dtype and device."""
    return (
        x0.numel() * (len(plan.rows) + 1) <= MAX_DENSE_ENTRIES
        and x0.dtype in (torch.float32, torch.float64)
        and x0.device.type == "cpu"
        and type(x0) is Tensor
    )


def _run_dense(
    plan: Plan, field: Field, x0: Tensor, cond: Mapping[str, Any], trajectory: bool
) -> tuple[Tensor, list[Tensor]]:
    """:func:`run` by the dense form: all states start as ``a_j x_0``, and each velocity is added to all later ones."""
    shape, dtype, x, call = x0.shape, x0.dtype, x0, _uncounted(field)
    path: list[Tensor] = []
    start, columns = plan.weights(dtype, len(shape))
    work = plan.borrow(shape, dtype)
    torch.mul(start, x0, out=work.block)
    j = 0
    for t in plan.times(shape[0], dtype, x0.device):
        if j:
            x = work.states[j].clone()
        if trajectory and plan.rows[j].node:
            path.append(x)
        velocity = call(x, t, **cond)
        if j == 0 or velocity.dtype is not dtype:
            velocity = _like(velocity, x)
        work.later[j].addcmul_(columns[j], velocity)
        j += 1
    if call is not field:
        field.calls += j
    x = work.states[j].clone()
    plan.give_back(work)
    if trajectory:
        path.append(x)
    return x, path


def _uncounted(field: Field) -> Callable[..., Any]:
    """The network itself if every evaluation counts one (the loop then counts), else the field."""
    return field.velocity if isinstance(field, CountedField) else field


def _form(
    kept: list[Any], base: int, factor: float, terms: tuple[tuple[int, float], ...], free: tuple[int, ...]
) -> Tensor:
    """Sum of coefficient × tensor: ``x + h v`` is one kernel; further terms are added in place."""
    x: Tensor = kept[base]
    own = factor != 1.0
    if own:
        x = x * factor
    for slot, coefficient in terms:
        x = x.add_(kept[slot], alpha=coefficient) if own else x.add(kept[slot], alpha=coefficient)
        own = True
    for slot in free:
        kept[slot] = None
    return x


def _drawn(noise: Noise | None, k: int) -> Tensor:
    assert noise is not None, "a stochastic plan needs noise"
    return noise(k)


def _like(velocity: Any, x: Tensor) -> Tensor:
    """The velocity in the dtype of its state, after a check of its type and shape."""
    if not isinstance(velocity, Tensor):
        raise UserError(
            f"the network returned a {type(velocity).__name__}, and a velocity must be a tensor shaped like "
            "its input: wrap the network in a function that returns the tensor alone."
        )
    if velocity.shape != x.shape:
        raise UserError(
            f"the network returned shape {tuple(velocity.shape)} for an input of shape {tuple(x.shape)}: "
            "a velocity must have its input's shape."
        )
    return velocity if velocity.dtype is x.dtype else velocity.to(x.dtype)
