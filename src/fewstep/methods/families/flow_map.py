r"""The flow-map family: regress the average velocity ``u(x, t, r) = (X(x, t, r) - x) / (r - t)`` of a two-time network.

Each of three equations, together with ``u(x, t, t) = v``, has the flow map X as its only solution. Here ``t <= r``, and
t = 0 is noise.

    derivative    (r - t) u = int_t^r v(x_s, s) ds, differentiated in t along the flow:  u = v + (r - t) du/dt,
                  du/dt = ∂_t u + (∂_x u) v                          (arXiv:2505.13447, eq. 6, there in time 1 - t)
    composition   (r - t) u(x, t, r) = (q - t) u(x, t, q) + (r - q) u(x_q, q, r),  x_q = x + (q - t) u(x, t, q)
                                                            (arXiv:2507.16884; q in the middle: arXiv:2410.12557)
    Lagrangian    ∂_r X(x, t, r) = v(X(x, t, r), r)                  (arXiv:2406.07507)

The velocity v is a teacher's, or that of the data pair, ``d/dt x_t``, whose mean given x_t is v. In the derivative
equation v occurs twice, as the first term and as the direction of the derivative, both times linearly. So a pair's
velocity may replace it without changing the solution. The other two equations are not linear in v. There a pair's
velocity is used only on the diagonal r = t, where the loss regresses ``u = v``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.flow.derivatives import Derivative, rows_of
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.flow.paths import expand_time
from fewstep.flow.precision import full_precision
from fewstep.flow.time_laws import TimeLaw

MAX_CHANGE_RMS = 5.0  # root mean square of (r - t) du/dt in a target, per row; chosen, not tuned


class Times(NamedTuple):
    """Start times t and end times r >= t, (B,) each.

    Attributes:
        t, r: the times.
        diagonal: rows whose target is the velocity itself, (B,) of bool: those with r = t, in ``shortcut`` those with
            the smallest step.
    """

    t: Tensor
    r: Tensor
    diagonal: Tensor


def draw_times(law: TimeLaw, diagonal: float, draws: Draws, like: Tensor) -> Times:
    """Draw two times per row and sort them; with probability ``diagonal`` set r = t.

    Args:
        law: law of both times.
        diagonal: probability of r = t.
        draws: the random numbers of B rows.
        like: a tensor whose dtype and device the times get.

    Source: arXiv:2505.13447, alg. 1.
    """
    one, two = (law.sample(draws.uniform()).to(like) for _ in range(2))
    t, r = torch.minimum(one, two), torch.maximum(one, two)
    same = (draws.uniform() < diagonal).to(t.device)
    return Times(t, torch.where(same, t, r), same)


def derivative_target(
    derivative: Derivative, x: Tensor, times: Times, v: Tensor, cond: Mapping[str, Any], along: Tensor | None = None
) -> Tensor:
    """The target ``v + (r - t) du/dt`` with ``du/dt = ∂_t u + (∂_x u) w``, without a graph.

    Args:
        derivative: of ``u(x, t, r=r, **cond)``.
        x: (B, ...) at ``times.t``.
        times: t and r.
        v: the velocity at (x, t), (B, ...), or that of the pair, whose mean given x it is.
        cond: further keyword arguments of u.
        along: direction w of the derivative, (B, ...); v by default.

    Returns:
        (B, ...). In a row where ``(r - t) du/dt`` has a root mean square above 5, it is scaled down to 5; data have a
        root mean square of about 1. Without the bound one batch of large derivatives could make training diverge,
        because the target depends on the network.

    Source: arXiv:2505.13447, eq. 6 (there in time 1 - t); the bound is this library's.
    """
    _, slope = derivative(x, times.t, v if along is None else along, torch.ones_like(times.t), r=times.r, **cond)
    change = expand_time(times.r - times.t, x) * slope
    size = change.flatten(1).square().mean(1).sqrt()
    return v + expand_time(MAX_CHANGE_RMS / size.clamp(min=MAX_CHANGE_RMS), x) * change


def composition_target(u: Velocity, x: Tensor, times: Times, q: Tensor, cond: Mapping[str, Any]) -> Tensor:
    """``a u(x, t, q) + (1 - a) u(x_q, q, r)``, ``a = (q - t) / (r - t)``, ``x_q = x + (q - t) u(x, t, q)``.

    Args:
        u: ``u(x, t, r=r, **cond)``, called twice.
        x: (B, ...) at ``times.t``.
        times: t and r; in a row with r = t the result is ``u(x, t, t)``.
        q: times between t and r, (B,).
        cond: further keyword arguments of u.

    Returns:
        (B, ...).

    Source: arXiv:2507.16884; with q in the middle of t and r: arXiv:2410.12557.
    """
    t, r, _ = times
    width = torch.where(r == t, 1.0, r - t)
    share = expand_time((q - t) / width, x)
    first = u(x, t, r=q, **cond).to(x)
    return share * first + (1 - share) * u(x + expand_time(q - t, x) * first, q, r=r, **cond).to(x)


def where_rows(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Rows of ``yes`` where the mask (B,) is true, of ``no`` elsewhere; all (B, ...).

    >>> where_rows(torch.tensor([True, False]), torch.ones(2, 1), torch.zeros(2, 1)).tolist()
    [[1.0], [0.0]]
    """
    return torch.where(mask.reshape(-1, *(1,) * (yes.ndim - 1)), yes, no)


TargetOf = Callable[[Tensor, Tensor, Times, Mapping[str, Any]], Tensor]


def replace_off_diagonal(target: Tensor, x: Tensor, times: Times, cond: Mapping[str, Any], make: TargetOf) -> Tensor:
    """Replace the target of the rows that are not on the diagonal.

    Args:
        target: (B, ...), kept on the diagonal.
        x: (B, ...) at ``times.t``.
        times: t, r and the diagonal.
        cond: conditions of all rows.
        make: ``make(rows, x, times, cond)`` returns the target of the rows with these numbers, from their x, times and
            conditions; called in full precision, without a graph.

    Returns:
        (B, ...).
    """
    rows = (~times.diagonal).nonzero()[:, 0]
    if not len(rows):
        return target
    off = Times(*(part[rows] for part in times))
    with full_precision(x):
        found = make(rows, x[rows], off, rows_of(cond, len(x), rows))
    return target.index_copy(0, rows, found.to(target))


def weighted_square(e: Tensor, p: float = 0.0, c: float = 1e-3) -> Tensor:
    """Mean over rows of ``w |e|^2 / D``, ``w = (|e|^2 + c)^-p`` without gradient; p = 0 is the mean square.

    Args:
        e: errors (B, ...) with D entries per row.
        p: power of the weight. With p > 0 the minimum over noisy targets is no longer their mean.
        c: added to the squared error, so that the weight is finite.

    Source: arXiv:2505.13447, sec. 4.3.

    >>> weighted_square(torch.tensor([[1.0, 3.0]])).item()
    5.0
    """
    size = e.flatten(1).square().sum(1)
    return ((size.detach() + c) ** -p * size).mean() / e[0].numel()
