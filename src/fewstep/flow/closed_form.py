r"""Flows known exactly: Gaussian data, Gaussian mixtures, and correlated Gaussian pairs.

Solvers, losses and diagnostics are tested against them. Noise is x0 ~ N(0, I); times t, r are (B,) tensors, x is
(B, ...), t = 0 is noise. All is computed in float64 and returned in the dtype of x. All derivatives are finite on
[0, 1] for positive stds: q is computed from ``path.sigma_squared``, which has no square root.

**Gaussian** x1 ~ N(m, s^2), independent of x0, on x_t = alpha x1 + sigma x0. The marginal is N(alpha m, q)
with q(t) = sigma^2 + alpha^2 s^2, and the flow only rescales it:

    v(x, t)    = alpha' m + (sigma sigma' + alpha alpha' s^2) / q(t) (x - alpha(t) m)
    X(x, t, r) = alpha(r) m + sqrt(q(r) / q(t)) (x - alpha(t) m).

**Mixture** sum_k w_k N(m_k, s_k^2 I): with posterior weights gamma_k(x, t) ~ w_k N(x; alpha m_k, q_k I),
velocity and score are the gamma-weighted means of the components' own.

Correlated Gaussian pairs have a file of their own, :mod:`fewstep.flow.coupled_gaussian`.

>>> round(gaussian(mean=0.0, std=0.5).straightness(), 4)  # (2 - pi/2) s
0.2146
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.coupled_gaussian import CoupledGaussian, as_float64, broadcast, coupled_gaussian, fits, normal
from fewstep.flow.paths import AffinePath, Linear, expand_time

__all__ = ["Gaussian", "Mixture", "coupled_gaussian", "gaussian", "mixture"]

_LOG_2PI = math.log(2 * math.pi)
_BISECTIONS = 64


def gaussian(
    mean: Tensor | float,
    std: Tensor | float,
    path: AffinePath | None = None,
    shape: tuple[int, ...] | None = None,
) -> Gaussian:
    """Exact flow from N(0, I) to N(mean, diag(std^2)) with independent pairs.

    Args:
        mean, std: numbers or tensors broadcastable to one data point; std >= 0.
        path: affine path, the linear one by default.
        shape: shape of one data point, where it is larger than the broadcast shape of mean and std.

    Raises:
        UserError: a negative or non-finite value, or shapes that do not broadcast.

    >>> flow = gaussian(mean=1.0, std=0.5)
    >>> flow.flow_map(torch.tensor([[2.0]]), torch.zeros(1), torch.ones(1))  # m + s x
    tensor([[2.]])
    """
    m, s = as_float64("mean", mean), as_float64("std", std)
    if bool((s < 0).any()):
        raise UserError("gaussian: std has a negative value; standard deviations must be >= 0.")
    return Gaussian(*broadcast(m, s, shape), path=path or Linear())


def mixture(weights: Tensor, means: Tensor, stds: Tensor, path: AffinePath | None = None) -> Mixture:
    """Exact flow from N(0, I) to sum_k w_k N(m_k, s_k^2 I) with independent pairs.

    Args:
        weights: (K,), positive; normalised to sum 1.
        means: (K, ...), one data point each.
        stds: (K,), >= 0; where one is 0 (a point) nothing is defined at t = 1.
        path: affine path, the linear one by default.

    Raises:
        UserError: shapes that do not agree, weights not positive, stds negative.
    """
    w, m, s = as_float64("weights", weights), as_float64("means", means), as_float64("stds", stds)
    if m.ndim < 2 or w.shape != m.shape[:1] or s.shape != m.shape[:1]:
        raise UserError(
            f"mixture: weights {tuple(w.shape)}, means {tuple(m.shape)}, stds {tuple(s.shape)}: for K "
            "components give weights (K,), means (K, ...) with at least one data dimension, stds (K,)."
        )
    if bool((w <= 0).any()) or bool((s < 0).any()):
        raise UserError("mixture: weights must be positive and stds >= 0; leave out empty components.")
    return Mixture(w / w.sum(), m, s, path or Linear())


@final
@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, diag(std^2)), independent pairs, any affine path. Made by :func:`gaussian`.

    Attributes:
        mean, std: float64, one shape that broadcasts to a data point.
        path: the affine path.
    """

    mean: Tensor
    std: Tensor
    path: AffinePath

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """v(x, t) = alpha' m + (sigma sigma' + alpha alpha' s^2) / q (x - alpha m)."""
        y, time, m, s = self._prepare(x, t)
        alpha, alpha_dot = (expand_time(c, y) for c in (self.path.alpha(time), self.path.alpha_dot(time)))
        half_rate = expand_time(self.path.sigma_sigma_dot(time), y) + alpha * alpha_dot * s**2
        return (alpha_dot * m + half_rate / self._variance(time, y) * (y - alpha * m)).to(x.dtype)

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """X(x, t, r) = alpha(r) m + sqrt(q(r) / q(t)) (x - alpha(t) m)."""
        y, time, m, _ = self._prepare(x, t)
        end = r.to(torch.float64)
        scale = (self._variance(end, y) / self._variance(time, y)).sqrt()
        start_mean, end_mean = (expand_time(self.path.alpha(c), y) * m for c in (time, end))
        return (end_mean + scale * (y - start_mean)).to(x.dtype)

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u = (X(x, t, r) - x) / (r - t), and v(x, t) where r = t.

        On the linear path (r - t) cancels in the formula, (sqrt q_r - sqrt q_t) / (r - t) =
        ((r + t)(1 + s^2) - 2) / (sqrt q_r + sqrt q_t), so u is exact and differentiable at r = t too.
        """
        y, time, m, s = self._prepare(x, t)
        end = r.to(torch.float64)
        if not isinstance(self.path, Linear):
            return _secant(self, x, t, r)
        root_t, root_r = self._variance(time, y).sqrt(), self._variance(end, y).sqrt()
        slope = (expand_time(end + time, y) * (1 + s**2) - 2) / (root_r + root_t)
        return (m + slope / root_t * (y - expand_time(time, y) * m)).to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = -(x - alpha m) / q."""
        y, time, m, _ = self._prepare(x, t)
        return ((expand_time(self.path.alpha(time), y) * m - y) / self._variance(time, y)).to(x.dtype)

    def log_density(self, x: Tensor, t: Tensor | float = 1.0) -> Tensor:
        """log p_t(x), (B,), natural logarithm; the data density at t = 1."""
        y, time, m, _ = self._prepare(x, _times(t, x))
        q = self._variance(time, y).expand_as(y)
        z2 = (y - expand_time(self.path.alpha(time), y) * m) ** 2 / q
        return (-0.5 * (z2 + q.log() + _LOG_2PI)).flatten(1).sum(1).to(x.dtype)

    def sample(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """n draws of the data, (n, *shape)."""
        return (self.mean + self.std * normal((n, *self.mean.shape), generator)).to(dtype)

    def loss_floor(self) -> float:
        """V = (pi/2) sum s: least flow-matching loss, uniform t, summed over dimensions; linear path only."""
        return self._coupled().loss_floor()

    def straightness(self) -> float:
        """S = int E||(Z1 - Z0) - v(Z_t, t)||^2 dt = (2 - pi/2) sum s, over dimensions; linear path only."""
        return self._coupled().straightness()

    def _coupled(self) -> CoupledGaussian:
        if not isinstance(self.path, Linear):
            raise UserError(
                f"the closed form holds on the linear path only, not on {type(self.path).__name__}: "
                "measure it with fewstep.diagnose."
            )
        return CoupledGaussian(self.mean, self.std, rho=0.0)

    def _variance(self, t: Tensor, y: Tensor) -> Tensor:
        """q(t), broadcastable to y."""
        s = self.std.to(y)
        q = expand_time(self.path.sigma_squared(t), y) + expand_time(self.path.alpha(t), y) ** 2 * s**2
        _refuse_points(self.std, q)
        return q

    def _prepare(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = x.to(torch.float64)
        expand_time(t, x)
        fits(self.mean.shape, x)
        return y, t.to(torch.float64), self.mean.to(y), self.std.to(y)


@final
@dataclass(frozen=True, eq=False)
class Mixture:
    """sum_k w_k N(m_k, s_k^2 I), independent pairs, any affine path. Made by :func:`mixture`.

    Attributes:
        weights: (K,), sum 1.
        means: (K, ...).
        stds: (K,).
        path: the affine path.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    path: AffinePath

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """v = sum_k gamma_k [alpha' m_k + c_k (x - alpha m_k)], c_k = d/dt log sqrt(q_k)."""
        y, time = self._prepare(x, t)
        alpha, alpha_dot = self.path.alpha(time)[:, None], self.path.alpha_dot(time)[:, None]
        q = self._variance(time)
        c = (self.path.sigma_sigma_dot(time)[:, None] + alpha * alpha_dot * self.stds.to(y) ** 2) / q
        gamma = self._log_joint(y, time, q).softmax(1)
        v = (gamma * (alpha_dot - c * alpha)) @ self._centres(y) + (gamma * c).sum(1, keepdim=True) * y
        return v.reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x) = sum_k gamma_k (alpha m_k - x) / q_k."""
        y, time = self._prepare(x, t)
        q = self._variance(time)
        weight = self._log_joint(y, time, q).softmax(1) / q
        pull = (weight * self.path.alpha(time)[:, None]) @ self._centres(y)
        return (pull - weight.sum(1, keepdim=True) * y).reshape(x.shape).to(x.dtype)

    def log_density(self, x: Tensor, t: Tensor | float = 1.0) -> Tensor:
        """log p_t(x), (B,), natural logarithm; the data density at t = 1."""
        y, time = self._prepare(x, _times(t, x))
        return self._log_joint(y, time, self._variance(time)).logsumexp(1).to(x.dtype)

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """X(x, t, r).

        In one dimension the flow preserves order, so F_r(X) = F_t(x) with the distribution functions F: solved by
        bisection to rounding, with exact first derivatives. In more dimensions by RK4 with 160 to 2000 steps (error
        below 1e-6 on mixtures with stds .02 to .3 times the largest mean); derivatives go through the solver.
        """
        y, time = self._prepare(x, t)
        expand_time(r, x)
        end = r.to(y)
        out = self._rearrange(y, time, end) if y.shape[1] == 1 else self._integrate(y, time, end)
        return out.reshape(x.shape).to(x.dtype)

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u = (X(x, t, r) - x) / (r - t), and v(x, t) where r = t."""
        return _secant(self, x, t, r)

    def sample(self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """n draws of the data, (n, *shape)."""
        device = generator.device
        k = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator).cpu()
        noise = normal((n, *self.means.shape[1:]), generator)
        return (self.means[k] + expand_time(self.stds[k], noise) * noise).to(dtype)

    def _prepare(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x as (B, D) float64, t as (B,) float64."""
        expand_time(t, x)
        if x.shape[1:] != self.means.shape[1:]:
            raise UserError(
                f"x has shape {tuple(x.shape)} but the mixture lives on {tuple(self.means.shape[1:])}: "
                f"give x as (B, {', '.join(map(str, self.means.shape[1:]))})."
            )
        return x.to(torch.float64).flatten(1), t.to(torch.float64)

    def _centres(self, y: Tensor) -> Tensor:
        return self.means.to(y).flatten(1)

    def _variance(self, t: Tensor) -> Tensor:
        """q_k(t) = sigma^2 + alpha^2 s_k^2, (B, K)."""
        q = self.path.sigma_squared(t)[:, None] + (self.path.alpha(t)[:, None] * self.stds.to(t)) ** 2
        _refuse_points(self.stds, q)
        return q

    def _log_joint(self, y: Tensor, t: Tensor, q: Tensor) -> Tensor:
        """log w_k + log N(y; alpha m_k, q_k I), (B, K)."""
        m = self._centres(y)
        alpha = self.path.alpha(t)[:, None]
        distance = (y**2).sum(1, keepdim=True) - 2 * alpha * (y @ m.T) + alpha**2 * (m**2).sum(1)
        return self.weights.to(y).log() - 0.5 * (distance / q + y.shape[1] * (q.log() + _LOG_2PI))

    def _log_tails(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """log F_t(y) and log (1 - F_t(y)) in one dimension, (B,) each, accurate far out."""
        z = (y - self.path.alpha(t)[:, None] * self._centres(y)[:, 0]) / self._variance(t).sqrt()
        w = self.weights.to(y).log()
        below = (w + torch.special.log_ndtr(z)).logsumexp(1)
        above = (w + torch.special.log_ndtr(-z)).logsumexp(1)
        return below, above

    def _rearrange(self, y: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """The y' with F_r(y') = F_t(y), y (B, 1), compared in the lighter tail."""
        below, above = self._log_tails(y, t)
        lower = below < above
        with torch.no_grad():
            found = self._bisect(y.detach(), t.detach(), r.detach(), below.detach(), above.detach())
        # a Newton step at the root has the value 0 and the derivatives of the implicit function
        below_r, above_r = self._log_tails(found, r)
        log_p = self._log_joint(found, r, self._variance(r)).logsumexp(1)
        gap = torch.where(lower, below - below_r, above_r - above)
        weight = torch.where(lower, below_r, above_r) - log_p
        step = gap * weight.detach().exp().clamp(max=1e30)
        return found + (step - step.detach())[:, None]

    def _bisect(self, y: Tensor, t: Tensor, r: Tensor, below: Tensor, above: Tensor) -> Tensor:
        """Bisection between the images of y under the components' own maps, which enclose the root."""
        centres, lower = self._centres(y)[:, 0], below < above
        z = (y - self.path.alpha(t)[:, None] * centres) / self._variance(t).sqrt()
        spread, shift = self._variance(r).sqrt(), self.path.alpha(r)[:, None] * centres
        low = (shift + spread * z.amin(1, keepdim=True)).amin(1, keepdim=True)
        high = (shift + spread * z.amax(1, keepdim=True)).amax(1, keepdim=True)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            below_r, above_r = self._log_tails(middle, r)
            too_low = torch.where(lower, below_r < below, above_r > above)[:, None]
            low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
        return (low + high) / 2

    def _integrate(self, y: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """RK4 from t to r, the more steps the narrower the narrowest component."""
        narrow = float(self.stds.min()) / max(1.0, float(self.means.abs().max()))
        steps = math.ceil(24 / min(max(narrow, 0.012), 0.15))
        h = (r - t) / steps
        width = h[:, None]
        flat = Mixture(self.weights, self.means.flatten(1), self.stds, self.path)
        for k in range(steps):
            start, middle, end = t + k * h, t + (k + 0.5) * h, t + (k + 1) * h if k < steps - 1 else r
            k1 = flat.velocity(y, start)
            k2 = flat.velocity(y + width / 2 * k1, middle)
            k3 = flat.velocity(y + width / 2 * k2, middle)
            k4 = flat.velocity(y + width * k3, end)
            y = y + width / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return y


def _secant(flow: Gaussian | Mixture, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """(X(x, t, r) - x) / (r - t), and v(x, t) on the diagonal; the difference is taken in float64."""
    y = x.to(torch.float64)
    time, end = t.to(torch.float64), r.to(torch.float64)
    same = time == end
    width = torch.where(same, 1.0, end - time)
    chord = (flow.flow_map(y, time, end) - y) / expand_time(width, y)
    if not bool(same.any()):
        return chord.to(x.dtype)
    return torch.where(expand_time(same, y) > 0, flow.velocity(y, time), chord).to(x.dtype)


def _times(t: Tensor | float, x: Tensor) -> Tensor:
    """One time for all rows as (B,)."""
    return t if isinstance(t, Tensor) else torch.full((len(x),), t, dtype=torch.float64, device=x.device)


def _refuse_points(stds: Tensor, q: Tensor) -> None:
    """Refuse q = 0, which a component with std 0 has at t = 1. Nothing is computed when every std is positive."""
    if bool((stds == 0).any()) and bool((q == 0).any()):
        raise UserError("a component with std 0 is a point: nothing is defined at t = 1, use t < 1.")
