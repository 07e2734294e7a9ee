"""Two-sample statistics of a kernel, with their standard errors.

For a symmetric kernel ``h`` and samples ``X_1..X_n ~ P``, ``Y_1..Y_m ~ Q``, both the energy distance
(``h = |x - y|``) and minus the squared maximum mean discrepancy (``h`` a Gaussian kernel) are

    T = 2 E h(X, Y) - E h(X, X') - E h(Y, Y').

(Szekely & Rizzo 2013, "Energy statistics"; Gretton et al. 2012, "A kernel two-sample test"; that both are this
statistic: Sejdinovic et al., arXiv 1207.6076.)

Standard error, by Hoeffding's decomposition (Hoeffding 1948). The first-order projections (influence
functions) are ``psi_P(x) = 2 (E h(x, Y) - E h(x, X'))`` and ``psi_Q(y) = 2 (E h(X, y) - E h(Y', y))``; the
second-order part consists of the doubly centred kernels ``h~``:

    Var T = Var psi_P / n + Var psi_Q / m + S,
    S     = 2 E h~_PP^2 / n^2 + 2 E h~_QQ^2 / m^2 + 4 E h~_PQ^2 / (n m).

At ``P = Q`` the first-order part is zero (T is degenerate) and only S remains. The projections are estimated from
the same sample, and their noise adds ``2 S`` to the first-order variance. So the estimate is ``max(first - S, S)``,
which is correct at ``P = Q`` and far from it, and not too small in between (its median agrees with the spread over
draws; in two dimensions near ``P = Q`` its root mean square is 1.3 times that). ``E h~^2`` is estimated without bias
by U-centring (Szekely & Rizzo 2014, "Partial distance correlation", Sec. 3), because in high dimension the naive
estimate consists mostly of its diagonal.

For ``P = Q`` the V-statistic (diagonals included) of the energy distance has mean and standard deviation

    (1/n + 1/m) mu,   (1/n + 1/m) sqrt(2 E h~^2),   mu = E|X - X'|,

the mean exactly: the zeros on the diagonal reduce a mean over ``n^2`` pairs by ``mu / n``. This is the
data-data floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics.rows import half_tiles, tiles

Kernel = Callable[[Tensor], Tensor]
"""Maps squared distances to kernel values; it may overwrite its argument."""


@dataclass(frozen=True)
class Within:
    """Moments of a kernel within one sample, without the diagonal.

    Attributes:
        size: n.
        rows: ``(n,)``, mean of ``h(x_i, x_j)`` over ``j != i``.
        mean: U-statistic of ``E h(X, X')``.
        centred_square: unbiased estimate of ``E h~(X, X')^2``, set to 0 where negative or with fewer than 4 samples.
    """

    size: int
    rows: Tensor
    mean: float
    centred_square: float


@dataclass(frozen=True)
class Between:
    """Moments of a kernel between two samples.

    Attributes:
        rows: ``(n,)``, mean of ``h(x_i, Y)``.
        cols: ``(m,)``, mean of ``h(X, y_j)``.
        mean: ``E h(X, Y)``.
        centred_square: ``E h~(X, Y)^2``.
    """

    rows: Tensor
    cols: Tensor
    mean: float
    centred_square: float


def within(x: Tensor, kernel: Kernel) -> Within:
    """Kernel moments within the rows ``(n, D)`` of one sample; each pair is computed once."""
    n = x.shape[0]
    sums = torch.zeros(n, dtype=torch.float64, device=x.device)
    square = 0.0
    for rows, cols, d2 in half_tiles(x):
        h = kernel(d2)
        if rows == cols:
            h.fill_diagonal_(0.0)
        sums[rows] += h.sum(dim=1)
        off_diagonal = rows != cols
        if off_diagonal:
            sums[cols] += h.sum(dim=0)
        square += (2.0 if off_diagonal else 1.0) * float(torch.dot(h.reshape(-1), h.reshape(-1)))
    total = float(sums.sum())
    centred = 0.0
    if n > 3:
        correction = 2.0 / (n - 2) * float(sums.square().sum()) - total**2 / ((n - 1) * (n - 2))
        centred = max((square - correction) / (n * (n - 3)), 0.0)
    return Within(n, sums / (n - 1), total / (n * (n - 1)), centred)


def between(x: Tensor, y: Tensor, kernel: Kernel) -> Between:
    """Kernel moments between the rows of two samples ``(n, D)``, ``(m, D)``."""
    n, m = x.shape[0], y.shape[0]
    row_sums = torch.zeros(n, dtype=torch.float64, device=x.device)
    col_sums = torch.zeros(m, dtype=torch.float64, device=x.device)
    square = 0.0
    for rows, cols, d2 in tiles(x, y):
        h = kernel(d2)
        row_sums[rows] += h.sum(dim=1)
        col_sums[cols] += h.sum(dim=0)
        square += float(torch.dot(h.reshape(-1), h.reshape(-1)))
    a, b = row_sums / m, col_sums / n
    mean = float(a.mean())
    spread = square / (n * m) - float(a.square().mean()) - float(b.square().mean()) + mean**2
    return Between(a, b, mean, max(spread, 0.0) * n * m / ((n - 1) * (m - 1)))


def standard_error(x: Within, y: Within, cross: Between) -> float:
    """Standard error of ``T`` (module docstring), for the U-statistic and for the V-statistic.

    Args:
        x: moments within the first sample.
        y: moments within the second sample.
        cross: moments between the two.
    """
    n, m = x.size, y.size
    first = float((2.0 * (cross.rows - x.rows)).var()) / n + float((2.0 * (cross.cols - y.rows)).var()) / m
    second = 2.0 * x.centred_square / n**2 + 2.0 * y.centred_square / m**2 + 4.0 * cross.centred_square / (n * m)
    return math.sqrt(max(first - second, second, 0.0))
