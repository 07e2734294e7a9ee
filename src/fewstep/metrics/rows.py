"""Samples as rows, and all their pairwise distances one tile at a time.

Every metric of this package reads samples as a matrix ``(N, D)``: arrays or tensors ``(N, ...)`` are
flattened, a vector ``(N,)`` becomes ``(N, 1)``. Pairwise work goes through :func:`tiles`, which never holds
more than :data:`TILE` numbers (8 MB) of an ``N x M`` matrix, whatever N and M are.

Squared distances come from the matrix product ``|x|^2 + |y|^2 - 2 x.y`` in float64 after centring on the mean
of ``y``; the rounding error of ``|x - y|^2`` is then below :data:`SAME` times ``|x|^2 + |y|^2``, and what is
below that (for typical norms) counts as zero, so equal rows read a distance of zero. (float32 would read
``~1e-3 |x|`` there, which spoils nearest-neighbour checks, and is only twice as fast.) In :data:`DIRECT_DIM`
dimensions or fewer the differences are taken directly, which costs the same there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError

Samples = Tensor | np.ndarray

TILE = 1 << 20
"""Most numbers in one tile of a distance matrix."""

DIRECT_DIM = 4
"""Up to this many dimensions distances are taken from differences, not from a matrix product."""

SAME = 1e-14
"""Squared distance, relative to the squared norms, that is rounding error and counts as zero."""

TIE = 1e-9
"""Relative difference of squared distances below which two distances are the same."""


def as_rows(samples: Samples, name: str, least: int = 2) -> Tensor:
    """Flatten samples ``(N, ...)`` to a tensor ``(N, D)`` of float32 or float64; other dtypes become float64.

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
            f"{name} holds NaN or infinity in {bad} of {rows.shape[0]} samples, and a distance to them means "
            "nothing: remove them, or find out why the model produced them."
        )
    return rows


def as_tensor(samples: Samples, name: str) -> Tensor:
    """The samples as a detached tensor of their own shape and dtype; refuses what is not real numbers."""
    if isinstance(samples, np.ndarray) and samples.dtype.kind in "biuf":
        samples = np.ascontiguousarray(samples, dtype=samples.dtype.newbyteorder("="))
        return torch.from_numpy(samples if samples.flags.writeable else samples.copy())
    if isinstance(samples, Tensor) and not samples.is_complex():
        return samples.detach()
    kind = f"of {samples.dtype}" if isinstance(samples, Tensor | np.ndarray) else f"a {type(samples).__name__}"
    raise UserError(f"{name} must be a tensor or an array (N, ...) of real numbers, and is {kind}.")


def as_pair(x: Samples, y: Samples, names: tuple[str, str] = ("x", "y"), least: int = 2) -> tuple[Tensor, Tensor]:
    """Two sets of rows of equal dimension, on the device of the first."""
    a, b = as_rows(x, names[0], least), as_rows(y, names[1], least)
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"{names[0]} has {a.shape[1]} numbers per sample (shape {tuple(x.shape)}) and {names[1]} has "
            f"{b.shape[1]} (shape {tuple(y.shape)}): both must be samples of the same space."
        )
    return a, b.to(a.device)


def pick(size: int, most: int, seed: int = 0) -> np.ndarray:
    """Sorted indices of ``min(size, most)`` different rows, the same for every call.

    All rows when they are few enough, else the head of ``default_rng(seed).permutation(size)``. A drawn
    order, not an even stride: a stride can fall in step with data that are stored class by class in turn.
    """
    if size <= most:
        return np.arange(size)
    return np.sort(np.random.default_rng(seed).permutation(size)[:most])


def spans(size: int, width: int) -> list[slice]:
    """Cut ``range(size)`` into slices of at most ``width``."""
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]


def tiles(x: Tensor, y: Tensor, wide: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """Squared distances between the rows of ``x`` and ``y``: yields ``(rows of x, rows of y, d2)``.

    Args:
        x: ``(N, D)``.
        y: ``(M, D)``. The same object as ``x`` stands for distances within one sample: ``d2[i, i]`` is
            exactly 0.
        wide: tiles of 256 x 4096 (for reductions along a row) rather than 1024 x 1024.

    Yields:
        ``d2`` float64, never negative, owned by the caller (it may be overwritten).
    """
    height = 256 if wide else 1024
    centre = y.mean(dim=0, dtype=torch.float64)
    for cols in spans(y.shape[0], TILE // height):
        right = y[cols].double() - centre
        for rows in spans(x.shape[0], height):
            left = x[rows].double() - centre
            d2 = squared_distances(left, right)
            if x is y:
                fill_self(d2, rows, cols, 0.0)
            yield rows, cols, d2


def half_tiles(x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Like ``tiles(x, x)``, each pair of tiles once: ``cols`` starts at ``rows`` or behind it."""
    centre = x.mean(dim=0, dtype=torch.float64)
    blocks = spans(x.shape[0], 1024)
    for k, cols in enumerate(blocks):
        right = x[cols].double() - centre
        for rows in blocks[: k + 1]:
            d2 = squared_distances(x[rows].double() - centre, right)
            fill_self(d2, rows, cols, 0.0)
            yield rows, cols, d2


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2`` of float64 rows ``(N, D)``, ``(M, D)`` that are roughly centred: ``(N, M)``."""
    if x.shape[1] <= DIRECT_DIM:
        return sum_of_squares(x, y)
    norms_x, norms_y = x.square().sum(dim=1), y.square().sum(dim=1)
    d2 = torch.addmm(norms_y[None, :], x, y.T, alpha=-2.0).add_(norms_x[:, None])
    # Typical norms, not the largest: one far outlier must not make near neighbours coincide.
    rounding = SAME * float(norms_x.median() + norms_y.median())
    return torch.threshold_(d2, rounding, 0.0)


def sum_of_squares(x: Tensor, y: Tensor) -> Tensor:
    """``|x_i - y_j|^2`` coordinate by coordinate, without cancellation."""
    d2 = torch.zeros(x.shape[0], y.shape[0], dtype=x.dtype, device=x.device)
    for a, b in zip(x.T, y.T, strict=True):
        difference = a[:, None] - b[None, :]
        d2.addcmul_(difference, difference)
    return d2


def fill_self(d2: Tensor, rows: slice, cols: slice, value: float) -> None:
    """Set the distance of each row to itself, where a tile of ``tiles(x, x)`` crosses the diagonal."""
    start, stop = max(rows.start, cols.start), min(rows.stop, cols.stop)
    if start < stop:
        same = torch.arange(start, stop, device=d2.device)
        d2[same - rows.start, same - cols.start] = value
