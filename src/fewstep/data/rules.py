"""Chooses the scaling of an array.

The base distribution is ``N(0, I)``, so the data are scaled to values of order one. The rules for rows that are
vectors ``(D,)`` or images ``(C, H, W)``:

=================================  ==========================================  =================
rows                               automatic scaling                           quantum
=================================  ==========================================  =================
vectors                            per feature, mean 0 and std 1               None (D = 1: below)
vectors of small whole numbers     per-feature mean, one scale: the root mean  1 / scale
with features of one unit          square of the stds
uint8 images with C <= 4           ``x / 127.5 - 1``, clip (0, 255)            2 / 255
images of small whole numbers      smallest..largest -> -1..1, clip to them    2 / (max - min)
other images                       one mean -> 0, one std -> 0.5               None
=================================  ==========================================  =================

*Small whole numbers*: every value is an integer, whatever the dtype, and largest minus smallest value is at most
255. *Of one unit*: at least three quarters of the features that vary span at least half of the whole range. The
pixels of flattened images do; the columns of a table (a flag, an age) do not. A quantum exists only where all
features share one scale. All pixels of an image share one scale, so that equal brightness gives equal values at
every position; their std is 0.5, which puts most values in -1..1.

The user may choose: ``standardise`` (per feature for vectors, one mean and std for images), ``range``
(smallest..largest -> -1..1; for uint8 images 0..255; one range for images and vectors of one unit,
else per feature) or ``none``. Features that do not vary have scale 1. All statistics are over all rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fewstep.data.scaling import Layout, Scaling
from fewstep.errors import UserError, unknown

__all__ = ["SCALES", "choose_scaling", "refuse_non_finite"]

SCALES = ("standardise", "range", "none")
_MAX_CHUNK_VALUES = 1 << 22  # values processed at a time; chosen, not tuned
_MAX_DISCRETE_RANGE = 255  # the range of 8-bit pixels
_IMAGE_STD = 0.5  # std of images in network units; chosen, not tuned


def _chunks(rows: NDArray[Any]) -> range:
    """First rows of the chunks; the step is the number of rows of a chunk."""
    return range(0, len(rows), max(1, _MAX_CHUNK_VALUES // max(1, math.prod(rows.shape[1:]))))


def refuse_non_finite(rows: NDArray[Any], what: str) -> None:
    """Refuse rows with NaN or infinite values.

    Args:
        rows: ``(N, ...)`` of any real dtype.
        what: how the error names the rows.

    Raises:
        UserError: such values exist; the message gives their number and the index of the first.
    """
    if rows.dtype.kind != "f":
        return
    count, first = 0, ""
    chunks = _chunks(rows)
    for start in chunks:
        part = np.asarray(rows[start : start + chunks.step])
        bad = ~np.isfinite(part)
        found = int(bad.sum())
        if found and not count:
            place = np.unravel_index(int(bad.argmax()), bad.shape)
            index = (start + int(place[0]), *map(int, place[1:]))
            first = f"the first is {part[place]} at index {list(index)}"
        count += found
    if count:
        raise UserError(
            f"{what} holds {count} value(s) that are NaN or infinite; {first}. "
            "Drop those rows or fill the gaps: a loss on them is not finite."
        )


@final
@dataclass(frozen=True)
class _Statistics:
    """Per-feature statistics of rows ``(N, *shape)``, each of shape ``shape``, in float64."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    integer: bool  # every value is an integer

    @property
    def discrete(self) -> bool:
        """Small whole numbers (see the module docstring)."""
        return self.integer and float(self.high.max() - self.low.min()) <= _MAX_DISCRETE_RANGE

    @property
    def one_unit(self) -> bool:
        """Small whole numbers of one unit (see the module docstring)."""
        span = self.high - self.low
        span = np.sort(span[span > 0])
        if not self.discrete or not span.size:
            return False
        return bool(span[(span.size - 1) // 4] >= 0.5 * (self.high.max() - self.low.min()))


def _statistics(rows: NDArray[Any], what: str) -> _Statistics:
    """Compute the statistics in one pass over chunks, combined as in Chan, Golub and LeVeque (1983)."""
    low, high = np.full(rows.shape[1:], np.inf), np.full(rows.shape[1:], -np.inf)
    mean, squares = np.zeros(rows.shape[1:]), np.zeros(rows.shape[1:])
    integer, seen = True, 0
    chunks = _chunks(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in chunks:
            part = np.asarray(rows[start : start + chunks.step], dtype=np.float64)
            low, high = np.minimum(low, part.min(axis=0)), np.maximum(high, part.max(axis=0))
            integer = integer and bool((part == np.rint(part)).all())
            new, total = len(part), seen + len(part)
            part_mean = part.mean(axis=0)
            delta = part_mean - mean
            squares += ((part - part_mean) ** 2).sum(axis=0) + delta**2 * (seen * new / total)
            mean += delta * (new / total)
            seen = total
    if not np.isfinite(squares).all():
        largest = max(abs(float(low.min())), abs(float(high.max())))
        raise UserError(
            f"{what} holds values up to {largest:.3g}, too large to scale: their squares overflow float64. "
            "Divide them first."
        )
    return _Statistics(low, high, mean, squares / seen, integer)


def _scale_of(variance: NDArray[np.float64], span: NDArray[np.float64]) -> NDArray[np.float64]:
    """The std of each feature; the span where the std underflows to 0; 1 for a constant feature.

    A constant feature is recognised by its span: rounding can leave its computed std above 0.
    """
    std = np.sqrt(variance)
    return np.where(span > 0, np.where(std > 0, std, span), 1.0)


def _shared_or_each(values: NDArray[np.float64]) -> float | tuple[float, ...]:
    """One number if all values are equal, else a flat tuple."""
    flat = values.ravel()
    return float(flat[0]) if (flat == flat[0]).all() else tuple(flat.tolist())


def _standardise(stats: _Statistics, image: bool, shared: bool) -> dict[str, Any]:
    """Mean 0 and std 1 per feature; std 0.5 over all pixels of images; one scale for all features if shared."""
    span = stats.high - stats.low
    if image:
        mean = stats.mean.mean()
        variance = np.asarray((stats.variance + (stats.mean - mean) ** 2).mean())
        std = float(_scale_of(variance, np.asarray(stats.high.max() - stats.low.min())))
        return {"shift": float(mean), "scale": std / _IMAGE_STD}
    if shared:
        return {"shift": _shared_or_each(stats.mean), "scale": math.sqrt(stats.variance.mean())}
    return {"shift": _shared_or_each(stats.mean), "scale": _shared_or_each(_scale_of(stats.variance, span))}


def _range(low: NDArray[np.float64], high: NDArray[np.float64], shared: bool) -> dict[str, Any]:
    """Map low..high to -1..1 per feature, or with one range for all if shared; clip where one range serves all."""
    if shared:
        low, high = low.min(keepdims=True), high.max(keepdims=True)
    half = np.where(high > low, high / 2 - low / 2, 1.0)
    clip = (float(low.min()), float(high.max()))
    one = len(np.unique(low)) == len(np.unique(high)) == 1 and clip[0] < clip[1]
    return {"shift": _shared_or_each(low / 2 + high / 2), "scale": _shared_or_each(half), "clip": clip if one else None}


def choose_scaling(rows: NDArray[Any], layout: Layout, scale: str | None, what: str) -> tuple[Scaling, float | None]:
    """Choose the scaling of rows by the rules of the module.

    Args:
        rows: finite values ``(N, *shape)``.
        layout: how the file arranges a row.
        scale: one of ``SCALES``, or None for the automatic rule.
        what: how errors name the data.

    Returns:
        The scaling, and the quantum in network units; None in place of the quantum for continuous data.

    Raises:
        UserError: ``scale`` is unknown, or values are too large.
    """
    if scale is not None and scale not in SCALES:
        raise unknown("data key 'scale'", scale, SCALES)
    shape = tuple(rows.shape[1:])
    image = len(shape) == 3
    pixels = image and rows.dtype == np.uint8 and shape[0] <= 4
    if pixels and scale in (None, "range"):
        return Scaling(127.5, 127.5, (0.0, 255.0), shape, layout), 2 / 255
    stats = _statistics(rows, what)
    if scale == "none":
        fields: dict[str, Any] = {}
    elif scale == "range" or (scale is None and image and stats.discrete):
        fields = _range(stats.low, stats.high, shared=image or stats.one_unit)
    else:
        fields = _standardise(stats, image, shared=scale is None and stats.one_unit)
    scaling = Scaling(**fields, shape=shape, layout=layout)
    discrete = stats.discrete and isinstance(scaling.scale, float)
    return scaling, 1 / scaling.scale if discrete and isinstance(scaling.scale, float) else None
