r"""The endpoint error of Euler's method, and where along t it is made.

One Euler step of length h from ``x(t)`` misses the trajectory by ``-h^2/2 x''(t)``; at ``t = 1`` the flow has turned
that into ``-h^2/2 Φ(1, t) x''(t)``, with ``Φ' = J Φ``, ``J = ∂v/∂x``. On N equal steps the error (numerical − exact) is

    -e(1) / N + O(N^-2),     e' = J e + x''/2,  e(0) = 0                                  (:func:`unit_error`)

(Hairer, Nørsett & Wanner, Solving Ordinary Differential Equations I, sec. II.8). The weight of an error made at t is
the mean of ``|Φ(1, t) x''|^2``; for random signs w it equals the mean of ``(λ(t) · x''(t))^2`` with ``λ' = -J^T λ``,
``λ(1) = w`` (:func:`adjoint_weights`), since ``E w w^T = I``.

Both equations are solved on the panels of the trajectory by Kutta's third-order rule, whose stages are a panel's nodes.

First order holds only where the flow is smooth over one step. At N = 16 it is within 5 % on smooth flows and 40 % too
large on modes of width .03, so Euler's method is also run at a few N (:func:`endpoint_errors`), which is cheaper than
the linear equation, and :func:`interpolated` joins both.

**Samples that change modes.** Between two narrow modes lies a boundary: noises on either side of it flow to different
modes. Euler's method moves the boundary by O(1/N), so a share of about c/N of the samples ends in the wrong mode, with
an error of the order of the distance between the modes whatever N. Their part of the mean square falls as 1/N and not
as 1/N^2; the mean of ``|e(1)|^2`` does not contain it, because trajectories near enough to the boundary for a large
``e`` are too rare to be drawn. On two modes of width .1 on the line and N from 8 to 256, ``N P(error > 1)`` stays
between .061 and .070 while ``N RMS`` grows from 1.2 to 5.5. :func:`jump_squares` separates this part, and
:func:`with_jumps` extrapolates it by its own law.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.diagnostics.profiles import Path, at, refuse_infinite, rows
from fewstep.errors import UserError
from fewstep.flow.derivatives import Derivative, pullback
from fewstep.flow.field import Field
from fewstep.solvers.solve import solve

EULER_STEPS = (1, 2, 4, 6, 8, 12, 16)  # Euler is always run with these; chosen, not tuned
MAX_EULER_STEPS = 128  # largest number of Euler steps tried until the error follows first order; chosen, not tuned
AGREED = 1.25  # the error follows first order when both agree within this factor
DROPPED = 0.05  # share of samples that a trimmed mean leaves out
AGREEMENT, ROUNDING = 0.1, 1e-3  # allowed gap of gradient and Jacobian-vector product: relative, and per velocity
JUMP = 3.0  # a sample has jumped when its error is so many times first order's; 4 and 8 miss more jumps (ten mixtures)
# Fewest steps at which jumps follow 1/N: N jump_squares is .09, .01 and 0 at 4, 8 and 16 steps on 8 modes of width .05.
JUMP_STEPS = 8
JUMP_SAMPLES = 500  # with 100 samples, which often hold no jump, predictions were up to 25 times too small


@torch.no_grad()
def unit_error(derivative: Derivative, path: Path, cond: Mapping[str, Any]) -> Tensor:
    """``e(1)`` of ``e' = J e + x''/2, e(0) = 0``: minus Euler's endpoint error is ``e(1) / N + O(N^-2)``.

    Args:
        derivative: Jacobian-vector products of the field.
        path: trajectories; its first R rows have accelerations.
        cond: conditions of those rows.

    Returns:
        (R, ...). Source: Hairer, Nørsett & Wanner I, sec. II.8.

    Raises:
        UserError: a derivative that is not finite; the time is named.
    """
    few = len(path.accelerations[0])

    def slope(k: int, e: Tensor) -> Tensor:
        x, t = path.states[k][:few], float(path.times[k])
        _, along = derivative(x, at(t, x), e, **cond)
        refuse_infinite(along, "derivative along an error", t)
        return along.to(x.dtype).add(path.accelerations[k], alpha=0.5)

    e = torch.zeros_like(path.accelerations[0])
    for k in range(0, len(path.times) - 1, 2):
        h = float(path.times[k + 2] - path.times[k])
        k1 = slope(k, e)
        k2 = slope(k + 1, e.add(k1, alpha=h / 2))
        k3 = slope(k + 2, e.add(2 * k2 - k1, alpha=h))
        e = e.add(k1 + 4 * k2 + k3, alpha=h / 6)
    return e


def adjoint_weights(
    field: Field, derivative: Derivative, path: Path, signs: Tensor, cond: Mapping[str, Any]
) -> np.ndarray | None:
    """``(λ · x'')^2`` at every node, (R, N + 1); None where gradients do not flow through the whole network.

    Args:
        field: ``v(x, t, **cond)``.
        derivative: its Jacobian-vector products; the gradients must agree with them in the middle of the path.
        path: trajectories; its first R rows have accelerations.
        signs: ``λ(1)``, (R, ...), of entries ±1.
        cond: conditions of those rows.
    """
    last = len(path.times) - 1
    weights = np.empty((len(signs), last + 1))

    def vjp(k: int, w: Tensor) -> Tensor:
        x = path.states[k][: len(signs)]
        return pullback(field, x, at(float(path.times[k]), x), w, **cond)[1]

    def weigh(k: int, w: Tensor) -> None:
        weights[:, k] = _dot(w, path.accelerations[k]).square().numpy()

    if not _transposed(vjp, derivative, path, signs, cond):
        return None
    w = signs
    weigh(last, w)
    for k in range(last, 0, -2):
        h = float(path.times[k] - path.times[k - 2])
        p1 = vjp(k, w)
        p2 = vjp(k - 1, w.add(p1, alpha=h / 2))
        p3 = vjp(k - 2, w.add(2 * p2 - p1, alpha=h))
        before = w.add(p1 + 4 * p2 + p3, alpha=h / 6)
        weigh(k - 1, ((w + before) / 2).add(p1 - p3, alpha=h / 8))  # the cubic through both ends
        weigh(k - 2, before)
        w = before
    return weights


def _transposed(
    vjp: Callable[[int, Tensor], Tensor], derivative: Derivative, path: Path, w: Tensor, cond: Mapping[str, Any]
) -> bool:
    """Whether ``(w^T J) u = w^T (J u)`` in the middle of the path.

    A network that detaches part of its input gives a wrong gradient without an error.
    """
    k = len(path.times) // 2
    x, u = path.states[k][: len(w)], path.velocities[k][: len(w)]
    try:
        left = _dot(vjp(k, w), u)
    except torch.OutOfMemoryError:
        raise
    except (UserError, RuntimeError):
        return False
    right = _dot(w, derivative(x, at(float(path.times[k]), x), u, **cond)[1])
    allowed = AGREEMENT * torch.maximum(left.norm(), right.norm()) + ROUNDING * u.double().norm().cpu()
    return bool((left - right).norm() <= allowed)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product of every row, float64 on the CPU."""
    return (a.flatten(1).cpu().double() * b.flatten(1).cpu().double()).sum(1)


def endpoint_errors(
    field: Field, x0: Tensor, x1: Tensor, cond: Mapping[str, Any], steps: int, parts: Sequence[slice]
) -> np.ndarray:
    """Norm of Euler's endpoint error with ``steps`` equal steps, per sample: (M,).

    Args:
        field: ``v(x, t, **cond)``.
        x0, x1: starts and true endpoints, (M, ...).
        cond: conditions, one row per sample.
        steps: number of equal Euler steps from t = 0 to t = 1.
        parts: slices of samples that are solved at a time.
    """
    found = []
    for part in parts:
        end = solve(field, x0[part], steps=steps, cond=rows(cond, part)).x
        found.append((end - x1[part]).flatten(1).cpu().double().norm(dim=1).numpy())
    return np.concatenate(found)


def root_mean_square(norms: np.ndarray, *, trimmed: bool) -> float:
    """RMS of norms (M,); trimmed, without the 5 % largest of them.

    >>> root_mean_square(np.array([1.0, 7.0]), trimmed=False)
    5.0
    """
    kept = np.sort(norms)[: len(norms) - int(DROPPED * len(norms))] if trimmed else norms
    return float(np.sqrt(np.square(kept).mean()))


def jump_squares(norms: np.ndarray, unit: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Part of the mean square error that samples make which jumped, per number of steps: (K,).

    A sample has jumped when its error at N steps is more than 3 times first order's, ``|e(1)| / N``.

    Args:
        norms: endpoint errors of Euler's method, (R, K).
        unit: ``|e(1)|`` of the same samples, (R,).
        steps: numbers of steps, (K,).
    """
    jumped = norms > JUMP * unit[:, None] / steps
    return np.asarray(np.where(jumped, np.square(norms), 0.0).mean(0))


def with_jumps(steps: int, unit: float, known_steps: np.ndarray, known: np.ndarray, jumps: np.ndarray) -> float:
    """RMS error over all samples at ``steps``, from its first-order part and the part of the samples that jump.

    ``E(N)^2 = F(N)^2 + J / N``: F is interpolated between the runs' errors without jumps and the limit ``unit / N``,
    and ``J`` is the mean of ``N jumps`` over runs with at least 8 steps. With fewer steps the runs are interpolated
    as they are.

    Args:
        steps: N.
        unit: RMS of ``|e(1)|``.
        known_steps: numbers of steps that Euler's method was run with, increasing, (K,).
        known: RMS errors of these runs over all samples, (K,).
        jumps: the part of their squares that samples make which jumped, (K,).
    """
    if steps < JUMP_STEPS:
        return interpolated(steps, unit, known_steps, known)
    first = np.sqrt(np.maximum(np.square(known) - jumps, 0.0))
    law = float((known_steps * jumps)[known_steps >= JUMP_STEPS].mean())
    return float(np.hypot(interpolated(steps, unit, known_steps, first), np.sqrt(law / steps)))


def interpolated(steps: int, unit: float, known_steps: np.ndarray, known: np.ndarray) -> float:
    """The error at ``steps`` from that at ``known_steps`` and from its limit ``unit / N``.

    ``log(N error)`` is interpolated linearly in 1/N between neighbours; ``log(unit)`` stands at 1/N = 0.

    Args:
        steps: N.
        unit: the limit of ``N error``.
        known_steps: increasing, (K,).
        known: errors with those numbers of steps, (K,).
    """
    inverse = np.concatenate([[0.0], 1 / known_steps[::-1].astype(float)])
    scaled = np.concatenate([[unit], (known_steps * known)[::-1]])
    return float(np.exp(np.interp(1 / steps, inverse, np.log(np.maximum(scaled, 1e-30)))) / steps)
