r"""Directional derivatives of a velocity field, of any network.

    dv = (∂v/∂x) dx + (∂v/∂t) dt        (:class:`Derivative`)
    w^T ∂v/∂x                           (:func:`pullback`)

Along a trajectory, ``dx = v``, ``dt = 1`` gives the acceleration ``x'' = ∂_t v + (∂_x v) v``.

There are three ways to compute ``dv``. *Forward-mode* differentiation (``torch.func.jvp``) keeps no graph and costs
about two network calls where the tensors are large (several where they are small). Not every operation has it: fused
attention kernels do not (the plain "math" kernel is used instead), and GroupNorm or reshapes in some networks fail.
*Double reverse* differentiation runs wherever training runs: the reverse derivative ``u -> u^T J`` is linear in ``u``,
and differentiating it again gives ``J dx``. *Finite differences* always run: a second-order difference of three
values, one-sided next to t = 0 and t = 1 so that the network is called at no time outside [0, 1].

``auto`` takes the first way that works and records it in :attr:`Derivative.used`. Both ways of automatic
differentiation give a wrong result, without an error, for a network that detaches its input or a part of it (and the
reverse way for ``no_grad`` inside it). So at the first call the derivative ``d`` of a few rows is compared with the
finite differences ``d_h`` and ``d_k`` of two steps, ``h`` and ``k = h/16``, and refused when

    min(|d - d_h|, |d - d_k|) > 1/4 max(|d|, |d_h|) + 4 (|d_h - d_k| + eps |v| / k).

The second term is large where the network is steep on the scale of the steps, or noisy: then differences decide
nothing. The third is the effect of rounding on them; in half precision nothing else is left of the differences, and
only a derivative of 0 is refused.

A derivative that is NaN or infinite is never taken. Where autograd gives one, finite differences are taken if both
steps agree: then the derivative exists and autograd only met an expression like ``sqrt(s)**2`` at s = 0. If they do
not, the slope is infinite, as that of ``sqrt(1 - t)`` at t = 1, and an error says so.

Finite differences compare calls of the network. A network that gives two values for one input (dropout in training
mode) makes them noise divided by the step, so it is refused: one call is repeated on a few rows and the values are
compared. The other two ways make one call and need no such check.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor

from fewstep.errors import UserError, unknown
from fewstep.flow.field import Velocity, check_conditions
from fewstep.flow.noise import isolated_rng

Mode = Literal["auto", "forward", "double_vjp", "finite_difference"]
Way = Literal["auto", "forward", "finite_difference"]
WAYS: tuple[Mode, ...] = ("forward", "double_vjp", "finite_difference")
STEP = {torch.float64: 1e-5}  # step of finite differences, relative to the size of the state
COARSE_STEP = 5e-3  # the same in single and half precision, where velocities carry relative errors near 1e-6 or more
TRIED_ROWS = 4  # rows on which ``auto`` tries the ways
SHARE = 0.25  # largest relative gap to the finite differences at which a derivative is taken; chosen, not tuned
CERTAINTY = 4.0  # the gap may be larger by so many times the differences' own uncertainty; chosen, not tuned
FINER = 1 / 16  # the second step of the finite differences, relative to the first
HALF_PRECISION_EPS = 1e-3  # in precisions whose eps is larger, differences decide nothing
SAME = 8.0  # two calls agree when they differ by at most this many eps: GPU sums may change order between calls


@final
class Derivative:
    """``(x, t, dx, dt) -> (v, dv)``, ``dv = (∂v/∂x) dx + (∂v/∂t) dt``, for one velocity field.

    Args:
        velocity: ``v(x, t, **cond)``.
        mode: ``forward``, ``double_vjp``, ``finite_difference``, or ``auto``: the first of them that works, found
            at the first call and kept.

    Attributes:
        used: the way that was taken, None before the first call.

    Raises:
        UserError: an unknown mode.

    >>> x, t = torch.ones(2, 3), torch.full((2,), 0.5)
    >>> Derivative(lambda x, t: x**2)(x, t, x)[1][0]
    tensor([2., 2., 2.])
    """

    def __init__(self, velocity: Velocity, mode: Mode = "auto") -> None:
        if mode != "auto" and mode not in WAYS:
            raise unknown("derivative mode", mode, ("auto", *WAYS))
        self.velocity = velocity
        self.mode = mode
        self.used: Mode | None = None if mode == "auto" else mode
        self._repeats = False  # whether the network was seen to give one value for one input

    def __call__(
        self, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor | None = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """The velocity and its derivative in the direction ``(dx, dt)``.

        The tries of the first call leave torch's global random state as they found it.

        Args:
            x, dx: state and its tangent, (B, ...).
            t, dt: times in [0, 1] and their tangents, (B,); no ``dt`` is 0.
            cond: handed to the network.

        Returns:
            ``v`` and ``dv``, each (B, ...), without an autograd graph.

        Raises:
            UserError: ``dx`` has another shape than ``x``; with ``auto``, no way gives a finite derivative; finite
                differences of a network that gives two values for one input.
        """
        if dx.shape != x.shape:
            raise UserError(f"the tangent has shape {tuple(dx.shape)} and the state {tuple(x.shape)}: they must agree.")
        dt = torch.zeros_like(t) if dt is None else dt
        if self.used is None or (self.used == "finite_difference" and not self._repeats):
            rows = slice(TRIED_ROWS)
            few = x[rows], t[rows], dx[rows], dt[rows], rows_of(cond, len(x), rows)
            with torch.no_grad(), plain_attention(), isolated_rng(x.device):
                self.used = self.used or self._first_that_works(*few)
                if self.used == "finite_difference":
                    self._repeats = _repeats(self.velocity, few[0], few[1], few[-1])
        with torch.no_grad(), plain_attention():
            return _RUN[self.used](self.velocity, x, t, dx, dt, cond)

    def _first_that_works(self, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, cond: dict[str, Any]) -> Mode:
        """Try on a few rows; what a network raises where it cannot be differentiated may be any exception."""
        differences, infinite = _Differences(self.velocity, x, t, dx, dt, cond), False
        for way in ("forward", "double_vjp"):
            try:
                _, derivative = _RUN[way](self.velocity, x, t, dx, dt, cond)
            except Exception:
                continue
            if not _finite(derivative):
                infinite = True
            elif differences.allow(derivative):
                return way
        if not _finite(differences.slope) or (infinite and not differences.settled):
            raise _no_finite_derivative(self.velocity(x, t, **cond), t)
        return "finite_difference"


@final
class _Differences:
    """Finite differences on a few rows with two steps, and their uncertainty; see the module's docstring."""

    def __init__(self, velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, cond: dict[str, Any]) -> None:
        share = _share(x)
        v, self.slope = _finite_difference(velocity, x, t, dx, dt, cond)
        _, self.finer = _finite_difference(velocity, x, t, dx, dt, cond, FINER * share)
        self.eps = torch.finfo(v.dtype).eps
        self.noise = self.eps * _norm(v / _wide(_offset(x, dx, dt, FINER * share), v))
        self.doubt = _norm(self.slope - self.finer) + self.noise

    @property
    def settled(self) -> bool:
        """Whether both steps give one slope; towards an infinite slope the smaller step gives a larger one."""
        return self.doubt <= SHARE * _norm(self.slope) + CERTAINTY * self.noise

    def allow(self, derivative: Tensor) -> bool:
        """Whether a derivative agrees. Exactly 0 is what a detached input gives: taken only if rounding explains it."""
        size = _norm(self.slope)
        if not derivative.any():
            return size <= CERTAINTY * self.noise
        gap = min(_norm(derivative - self.slope), _norm(derivative - self.finer))
        allowed = SHARE * max(_norm(derivative), size) + CERTAINTY * self.doubt
        return self.eps > HALF_PRECISION_EPS or not gap > allowed


def _repeats(velocity: Velocity, x: Tensor, t: Tensor, cond: dict[str, Any]) -> bool:
    """Refuse a network that gives two values for one input. False where all values are 0, which decides nothing."""
    one, two = velocity(x, t, **cond), velocity(x, t, **cond)
    if _norm(one - two) > SAME * torch.finfo(one.dtype).eps * _norm(one):
        raise UserError(
            "the derivative would be taken by finite differences, and the network gives two values for one input (as "
            "dropout in training mode does): their difference is noise, not a derivative. Set the network's dropout "
            "to 0, call .eval() on it, or make it differentiable in forward mode (mode 'forward' needs one call)."
        )
    return bool(one.any())


def _finite(values: Tensor) -> bool:
    return bool(torch.isfinite(values).all())


def _no_finite_derivative(v: Tensor, t: Tensor) -> UserError:
    """What is not finite: the velocity itself, or its derivative alone; and at which time."""
    if not _finite(v):
        row = int((~torch.isfinite(v)).flatten(1).any(1).nonzero()[0])
        return UserError(
            f"the velocity is NaN or infinite at t = {float(t[row]):g}, so it has no derivative: check the network's "
            "weights, its conditions and the scale of its input."
        )
    times = ", ".join(f"{time:g}" for time in sorted(set(t.tolist())))
    return UserError(
        f"no mode (forward, double_vjp, finite_difference) gives a finite derivative at t = {times}, although the "
        "velocity is finite: its slope is infinite there, as that of a square root at 0. Take times inside (0, 1), or "
        "write the network without the square root."
    )


def pullback(velocity: Velocity, x: Tensor, t: Tensor, w: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
    """``v`` and ``w^T ∂v/∂x`` by reverse differentiation.

    Args:
        velocity: ``v(x, t, **cond)``.
        x, w: state and the vector that multiplies the Jacobian from the left, (B, ...).
        t: times in [0, 1], (B,).
        cond: handed to the network.

    Returns:
        Both (B, ...), without an autograd graph.

    Raises:
        UserError: autograd sees no dependence on ``x``.
    """
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        v = velocity(point, t, **cond)
        if not v.requires_grad:
            raise UserError(
                "the velocity does not depend on x as far as autograd can see (it is computed under no_grad, or x is "
                "detached): let gradients through the network's input."
            )
        (vjp,) = torch.autograd.grad(v, point, w, allow_unused=True)
    return v.detach(), torch.zeros_like(x) if vjp is None else vjp


def _forward(
    velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    pair = torch.func.jvp(lambda y, s: velocity(y, s, **cond), (x, t), (dx, dt))
    return pair[0], pair[1]


def _double_vjp(
    velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, cond: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        point, time = x.detach().requires_grad_(), t.detach().requires_grad_()
        v = velocity(point, time, **cond)
        u = torch.zeros_like(v, requires_grad=True)
        rows = torch.autograd.grad(v, (point, time), u, create_graph=True, allow_unused=True)
        used = [(row, tangent) for row, tangent in zip(rows, (dx, dt), strict=True) if row is not None]
        if not used:
            return v.detach(), torch.zeros_like(v)
        (dv,) = torch.autograd.grad([row for row, _ in used], u, [tangent for _, tangent in used], allow_unused=True)
    return v.detach(), torch.zeros_like(v) if dv is None else dv


def _finite_difference(
    velocity: Velocity,
    x: Tensor,
    t: Tensor,
    dx: Tensor,
    dt: Tensor,
    cond: dict[str, Any],
    share: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Second order from offsets ``(-h, 0, h)``, ``(0, h, 2h)`` or ``(-2h, -h, 0)`` along ``(dx, dt)``, per row."""
    h = _offset(x, dx, dt, _share(x) if share is None else share)
    side = torch.where(t - h * dt.abs() < 0, dt.sign(), torch.where(t + h * dt.abs() > 1, -dt.sign(), 0.0))
    one = torch.where(side == 0, -h, side * h)
    two = torch.where(side == 0, h, 2 * side * h)
    v = velocity(x, t, **cond)

    def change(offset: Tensor) -> Tensor:
        return velocity(x + _wide(offset, x) * dx, (t + offset * dt).clamp(0, 1), **cond) - v

    # slope at 0 of the parabola through the values at 0, one and two
    rise = _wide(two**2, x) * change(one) - _wide(one**2, x) * change(two)
    return v, rise / _wide(one * two * (two - one), x)


def _share(x: Tensor) -> float:
    return STEP.get(x.dtype, COARSE_STEP)


def _offset(x: Tensor, dx: Tensor, dt: Tensor, share: float) -> Tensor:
    """``h`` that moves the state by a fixed share of its size and the time by no more, (B,)."""
    size = x.flatten(1).square().mean(1).sqrt() + 1.0
    reach = torch.maximum(dx.flatten(1).square().mean(1).sqrt() / size, dt.abs())
    return share / torch.where(reach > 0, reach, 1.0)


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …), to multiply rows."""
    return values.reshape(-1, *(1,) * (like.ndim - 1))


def _norm(values: Tensor) -> float:
    return float(values.double().square().sum().sqrt())


_RUN = {"forward": _forward, "double_vjp": _double_vjp, "finite_difference": _finite_difference}


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """A context in which attention is computed by plain matrix products, which have forward and second derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def rows_of(cond: Mapping[str, Any], batch: int, rows: slice | Tensor) -> dict[str, Any]:
    """The conditions of some samples.

    Args:
        cond: conditions, tensors with one row per sample; what is no tensor belongs to all samples.
        batch: number of samples.
        rows: which samples.

    Raises:
        UserError: a tensor that does not have one row per sample.
    """
    check_conditions(cond, batch)
    return {name: value[rows] if isinstance(value, Tensor) else value for name, value in cond.items()}
