"""The paths by name: linear, cosine, variance preserving, and the stochastic interpolant.

What they share, and the conversions between velocity, data, noise and score, is in :mod:`fewstep.flow.affine_path`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from fewstep.errors import UserError, unknown
from fewstep.flow.affine_path import AffinePath, expand_time, refuse_singular

__all__ = ["PATHS", "VP", "AffinePath", "Cosine", "Interpolant", "Linear", "expand_time", "make_path"]


@final
@dataclass(frozen=True)
class Linear(AffinePath):
    """The straight line x_t = t x1 + (1 - t) x0 with target x1 - x0 (arXiv:2209.03003, eq. 1).

    >>> Linear().velocity_to_data(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.tensor([0.25]))  # x + (1 - t) v
    tensor([[2.5000]])
    """

    def alpha(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def alpha_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-1."""
        return -torch.ones_like(t)

    def sigma_squared(self, t: Tensor) -> Tensor:
        """(1 - t)^2."""
        return (1 - t) ** 2

    def sigma_sigma_dot(self, t: Tensor) -> Tensor:
        """t - 1."""
        return t - 1

    def data_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x1 = x + (1 - t) v."""
        return torch.ones_like(t), 1 - t

    def noise_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 = x - t v."""
        return torch.ones_like(t), -t

    def score_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """score = (t v - x) / (1 - t)."""
        return -1 / (1 - t), t / (1 - t)


@final
@dataclass(frozen=True)
class Cosine(AffinePath):
    """The quarter circle alpha = sin(pi t / 2), sigma = cos(pi t / 2) (GVP of SiT, arXiv:2401.08740; arXiv:2209.15571).

    sigma is computed as sin(pi (1 - t) / 2), which is exactly 0 at t = 1.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return torch.sin(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        """cos(pi t / 2), computed as sin(pi (1 - t) / 2)."""
        return torch.sin(math.pi / 2 * (1 - t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """(pi / 2) sigma."""
        return math.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-(pi / 2) alpha."""
        return -math.pi / 2 * self.alpha(t)

    def sigma_squared(self, t: Tensor) -> Tensor:
        """sin^2(pi (1 - t) / 2)."""
        return self.sigma(t) ** 2

    def sigma_sigma_dot(self, t: Tensor) -> Tensor:
        """-(pi / 2) alpha sigma."""
        return self.sigma(t) * self.sigma_dot(t)

    def data_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x1 = alpha x + (2 / pi) sigma v."""
        return self.alpha(t), 2 / math.pi * self.sigma(t)

    def noise_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 = sigma x - (2 / pi) alpha v."""
        return self.sigma(t), -2 / math.pi * self.alpha(t)

    def score_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """score = -x + (2 / pi) (alpha / sigma) v."""
        return -torch.ones_like(t), 2 / math.pi * self.alpha(t) / self.sigma(t)


@final
@dataclass(frozen=True)
class VP(AffinePath):
    """Variance preserving path of the linear-beta diffusion (arXiv:2011.13456, app. C), in our time t = 1 - tau.

    log alpha = -tau^2 (beta_max - beta_min) / 4 - tau beta_min / 2 and sigma = sqrt(1 - alpha^2).
    alpha(0) is small but not 0 (.0066 by default), and sigma' is infinite at t = 1: the *target* is refused
    there, while the velocity E[target | x_t] = (alpha'/alpha) (x + score) stays finite.

    Args:
        beta_min, beta_max: ends of the linear noise schedule, 0 < beta_min <= beta_max.

    Raises:
        UserError: a schedule that is not positive and growing.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min <= self.beta_max < math.inf:
            raise UserError(
                f"VP path: beta_min = {self.beta_min} and beta_max = {self.beta_max}, "
                "but the noise schedule must be positive and growing: give 0 < beta_min <= beta_max."
            )

    def _log_alpha(self, t: Tensor) -> Tensor:
        tau = 1 - t
        return -tau * (tau * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-tau^2 (beta_max - beta_min) / 4 - tau beta_min / 2), tau = 1 - t."""
        return torch.exp(self._log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - alpha^2)."""
        return torch.sqrt(self.sigma_squared(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """alpha beta(tau) / 2, beta(tau) = beta_min + tau (beta_max - beta_min)."""
        return self.alpha(t) * self._rate(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-alpha alpha' / sigma; refused at t = 1, where it is infinite."""
        sigma = self.sigma(t)
        refuse_singular(sigma == 0, t, "the VP path's sigma'(t)", "sigma is a square root with value 0 there")
        return -self.alpha(t) * self.alpha_dot(t) / sigma

    def sigma_squared(self, t: Tensor) -> Tensor:
        """1 - alpha^2, without cancellation where alpha is nearly 1."""
        return -torch.expm1(2 * self._log_alpha(t))

    def sigma_sigma_dot(self, t: Tensor) -> Tensor:
        """-alpha alpha'."""
        return -self.alpha(t) * self.alpha_dot(t)

    def data_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x1 = alpha x + (sigma^2 / alpha') v, as d = -alpha' / sigma."""
        return self.alpha(t), self.sigma_squared(t) / self.alpha_dot(t)

    def noise_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 = sigma x - sigma (alpha / alpha') v."""
        sigma = self.sigma(t)
        return sigma, -sigma / self._rate(t)

    def score_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """score = (alpha / alpha') v - x, regular also at t = 1."""
        return -torch.ones_like(t), 1 / self._rate(t)

    def _rate(self, t: Tensor) -> Tensor:
        """alpha' / alpha = beta(tau) / 2 > 0."""
        return (1 - t) * (self.beta_max - self.beta_min) / 2 + self.beta_min / 2


@final
@dataclass(frozen=True)
class Interpolant(AffinePath):
    """The stochastic interpolant ``x_t = t x1 + (1 - t) x0 + sqrt(2 t (1 - t)) z`` (2303.08797, Sec. 2.1, Table 4).

    With ``x0`` and the latent ``z`` both N(0, I), independent of each other and of ``x1``, the two noises are one,
    of variance ``(1 - t)^2 + 2 t (1 - t) = 1 - t^2``: the same laws, velocity and score as the affine path

        alpha = t,   sigma = sqrt(1 - t^2),

    which is what this class computes (the cosine path in another time). It needs the independent Gaussian coupling:
    with any other, ``z`` cannot be merged into ``x0``. sigma' is infinite at t = 1: the *target* is refused there,
    while the velocity stays finite, as on VP.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """t."""
        return t

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - t^2)."""
        return torch.sqrt(self.sigma_squared(t))

    def alpha_dot(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        """-t / sigma; refused at t = 1, where it is infinite."""
        sigma = self.sigma(t)
        refuse_singular(sigma == 0, t, "the interpolant path's sigma'(t)", "sigma is a square root with value 0 there")
        return -t / sigma

    def sigma_squared(self, t: Tensor) -> Tensor:
        """1 - t^2."""
        return (1 - t) * (1 + t)

    def sigma_sigma_dot(self, t: Tensor) -> Tensor:
        """-t."""
        return -t

    def data_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x1 = t x + (1 - t^2) v, as d = -1 / sigma."""
        return t, self.sigma_squared(t)

    def noise_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """x0 = sigma x - t sigma v."""
        sigma = self.sigma(t)
        return sigma, -t * sigma

    def score_coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """score = t v - x, regular also at t = 1."""
        return -torch.ones_like(t), t


PATHS: dict[str, type[AffinePath]] = {"linear": Linear, "cosine": Cosine, "vp": VP, "interpolant": Interpolant}


def make_path(name: str) -> AffinePath:
    """Return the path of that name with its default constants; ``UserError`` for an unknown name."""
    if name not in PATHS:
        raise unknown("path", name, PATHS)
    return PATHS[name]()
