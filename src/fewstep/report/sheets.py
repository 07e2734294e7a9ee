"""Sheets of samples: contact sheets of images, scatter plots of points, histograms of numbers.

Images are shown in data units, with the lowest value black and the highest white. Small images are enlarged by
nearest neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fewstep.errors import UserError
from fewstep.report.drawing import COLOURS, Array, bare, panels, picture, png_bytes, tidy
from fewstep.store.files import write_bytes

CELL = 48  # pixels; small images are enlarged to about this side
MAX_SIDE = 160  # pixels; larger images are reduced to this side
GAP = 2  # pixels between images
GAP_GREY = 236  # grey value of the gaps

Limits = tuple[float, float]


def write_sheet(
    x: Tensor | Array,
    path: str | Path,
    *,
    limits: Limits | None = None,
    columns: int | None = None,
) -> Path:
    """Write samples to a PNG file: images as a contact sheet, points as a scatter plot, numbers as a histogram.

    Args:
        x: images ``(N, H, W)``, ``(N, C, H, W)`` or ``(N, H, W, C)`` with C = 1 or 3, or vectors ``(N, D)``.
        path: a ``.png`` file.
        limits: the values shown as black and white; the smallest and largest of ``x`` when not given.
        columns: images per row; by default about as many as rows.

    Returns:
        The path of the file.

    Raises:
        UserError: the shape or the suffix is another, values are not finite, or limits or columns are not valid.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UserError(
            f"a sheet is a PNG file, and {str(path)!r} does not end in .png: give a name such as samples.png."
        )
    array = finite(x)
    if array.ndim == 2:
        if limits is not None or columns is not None:
            raise UserError("limits and columns are for images, and these samples are vectors: remove them.")
        return scatter_sheet(array, path)
    return sheet(array, path, limits=limits, columns=columns)


def sheet(
    images: Tensor | Array, path: str | Path, *, limits: Limits | None = None, columns: int | None = None
) -> Path:
    """Write images as a contact sheet; arguments and errors as in :func:`write_sheet`."""
    array = channels_last(finite(images))
    if columns is not None and columns < 1:
        raise UserError(f"columns must be at least 1, got {columns}.")
    across = min(columns or math.ceil(math.sqrt(len(array))), len(array))
    tiles = to_bytes(array, limits or (float(array.min()), float(array.max())))
    path = Path(path)
    write_bytes(path, png_bytes(tile(tiles, across)))
    return path


def scatter_sheet(points: Tensor | Array, path: str | Path) -> Path:
    """Write vectors ``(N, D)`` as a histogram (D = 1) or a scatter plot, for D > 2 of two principal components.

    Args:
        points: the vectors.
        path: a ``.png`` file.

    Raises:
        UserError: the samples are not vectors, or values are not finite.
    """
    array = finite(points)
    if array.ndim != 2:
        raise UserError(f"a scatter sheet needs vectors (N, D), got shape {array.shape}.")
    figure, axes = panels(1, 1, 5.0, 5.0 if array.shape[1] > 1 else 3.2)
    ax = axes[0, 0]
    if array.shape[1] == 1:
        ax.hist(array[:, 0], bins=bins_of(array[:, 0]), color=COLOURS[0], alpha=0.8)
        tidy(ax, x="value", y="samples")
    else:
        flat = array if array.shape[1] == 2 else (array - array.mean(0)) @ principal_directions(array)
        ax.scatter(flat[:, 0], flat[:, 1], s=dot_size(len(flat)), color=COLOURS[0], alpha=0.6, linewidths=0)
        bare(ax)
        ax.tick_params(labelsize=8)
        tidy(ax, title="" if array.shape[1] == 2 else "first two principal components of the samples")
        ax.set_aspect("equal", adjustable="datalim")
    path = Path(path)
    write_bytes(path, picture(figure, "").png)
    return path


def finite(x: Tensor | ArrayLike) -> Array:
    """The samples as a float64 array.

    Raises:
        UserError: the shape is not that of samples, there are none, or values are not finite.
    """
    array = np.asarray(x.detach().cpu().float() if isinstance(x, Tensor) else x, dtype=np.float64)
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise UserError(
            f"samples of shape {array.shape} cannot be drawn: give images (N, H, W) or (N, C, H, W), or "
            "vectors (N, D), at least one."
        )
    if not np.isfinite(array).all():
        raise UserError("these samples hold NaN or infinite values and cannot be drawn: remove those samples.")
    return array


def channels_last(array: Array) -> Array:
    """Bring images to ``(N, H, W, C)`` with C = 1 or 3.

    Raises:
        UserError: the shape is not that of grey or colour images.
    """
    if array.ndim == 3:
        return array[..., None]
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return np.moveaxis(array, 1, -1)
    if array.ndim == 4 and array.shape[-1] in (1, 3):
        return array
    raise UserError(
        f"samples of shape {array.shape} are not grey or colour images: give (N, H, W), (N, C, H, W) or "
        "(N, H, W, C) with C = 1 or 3. Or write them as .npy instead."
    )


def to_bytes(array: Array, limits: Limits) -> Array:
    """Map values to uint8: the lower limit to 0, the upper to 255; values outside are clipped.

    Raises:
        UserError: the lower limit is above the upper limit.

    >>> to_bytes(np.array([-1.0, 0.5, 2.0]), (0.0, 1.0))
    array([  0, 128, 255], dtype=uint8)
    """
    low, high = limits
    if not low <= high:
        raise UserError(f"limits must be (lowest, highest), got {limits}.")
    share = (array - low) / (high - low) if high > low else np.full(array.shape, 0.5)
    return np.rint(255 * share.clip(0, 1)).astype(np.uint8)


def tile(tiles: Array, columns: int, cell: int = CELL, largest: int = MAX_SIDE) -> Any:
    """Arrange byte images in rows of one Pillow image, with light grey gaps.

    Args:
        tiles: images ``(N, H, W, C)``, uint8.
        columns: images per row.
        cell: side in pixels to which small images are enlarged, about.
        largest: side in pixels to which larger images are reduced.
    """
    from PIL import Image

    tiles = resize(tiles, cell, largest)
    count, height, width, channels = tiles.shape
    rows = -(-count // columns)
    page = np.full((rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels), GAP_GREY, dtype=np.uint8)
    for k, image in enumerate(tiles):
        top, left = (k // columns) * (height + GAP), (k % columns) * (width + GAP)
        page[top : top + height, left : left + width] = image
    return Image.fromarray(page[..., 0] if channels == 1 else page)


def resize(tiles: Array, cell: int, largest: int) -> Array:
    """Enlarge small images by a whole factor to about ``cell`` pixels; reduce large ones to ``largest``."""
    from PIL import Image

    side = max(tiles.shape[1:3])
    if side <= largest:
        factor = max(1, round(cell / side))
        return tiles.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = (max(1, round(length * largest / side)) for length in tiles.shape[1:3])
    reduced = [
        np.asarray(Image.fromarray(t[..., 0] if t.shape[-1] == 1 else t).resize((width, height), Image.Resampling.BOX))
        for t in tiles
    ]
    return np.stack(reduced).reshape(len(tiles), height, width, tiles.shape[-1])


def principal_directions(points: Array, count: int = 2) -> Array:
    """The ``count`` directions of largest variance, ``(D, count)``; the largest entry of each is positive."""
    centred = torch.as_tensor(np.asarray(points, dtype=np.float64))
    centred = centred - centred.mean(0)
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:count].numpy()
    signs = np.sign(basis[np.arange(len(basis)), np.abs(basis).argmax(1)])
    directions = (basis * signs[:, None]).T
    return (
        directions if directions.shape[1] == count else np.pad(directions, ((0, 0), (0, count - directions.shape[1])))
    )


def bins_of(values: Array | Sequence[float], count: int = 60) -> Array:
    """Edges of ``count`` equal bins over the central 99.6 % of the values, with a margin."""
    low, high = np.quantile(values, [0.002, 0.998])
    margin = 0.08 * (high - low) or 1.0
    return np.linspace(low - margin, high + margin, count + 1)


def dot_size(count: int) -> float:
    """Area of a point in a scatter plot, smaller for more points."""
    return float(np.clip(6000 / max(count, 1), 2.0, 14.0))
