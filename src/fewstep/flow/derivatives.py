r"""Directional derivatives of a velocity field, of any network.

    dv = (∂v/∂x) dx + (∂v/∂t) dt        (:class:`Derivative`)
    w^T ∂v/∂x                           (:func:`pullback`)

Along a trajectory, ``dx = v``, ``dt = 1`` gives the acceleration ``x'' = ∂_t v + (∂_x v) v``.

Three ways lead to ``dv``. *Forward-mode* differentiation (``torch.func.jvp``) keeps no graph and costs about two
network calls where the tensors are large (several where they are small); not every operation has it: fused attention
kernels never do (the plain "math" kernel is taken instead), and GroupNorm or reshapes in some networks fail. *Double
reverse* differentiation runs wherever training runs: the reverse derivative ``u -> u^T J`` is linear in ``u``, and
differentiating it again gives ``J dx``. *Finite differences* run always: a second-order difference of three values,
one-sided next to t = 0 and t = 1 so that no time outside [0, 1] is asked for.

``auto`` takes the first that works, and says which in :attr:`Derivative.used`. A network that detaches its input, or
part of it, raises nothing and is differentiated wrongly by both (``no_grad`` inside it stops only the reverse way), so
at the first call the derivative of a few rows is held against finite differences with two steps, ``h`` and
``k = h/16``. It is refused when

    min(|d - d_h|, |d - d_k|) > 1/4 max(|d|, |d_h|) + 4 (|d_h - d_k| + eps |v| / k).

The second term is large where the network is steep on the scale of the steps, or noisy: then differences say nothing.
The third is what rounding does to them; in half precision it is all there is, and only a derivative of 0 is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, final

import torch
from torch import Tensor

from fewstep.errors import UserError, unknown
from fewstep.flow.field import Velocity

Mode = Literal["auto", "forward", "double_vjp", "finite_difference"]
Way = Literal["auto", "forward", "finite_difference"]
WAYS: tuple[Mode, ...] = ("forward", "double_vjp", "finite_difference")
STEP = {torch.float64: 1e-5}  # of finite differences; values in single precision carry errors of 1e-6 or so
COARSE_STEP = 5e-3
TRIED_ROWS = 4  # on which ``auto`` looks for a way
SHARE = 0.25  # of the derivative: a larger difference from finite differences is a wrong derivative
CERTAINTY = 4.0  # times the uncertainty of the finite differences
FINER = 1 / 16  # of the step, for their uncertainty
HALF = 1e-3  # precisions with a larger eps cannot judge


@final
class Derivative:
    """``(x, t, dx, dt) -> (v, dv)`` for one velocity field.

    Args:
        velocity: ``v(x, t, **cond)``.
        mode: ``forward``, ``double_vjp``, ``finite_difference``, or ``auto``: the first of them that works, found
            at the first call and kept.

    Attributes:
        used: the way that was taken, None before the first call.
    """

    def __init__(self, velocity: Velocity, mode: Mode = "auto") -> None:
        if mode != "auto" and mode not in WAYS:
            raise unknown("derivative mode", mode, ("auto", *WAYS))
        self.velocity = velocity
        self.mode = mode
        self.used: Mode | None = None if mode == "auto" else mode

    def __call__(
        self, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor | None = None, **cond: Any
    ) -> tuple[Tensor, Tensor]:
        """The velocity and its derivative in the direction ``(dx, dt)``.

        Args:
            x, dx: state and its tangent, (B, ...).
            t, dt: times and their tangents, (B,); no ``dt`` is 0.
            cond: handed to the network.

        Returns:
            ``v`` and ``dv``, each (B, ...), without an autograd graph.
        """
        if dx.shape != x.shape:
            raise UserError(f"the tangent has shape {tuple(dx.shape)} and the state {tuple(x.shape)}: they must agree.")
        dt = torch.zeros_like(t) if dt is None else dt
        if self.used is None:
            rows = slice(TRIED_ROWS)
            self.used = self._first_that_works(x[rows], t[rows], dx[rows], dt[rows], rows_of(cond, len(x), rows))
        with torch.no_grad(), plain_attention():
            return _RUN[self.used](self.velocity, x, t, dx, dt, cond)

    def _first_that_works(self, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, cond: dict[str, Any]) -> Mode:
        """Try on a few rows; what a network raises where it cannot be differentiated may be any exception."""
        with torch.no_grad(), plain_attention():
            right = _Differences(self.velocity, x, t, dx, dt, cond)
            for way in ("forward", "double_vjp"):
                try:
                    _, derivative = _RUN[way](self.velocity, x, t, dx, dt, cond)
                except Exception:
                    continue
                if right.allow(derivative):
                    return way
        return "finite_difference"


@final
class _Differences:
    """Finite differences on a few rows, and what they are worth; see the module's docstring."""

    def __init__(self, velocity: Velocity, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, cond: dict[str, Any]) -> None:
        share = _share(x)
        v, self.slope = _finite_difference(velocity, x, t, dx, dt, cond)
        _, self.finer = _finite_difference(velocity, x, t, dx, dt, cond, share=FINER * share)
        self.eps = torch.finfo(v.dtype).eps
        self.noise = self.eps * _norm(v / _wide(_offset(x, dx, dt, FINER * share), v))
        self.doubt = _norm(self.slope - self.finer) + self.noise

    def allow(self, derivative: Tensor) -> bool:
        """Whether a derivative agrees. An exact 0 is what a detached input gives: only rounding excuses it."""
        size = _norm(self.slope)
        if not derivative.any():
            return size <= CERTAINTY * self.noise
        gap = min(_norm(derivative - self.slope), _norm(derivative - self.finer))
        return self.eps > HALF or not gap > SHARE * max(_norm(derivative), size) + CERTAINTY * self.doubt


def pullback(velocity: Velocity, x: Tensor, t: Tensor, w: Tensor, **cond: Any) -> tuple[Tensor, Tensor]:
    """``v`` and ``w^T ∂v/∂x``, each (B, ...), by reverse differentiation, without an autograd graph."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        v = velocity(point, t, **cond)
        if not v.requires_grad:
            raise UserError(
                "the velocity does not depend on x as far as autograd can see (it is computed under no_grad, or x is "
                "detached): let gradients through the network's input."
            )
        (pulled,) = torch.autograd.grad(v, point, w, allow_unused=True)
    return v.detach(), torch.zeros_like(x) if pulled is None else pulled


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
    """Attention by plain matrix products, which have forward and second derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


def rows_of(cond: Mapping[str, Any], batch: int, rows: slice | Tensor) -> dict[str, Any]:
    """Those rows of the conditions that have one row per sample; others belong to all samples."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.shape[:1] == (batch,) else value
        for name, value in cond.items()
    }
