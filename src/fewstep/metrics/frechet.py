r"""Fréchet distance between Gaussians fitted to two samples, usually of features.

With means and covariances :math:`(m, \Sigma)` of the two samples

.. math:: d^2 = \|m_x - m_y\|^2 + \mathrm{tr}\,\Sigma_x + \mathrm{tr}\,\Sigma_y
                - 2\,\mathrm{tr}(\Sigma_x^{1/2} \Sigma_y \Sigma_x^{1/2})^{1/2}

(Dowson & Landau 1982; for generative models Heusel et al., arXiv 1706.08500, Eq. (6)). Distances in different
features cannot be compared, so each is named after its features: ``FD-<extractor>``.

If the centred features divided by the root of ``n - 1`` are ``Q R``, then :math:`\Sigma = R^T R`, and the last trace
is the nuclear norm :math:`\|R_x R_y^T\|_*`. It is computed by one QR decomposition per sample and the singular values
of one product. This needs no matrix root, does not square the condition number, and allows rank-deficient
covariances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.metrics.rows import Samples, as_pair

Moments = tuple[Tensor, Tensor]
"""Mean and covariance root of a sample, as :func:`moments` gives them."""


@dataclass(frozen=True)
class Frechet:
    """A squared Fréchet distance.

    Attributes:
        value: the distance, in squared units of the features.
        percent: 100 times ``value`` over the trace of the real covariance; it does not depend on the features' scale.
        mean_term: ``|m_x - m_y|^2``, in squared units of the features.
        covariance_term: ``value - mean_term``.
    """

    value: float
    percent: float
    mean_term: float
    covariance_term: float

    def __float__(self) -> float:
        return self.value


def frechet_distance(fake: Samples, real: Samples) -> Frechet:
    """Squared Fréchet distance between Gaussians fitted to two sets of features, in float64.

    Covariances are normalised by ``n - 1``. The estimate has a bias of order 1/n, so only distances at equal
    sample sizes can be compared.

    Args:
        fake: features of generated samples ``(N, F)``.
        real: features of data ``(M, F)``.

    Raises:
        UserError: the dimensions differ, a set has fewer than two samples, values are not finite, or all real
            features are equal.

    >>> round(frechet_distance(torch.eye(3) + 1, torch.eye(3)).value, 6)
    3.0
    """
    a, b = as_pair(fake, real, ("fake", "real"))
    return frechet_from_moments(moments(a), moments(b))


def frechet_from_moments(fake: Moments, real: Moments) -> Frechet:
    """:func:`frechet_distance` from :func:`moments` that are already there."""
    (mean_a, root_a), (mean_b, root_b) = fake, real
    trace_a, trace_b = float(root_a.square().sum()), float(root_b.square().sum())
    if trace_b == 0.0:
        raise UserError(
            "the real features are all equal, so the distance cannot be given relative to their covariance. "
            "Give features of different samples."
        )
    cross = float(torch.linalg.svdvals(root_a @ root_b.T).sum())
    mean_term = float((mean_a - mean_b).square().sum())
    covariance_term = max(trace_a + trace_b - 2.0 * cross, 0.0)
    value = mean_term + covariance_term
    return Frechet(value, 100.0 * value / trace_b, mean_term, covariance_term)


def moments(rows: Tensor) -> Moments:
    """Mean and a root of the covariance of rows ``(N, D)``.

    Returns:
        The mean ``(D,)`` and ``R (min(N, D), D)`` with ``R^T R`` the covariance, both float64.
    """
    centred = rows.double()
    mean = centred.mean(dim=0)
    centred = centred - mean
    return mean, torch.linalg.qr(centred, mode="r").R / math.sqrt(rows.shape[0] - 1)
