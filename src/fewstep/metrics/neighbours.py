r"""Precision, recall, density and coverage by nearest neighbours.

:math:`B_k(x_i)` is the ball around a real point that reaches its k-th nearest other real point (N real points
``x``, M generated ``y``).

- precision: share of generated points inside some real ball (how many look like data);
- recall: share of real points inside some ball of the generated points (how much of the data is reached);
- density: :math:`\frac{1}{kM} \sum_j \sum_i 1[y_j \in B_k(x_i)]`, a precision that an outlier's huge ball
  cannot buy;
- coverage: share of real balls that hold a generated point, a recall that outliers cannot buy.

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
from fewstep.metrics.rows import TIE, Samples, as_pair, fill_self, tiles


@dataclass(frozen=True)
class PRDC:
    """Precision, recall, density and coverage (module docstring)."""

    precision: float
    recall: float
    density: float
    coverage: float


def prdc(real: Samples, fake: Samples, k: int = 5) -> PRDC:
    """Precision, recall, density and coverage by k nearest neighbours.

    A point is not its own neighbour, by index: an equal copy of it is one. Balls are closed, as in the
    papers' formulas, except for density, whose balls are open as in its authors' code; so real data given as
    the generated samples score 1 on all four. Distances that differ by rounding only (1e-9) count as ties.

    Args:
        real: data ``(N, ...)`` or their features, more than ``k``.
        fake: generated samples ``(M, ...)`` or their features, more than ``k``.
        k: which neighbour sets the radius. Numbers of different ``k``, N or M do not compare.

    Raises:
        UserError: ``k`` below 1, too few samples, other dimensions, values that are not finite.
    """
    if k < 1:
        raise UserError(f"k = {k}: the radius is the distance to the k-th nearest neighbour, so k is at least 1.")
    x, y = as_pair(real, fake, ("real", "fake"), least=k + 1)
    real_radius, fake_radius = neighbour_radius(x, k), neighbour_radius(y, k)
    precise = torch.zeros(y.shape[0], dtype=torch.bool, device=x.device)
    recalled = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    covered = torch.zeros_like(recalled)
    inside = 0
    for rows, cols, d2 in tiles(x, y):
        reach, reach_fake = real_radius[rows, None], fake_radius[None, cols]
        closed = d2 <= reach * (1.0 + TIE)
        precise[cols] |= closed.any(dim=0)
        covered[rows] |= closed.any(dim=1)
        recalled[rows] |= (d2 <= reach_fake * (1.0 + TIE)).any(dim=1)
        inside += int(torch.count_nonzero(d2 < reach * (1.0 - TIE)))
    return PRDC(
        precision=float(precise.double().mean()),
        recall=float(recalled.double().mean()),
        density=inside / (k * y.shape[0]),
        coverage=float(covered.double().mean()),
    )


def neighbour_radius(x: Tensor, k: int) -> Tensor:
    """Squared distance of each row to its k-th nearest other row: ``(N, D)`` -> ``(N,)``."""
    return nearest(x, x, k)[0][:, -1]


def nearest(x: Tensor, y: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """Squared distances to, and indices of, the ``k`` nearest rows of ``y (M, D)`` for each row of ``x (N,
    D)``.

    If ``y`` is ``x`` itself (the same object), a row is not its own neighbour. Both results are ``(N, k)``,
    nearest first, infinite where ``y`` has too few rows.
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
    r"""Mean coverage of a perfect generator: what data of the same law score as ``fake`` against ``real``
    points.

    .. math:: 1 - \prod_{j=1}^{k} \frac{N - j}{N + M - j}

    for N real and M generated points (Naeem et al., arXiv 2002.09797, Sec. 3): among the ``N - 1 + M`` other
    points around a real one, the nearest k are all real. About ``1 - 2^-k`` for N = M; lower when M is
    smaller than N.
    """
    if not 1 <= k < real or fake < 1:
        raise UserError(f"coverage needs 1 <= k < real and fake >= 1, got k = {k}, real = {real}, fake = {fake}.")
    return 1.0 - math.prod((real - j) / (real + fake - j) for j in range(1, k + 1))
