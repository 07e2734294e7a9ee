r"""Correlated Gaussian pairs: the exact flow between full independence and a perfect reflow.

x1 = m + s w with corr(x0, w) = rho per coordinate, on the linear path. Then
q(t) = (1 - t)^2 + t^2 s^2 + 2 t (1 - t) rho s, z_1 = m + s z_0 for *every* rho, and with theta = arccos rho

    V = min flow-matching loss = s sqrt(1 - rho^2) theta,      S = straightness = 2 s (1 - rho) - V,
    E|X1 - X0|^2 = E|Z1 - Z0|^2 + S + V   (any coupling, exact velocity),
    std after K Euler steps on the equal-angle grid = s cos(theta / K)^K.

rho = 0 is the first rectified flow (independent pairs), 0 < rho < 1 resembles minibatch optimal transport or a base
that depends on the data, rho = 1 a perfect reflow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow.paths import expand_time


def coupled_gaussian(
    mean: Tensor | float, std: Tensor | float, rho: float, shape: tuple[int, ...] | None = None
) -> CoupledGaussian:
    """Exact linear-path flow for x1 = mean + std w, where (x0, w) are standard normal with correlation rho.

    Args:
        mean, std: numbers or tensors broadcastable to one data point; std > 0.
        rho: correlation, -1 < rho <= 1 (at -1 all paths cross in one point and no flow exists).
        shape: shape of one data point, where it is larger than the broadcast shape of mean and std.

    Raises:
        UserError: std not positive, rho outside (-1, 1], values that are not finite, shapes that do not broadcast.

    >>> coupled_gaussian(0.0, 1.0, rho=0.5).one_step_std()
    tensor([0.5000], dtype=torch.float64)
    """
    m, s = as_float64("mean", mean), as_float64("std", std)
    if bool((s <= 0).any()):
        raise UserError("coupled_gaussian: std has a value that is not positive; give std > 0 everywhere.")
    if not -1 < rho <= 1:
        raise UserError(f"coupled_gaussian: rho = {rho} must be in (-1, 1]: at -1 all paths meet in one point.")
    return CoupledGaussian(*broadcast(m, s, shape), rho=float(rho))


@final
@dataclass(frozen=True, eq=False)
class CoupledGaussian:
    """x1 = mean + std w, corr(x0, w) = rho per coordinate, linear path. Made by :func:`coupled_gaussian`.

    Formulas: the module's docstring. The velocity-score relation does not hold unless rho = 0, so there is no score.

    Attributes:
        mean, std: float64, one shape that broadcasts to a data point.
        rho: correlation of x0 and w.
    """

    mean: Tensor
    std: Tensor
    rho: float

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """v = m + (t s^2 - (1 - t) + rho s (1 - 2 t)) / q(t) (x - t m)."""
        y, time, m, s = self._prepare(x, t)
        half_rate = time * s**2 - (1 - time) + self.rho * s * (1 - 2 * time)
        return (m + half_rate / self._variance(time, s) * (y - time * m)).to(x.dtype)

    def flow_map(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """X = r m + sqrt(q(r) / q(t)) (x - t m); from 0 to 1 this is m + s x for every rho."""
        y, time, m, s = self._prepare(x, t)
        end = expand_time(r, y)
        scale = (self._variance(end, s) / self._variance(time, s)).sqrt()
        return (end * m + scale * (y - time * m)).to(x.dtype)

    def average_velocity(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u = (X - x) / (r - t), v at r = t: (r - t) is cancelled in the formula, so u is exact at r = t too."""
        y, time, m, s = self._prepare(x, t)
        end = expand_time(r, y)
        root_t, root_r = self._variance(time, s).sqrt(), self._variance(end, s).sqrt()
        a = 1 + s**2 - 2 * self.rho * s
        slope = ((end + time) * a - 2 + 2 * self.rho * s) / (root_r + root_t)
        return (m + slope / root_t * (y - time * m)).to(x.dtype)

    def acceleration(self, x: Tensor, t: Tensor) -> Tensor:
        """x''(t) along the flow: s^2 (1 - rho^2) / q^2 (x - t m), as z_t - t m = sqrt(q) z_0."""
        y, time, m, s = self._prepare(x, t)
        return (s**2 * (1 - self.rho**2) / self._variance(time, s) ** 2 * (y - time * m)).to(x.dtype)

    def loss_floor(self) -> float:
        """V = sum s sqrt(1 - rho^2) arccos rho: least flow-matching loss, uniform t, over dimensions."""
        return float(self.std.sum()) * math.sqrt(1 - self.rho**2) * math.acos(self.rho)

    def straightness(self) -> float:
        """S = sum s (2 (1 - rho) - sqrt(1 - rho^2) arccos rho), summed over dimensions."""
        return 2 * (1 - self.rho) * float(self.std.sum()) - self.loss_floor()

    def one_step_std(self) -> Tensor:
        """Standard deviation |rho| s of the single Euler step x0 + v(x0, 0) = m + rho s x0."""
        return abs(self.rho) * self.std

    def angle_grid(self, steps: int) -> tuple[float, ...]:
        """Times on which the chord from x0 to x1 turns by equal angles theta / K per step; needs one std.

        t_k = sin phi_k / (sin phi_k + s sin(theta - phi_k)), phi_k = k theta / K. Euler on this grid gives
        exactly the standard deviation s cos(theta / K)^K.

        Args:
            steps: K, at least 1.

        Raises:
            UserError: several stds, steps below 1.
        """
        s = float(self.std.flatten()[0])
        if not bool((self.std == s).all()):
            raise UserError("angle_grid needs one std for all coordinates: each std has its own grid.")
        if steps < 1:
            raise UserError(f"angle_grid: steps = {steps} must be at least 1.")
        theta = math.acos(self.rho)
        grid = [0.0]
        for k in range(1, steps):
            near, far = (k, steps - k) if theta == 0 else (_sine(theta, k, steps), _sine(theta, steps - k, steps))
            grid.append(near / (near + s * far))
        return (*grid, 1.0)

    def sample_pairs(
        self, n: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """n pairs (x0, x1), each (n, *shape)."""
        x0, other = normal((2, n, *self.mean.shape), generator)
        w = self.rho * x0 + math.sqrt(1 - self.rho**2) * other
        return x0.to(dtype), (self.mean + self.std * w).to(dtype)

    def _variance(self, t: Tensor, s: Tensor) -> Tensor:
        """q(t) = (1 - t)^2 + t^2 s^2 + 2 t (1 - t) rho s."""
        return (1 - t) ** 2 + (t * s) ** 2 + 2 * t * (1 - t) * self.rho * s

    def _prepare(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y = x.to(torch.float64)
        fits(self.mean.shape, x)
        return y, expand_time(t, y), self.mean.to(y), self.std.to(y)


def joint_gaussian_velocity(
    x: Tensor, t: Tensor, mean0: Tensor, mean1: Tensor, cov0: Tensor, cov1: Tensor, cov10: Tensor
) -> Tensor:
    """Exact linear-path velocity of any jointly Gaussian pair.

    v = mu1 - mu0 + [t C1 - (1 - t) C0 + (1 - t) C10 - t C10^T] Q(t)^-1 (x - mu_t),
    Q(t) = (1 - t)^2 C0 + t^2 C1 + t (1 - t) (C10 + C10^T), mu_t = (1 - t) mu0 + t mu1.

    Args:
        x, t: (B, D), (B,).
        mean0, mean1: (D,).
        cov0, cov1: (D, D), covariances of x0 and x1.
        cov10: (D, D), Cov(x1, x0) = E[(x1 - mu1)(x0 - mu0)^T].
    """
    y = x.to(torch.float64)
    time = expand_time(t, y)
    mu0, mu1, c0, c1, c10 = (c.to(y) for c in (mean0, mean1, cov0, cov1, cov10))
    b = time[:, :, None]
    cross = b * c1 - (1 - b) * c0 + (1 - b) * c10 - b * c10.T
    q = (1 - b) ** 2 * c0 + b**2 * c1 + b * (1 - b) * (c10 + c10.T)
    centred = y - (1 - time) * mu0 - time * mu1
    return (mu1 - mu0 + (cross @ torch.linalg.solve(q, centred[:, :, None]))[:, :, 0]).to(x.dtype)


def _sine(theta: float, k: int, steps: int) -> float:
    return math.sin(theta * k / steps)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(0, 1) draws of that shape in float64, made on the generator's device and moved to the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).cpu()


def as_float64(name: str, value: Tensor | float) -> Tensor:
    """A number or tensor as a float64 tensor on the CPU, without a graph; NaN and infinity are refused by ``name``."""
    tensor = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    if not bool(torch.isfinite(tensor).all()):
        raise UserError(f"{name} has NaN or infinite values.")
    return tensor


def broadcast(m: Tensor, s: Tensor, shape: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
    """Mean and std in the shape of one data point, at least (1,); shapes that do not broadcast are refused."""
    try:
        common = torch.broadcast_shapes(m.shape, s.shape, shape or (1,))
    except RuntimeError:
        raise UserError(
            f"mean {tuple(m.shape)}, std {tuple(s.shape)} and shape {shape} do not broadcast to one point."
        ) from None
    return m.expand(common), s.expand(common)


def fits(shape: torch.Size, x: Tensor) -> None:
    """Refuse ``x`` (B, ...) unless the closed form's shape broadcasts to that of one of its rows."""
    data = tuple(x.shape[1:])
    if len(shape) > len(data) or any(a not in (1, b) for a, b in zip(reversed(shape), reversed(data), strict=False)):
        raise UserError(f"x has shape {tuple(x.shape)} but mean and std are {tuple(shape)} per data point.")
