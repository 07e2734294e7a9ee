"""Samplers of learned flow maps, one function each; a velocity, or a map that is called like one, has solvers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.field import Field
from fewstep.flow.grids import Grid
from fewstep.flow.noise import integer_rows, noise_rows
from fewstep.flow.paths import AffinePath
from fewstep.solvers.solve import FIRST_DRAW

Sampler = Literal["euler", "chain", "restart"]


@final
@dataclass(frozen=True)
class SampleRule:
    """How a finished network is sampled.

    Attributes:
        kind: ``velocity`` (any solver, any number of steps), ``map`` (its own sampler), or ``features`` (no sampler).
        steps: the step counts it was made for; None for any.
        multiple: multiples of these step counts are right too.
        default_steps: steps when the user names none.
        sampler: of a map: ``euler``: one call ``v(x, t)`` per step; ``chain``: one call ``u(x, t, r)`` per step, to the
            step's end; ``restart``: to the data and back to fresh noise.
    """

    kind: Literal["velocity", "map", "features"] = "velocity"
    steps: tuple[int, ...] | None = None
    default_steps: int = 50
    multiple: bool = False
    sampler: Sampler = "euler"


def chain(u: Field, x: Tensor, times: Grid, cond: Mapping[str, Any]) -> Tensor:
    """``x <- x + (t_{i+1} - t_i) u(x, t_i, t_{i+1})``, one call per step.

    The exact average velocity gives the same end point on every grid, since its maps compose (arXiv:2505.13447, alg. 2;
    arXiv:2406.07507).

    Args:
        u: two-time field, called ``u(x, t, r=r, **cond)``.
        x: (B, ...) at ``times[0]``.
        times: where the steps begin and end.
        cond: further keyword arguments of every call.
    """
    for t, r in itertools.pairwise(times):
        start, end = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, r))
        x = x + (r - t) * u(x, start, r=end, **cond).to(x.dtype)
    return x


@final
@dataclass(frozen=True)
class Fresh:
    """Takes samples back to a time before the data, with base noise of their own: a function of (seed, row, draw).

    Attributes:
        path: the path the map was trained on.
        seed: the samples' seed.
        row: index of the first one.
        base_rows: rows the base draws from; None: it is Gaussian.
    """

    path: AffinePath
    seed: int
    row: int = 0
    base_rows: Tensor | None = None

    def __call__(self, y: Tensor, r: float, step: int) -> Tensor:
        """``alpha(r) y + sigma(r) eps``, with the noise that belongs to step number ``step``, from 0."""
        draw = FIRST_DRAW + step
        if self.base_rows is None:
            noise = noise_rows(len(y), y.shape[1:], seed=self.seed, start=self.row, draw=draw)
        else:
            number = len(self.base_rows)
            noise = self.base_rows[integer_rows(len(y), number, seed=self.seed, start=self.row, draw=draw)]
        return self.path.interpolate(noise.to(y), y, torch.full((len(y),), r, dtype=y.dtype, device=y.device))


def restart(f: Field, x: Tensor, times: Grid, cond: Mapping[str, Any], fresh: Fresh, two_time: bool = False) -> Tensor:
    """``y = x + (1 - t_i) f(x, t_i)``, then ``x = alpha(t_{i+1}) y + sigma(t_{i+1}) eps`` with fresh ``eps``.

    One call per step, the last one ending at the data (arXiv:2303.01469, alg. 1). Of the exact map, y has the law of
    the data after every step, so the number of steps and their times do not matter.

    Args:
        f: field, called ``f(x, t, **cond)``.
        x: (B, ...) at ``times[0]``.
        times: where the map is asked, from 0, and 1 at the end.
        cond: further keyword arguments of every call.
        fresh: takes y back.
        two_time: it is called with ``r = 1`` too.
    """
    one = {"r": torch.ones(len(x), dtype=x.dtype, device=x.device)} if two_time else {}
    y = x
    for step, (t, r) in enumerate(itertools.pairwise(times)):
        start = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        y = x + (1 - t) * f(x, start, **one, **cond).to(x.dtype)
        x = fresh(y, r, step) if r < 1 else y
    return y


@torch.no_grad()
def run_map(
    sampler: Sampler,
    field: Field,
    x0: Tensor,
    times: Grid,
    cond: Mapping[str, Any],
    fresh: Fresh | None = None,
    two_time: bool = True,
) -> tuple[Tensor, int]:
    """Sample a map on a grid: the samples and the network evaluations per sample, counted.

    Raises:
        UserError: a map that has no sampler of its own.
    """
    before = field.calls
    if sampler == "chain":
        x = chain(field, x0, times, cond)
    elif sampler == "restart" and fresh is not None:
        x = restart(field, x0, times, cond, fresh, two_time)
    else:
        raise UserError(f"there is no map sampler {sampler!r}: give 'chain', or 'restart' with its fresh noise.")
    return x, field.calls - before
