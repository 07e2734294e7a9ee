r"""Trajectories on a grid of panels, and the quantities at their nodes.

A *panel* ``[a, b]`` is two RK4 steps of half its width; its nodes are ``a``, its middle ``m`` and ``b``, and Simpson's
rule integrates over it. At every node the acceleration is a directional derivative, ``x'' = ∂_t v + (∂_x v) v``.

A panel is halved while it does not resolve the acceleration. From velocities and accelerations at its ends, the cubic
through them has in the middle the derivative

    3 (v_b - v_a) / (2 H) - (x''_a + x''_b) / 4,

which differs from the acceleration measured there by O(H^4); and ``x_b - x_a`` differs from the integral of the
velocity by O(H^5). Both differences, as RMS over a few pilot trajectories, must be a small share of the whole change
of velocity ``∫ |x''| dt``. For data of width s, paths bend within a time s of t = 1: panels there become as short as s,
and the others keep their length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.derivatives import Derivative
from fewstep.flow.field import Field

TOLERANCE = 5e-4  # largest difference on a panel, as a share of the whole change of velocity; chosen, not tuned
MIN_CHANGE = 1e-3  # of the velocity: a smaller change over the whole time counts as this; chosen, not tuned
MIN_PANEL = 2.0**-14  # shortest panel, whose nodes are still different numbers in single precision
MAX_PANEL_RATIO = 4  # panels at the end, in panels of the starting grid; chosen, not tuned


DERIVED_AT_ONCE = 1 << 17
"""Numbers in one call of the derivative. A call has a fixed cost: 7 ms for 32 rows of 64 numbers, 48 ms for 1024 (one
thread, the digits recipe's network)."""


@final
@dataclass(frozen=True)
class Path:
    """Trajectories at ``times``; lists run over the nodes.

    Attributes:
        times: (N + 1,).
        states: (B, ...) each.
        velocities: (B, ...) each.
        accelerations: of the first rows, (R, ...) each.
        doubled: ``(v(x + h/2 v, t + h/2) - v) / h``, (B, ...) each: twice the difference between two half Euler
            steps and one of length h, over h^2. ``h`` is the step to the next node (to the one before, at the end).
    """

    times: np.ndarray
    states: list[Tensor]
    velocities: list[Tensor]
    accelerations: list[Tensor]
    doubled: list[Tensor]


def at(t: float, x: Tensor) -> Tensor:
    """The time ``t`` for every row of ``x``, (B,)."""
    return x.new_full((len(x),), t)


def rows(cond: Mapping[str, Any], part: slice) -> dict[str, Any]:
    """The conditions of some samples: tensors are cut to ``part``, other values belong to all samples."""
    return {name: value[part] if isinstance(value, Tensor) else value for name, value in cond.items()}


@torch.no_grad()
def follow(
    field: Field, derivative: Derivative, x: Tensor, times: np.ndarray, cond: Mapping[str, Any], derived: int
) -> Path:
    """Trajectories by RK4 from node to node.

    Args:
        field: ``v(x, t, **cond)``.
        derivative: of the same field.
        x: starts at ``times[0]``, (B, ...).
        times: nodes, (N + 1,).
        cond: conditions of these rows.
        derived: for so many of the first rows the acceleration is computed too.

    Returns:
        A :class:`Path`.

    Raises:
        UserError: a velocity or an acceleration that is not finite; the time is named.
    """
    path = Path(times, [], [], [], [])
    few = rows(cond, slice(0, derived))
    for k, t in enumerate(map(float, times)):
        v = field(x, at(t, x), **cond)
        refuse_infinite(v, "velocity", t)
        path.states.append(x)
        path.velocities.append(v)
        last = k == len(times) - 1
        h = float(times[k] - times[k - 1]) if last else float(times[k + 1] - t)
        middle = at(t - h / 2 if last else t + h / 2, x)
        k2 = field(x.add(v, alpha=-h / 2 if last else h / 2), middle, **cond)
        path.doubled.append((v - k2 if last else k2 - v) / h)
        if not last:
            k3 = field(x.add(k2, alpha=h / 2), middle, **cond)
            k4 = field(x.add(k3, alpha=h), at(float(times[k + 1]), x), **cond)
            x = x.add(v + 2 * (k2 + k3) + k4, alpha=h / 6)
    if derived:
        path.accelerations.extend(_accelerations(derivative, path, derived, few))
    return path


def refuse_infinite(values: Tensor, what: str, t: float) -> None:
    """Raise when a value is NaN or infinite.

    Args:
        values: what the network gave.
        what: its name in the message, as "the network's ...".
        t: the time it was taken at.

    Raises:
        UserError: a value is not finite.
    """
    if bool(torch.isfinite(values).all()):
        return
    if what == "velocity":
        fix = "Check the network's weights, its conditions and the scale of the start."
    else:
        fix = "The velocity is finite: it has an infinite slope there, as a square root has at 0."
    raise UserError(
        f"the network's {what} is NaN or infinite at t = {t:g} on its own trajectories: nothing can be measured there. "
        f"{fix}"
    )


def _accelerations(derivative: Derivative, path: Path, derived: int, cond: Mapping[str, Any]) -> list[Tensor]:
    """The acceleration of the first ``derived`` rows at every node; small samples of several nodes go in one call."""
    found: list[Tensor] = []
    for part in pieces(len(path.times), at_once(derived * path.states[0][0].numel())):
        x = torch.cat([state[:derived] for state in path.states[part]])
        v = torch.cat([velocity[:derived] for velocity in path.velocities[part]])
        t = torch.as_tensor(path.times[part], dtype=x.dtype, device=x.device).repeat_interleave(derived)
        _, a = derivative(x, t, v, torch.ones_like(t), **repeated(cond, part.stop - part.start))
        for acceleration, node in zip(a.split(derived), path.times[part], strict=True):
            refuse_infinite(acceleration, "derivative along its trajectories", float(node))
            found.append(acceleration.to(x.dtype))
    return found


def at_once(numbers: int) -> int:
    """How many nodes of so many numbers each go into one call of the derivative."""
    return max(1, DERIVED_AT_ONCE // numbers)


def repeated(cond: Mapping[str, Any], times: int) -> dict[str, Any]:
    """The conditions of the same samples, several times one after the other."""
    return {name: torch.cat([value] * times) if isinstance(value, Tensor) else value for name, value in cond.items()}


def with_middles(edges: np.ndarray) -> np.ndarray:
    """Ends and middles of panels, in order: (2 N + 1,) from N + 1 ends.

    >>> with_middles(np.array([0.0, 0.5, 1.0])).tolist()
    [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    times = np.empty(2 * len(edges) - 1)
    times[::2], times[1::2] = edges, (edges[1:] + edges[:-1]) / 2
    return times


def resolved_times(
    field: Field,
    derivative: Derivative,
    x: Tensor,
    cond: Mapping[str, Any],
    panels: int,
    affordable: Callable[[int, int], bool],
) -> tuple[np.ndarray, bool]:
    """Nodes that resolve the acceleration of these trajectories, by the criterion of the module's docstring.

    Every pass starts at the first panel that was halved in the pass before.

    Args:
        field: ``v(x, t, **cond)``.
        derivative: of the same field.
        x: starts of the pilot trajectories at t = 0, (B, ...).
        cond: conditions of these rows.
        panels: number of equal panels to begin with; at most four times as many are made.
        affordable: whether a further pass over so many panels, of so many in all, may be made.

    Returns:
        Ends and middles of the panels, (2 N + 1,), and whether no pass was left out.
    """
    edges, done = np.linspace(0.0, 1.0, panels + 1), np.empty(0)
    scale = None
    while True:
        path = follow(field, derivative, x, with_middles(edges), cond, len(x))
        scale = _scale(path) if scale is None else scale
        defect = _defects(path)
        bad = ~(defect <= TOLERANCE * scale) & (np.diff(edges) > 1.5 * MIN_PANEL)
        room = MAX_PANEL_RATIO * panels - len(done) - len(bad)
        if bad.sum() > room:
            bad &= defect >= np.sort(defect[bad])[::-1][max(room, 1) - 1]
        if room <= 0 or not bad.any():
            return with_middles(np.concatenate([done, edges])), True
        first = int(np.argmax(bad))
        again = len(bad) - first + int(bad.sum())
        if not affordable(again, len(done) + first + again):
            return with_middles(np.concatenate([done, edges])), False
        x, done = path.states[2 * first], np.concatenate([done, edges[:first]])
        middles = ((edges[1:] + edges[:-1]) / 2)[bad]
        edges = np.sort(np.concatenate([edges[first:], middles]))


def _defects(path: Path) -> np.ndarray:
    """The larger of both differences on every panel, as a change of velocity, RMS over samples."""
    found = []
    for k in range(0, len(path.times) - 1, 2):
        width = float(path.times[k + 2] - path.times[k])
        (v0, v1, v2), (a0, a1, a2) = path.velocities[k : k + 3], path.accelerations[k : k + 3]
        bend = 1.5 * (v2 - v0) - width * ((a0 + a2) / 4 + a1)
        drift = (path.states[k + 2] - path.states[k]) / width - (v0 + 4 * v1 + v2) / 6
        found.append(max(_rms(bend), _rms(drift)))
    return np.array(found)


def _scale(path: Path) -> float:
    """``∫ |x''| dt``, at least a small share of the velocity."""
    change = float(simpson_weights(path.times) @ [_rms(a) for a in path.accelerations])
    return max(change, MIN_CHANGE * max(_rms(v) for v in path.velocities), 1e-30)


def _rms(values: Tensor) -> float:
    return float(values.flatten(1).double().square().sum(1).mean().sqrt())


def simpson_weights(times: np.ndarray) -> np.ndarray:
    """Weights of Simpson's rule on panels whose ends and middles are ``times``, (2 N + 1,); they sum to the range.

    >>> (6 * simpson_weights(np.array([0.0, 0.5, 1.0]))).tolist()
    [1.0, 4.0, 1.0]
    """
    weights = np.zeros(len(times))
    for k in range(0, len(times) - 1, 2):
        weights[k : k + 3] += (times[k + 2] - times[k]) / 6 * np.array([1.0, 4.0, 1.0])
    return weights


def root_mean(squares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Root of the mean over samples (M, …), and its standard error by the delta method, ``se(m) / (2 sqrt(m))``."""
    root = np.sqrt(squares.mean(0))
    return root, standard_error(squares) / np.maximum(2 * root, 1e-150)


def standard_error(values: np.ndarray) -> np.ndarray:
    """Standard error of the mean over samples (M, …): std / sqrt(M). NaN for one sample."""
    if len(values) < 2:
        return np.full(values.shape[1:], np.nan)
    return np.asarray(values.std(0, ddof=1) / np.sqrt(len(values)))


def pieces(total: int, size: int) -> list[slice]:
    """Consecutive slices of at most ``size`` rows that cover ``total`` rows."""
    cuts = [*range(0, total, size), total]
    return [slice(a, b) for a, b in itertools.pairwise(cuts)]
