r"""Affine probability paths, and conversions between velocity, data prediction, noise prediction and score.

A path carries noise ``x0`` (t = 0) to data ``x1`` (t = 1):

    x_t = alpha(t) x1 + sigma(t) x0,        target(t) = alpha'(t) x1 + sigma'(t) x0.

Taking E[. | x_t] of both lines shows that the velocity ``v``, the data prediction ``x1 = E[x1 | x_t]`` and
the noise prediction ``x0 = E[x0 | x_t]`` are linear in each other, for every coupling. With the determinant
``d = alpha sigma' - sigma alpha'`` (negative wherever the signal-to-noise ratio grows),

    x1 = (sigma' x - sigma v) / d,          x0 = (alpha v - alpha' x) / d.

Only the score needs more: ``score = -x0 / sigma`` holds when x0 is standard normal and independent of x1
(Lipman et al., arXiv:2210.02747; Albergo et al., arXiv:2303.08797), not after reflow or an OT coupling.

A conversion that is singular at some t (data -> velocity at sigma = 0, noise -> velocity at alpha = 0, ...)
raises when a given t is exactly there. Velocity -> data and velocity -> noise are regular on all of [0, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fewstep.errors import UserError


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """Reshape ``t`` (B,) to (B, 1, ..., 1) with as many dimensions as ``x`` (B, ...), in the dtype of ``x``.

    The reshape goes by dimensions, so it is right also when B equals the data dimension.

    Raises:
        UserError: ``t`` is not (B,).

    >>> expand_time(torch.zeros(2), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    if t.ndim != 1 or x.ndim == 0 or t.shape[0] != x.shape[0]:
        raise UserError(
            f"t has shape {tuple(t.shape)} and x has shape {tuple(x.shape)}: t must be (B,), one time per "
            "row of x. For one time for all rows use x.new_full((x.shape[0],), time)."
        )
    return t.to(x.dtype).reshape(-1, *([1] * (x.ndim - 1)))


class AffinePath(ABC):
    """x_t = alpha(t) x1 + sigma(t) x0, from noise (t = 0) to data (t = 1).

    The coefficient functions take and return (B,) tensors. In the conversions ``x`` is the state x_t
    (B, ...), ``t`` is (B,) in [0, 1], and the converted quantity has the shape of ``x``. A conversion raises
    ``UserError`` for shapes that differ and for a t at which it is singular.

    Source: Lipman et al. (arXiv:2210.02747) and Albergo et al. (arXiv:2303.08797); the formulas are in the module's
    docstring.
    """

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Weight of the data, alpha(1) = 1."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Weight of the noise, sigma(1) = 0."""

    @abstractmethod
    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt."""

    @abstractmethod
    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt."""

    @abstractmethod
    def sigma_squared(self, t: Tensor) -> Tensor:
        """Variance of the noise, sigma^2, without a square root: all its derivatives are finite on [0, 1].

        ``sigma(t)**2`` has the derivative ``2 sigma sigma'``, which automatic differentiation computes as 0 times
        infinity at t = 1 where sigma is a square root (VP, interpolant).
        """

    @abstractmethod
    def sigma_sigma_dot(self, t: Tensor) -> Tensor:
        """sigma sigma' = (sigma^2)' / 2, finite on all of [0, 1] even where sigma' is not."""

    @abstractmethod
    def data_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of x1 = a x + b v: a = sigma'/d, b = -sigma/d."""

    @abstractmethod
    def noise_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of x0 = a x + b v: a = -alpha'/d, b = alpha/d."""

    @abstractmethod
    def score_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(a, b) of score = a x + b v = -x0 / sigma; not finite where the score is singular."""

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha(t) x1 + sigma(t) x0."""
        _same_shape("x0", x0, "x1", x1)
        return expand_time(self.alpha(t), x1) * x1 + expand_time(self.sigma(t), x0) * x0

    def target(self, x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
        """Conditional velocity alpha'(t) x1 + sigma'(t) x0, what flow matching regresses on."""
        _same_shape("x0", x0, "x1", x1)
        return expand_time(self.alpha_dot(t), x1) * x1 + expand_time(self.sigma_dot(t), x0) * x0

    def velocity_to_data(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """E[x1 | x_t]; on the linear path x + (1 - t) v. Regular on [0, 1]."""
        return _combine(self.data_coefficients(t), x, v)

    def velocity_to_noise(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """E[x0 | x_t]; on the linear path x - t v. Regular on [0, 1]."""
        return _combine(self.noise_coefficients(t), x, v)

    def data_to_velocity(self, x1: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The inverse of :meth:`velocity_to_data`; singular where sigma(t) = 0."""
        return _solve(self.data_coefficients(t), x, x1, t, "data to velocity", "sigma(t) = 0 there")

    def noise_to_velocity(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Inverse of :meth:`velocity_to_noise`; singular where alpha(t) = 0, and at t = 1 on VP and interpolant."""
        reason = "v has weight 0 in the noise prediction there"
        return _solve(self.noise_coefficients(t), x, x0, t, "noise to velocity", reason)

    def data_to_noise(self, x1: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 = (x - alpha x1) / sigma; singular where sigma(t) = 0."""
        return _solve((self.alpha(t), self.sigma(t)), x1, x, t, "data to noise", "sigma(t) = 0 there")

    def noise_to_data(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x1 = (x - sigma x0) / alpha; singular where alpha(t) = 0."""
        return _solve((self.sigma(t), self.alpha(t)), x0, x, t, "noise to data", "alpha(t) = 0 there")

    def velocity_to_score(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = -x0 / sigma, on the linear path (t v - x) / (1 - t).

        Valid for an independent coupling with x0 ~ N(0, I) only. Singular where sigma(t) = 0, except on VP and
        interpolant.
        """
        a, b = self.score_coefficients(t)
        refuse_singular(~(torch.isfinite(a) & torch.isfinite(b)), t, "velocity to score", "sigma(t) = 0 there")
        return _combine((a, b), x, v)

    def score_to_velocity(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """v = (alpha'/alpha) (x + sigma^2 score) - sigma sigma' score; singular where alpha(t) = 0."""
        _same_shape("score", score, "x", x)
        alpha = self.alpha(t)
        refuse_singular(alpha == 0, t, "score to velocity", "alpha(t) = 0 there")
        rate = self.alpha_dot(t) / alpha
        weight = rate * self.sigma_squared(t) - self.sigma_sigma_dot(t)
        return expand_time(rate, x) * x + expand_time(weight, x) * score

    def noise_to_score(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """score = -x0 / sigma; ``x`` only fixes the batch. Singular where sigma(t) = 0."""
        _same_shape("x0", x0, "x", x)
        sigma = self.sigma(t)
        refuse_singular(sigma == 0, t, "noise to score", "sigma(t) = 0 there")
        return -x0 / expand_time(sigma, x)

    def score_to_noise(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """x0 = -sigma score. Regular on [0, 1]."""
        _same_shape("score", score, "x", x)
        return -expand_time(self.sigma(t), x) * score

    def data_to_score(self, x1: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """score = (alpha x1 - x) / sigma^2; singular where sigma(t) = 0."""
        return self.noise_to_score(self.data_to_noise(x1, x, t), x, t)

    def score_to_data(self, score: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Tweedie's formula x1 = (x + sigma^2 score) / alpha; singular where alpha(t) = 0."""
        return self.noise_to_data(self.score_to_noise(score, x, t), x, t)


def _combine(coefficients: tuple[Tensor, Tensor], x: Tensor, v: Tensor) -> Tensor:
    """``a x + b v`` with (B,) coefficients."""
    _same_shape("the converted quantity", v, "x", x)
    a, b = coefficients
    return expand_time(a, x) * x + expand_time(b, x) * v


def _solve(coefficients: tuple[Tensor, Tensor], x: Tensor, y: Tensor, t: Tensor, what: str, reason: str) -> Tensor:
    """The v that solves ``a x + b v = y``; refuses b = 0."""
    _same_shape("the converted quantity", x, "x", y)
    a, b = coefficients
    refuse_singular(b == 0, t, what, reason)
    return (y - expand_time(a, x) * x) / expand_time(b, x)


def refuse_singular(singular: Tensor, t: Tensor, what: str, reason: str) -> None:
    """Raise ``UserError`` for the first time (B,) at which ``what`` is ``singular`` (B,), with the reason."""
    if bool(singular.any()):
        where = float(t[singular][0])
        raise UserError(f"{what} is singular at t = {where:g}: {reason}. Use a t strictly inside (0, 1).")


def _same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Refuse two states of different shapes, which torch would broadcast without a word."""
    if a.shape != b.shape:
        raise UserError(f"{name_a} has shape {tuple(a.shape)} but {name_b} has {tuple(b.shape)}: they must be equal.")
