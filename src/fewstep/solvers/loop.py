"""The one loop that runs any solver table.

A :class:`Plan` is the table made ready: per row the terms to add up, and which states and velocities nobody
needs any more. Plans and time tensors are cached, because with small networks the loop's own work is what a
user would notice.

There are two loops. One adds up a row's terms, which is one kernel for ``x + h v``. Where rows are longer and tensors
small, a kernel costs the same whatever it does, and the other loop takes the dense form of the table: all states are
made at once in one block, and each velocity is added to all later ones by one kernel.
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

CACHED_SHAPES = 8  # batch shapes whose time tensors a plan keeps
CACHED_NUMBERS = 1 << 20  # larger blocks of times are made anew for every solve
DENSE_NUMBERS = 1 << 16  # largest block of states for which one kernel beats the terms one by one
DENSE_ROWS = 256  # most rows for which the dense form is computed at all: it has their number squared
DENSE_TERMS = 2.0  # mean number of tensor operations a row beyond which it does
DENSE_SIZE = 16.0  # largest sum of a row's absolute coefficients: beyond, the dense form would lose digits


Noise = Callable[[int], Tensor]


class Row(NamedTuple):
    """How a state is formed.

    Slot ``2 j`` holds the state of row j, slot ``2 j + 1`` its velocity; behind those of all rows come the noises.
    """

    base: int  # the slot the sum starts from
    factor: float  # its coefficient, mostly one
    terms: tuple[tuple[int, float], ...]  # the other slots and their coefficients
    free: tuple[int, ...]  # slots nobody needs once this state is formed
    keep: bool  # a later row needs this state itself
    node: bool  # this is a grid time's state
    draw: tuple[int, ...]  # noises first used in this state


class Work(NamedTuple):
    """Memory of the dense form: all states at once, in the making."""

    block: Tensor  # (rows + 1, B, ...)
    states: tuple[Tensor, ...]  # its parts
    later: tuple[Tensor, ...]  # per row, the states after it


@final
class Plan:
    """A solver table made ready to run.

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
        """Whether small problems run faster, and as accurately, by the table's dense form."""
        rows = [*self.rows[1:], self.end]
        operations = sum(len(row.terms) + (row.factor != 1.0) for row in rows) / len(rows)
        if operations <= DENSE_TERMS or len(rows) > DENSE_ROWS or self.table.stochastic:
            return False
        a, b = self.table.dense
        return bool((np.abs(a) + np.abs(b).sum(1)).max() <= DENSE_SIZE)

    def weights(self, dtype: torch.dtype, dimensions: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        """``a`` and, per row k, the column ``b_jk`` for j > k, shaped to multiply states of so many dimensions."""
        found = self._weights.get((dtype, dimensions))
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                a, b = (torch.from_numpy(part).to(dtype) for part in self.table.dense)
                a, b = a.reshape(-1, *([1] * dimensions)), b.reshape(*b.shape, *([1] * dimensions))
                found = a, tuple(b[k + 1 :, k] for k in range(b.shape[1]))
            self._weights[dtype, dimensions] = found
        return found

    def borrow(self, shape: torch.Size, dtype: torch.dtype) -> Work:
        """Memory for the dense form; :meth:`give_back` keeps it for the next solve, which then need not make it.

        Nobody else has it meanwhile: a network may solve with the same plan itself, and so may another thread.
        """
        found = self._work.pop((shape, dtype), None)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                block = torch.empty((len(self.rows) + 1, *shape), dtype=dtype)
                found = Work(block, block.unbind(0), tuple(block[k + 1 :] for k in range(len(self.rows))))
        return found

    def give_back(self, work: Work) -> None:
        """Keep borrowed memory."""
        if len(self._work) >= CACHED_SHAPES:
            self._work.clear()
        self._work[work.block.shape[1:], work.block.dtype] = work

    def times(self, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """One ``(batch,)`` tensor of times per row.

        They are views of one block, which shares its version counter with them: a block that a network wrote
        into is not used again.
        """
        key = (batch, dtype, device)
        found = self._times.get(key)
        if found is not None and found[0]._version == found[1]:
            return found[2]
        # made outside inference mode, whatever mode the caller is in: a solve with gradients may be next
        with torch.inference_mode(False), torch.no_grad():
            column = torch.tensor(self.table.times, dtype=torch.float64).to(dtype).to(device)
            block = column[:, None].repeat(1, batch)
            rows = block.unbind(0)
        if block.numel() <= CACHED_NUMBERS:
            if len(self._times) >= CACHED_SHAPES:
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

    ``noise(k)`` gives the stochastic solvers' noise number k, like ``x0``.
    A state that a network has seen is never changed: it may return its own input, or a caller may keep it.
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
        del velocity  # the next call must not find it alive where no later row needs it
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
    """Whether the dense form is for this start: in the memory, of a precision and on the device it was measured on."""
    return (
        x0.numel() * (len(plan.rows) + 1) <= DENSE_NUMBERS
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
    """What the loop calls: the network itself where every evaluation counts one, and the loop adds them up."""
    return field.velocity if isinstance(field, CountedField) else field


def _form(
    kept: list[Any], base: int, factor: float, terms: tuple[tuple[int, float], ...], free: tuple[int, ...]
) -> Tensor:
    """Add up coefficient × tensor: ``x + h v`` is one kernel; more terms go into the new tensor in place."""
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
    """A velocity in its state's dtype; refuses what is no velocity."""
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
