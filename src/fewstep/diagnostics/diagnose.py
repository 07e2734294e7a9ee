"""Straightness, curvature and local error of a flow, measured along its own trajectories.

From one fine RK4 trajectory ``Z_t`` per noise, with velocities at its nodes:

- straightness ``S = int_0^1 E|(Z_1 - Z_0) - v(Z_t, t)|^2 dt`` (arXiv:2209.03003, sec. 2.2): zero exactly when
  every trajectory is a straight line run at constant speed, and then one Euler step is exact;
- acceleration ``Z'' = d/dt v(Z_t, t)`` and its part normal to the velocity: the first counts changes of
  speed, the second only changes of direction;
- local error of an Euler step of length h: ``h^2/2 |Z''|``;
- one-step gap: the distance between one Euler step and the trajectory's end.

Sums run over dimensions; relative values are divided by ``E|Z_1 - Z_0|^2`` (or its root), which is
scale-free.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.field import Field, Velocity, as_field
from fewstep.flow.grids import Grid, check_steps, check_times
from fewstep.solvers.solve import check_start, solve

NODES = 64
CHUNK = 256  # samples measured at a time, fewer where they are large
CHUNK_NUMBERS = 1 << 24  # at most so many velocity components at a time
FLOOR = 0.02  # smallest local error a grid is built for, as a share of the largest


@final
@dataclass(frozen=True)
class Diagnosis:
    """What :func:`diagnose` measures; arrays run over ``times``.

    Attributes:
        straightness: S, summed over dimensions.
        straightness_error: its standard error.
        relative_straightness: ``S / E|Z_1 - Z_0|^2``.
        displacement: ``E|Z_1 - Z_0|^2``.
        one_step_gap: RMS over samples of ``|Z_0 + v(Z_0, 0) - Z_1|``.
        relative_gap: the gap over the root of the displacement.
        path_length_ratio: mean length of the trajectory over that of its chord (1: geometrically straight).
        times: nodes of the measurement, (N + 1,).
        deviation: ``E|(Z_1 - Z_0) - v|^2`` at every node; its integral is S.
        curvature: RMS of ``|Z''|`` at every node.
        normal_curvature: RMS of the normal part of ``Z''``.
        local_error: RMS error of an Euler step per ``h^2``: ``|Z''| / 2``.
        nfe: network evaluations per sample spent.
        solver: how the trajectories were solved.
    """

    straightness: float
    straightness_error: float
    relative_straightness: float
    displacement: float
    one_step_gap: float
    relative_gap: float
    path_length_ratio: float
    times: np.ndarray
    deviation: np.ndarray
    curvature: np.ndarray
    normal_curvature: np.ndarray
    local_error: np.ndarray
    nfe: int
    solver: str

    def grid(self, steps: int) -> Grid:
        """Times that give every Euler step the same local error.

        The step density is proportional to ``local_error^(1/2)`` (floored at 2 % of its largest value), which
        minimises the sum of the local errors for a given number of steps.
        """
        steps = check_steps(steps)
        profile = np.maximum(self.local_error, FLOOR * max(self.local_error.max(), 1e-12))
        density = np.sqrt(profile)
        mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(self.times))])
        inner = np.interp(np.arange(1, steps) / steps * mass[-1], mass, self.times)
        times = (0.0, *(float(t) for t in inner), 1.0)
        check_times(times)
        return times

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(self).items()}


def diagnose(v: Velocity, x0: Tensor, *, cond: Mapping[str, Any] | None = None, nodes: int = NODES) -> Diagnosis:
    """Measure a velocity field along the trajectories that start at ``x0``.

    Args:
        v: ``v(x, t, **cond)``.
        x0: base samples, (M, ...); a few hundred give S to a few per cent.
        cond: conditions, tensors with one row per sample; what is no tensor is handed on as it is.
        nodes: RK4 steps and quadrature nodes, even.

    Returns:
        A :class:`Diagnosis`.

    Raises:
        UserError: a start that :func:`fewstep.solve` refuses, conditions of another length, an odd number of
            nodes, a velocity that is not finite.
    """
    check_start(x0)
    if not isinstance(nodes, int) or nodes < 4 or nodes % 2:
        raise UserError(f"nodes must be an even number of at least 4, got {nodes}.")
    cond = cond or {}
    for name, value in cond.items():
        if isinstance(value, Tensor) and value.shape[:1] != x0.shape[:1]:
            raise UserError(
                f"condition {name!r} has shape {tuple(value.shape)} for {len(x0)} samples: give one row per sample."
            )
    field = as_field(v)
    before = field.calls
    size = max(1, min(CHUNK, CHUNK_NUMBERS // ((nodes + 1) * x0[0].numel())))
    chunks = [slice(i, i + size) for i in range(0, len(x0), size)]
    parts = [_measure(field, x0[rows], _rows(cond, rows), nodes) for rows in chunks]
    nfe = (field.calls - before) // len(chunks)
    return _summary({name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, nodes, nfe)


def _rows(cond: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """The conditions of some samples; what is no tensor belongs to all of them."""
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in cond.items()}


@torch.no_grad()
def _measure(field: Field, x0: Tensor, cond: Mapping[str, Any], nodes: int) -> dict[str, np.ndarray]:
    """Per-sample quantities, (B,) or (B, nodes + 1)."""
    flat, chord = _trajectory(field, x0, cond, nodes)
    acceleration = torch.einsum("mn,bnd->bmd", torch.from_numpy(difference_matrix(nodes)), flat)
    speed = flat.square().sum(-1)
    along = (acceleration * flat).sum(-1).square() / speed.clamp_min(1e-30)
    total = acceleration.square().sum(-1)
    rows = {
        "deviation": (chord[:, None] - flat).square().sum(-1),
        "total": total,
        "normal": (total - along).clamp_min(0),
        "speed": speed.sqrt(),
        "displacement": chord.square().sum(-1),
        "gap": (flat[:, 0] - chord).square().sum(-1),
    }
    return {name: value.numpy() for name, value in rows.items()}


def _trajectory(field: Field, x0: Tensor, cond: Mapping[str, Any], nodes: int) -> tuple[Tensor, Tensor]:
    """Velocities along the trajectories, (B, nodes + 1, D), and chords, (B, D); float64 on the CPU."""
    solution = solve(field, x0, solver="rk4", steps=nodes, cond=cond, trajectory=True)
    assert solution.trajectory is not None
    states = solution.trajectory
    velocity = torch.stack(
        [field(x, x.new_full((len(x),), t), **cond) for x, t in zip(states, solution.times, strict=True)]
    )
    bad = ~torch.isfinite(velocity).flatten(1).all(1)
    if bad.any():
        time = solution.times[int(bad.nonzero()[0, 0])]
        raise UserError(
            f"the network's velocity is NaN or infinite at t = {time:g} on its own trajectories: nothing can "
            "be measured there. Check the network's weights, its conditions and the scale of the start."
        )
    flat = velocity.flatten(2).transpose(0, 1).cpu().double()
    return flat, (states[-1] - states[0]).flatten(1).cpu().double()


def _summary(rows: dict[str, np.ndarray], nodes: int, nfe: int) -> Diagnosis:
    weights = simpson_weights(nodes)
    samples = rows["deviation"] @ weights
    displacement = float(rows["displacement"].mean())
    gap = float(np.sqrt(rows["gap"].mean()))
    curvature = np.sqrt(rows["total"].mean(0))
    lengths = rows["speed"] @ weights
    error = samples.std(ddof=1) / np.sqrt(len(samples)) if len(samples) > 1 else np.nan
    return Diagnosis(
        straightness=float(samples.mean()),
        straightness_error=float(error),
        relative_straightness=float(samples.mean()) / max(displacement, 1e-30),
        displacement=displacement,
        one_step_gap=gap,
        relative_gap=gap / max(np.sqrt(displacement), 1e-30),
        path_length_ratio=float(lengths.mean() / max(np.sqrt(rows["displacement"]).mean(), 1e-30)),
        times=np.linspace(0.0, 1.0, nodes + 1),
        deviation=rows["deviation"].mean(0),
        curvature=curvature,
        normal_curvature=np.sqrt(rows["normal"].mean(0)),
        local_error=curvature / 2,
        nfe=nfe,
        solver=f"rk4, {nodes} steps, Simpson quadrature",
    )


def difference_matrix(nodes: int) -> np.ndarray:
    """First derivatives to fourth order on ``nodes`` equal intervals of [0, 1]: (N + 1, N + 1).

    Row i differentiates the quartic through five neighbouring values, one-sided near the ends: its weights
    solve ``sum_j w_j x_j^k = [k = 1]``, ``k = 0 … 4``, over the offsets ``x_j`` from node i.
    """
    matrix = np.zeros((nodes + 1, nodes + 1))
    for i in range(nodes + 1):
        first = min(max(i - 2, 0), nodes - 4)
        offsets = np.arange(first, first + 5) - i
        moments = np.vander(offsets, 5, increasing=True).T.astype(float)
        matrix[i, first : first + 5] = np.linalg.solve(moments, np.eye(5)[1]) * nodes
    return matrix


def simpson_weights(nodes: int) -> np.ndarray:
    """Weights of Simpson's rule on ``nodes`` equal intervals of [0, 1] (``nodes`` even)."""
    weights = np.ones(nodes + 1)
    weights[1:-1:2], weights[2:-1:2] = 4.0, 2.0
    return weights / (3.0 * nodes)
