"""Distances between two samples: energy, sliced Wasserstein, maximum mean discrepancy.

All are zero exactly when the two laws agree, and none needs features. None suffices either: blurred samples,
or a Gaussian with the mean and covariance of the data (:func:`fewstep.metrics.moment_matched_gaussian`),
score almost like the data in high dimension, so they are read together with precision and recall
(:func:`fewstep.metrics.prdc`).

A finite sample of the data itself does not score zero. The floor functions say what it scores at the same
sizes.
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
    """A number and its standard error: the standard deviation the number has over fresh draws of the
    samples."""

    value: float
    standard_error: float

    def __float__(self) -> float:
        return self.value


# --- energy --------------------------------------------------------------------------------------------


def energy(x: Samples, y: Samples) -> Estimate:
    r"""Energy distance, as the V-statistic with the diagonals included.

    .. math:: 2 E\|X - Y\| - E\|X - X'\| - E\|Y - Y'\|

    Never negative, zero for equal samples, in units of the data. Between two samples of one law it is
    :func:`energy_floor`, not zero.

    Args:
        x: samples ``(N, ...)``.
        y: samples ``(M, ...)`` of the same dimension.

    Returns:
        The value with the standard error of Hoeffding's decomposition (:mod:`fewstep.metrics.two_sample`).

    Raises:
        UserError: other dimensions, fewer than two samples, values that are not finite.

    References:
        Szekely & Rizzo 2013, "Energy statistics: a class of statistics based on distances".
    """
    a, b = as_pair(x, y)
    return energy_from_moments(within(a, distance), within(b, distance), between(a, b, distance))


def energy_floor(y: Samples, n: int, m: int | None = None) -> Estimate:
    r"""What :func:`energy` gives for two independent samples of ``y``'s own law, of sizes ``n`` and ``m``.

    The mean over draws is exactly :math:`(1/n + 1/m)\,E\|Y - Y'\|`, because a mean over all pairs counts
    ``n`` (``m``) zeros of the diagonal. The expectation is estimated without bias by the U-statistic over all
    rows of ``y``, so ``n`` and ``m`` may be larger than half of ``y`` or than ``y`` itself; no split, no
    bootstrap, no seed.

    Args:
        y: samples ``(M, ...)`` of the data.
        n: size of the one sample (the generated one).
        m: size of the other (the reference); ``len(y)`` when not given.

    Returns:
        ``value`` is that mean and ``standard_error`` the standard deviation of one draw of the statistic
        around it: an energy above ``value + 3 standard_error`` is not explained by the finite samples.

    Raises:
        UserError: ``n`` or ``m`` below 1, or unusable samples.
    """
    rows = as_rows(y, "y")
    return floor_from_moments(within(rows, distance), n, rows.shape[0] if m is None else m)


def distance(d2: Tensor) -> Tensor:
    """The kernel of the energy distance, ``|x - y|`` (in place)."""
    return d2.sqrt_()


def energy_from_moments(x: Within, y: Within, cross: Between) -> Estimate:
    """:func:`energy` from moments of :func:`distance` that are already there."""
    diagonal_x, diagonal_y = (x.size - 1) / x.size, (y.size - 1) / y.size
    value = 2.0 * cross.mean - diagonal_x * x.mean - diagonal_y * y.mean
    return Estimate(value, standard_error(x, y, cross))


def floor_from_moments(y: Within, n: int, m: int) -> Estimate:
    """:func:`energy_floor` from moments of :func:`distance` that are already there."""
    if n < 1 or m < 1:
        raise UserError(f"n = {n} and m = {m} are sample sizes, and must be at least 1.")
    scale = 1.0 / n + 1.0 / m
    return Estimate(scale * y.mean, scale * math.sqrt(2.0 * y.centred_square))


# --- sliced Wasserstein --------------------------------------------------------------------------------


def sliced_w2(x: Samples, y: Samples, projections: int = 256, seed: int = 0) -> float:
    r"""Sliced 2-Wasserstein distance: the root of the mean squared W2 of one-dimensional projections.

    .. math:: SW_2^2 = E_{\theta \sim U(S^{D-1})} W_2^2(\theta^T X, \theta^T Y), \qquad
              W_2^2 = \int_0^1 (F_X^{-1}(u) - F_Y^{-1}(u))^2 du

    The integral over the two empirical quantile functions (steps of width 1/N and 1/M) is exact, for unequal
    sizes too. The directions depend on ``(D, projections, seed)`` only, so numbers of different models
    compare.

    Args:
        x: samples ``(N, ...)``.
        y: samples ``(M, ...)``.
        projections: number of directions; the sampling error of the mean square falls with its root.
        seed: seed of the directions.

    Returns:
        The distance, in units of the data (a shift by ``c`` in D dimensions gives ``|c| / sqrt(D)``).

    Raises:
        UserError: other dimensions, fewer than one projection, unusable samples.

    References:
        Bonneel et al. 2015, "Sliced and Radon Wasserstein barycenters of measures".
    """
    a, b = as_pair(x, y, least=1)
    theta = directions(a.shape[1], projections, seed, a.device)
    total = 0.0
    for part in spans(projections, _width(a.shape[0] + b.shape[0])):
        total += float(squared_w2(_project(a, theta[:, part]), _project(b, theta[:, part])).sum())
    return math.sqrt(total / projections)


def sliced_w2_floor(
    y: Samples, n: int, m: int | None = None, projections: int = 256, seed: int = 0, splits: int = 4
) -> float:
    """What :func:`sliced_w2` gives between samples of sizes ``n`` and ``m`` of ``y``'s own law (root mean
    square).

    ``W2^2`` between two samples of one law falls as ``1/n + 1/m`` (del Barrio, Gine & Utzet 2005), so the
    mean square over random halves of ``y`` is rescaled from their size to the sizes asked for.
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
    """Uniform unit vectors, float64 ``(dim, projections)``, drawn on the CPU so that every device has the
    same."""
    if projections < 1:
        raise UserError(f"projections = {projections}, and at least one direction is needed.")
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(projections, dim, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(theta, dim=1).T.contiguous().to(device)


def squared_w2(x: Tensor, y: Tensor) -> Tensor:
    """Exact squared W2 of one-dimensional samples, column by column: ``(N, P)``, ``(M, P)`` -> ``(P,)``."""
    a, b = x.sort(dim=0).values, y.sort(dim=0).values
    n, m = a.shape[0], b.shape[0]
    if n == m:
        return (a - b).square().mean(dim=0)
    # Both quantile functions are constant between neighbouring multiples of 1/n and 1/m. Times n m these are
    # integers.
    first, second = torch.arange(n + 1, device=x.device) * m, torch.arange(m + 1, device=x.device) * n
    knots = torch.cat([first, second]).unique()
    start, width = knots[:-1], knots.diff().double() / (n * m)
    return width @ (a[start // m] - b[start // n]).square()


def _project(x: Tensor, theta: Tensor) -> Tensor:
    """Project ``(N, D)`` on ``(D, P)`` in float64, without a float64 copy of all of ``x``."""
    return torch.cat([x[part].double() @ theta for part in spans(x.shape[0], 4096)])


def _width(rows: int) -> int:
    """How many projections of ``rows`` numbers fit in 32 MB."""
    return max(1, (1 << 22) // rows)


# --- maximum mean discrepancy --------------------------------------------------------------------------


def mmd(x: Samples, y: Samples, bandwidth: float | Sequence[float] | None = None) -> Estimate:
    r"""Squared maximum mean discrepancy, as the unbiased U-statistic.

    .. math:: E k(X, X') + E k(Y, Y') - 2 E k(X, Y), \qquad
              k(x, y) = \frac1H \sum_h \exp\left(-\frac{\|x - y\|^2}{2 h^2}\right)

    Unbiased: zero in the mean between two samples of one law, and then often slightly negative.

    Args:
        x: samples ``(N, ...)``.
        y: samples ``(M, ...)``.
        bandwidth: ``h``, or several whose kernels are averaged; the median distance of ``y`` when not given
            (of the reference alone, so that every model is judged with one kernel).

    Raises:
        UserError: a bandwidth that is not positive, other dimensions, unusable samples.

    References:
        Gretton et al. 2012, "A kernel two-sample test", Lemma 6.
    """
    a, b = as_pair(x, y)
    if bandwidth is None:
        bandwidth = median_distance(b)
    widths = [float(bandwidth)] if isinstance(bandwidth, int | float) else [float(h) for h in bandwidth]
    if not widths or not all(h > 0 and math.isfinite(h) for h in widths):
        raise UserError(
            f"bandwidth = {bandwidth}: a Gaussian kernel needs positive widths, such as the median distance."
        )
    kernel = gaussian_kernel(widths)
    inside, outside, cross = within(a, kernel), within(b, kernel), between(a, b, kernel)
    value = inside.mean + outside.mean - 2.0 * cross.mean
    return Estimate(value, standard_error(inside, outside, cross))


def gaussian_kernel(widths: Sequence[float]) -> Kernel:
    """Mean of the kernels ``exp(-d2 / (2 h^2))`` over the widths ``h``."""

    def kernel(d2: Tensor) -> Tensor:
        if len(widths) == 1:
            return d2.mul_(-0.5 / widths[0] ** 2).exp_()
        total = torch.zeros_like(d2)
        for h in widths:
            total += torch.exp(d2 * (-0.5 / h**2))
        return total / len(widths)

    return kernel


def median_distance(y: Samples, most: int = 1000) -> float:
    """Median of the distances between different rows of (at most ``most`` rows of) ``y``: the usual kernel
    width."""
    rows = as_rows(y, "y")
    chosen = rows[torch.as_tensor(pick(rows.shape[0], most), device=rows.device)]
    n = chosen.shape[0]
    d2 = torch.empty(n, n, dtype=torch.float64, device=rows.device)
    for r, c, tile in tiles(chosen, chosen):
        d2[r, c] = tile
    upper = torch.triu_indices(n, n, offset=1, device=rows.device)
    median = math.sqrt(float(d2[upper[0], upper[1]].median()))
    if median == 0.0:
        raise UserError("more than half of the rows of y are equal, so their median distance is 0: give a bandwidth.")
    return median
