"""The one loop that runs any solver table.

A :class:`Plan` is the table made ready: per row the terms to add up, and which states and velocities nobody needs any
more. Plans and time tensors are cached, because with small networks the loop's own work is what a user would notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.field import Field
from fewstep.solvers.tables import Atom, Combination, Table

Terms = tuple[tuple[int, int, float], ...]  # (0 state | 1 velocity, row, coefficient)


class Row(NamedTuple):
    """What happens before one network call (or at the end)."""

    terms: Terms
    node: bool  # this state is a grid time's state
    release: tuple[tuple[int, int], ...]  # atoms not used after this row


@final
class Plan:
    """A solver table made ready to run."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.times = table.times
        node_of = {id(node): k for k, node in enumerate(table.nodes)}
        combinations = [*table.points, table.nodes[-1]]
        last_use = _last_use(combinations)
        self.rows = tuple(
            Row(
                terms=_terms(combination),
                node=id(combination) in node_of,
                release=tuple(atom for atom, row in last_use.items() if row == j),
            )
            for j, combination in enumerate(combinations)
        )
        self._tensors: dict[tuple[int, torch.dtype, torch.device], Sequence[Tensor]] = {}

    def time_tensors(self, batch: int, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
        """One ``(batch,)`` tensor of times per row."""
        key = (batch, dtype, device)
        tensors = self._tensors.get(key)
        if tensors is None:
            column = torch.tensor(self.times, dtype=torch.float64).to(device=device, dtype=dtype)
            tensors = column[:, None].repeat(1, batch).unbind(0)
            if len(self._tensors) >= 8:
                self._tensors.clear()
            self._tensors[key] = tensors
        return tensors


def run(
    plan: Plan, field: Field, x0: Tensor, cond: Mapping[str, Any], *, trajectory: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Run a plan from ``x0``; return the end point and, if asked, the states at the grid's times.

    States are never changed in place: a network may return its own input, and a caller may keep what it saw.
    """
    times = plan.time_tensors(len(x0), x0.dtype, x0.device)
    kept: tuple[dict[int, Tensor], dict[int, Tensor]] = ({0: x0}, {})
    states, velocities = kept
    path: list[Tensor] = []
    last = len(times)
    for j, (terms, node, release) in enumerate(plan.rows):
        x = x0 if j == 0 else _combine(terms, kept)
        if trajectory and (node or j == 0):
            path.append(x)
        if j == last:
            return x, path
        states[j] = x
        velocity = field(x, times[j], **cond)
        if j == 0 and velocity.shape != x.shape:
            raise UserError(
                f"the network returned shape {tuple(velocity.shape)} for an input of shape {tuple(x.shape)}: "
                "a velocity must have its input's shape."
            )
        velocities[j] = velocity
        for kind, i in release:
            del kept[kind][i]
    raise AssertionError("a plan ends with its end point")


def _combine(terms: Terms, kept: tuple[dict[int, Tensor], dict[int, Tensor]]) -> Tensor:
    """Add up coefficient × tensor; the common ``x + h v`` is one kernel."""
    kind, i, first = terms[0]
    x = kept[kind][i]
    if first != 1.0:
        x = x * first
    for kind, i, coefficient in terms[1:]:
        x = torch.add(x, kept[kind][i], alpha=coefficient)
    return x


def _terms(combination: Combination) -> Terms:
    """Sort a combination: states first, those with coefficient one before others, so that ``_combine`` can start there."""
    items = [
        (0 if kind == "y" else 1, i, coefficient)
        for (kind, i), coefficient in combination.terms.items()
        if coefficient
    ]
    return tuple(sorted(items, key=lambda item: (item[0], item[2] != 1.0, item[1])))


def _last_use(combinations: Sequence[Combination]) -> dict[tuple[int, int], int]:
    """For every atom the row after whose call it can be dropped (its own row when nobody uses it)."""
    last: dict[Atom, int] = {}
    for j, combination in enumerate(combinations):
        if j < len(combinations) - 1:
            last[("y", j)] = j
            last[("v", j)] = j
        for atom in combination.terms:
            if atom != ("y", j):
                # used when row j is formed, hence free once row j's own call is done
                last[atom] = j
    return {(0 if kind == "y" else 1, i): row for (kind, i), row in last.items()}
