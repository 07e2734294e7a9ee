"""Distances between two samples: energy, sliced Wasserstein, maximum mean discrepancy.

All are zero exactly when the two laws are equal, and none needs features. In high dimension blurred samples, or a
Gaussian with the mean and covariance of the data (:func:`fewstep.metrics.moment_matched_gaussian`), have almost the
same distance as the data itself. So these distances must be read together with precision and recall
(:func:`fewstep.metrics.prdc`).

A finite sample of the data has a positive distance to the data. The floor functions give it for the same sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.metrics.rows import Samples, as_pair, as_rows, pick, spans, tiles
from fewstep.metrics.two_sample import Between, Kernel, Within, between, standard_error, within


@dataclass(frozen=True)
class Estimate:
    """An estimate and its standard error.

    Attributes:
        value: the estimate.
        standard_error: estimated standard deviation of ``value`` over new draws of the samples.
    """

    value: float
    standard_error: float

    def __float__(self) -> float:
        return self.value


# --- energy --------------------------------------------------------------------------------------------


def energy(x: Samples, y: Samples) -> Estimate:
    r"""Energy distance as a V-statistic, diagonals included.

    .. math:: 2 E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|

    It is never negative and is zero for equal samples. Between two samples of one law its mean is
    :func:`energy_floor`.

    Args:
        x: samples ``(N, ...)``.
        y: samples ``(M, ...)`` of the same dimension.

    Returns:
        The distance in units of the data, with the standard error of Hoeffding's decomposition
        (:mod:`fewstep.metrics.two_sample`).

    Raises:
        UserError: the dimensions differ, a set has fewer than two samples, or values are not finite.

    Source: Szekely & Rizzo 2013, "Energy statistics: a class of statistics based on distances".

    >>> energy(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0])).value
    0.0
    """
    a, b = as_pair(x, y)
    return energy_from_moments(within(a, distance), within(b, distance), between(a, b, distance))


def energy_floor(y: Samples, n: int, m: int | None = None) -> Estimate:
    r"""Mean of :func:`energy` between two independent samples of the law of ``y``, of sizes ``n`` and ``m``.

    The mean is exactly :math:`(1/n + 1/m)\,E\|Y - Y'\|`, because the means over all pairs include the zeros of
    the diagonals. The expectation is estimated without bias by the U-statistic over all rows of ``y``. So the floor
    needs no split of ``y`` and no random numbers, and ``n`` and ``m`` may be larger than the number of rows of ``y``.

    Args:
        y: samples ``(M, ...)`` of the data.
        n: size of the generated sample.
        m: size of the reference sample; ``len(y)`` when not given.

    Returns:
        ``value`` is the mean and ``standard_error`` the standard deviation of one :func:`energy` about it. An energy
        above ``value + 3 standard_error`` is not explained by the finite sample sizes.

    Raises:
        UserError: ``n`` or ``m`` is below 1, or the samples cannot be used.
    """
    rows = as_rows(y, "y")
    return floor_from_moments(within(rows, distance), n, rows.shape[0] if m is None else m)


def distance(d2: Tensor) -> Tensor:
    """The kernel of the energy distance: ``|x - y|`` from ``|x - y|^2``, in place."""
    return d2.sqrt_()


def energy_from_moments(x: Within, y: Within, cross: Between) -> Estimate:
    """:func:`energy` from the moments of :func:`distance`.

    Args:
        x: moments within the first sample.
        y: moments within the second sample.
        cross: moments between the two.
    """
    diagonal_x, diagonal_y = (x.size - 1) / x.size, (y.size - 1) / y.size
    value = 2.0 * cross.mean - diagonal_x * x.mean - diagonal_y * y.mean
    return Estimate(value, standard_error(x, y, cross))


def floor_from_moments(y: Within, n: int, m: int) -> Estimate:
    """:func:`energy_floor` from the moments of :func:`distance`.

    Args:
        y: moments within a sample of the data.
        n: size of the generated sample.
        m: size of the reference sample.

    Raises:
        UserError: ``n`` or ``m`` is below 1.
    """
    if n < 1 or m < 1:
        raise UserError(f"n = {n} and m = {m} are sample sizes, and must be at least 1.")
    scale = 1.0 / n + 1.0 / m
    return Estimate(scale * y.mean, scale * math.sqrt(2.0 * y.centred_square))


# --- sliced Wasserstein --------------------------------------------------------------------------------


def sliced_w2(x: Samples, y: Samples, projections: int = 256, seed: int = 0) -> float:
    r"""Sliced 2-Wasserstein distance: the root of the mean squared W2 of one-dimensional projections.

    .. math:: SW_2^2 = E_{\theta \sim U(S^{D-1})} W_2^2(\theta^T X, \theta^T Y), \qquad
              W_2^2 = \int_0^1 (F_X^{-1}(u) - F_Y^{-1}(u))^2 du

    The integral over the two empirical quantile functions (steps of width 1/N and 1/M) is exact, also for unequal
    sizes. The directions depend on ``(D, projections, seed)`` only, so distances of different models can be compared.

    Args:
        x: samples ``(N, ...)``.
        y: samples ``(M, ...)``.
        projections: number of directions; the sampling error of the mean square is inversely proportional to its
            root.
        seed: seed of the directions.

    Returns:
        The distance in units of the data (a shift by ``c`` in D dimensions gives about ``|c| / sqrt(D)``).

    Raises:
        UserError: the dimensions differ, ``projections`` is below 1, or the samples cannot be used.

    Source: Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".

    >>> round(sliced_w2(torch.zeros(4, 1), torch.full((4, 1), 2.0)), 6)
    2.0
    """
    a, b = as_pair(x, y, least=1)
    theta = directions(a.shape[1], projections, seed, a.device)
    total = 0.0
    for part in spans(projections, _width(a.shape[0] + b.shape[0])):
        total += float(squared_w2(_project(a, theta[:, part]), _project(b, theta[:, part])).sum())
    return math.sqrt(total / projections)


def sorted_projections(y: Tensor, theta: Tensor) -> Tensor:
    """Projections of rows ``(M, D)`` on directions ``(D, P)``, every column in ascending order: ``(M, P)`` float64."""
    parts = [_project(y, theta[:, part]).sort(dim=0).values for part in spans(theta.shape[1], _width(y.shape[0]))]
    return torch.cat(parts, dim=1)


def sliced_w2_from_projections(x: Tensor, theta: Tensor, projected: Tensor) -> float:
    """:func:`sliced_w2` of rows ``x (N, D)`` and a sample of which :func:`sorted_projections` are there."""
    count, total = theta.shape[1], 0.0
    for part in spans(count, _width(x.shape[0] + projected.shape[0])):
        own = _project(x, theta[:, part]).sort(dim=0).values
        total += float(squared_w2_of_sorted(own, projected[:, part]).sum())
    return math.sqrt(total / count)


def sliced_w2_floor(
    y: Samples, n: int, m: int | None = None, projections: int = 256, seed: int = 0, splits: int = 4
) -> float:
    """Root mean square of :func:`sliced_w2` between samples of sizes ``n`` and ``m`` of the law of ``y``.

    The mean of ``W2^2`` between two samples of one law is proportional to ``1/n + 1/m`` for large samples. So the
    mean square between random halves of ``y`` is rescaled from their sizes to ``n`` and ``m``.

    Args:
        y: samples ``(M, ...)`` of the data, at least 4.
        n: size of the generated sample.
        m: size of the reference sample; ``len(y)`` when not given.
        projections: number of directions.
        seed: seed of the directions and of the halves.
        splits: number of random splits into halves.

    Raises:
        UserError: ``n`` or ``m`` is below 1, or the samples cannot be used.

    Source: del Barrio, Gine & Utzet 2005 (the rate).
    """
    rows = as_rows(y, "y", least=4)
    size = rows.shape[0]
    m = size if m is None else m
    if n < 1 or m < 1:
        raise UserError(f"n = {n} and m = {m} are sample sizes, and must be at least 1.")
    theta = directions(rows.shape[1], projections, seed, rows.device)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(size, generator=generator).to(rows.device) for _ in range(splits)]
    half, total = size // 2, 0.0
    for part in spans(projections, _width(size)):
        values = _project(rows, theta[:, part])
        for order in orders:
            total += float(squared_w2(values[order[:half]], values[order[half:]]).sum())
    scale = (1.0 / n + 1.0 / m) / (1.0 / half + 1.0 / (size - half))
    return math.sqrt(scale * total / (splits * projections))


def directions(dim: int, projections: int, seed: int, device: torch.device) -> Tensor:
    """Draw uniform unit vectors, float64 ``(dim, projections)``, on the CPU, so that all devices get the same.

    Raises:
        UserError: ``projections`` is below 1.
    """
    if projections < 1:
        raise UserError(f"projections = {projections}: the number of directions must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(projections, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(theta, dim=1).T.contiguous().to(device)


def squared_w2(x: Tensor, y: Tensor) -> Tensor:
    """Exact squared W2 ``(P,)`` of one-dimensional samples, the columns of ``(N, P)`` and ``(M, P)``."""
    return squared_w2_of_sorted(x.sort(dim=0).values, y.sort(dim=0).values)


def squared_w2_of_sorted(a: Tensor, b: Tensor) -> Tensor:
    """:func:`squared_w2` of columns that are in ascending order."""
    n, m = a.shape[0], b.shape[0]
    if n == m:
        return (a - b).square().mean(dim=0)
    # Both quantile functions are constant between neighbouring multiples of 1/n and 1/m; multiplied by n m, these
    # are integers.
    first, second = torch.arange(n + 1, device=a.device) * m, torch.arange(m + 1, device=a.device) * n
    knots = torch.cat([first, second]).unique()
    start, width = knots[:-1], knots.diff().double() / (n * m)
    return width @ (a[start // m] - b[start // n]).square()


def _project(x: Tensor, theta: Tensor) -> Tensor:
    """Project ``(N, D)`` on ``(D, P)`` in float64, without a float64 copy of all of ``x``."""
    return torch.cat([x[part].double() @ theta for part in spans(x.shape[0], 4096)])


def _width(rows: int) -> int:
    """Number of projections of ``rows`` float64 values that fit in 32 MB."""
    return max(1, (1 << 22) // rows)


# --- maximum mean discrepancy --------------------------------------------------------------------------


def mmd(x: Samples, y: Samples, bandwidth: float | Sequence[float] | None = None) -> Estimate:
    r"""Squared maximum mean discrepancy as the unbiased U-statistic.

    .. math:: E k(X, X') + E k(Y, Y') - 2 E k(X, Y), \qquad
              k(x, y) = \frac1H \sum_h \exp\left(-\frac{\|x - y\|^2}{2 h^2}\right)

    Between two samples of one law its mean is zero, so that single values are often slightly negative.

    Args:
        x: samples ``(N, ...)``.
        y: samples ``(M, ...)``.
        bandwidth: ``h`` in units of the data, or several whose kernels are averaged. Default: the median distance of
            the reference ``y``, so that every model is judged with the same kernel.

    Returns:
        The squared discrepancy, without unit, and its standard error.

    Raises:
        UserError: a bandwidth is not positive, the dimensions differ, or the samples cannot be used.

    Source: Gretton et al. 2012, "A kernel two-sample test", Lemma 6.
    """
    a, b = as_pair(x, y)
    if bandwidth is None:
        bandwidth = median_distance(b)
    widths = [float(bandwidth)] if isinstance(bandwidth, int | float) else [float(h) for h in bandwidth]
    if not widths or not all(h > 0 and math.isfinite(h) for h in widths):
        raise UserError(
            f"bandwidth = {bandwidth}: a Gaussian kernel needs a positive, finite width, such as the median distance."
        )
    kernel = gaussian_kernel(widths)
    inside, outside, cross = within(a, kernel), within(b, kernel), between(a, b, kernel)
    value = inside.mean + outside.mean - 2.0 * cross.mean
    return Estimate(value, standard_error(inside, outside, cross))


def gaussian_kernel(widths: Sequence[float]) -> Kernel:
    """Mean of the kernels ``exp(-d2 / (2 h^2))`` over the widths ``h``, a function of squared distances ``d2``."""

    def kernel(d2: Tensor) -> Tensor:
        if len(widths) == 1:
            return d2.mul_(-0.5 / widths[0] ** 2).exp_()
        total = torch.zeros_like(d2)
        for h in widths:
            total += torch.exp(d2 * (-0.5 / h**2))
        return total / len(widths)

    return kernel


def median_distance(y: Samples, most: int = 1000) -> float:
    """Median distance between different rows of ``y``, the usual kernel width.

    Args:
        y: samples ``(M, ...)``.
        most: number of rows that are used at most.

    Raises:
        UserError: the samples cannot be used, or the median is 0.
    """
    rows = as_rows(y, "y")
    chosen = rows[torch.as_tensor(pick(rows.shape[0], most), device=rows.device)]
    n = chosen.shape[0]
    d2 = torch.empty(n, n, dtype=torch.float64, device=rows.device)
    for r, c, tile in tiles(chosen, chosen):
        d2[r, c] = tile
    upper = torch.triu_indices(n, n, offset=1, device=rows.device)
    median = math.sqrt(float(d2[upper[0], upper[1]].median()))
    if median == 0.0:
        raise UserError("most rows of y are equal, so their median distance is 0: give a bandwidth.")
    return median
