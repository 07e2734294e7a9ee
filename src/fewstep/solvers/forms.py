r"""Three exact forms of a step, and the integrals in them that multistep solvers need.

On an affine path ``x_t = alpha x1 + sigma x0`` the velocity ``v``, the data prediction ``m = E[x1 | x_t]`` and the
noise prediction ``e = E[x0 | x_t]`` are linear in each other, and dividing ``x`` by ``sigma`` or ``alpha`` gives
(by ``v = alpha' m + sigma' e`` and ``x = alpha m + sigma e``), for a step from ``t_a`` to ``t_b``,

    velocity form   x_b = x_a                     +         int v dt
    data form       x_b = (sigma_b / sigma_a) x_a + sigma_b int m d(alpha / sigma)
    noise form      x_b = (alpha_b / alpha_a) x_a + alpha_b int e d(sigma / alpha).

If the quantity ``q`` is constant, equal to its value at ``t_a``, the last two both give ``x_b = alpha_b m_a + sigma_b
e_a`` (DDIM, arXiv:2010.02502, eq. 12), which has no singularity at either end. The rest is ``int (q - q_a) dw``.
Solvers replace ``q`` in it by a polynomial in a variable ``z`` of time. They need the moments

    M_k = int ((z - z_a) / (z_b - z_a))^k dw,      k = 1, 2, …

for the measure ``dw`` of the form. The variable is ``t`` (Adams-Bashforth; tAB-DEIS, arXiv:2204.13902), ``lambda =
log(alpha / sigma)`` (DPM-Solver++, arXiv:2211.01095; UniPC, arXiv:2302.04867) or ``sigma / alpha`` (rhoAB-DEIS). If
``z`` or ``w`` is infinite at an end of a step (``lambda`` and ``sigma / alpha`` at alpha = 0, ...), that step is DDIM,
and the value there is not a node of later polynomials.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import numpy as np
import torch

from fewstep.flow.grids import Grid
from fewstep.flow.paths import AffinePath
from fewstep.solvers.tape import Combination

_ZERO = 1e-290  # smaller alpha and sigma are treated as zero: ratios of them would leave the range of float64
_ROUNDING = 1e-15  # a sum of two coefficients this close to 1 is set to 1
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
# Breakpoints that halve the distance to both ends: a function that is singular at an end is smooth between neighbours.
_HALVES = 0.5 ** np.arange(1, 54)
_BREAKS = np.unique([*_HALVES, *(1.0 - _HALVES)])


@final
class Schedule:
    """A path's coefficients at a grid's times, in float64.

    Attributes:
        path, times: the path and the grid.
        alpha, sigma: weights of data and noise.
        data, noise: ``(a, b)`` per time of ``m = a x + b v`` and ``e = a x + b v``.
    """

    def __init__(self, path: AffinePath, grid: Grid) -> None:
        t = torch.tensor(grid, dtype=torch.float64)
        self.path, self.times = path, grid
        self.alpha: list[float] = path.alpha(t).tolist()
        self.sigma: list[float] = path.sigma(t).tolist()
        self.data = [tuple(c) for c in torch.stack(path.data_coefficients(t), 1).tolist()]
        self.noise = [tuple(c) for c in torch.stack(path.noise_coefficients(t), 1).tolist()]

    def predict_data(self, x: Combination, v: Combination, i: int) -> Combination:
        """``m = E[x1 | x_t]`` at time ``i`` from the state and the velocity there."""
        own, other = self.data[i]
        return own * x + other * v

    def predict_noise(self, x: Combination, v: Combination, i: int) -> Combination:
        """``e = E[x0 | x_t]`` at time ``i`` from the state and the velocity there."""
        own, other = self.noise[i]
        return own * x + other * v

    def ddim(self, x: Combination, v: Combination, i: int, share: float = 1.0) -> Combination:
        """``alpha_b m_a + share sigma_b e_a`` for step i; with ``share = 1`` on the linear path ``x + (b - a) v``."""
        alpha, sigma = self.alpha[i + 1], share * self.sigma[i + 1]
        (data_x, data_v), (noise_x, noise_v) = self.data[i], self.noise[i]
        own = alpha * data_x + sigma * noise_x
        return (1.0 if abs(own - 1.0) < _ROUNDING else own) * x + (alpha * data_v + sigma * noise_v) * v


class Form(ABC):
    """A form of the step and a variable ``z``, on a schedule. Step ``i`` runs from time ``i`` to time ``i + 1``."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    @abstractmethod
    def quantity(self, x: Combination, v: Combination, i: int) -> Combination:
        """``q`` at time ``i`` from the state and the velocity there."""

    @abstractmethod
    def carry(self, i: int) -> float:
        """The factor by which step i multiplies a change of its start at fixed ``q``."""

    @abstractmethod
    def position(self, i: int) -> float | None:
        """``z`` at time ``i``; None if it is infinite."""

    @abstractmethod
    def regular(self, i: int) -> bool:
        """Whether the integrals of step i are finite; if not, the step is taken with constant ``q``."""

    @abstractmethod
    def total(self, i: int) -> float | None:
        """``M_0``, the measure of step i; None if it is infinite."""

    @abstractmethod
    def moments(self, i: int, count: int) -> list[float]:
        """``M_1, …, M_count`` of a regular step."""

    def constant(self, x: Combination, v: Combination, i: int) -> Combination:
        """Step i with constant ``q``."""
        return self.schedule.ddim(x, v, i)

    def total_at_end_density(self, i: int) -> float:
        """``M_0`` of step i for a measure of constant density in ``z``, that at the end of the step."""
        total = self.total(i)
        assert total is not None
        return total


@final
class VelocityInTime(Form):
    """``q = v`` in ``z = t``: Adams methods. ``dw = dt``, on every path."""

    def quantity(self, x: Combination, v: Combination, i: int) -> Combination:
        return v

    def constant(self, x: Combination, v: Combination, i: int) -> Combination:
        return x + self.total(i) * v

    def carry(self, i: int) -> float:
        return 1.0

    def position(self, i: int) -> float:
        return self.schedule.times[i]

    def regular(self, i: int) -> bool:
        return True

    def total(self, i: int) -> float:
        return self.schedule.times[i + 1] - self.schedule.times[i]

    def moments(self, i: int, count: int) -> list[float]:
        """``M_k = h / (k + 1)``."""
        return [self.total(i) / (k + 1) for k in range(1, count + 1)]


class _Data(Form):
    """``q = m``, ``dw = sigma_b d(alpha / sigma)``, infinite at sigma = 0."""

    def quantity(self, x: Combination, v: Combination, i: int) -> Combination:
        return self.schedule.predict_data(x, v, i)

    def carry(self, i: int) -> float:
        return self.schedule.sigma[i + 1] / self.schedule.sigma[i]

    def total(self, i: int) -> float | None:
        """``alpha_b - sigma_b alpha_a / sigma_a``."""
        (alpha_a, alpha_b), (sigma_a, sigma_b) = self.schedule.alpha[i : i + 2], self.schedule.sigma[i : i + 2]
        return alpha_b - sigma_b * alpha_a / sigma_a if sigma_a > _ZERO else None


class _Noise(Form):
    """``q = e``, ``dw = alpha_b d(sigma / alpha)``, infinite at alpha = 0."""

    def quantity(self, x: Combination, v: Combination, i: int) -> Combination:
        return self.schedule.predict_noise(x, v, i)

    def carry(self, i: int) -> float:
        return self.schedule.alpha[i + 1] / self.schedule.alpha[i]

    def regular(self, i: int) -> bool:
        return min(self.schedule.alpha[i : i + 2]) > _ZERO

    def total(self, i: int) -> float | None:
        """``sigma_b - alpha_b sigma_a / alpha_a``."""
        (alpha_a, alpha_b), (sigma_a, sigma_b) = self.schedule.alpha[i : i + 2], self.schedule.sigma[i : i + 2]
        return sigma_b - alpha_b * sigma_a / alpha_a if alpha_a > _ZERO else None


@final
class DataInLambda(_Data):
    """``q = m`` in ``z = lambda``: DPM-Solver++ and UniPC. ``dw = alpha_b e^(lambda - lambda_b) d lambda``."""

    def position(self, i: int) -> float | None:
        alpha, sigma = self.schedule.alpha[i], self.schedule.sigma[i]
        return math.log(alpha) - math.log(sigma) if min(alpha, sigma) > _ZERO else None

    def regular(self, i: int) -> bool:
        return self.position(i) is not None and self.position(i + 1) is not None

    def moments(self, i: int, count: int) -> list[float]:
        """``M_k = alpha_b h int_0^1 e^(-h (1 - s)) s^k ds`` with ``h = lambda_b - lambda_a``."""
        h = self._length(i)
        return [self.schedule.alpha[i + 1] * h * integral for integral in exponential_moments(h, count)[1:]]

    def total_at_end_density(self, i: int) -> float:
        """``alpha_b h``; ``M_0`` if ``h`` is infinite."""
        return self.schedule.alpha[i + 1] * self._length(i) if self.regular(i) else super().total_at_end_density(i)

    def _length(self, i: int) -> float:
        a, b = self.position(i), self.position(i + 1)
        assert a is not None, "a regular step"
        assert b is not None, "a regular step"
        return b - a


@final
class DataInTime(_Data):
    """``q = m`` in ``z = t``."""

    def position(self, i: int) -> float:
        return self.schedule.times[i]

    def regular(self, i: int) -> bool:
        return min(self.schedule.sigma[i : i + 2]) > _ZERO

    def moments(self, i: int, count: int) -> list[float]:
        """By parts, ``M_k = k int_0^1 s^(k-1) (alpha_b - sigma_b (alpha / sigma)(s)) ds``."""
        s, weights, t = _quadrature(self.schedule.times[i], self.schedule.times[i + 1])
        ratio = (self.schedule.path.alpha(t) / self.schedule.path.sigma(t)).numpy()
        rest = weights * (self.schedule.alpha[i + 1] - self.schedule.sigma[i + 1] * ratio)
        return [float(k * (s ** (k - 1) @ rest)) for k in range(1, count + 1)]


@final
class NoiseInTime(_Noise):
    """``q = e`` in ``z = t``: tAB-DEIS."""

    def position(self, i: int) -> float:
        return self.schedule.times[i]

    def moments(self, i: int, count: int) -> list[float]:
        """By parts, ``M_k = k int_0^1 s^(k-1) (sigma_b - alpha_b (sigma / alpha)(s)) ds``."""
        s, weights, t = _quadrature(self.schedule.times[i], self.schedule.times[i + 1])
        ratio = (self.schedule.path.sigma(t) / self.schedule.path.alpha(t)).numpy()
        rest = weights * (self.schedule.sigma[i + 1] - self.schedule.alpha[i + 1] * ratio)
        return [float(k * (s ** (k - 1) @ rest)) for k in range(1, count + 1)]


@final
class NoiseInRho(_Noise):
    """``q = e`` in ``z = rho = sigma / alpha``: rhoAB-DEIS. ``dw = alpha_b d rho``."""

    def position(self, i: int) -> float | None:
        alpha = self.schedule.alpha[i]
        return self.schedule.sigma[i] / alpha if alpha > _ZERO else None

    def moments(self, i: int, count: int) -> list[float]:
        """``M_k = M_0 / (k + 1)``."""
        total = self.total(i)
        assert total is not None
        return [total / (k + 1) for k in range(1, count + 1)]


def exponential_moments(h: float, count: int) -> list[float]:
    """``J_k = int_0^1 e^(-h (1 - s)) s^k ds`` for ``k = 0, …, count``.

    By parts ``J_k = (1 - k J_(k-1)) / h``, which loses digits for small ``h``. For ``|h| < 1`` the exponential's series
    is used, ``J_k = k! sum_n (-h)^n / (n + k + 1)!``.
    """
    if abs(h) < 1.0:
        return [
            math.factorial(k) * math.fsum((-h) ** n / math.factorial(n + k + 1) for n in range(20))
            for k in range(count + 1)
        ]
    integrals = [-math.expm1(-h) / h]
    for k in range(1, count + 1):
        integrals.append((1.0 - k * integrals[-1]) / h)
    return integrals


def _quadrature(a: float, b: float) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    """Gauss-Legendre nodes between the times a and b as ``s`` in [0, 1], their weights, and their times."""
    low, high = min(a, b), max(a, b)
    inner = _BREAKS[np.searchsorted(_BREAKS, low, "right") : np.searchsorted(_BREAKS, high, "left")]
    edges = np.array([low, *inner, high])
    half = np.diff(edges)[:, None] / 2
    t = (edges[:-1, None] + half * (1.0 + _NODES)).ravel()
    return (t - a) / (b - a), ((half * _WEIGHTS) / (high - low)).ravel(), torch.from_numpy(t)
