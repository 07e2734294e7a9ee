r"""Precision, recall, density and coverage by nearest neighbours.

:math:`B_k(x_i)` is the ball around a real point whose radius is the distance to its k-th nearest other real
point (N real points ``x``, M generated ``y``).

- precision: share of generated points inside the ball of some real point;
- recall: share of real points inside the ball of some generated point;
- density: :math:`\frac{1}{kM} \sum_j \sum_i 1[y_j \in B_k(x_i)]`, like precision, but the
  large ball of a real outlier counts little;
- coverage: share of real balls that contain a generated point; like recall, but generated outliers have no effect.

Precision and recall: Kynkäänniemi et al., arXiv 1904.06991, Eq. (1)-(2). Density and coverage: Naeem et al.,
arXiv 2002.09797, Sec. 3. For a perfect generator the mean density is 1 and the mean coverage is
:func:`expected_coverage`, whatever the law and the dimension.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.metrics.rows import TIE_TOLERANCE, Samples, as_pair, fill_self, tiles


@dataclass(frozen=True)
class PRDC:
    """Precision, recall, density and coverage (module docstring).

    Attributes:
        precision, recall, coverage: shares in [0, 1].
        density: 0 or more; its mean is 1 for a perfect generator.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Samples, fake: Samples, k: int = 5) -> PRDC:
    """Precision, recall, density and coverage by k nearest neighbours.

    A point is not its own neighbour, but an equal copy of it in another row is. Balls are closed, as in the
    papers' formulas, except for density, whose balls are open as in its authors' code. So all four are 1 if the
    generated samples are the real data. Squared distances with a relative difference up to 1e-9 count as equal.

    Args:
        real: data ``(N, ...)`` or their features, more than ``k``.
        fake: generated samples ``(M, ...)`` or their features, more than ``k``.
        k: the neighbour that sets the radius. Only results with equal ``k``, N and M can be compared.

    Raises:
        UserError: ``k`` is below 1, there are too few samples, the dimensions differ, or values are not finite.

    >>> x = torch.arange(20.0)[:, None]
    >>> prdc(x, x)
    PRDC(precision=1.0, recall=1.0, density=1.0, coverage=1.0)
    """
    if k < 1:
        raise UserError(f"k = {k}: the radius is the distance to the k-th nearest neighbour, so k must be at least 1.")
    x, y = as_pair(real, fake, ("real", "fake"), least=k + 1)
    return prdc_from_radius(x, neighbour_radius(x, k), y, k)


def prdc_from_radius(x: Tensor, real_radius: Tensor, y: Tensor, k: int) -> PRDC:
    """:func:`prdc` of real rows ``x (N, D)``, whose :func:`neighbour_radius` is known, and generated ``y (M, D)``."""
    fake_radius = neighbour_radius(y, k)
    precise = torch.zeros(y.shape[0], dtype=torch.bool, device=x.device)
    recalled = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    covered = torch.zeros_like(recalled)
    inside = 0
    for rows, cols, d2 in tiles(x, y):
        radius, radius_fake = real_radius[rows, None], fake_radius[None, cols]
        closed = d2 <= radius * (1.0 + TIE_TOLERANCE)
        precise[cols] |= closed.any(dim=0)
        covered[rows] |= closed.any(dim=1)
        recalled[rows] |= (d2 <= radius_fake * (1.0 + TIE_TOLERANCE)).any(dim=1)
        inside += int(torch.count_nonzero(d2 < radius * (1.0 - TIE_TOLERANCE)))
    return PRDC(
        precision=float(precise.double().mean()),
        recall=float(recalled.double().mean()),
        density=inside / (k * y.shape[0]),
        coverage=float(covered.double().mean()),
    )


def neighbour_radius(x: Tensor, k: int) -> Tensor:
    """Squared distance ``(N,)`` of each row ``(N, D)`` to its k-th nearest other row."""
    return nearest(x, x, k)[0][:, -1]


def nearest(x: Tensor, y: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Find the ``k`` nearest rows of ``y (M, D)`` for each row of ``x (N, D)``.

    Args:
        x: ``(N, D)``.
        y: ``(M, D)``. If it is the same object as ``x``, a row is not its own neighbour.
        k: number of neighbours.

    Returns:
        Squared distances and row numbers, both ``(N, k)``, nearest first; the distance is infinite where ``y`` has
        too few rows.
    """
    best = torch.full((x.shape[0], k), math.inf, dtype=torch.float64, device=x.device)
    index = torch.zeros(x.shape[0], k, dtype=torch.long, device=x.device)
    for rows, cols, d2 in tiles(x, y, wide=True):
        if x is y:
            fill_self(d2, rows, cols, math.inf)
        near, at = d2.topk(min(k, d2.shape[1]), dim=1, largest=False)
        both, place = torch.cat([best[rows], near], dim=1).topk(k, dim=1, largest=False)
        index[rows] = torch.cat([index[rows], at + cols.start], dim=1).gather(1, place)
        best[rows] = both
    return best, index


def expected_coverage(real: int, fake: int, k: int = 5) -> float:
    r"""Mean coverage of a perfect generator, which draws from the law of the data.

    .. math:: 1 - \prod_{j=1}^{k} \frac{N - j}{N + M - j}

    A real point is not covered if the nearest k of the ``N - 1 + M`` other points are all real. For N = M the value
    is about ``1 - 2^-k``; it is lower for M < N.

    Args:
        real: N, the number of real points.
        fake: M, the number of generated points.
        k: the neighbour that sets the radius.

    Raises:
        UserError: the numbers are not ``1 <= k < real`` and ``fake >= 1``.

    Source: Naeem et al., arXiv 2002.09797, Sec. 3.

    >>> round(expected_coverage(1000, 1000, 5), 3)
    0.969
    """
    if not 1 <= k < real or fake < 1:
        raise UserError(f"coverage needs 1 <= k < real and fake >= 1, got k = {k}, real = {real}, fake = {fake}.")
    return 1.0 - math.prod((real - j) / (real + fake - j) for j in range(1, k + 1))
