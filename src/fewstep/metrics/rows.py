"""Samples as rows, and their pairwise distances in tiles.

Every metric of this package reads samples as a matrix ``(N, D)``: arrays or tensors ``(N, ...)`` are
flattened, a vector ``(N,)`` becomes ``(N, 1)``. Pairwise distances come from :func:`tiles`, which holds at most
:data:`MAX_TILE_VALUES` values (8 MB) of an ``N x M`` matrix at a time.

Squared distances come from the matrix product ``|x|^2 + |y|^2 - 2 x.y`` in float64 after centring on the mean
of ``y``; the rounding error of ``|x - y|^2`` is then below :data:`ROUNDING` times ``|x|^2 + |y|^2``. Values
below that (for the median norms) are set to zero, so that equal rows have distance zero. (In float32 they would have
a distance of about ``1e-3 |x|``, too inaccurate for nearest-neighbour checks, and float32 is only twice as fast.) In
:data:`MAX_DIRECT_DIM` dimensions or fewer the differences are computed directly, which takes the same time there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError

Samples = Tensor | np.ndarray

MAX_TILE_VALUES = 1 << 20
"""Largest number of values in one tile of a distance matrix; chosen, not tuned."""

MAX_DIRECT_DIM = 4
"""Up to this dimension distances are computed from differences, not from a matrix product."""

ROUNDING = 1e-14
"""Squared distance, relative to the squared norms, up to which it is rounding error and is set to zero."""

TIE_TOLERANCE = 1e-9
"""Relative difference of squared distances up to which two distances count as equal; chosen, not tuned."""


def as_rows(samples: Samples, name: str, least: int = 2) -> Tensor:
    """Flatten samples ``(N, ...)`` to a tensor ``(N, D)`` of float32 or float64; other dtypes become float64.

    Args:
        samples: the samples.
        name: how errors name them.
        least: smallest number of samples.

    Raises:
        UserError: not an array, fewer than ``least`` rows, no columns, complex or not finite.
    """
    rows = as_tensor(samples, name)
    if rows.ndim == 0 or rows.shape[0] < least:
        given = "a single number" if rows.ndim == 0 else f"{rows.shape[0]} rows"
        raise UserError(f"{name} has {given}, and this needs at least {least} samples (N, ...).")
    rows = rows.reshape(rows.shape[0], -1) if rows.numel() else rows.new_empty(rows.shape[0], 0)
    if rows.shape[1] == 0:
        raise UserError(f"{name} has shape {tuple(samples.shape)}, so its samples are empty.")
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.double()
    if not bool(torch.isfinite(rows).all()):
        bad = int((~torch.isfinite(rows)).any(dim=1).sum())
        raise UserError(
            f"{name} holds NaN or infinity in {bad} of {rows.shape[0]} samples, and distances to them are "
            "not defined: remove them, or find out why the model produced them."
        )
    return rows


def as_tensor(samples: Samples, name: str) -> Tensor:
    """The samples as a detached tensor of the same shape and dtype.

    Raises:
        UserError: the samples are not a tensor or an array of real numbers.
    """
    if isinstance(samples, np.ndarray) and samples.dtype.kind in "biuf":
        samples = np.ascontiguousarray(samples, dtype=samples.dtype.newbyteorder("="))
        return torch.from_numpy(samples if samples.flags.writeable else samples.copy())
    if isinstance(samples, Tensor) and not samples.is_complex():
        return samples.detach()
    kind = f"of {samples.dtype}" if isinstance(samples, Tensor | np.ndarray) else f"a {type(samples).__name__}"
    raise UserError(f"{name} must be a tensor or an array (N, ...) of real numbers, and is {kind}.")


def as_pair(x: Samples, y: Samples, names: tuple[str, str] = ("x", "y"), least: int = 2) -> tuple[Tensor, Tensor]:
    """Flatten two sets of samples to ``(N, D)`` and ``(M, D)``, both on the device of the first.

    Args:
        x: samples ``(N, ...)``.
        y: samples ``(M, ...)``.
        names: how errors name them.
        least: smallest number of samples in each.

    Raises:
        UserError: the dimensions differ, or :func:`as_rows` refuses one of the sets.
    """
    a, b = as_rows(x, names[0], least), as_rows(y, names[1], least)
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"{names[0]} has {a.shape[1]} numbers per sample (shape {tuple(x.shape)}) and {names[1]} has "
            f"{b.shape[1]} (shape {tuple(y.shape)}): both must have the same dimension."
        )
    return a, b.to(a.device)


def pick(size: int, most: int, seed: int = 0) -> np.ndarray:
    """Choose ``min(size, most)`` different rows, the same for every call.

    If ``size`` exceeds ``most``, these are the first of ``default_rng(seed).permutation(size)``. Rows at equal
    intervals would be biased for data that are stored with the classes in turn.

    Args:
        size: number of rows.
        most: largest number of rows to choose.
        seed: seed of the permutation.

    Returns:
        Sorted row numbers.
    """
    if size <= most:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).permutation(size)[:most])


def spans(size: int, width: int) -> list[slice]:
    """Divide ``range(size)`` into slices of at most ``width``.

    >>> spans(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def tiles(x: Tensor, y: Tensor, wide: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the squared distances between the rows of ``x`` and ``y``, tile by tile.

    Args:
        x: ``(N, D)``.
        y: ``(M, D)``. If it is the same object as ``x``, the distance of a row to itself is exactly 0.
        wide: whether tiles have 256 x 4096 values, for reductions along a row, instead of 1024 x 1024.

    Yields:
        Rows of x, rows of y, and their squared distances in float64, which the caller may overwrite.
    """
    height = 256 if wide else 1024
    centre = y.mean(dim=0, dtype=torch.float64)
    for cols in spans(y.shape[0], MAX_TILE_VALUES // height):
        right = y[cols].double() - centre
        for rows in spans(x.shape[0], height):
            left = x[rows].double() - centre
            d2 = squared_distances(left, right)
            if x is y:
                fill_self(d2, rows, cols, 0.0)
            yield rows, cols, d2


def half_tiles(x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Like ``tiles(x, x)``, but only tiles on or above the diagonal: ``cols`` starts at ``rows`` or later."""
    centre = x.mean(dim=0, dtype=torch.float64)
    blocks = spans(x.shape[0], 1024)
    for k, cols in enumerate(blocks):
        right = x[cols].double() - centre
        for rows in blocks[: k + 1]:
            d2 = squared_distances(x[rows].double() - centre, right)
            fill_self(d2, rows, cols, 0.0)
            yield rows, cols, d2


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2``, ``(N, M)``, of roughly centred float64 rows ``(N, D)`` and ``(M, D)``."""
    if x.shape[1] <= MAX_DIRECT_DIM:
        return sum_of_squares(x, y)
    norms_x, norms_y = x.square().sum(dim=1), y.square().sum(dim=1)
    d2 = torch.addmm(norms_y[None, :], x, y.T, alpha=-2.0).add_(norms_x[:, None])
    # The median norms and not the largest: one outlier must not set the distances of near neighbours to zero.
    rounding = ROUNDING * float(norms_x.median() + norms_y.median())
    return torch.threshold_(d2, rounding, 0.0)


def sum_of_squares(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2``, ``(N, M)``, as a sum over coordinates, without cancellation."""
    d2 = torch.zeros(x.shape[0], y.shape[0], dtype=x.dtype, device=x.device)
    for a, b in zip(x.T, y.T, strict=True):
        difference = a[:, None] - b[None, :]
        d2.addcmul_(difference, difference)
    return d2


def fill_self(d2: Tensor, rows: slice, cols: slice, value: float) -> None:
    """Set the diagonal entries (a row and itself) that lie in a tile of ``tiles(x, x)``, in place."""
    start, stop = max(rows.start, cols.start), min(rows.stop, cols.stop)
    if start < stop:
        same = torch.arange(start, stop, device=d2.device)
        d2[same - rows.start, same - cols.start] = value
