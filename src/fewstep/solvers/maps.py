"""Samplers of learned flow maps, one function each: ``chain`` and ``restart``.

A velocity, and a one-time map that is called like one (``euler``), are sampled by :func:`fewstep.solvers.solve.solve`.
"""

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
        kind: ``velocity``: any solver, any number of steps; ``map``: its own ``sampler``; ``features``: a feature
            network, which is not sampled.
        steps: the step counts that a map was made for; None: any number for ``chain`` and ``restart``, 1 for ``euler``.
        default_steps: steps when the user names none.
        multiple: whether multiples of ``steps`` are right too.
        sampler: of a map. ``euler``: one call ``v(x, t)`` per step, as of a velocity; ``chain``: one call
            ``u(x, t, r)`` per step, to the step's end; ``restart``: one call to the data, then fresh noise is added.
    """

    kind: Literal["velocity", "map", "features"] = "velocity"
    steps: tuple[int, ...] | None = None
    default_steps: int = 50
    multiple: bool = False
    sampler: Sampler = "euler"


def chain(u: Field, x: Tensor, times: Grid, cond: Mapping[str, Any]) -> Tensor:
    """Compose the steps of a two-time map: ``x <- x + (t_{i+1} - t_i) u(x, t_i, t_{i+1})``, one call per step.

    The maps of the exact average velocity compose, so its end point is the same on every grid.

    Args:
        u: average velocity, called ``u(x, t, r=r, **cond)``; ``t`` and ``r`` are (B,), in [0, 1].
        x: states at ``times[0]``, (B, ...).
        times: ends of the steps, increasing from 0 (noise) to 1 (data).
        cond: further keyword arguments of every call.

    Returns:
        States at ``times[-1]``, in the shape and dtype of ``x``.

    Source: arXiv:2505.13447, algorithm 2; arXiv:2406.07507.

    >>> from fewstep.flow.field import CountedField
    >>> u = CountedField(lambda x, t, r: torch.ones_like(x))
    >>> chain(u, torch.zeros(1, 2), (0.0, 0.25, 1.0), {}), u.calls
    (tensor([[1., 1.]]), 2)
    """
    for t, r in itertools.pairwise(times):
        start, end = (torch.full((len(x),), time, dtype=x.dtype, device=x.device) for time in (t, r))
        x = x + (r - t) * u(x, start, r=end, **cond).to(x.dtype)
    return x


@final
@dataclass(frozen=True)
class FreshNoise:
    """Takes samples from the data (t = 1) back to an earlier time, with fresh base noise.

    The noise is a function of (seed, row, step), so that a sample does not depend on its batch.

    Attributes:
        path: the path that the map was trained on.
        seed: the samples' seed.
        row: index of the first sample.
        base_rows: rows (N, ...) that the base noise is drawn from; None: it is Gaussian.
        valid: 1 for valid entries and 0 for padding, in a shape that multiplies samples; None without padding.
    """

    path: AffinePath
    seed: int
    row: int = 0
    base_rows: Tensor | None = None
    valid: Tensor | None = None

    def __call__(self, y: Tensor, r: float, step: int) -> Tensor:
        """``alpha(r) y + sigma(r) eps``, with the fresh noise ``eps`` of step number ``step`` (from 0).

        Args:
            y: samples at the data, (B, ...).
            r: the time to go back to, in [0, 1].
            step: number of the step.

        Returns:
            States at ``r``, in the shape and dtype of ``y``.
        """
        draw = FIRST_DRAW + step
        if self.base_rows is None:
            noise = noise_rows(len(y), y.shape[1:], seed=self.seed, start=self.row, draw=draw)
        else:
            number = len(self.base_rows)
            noise = self.base_rows[integer_rows(len(y), number, seed=self.seed, start=self.row, draw=draw)]
        noise = noise.to(y) if self.valid is None else noise.to(y) * self.valid.to(y)
        return self.path.interpolate(noise, y, torch.full((len(y),), r, dtype=y.dtype, device=y.device))


def restart(
    f: Field, x: Tensor, times: Grid, cond: Mapping[str, Any], fresh: FreshNoise, two_time: bool = False
) -> Tensor:
    """Go to the data, ``y = x + (1 - t_i) f(x, t_i)``, and back, ``x = alpha(t_{i+1}) y + sigma(t_{i+1}) eps``.

    ``eps`` is fresh noise; the last step ends at ``y``. One call per step. With the exact map, ``y`` has the law of the
    data after every step, for any number of steps at any times.

    Args:
        f: the map's velocity, called ``f(x, t, **cond)``; ``t`` is (B,), in [0, 1].
        x: states at ``times[0]``, (B, ...).
        times: where the map is called, from 0 (noise), and 1 (data) at the end.
        cond: further keyword arguments of every call.
        fresh: adds the fresh noise.
        two_time: whether ``f`` is called with ``r = 1`` too.

    Returns:
        Samples at the data, in the shape and dtype of ``x``.

    Source: arXiv:2303.01469, algorithm 1.
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
    fresh: FreshNoise | None = None,
    two_time: bool = True,
) -> tuple[Tensor, int]:
    """Sample a map on a grid, without gradients.

    Args:
        sampler: ``chain`` or ``restart``.
        field: the network, counted.
        x0: base samples, (B, ...).
        times: ends of the steps, from 0 (noise) to 1 (data).
        cond: further keyword arguments of every call.
        fresh: adds the fresh noise of ``restart``.
        two_time: whether ``restart`` calls the network with ``r = 1`` too.

    Returns:
        The samples (B, ...), and the network evaluations per sample, counted.

    Raises:
        UserError: another sampler, or ``restart`` without its fresh noise.
    """
    before = field.calls
    if sampler == "chain":
        x = chain(field, x0, times, cond)
    elif sampler == "restart" and fresh is not None:
        x = restart(field, x0, times, cond, fresh, two_time)
    else:
        raise UserError(f"there is no map sampler {sampler!r}: give 'chain', or 'restart' with its fresh noise.")
    return x, field.calls - before
