"""Which scaling an array gets.

A flow that starts from ``N(0, I)`` learns best on data of the order of one. The rules, for rows that
are vectors ``(D,)`` or images ``(C, H, W)``:

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

*Small whole numbers*: every value is an integer, whatever the dtype, and they span at most 255. *Of
one unit*: at least three quarters of the features that vary span half of the whole range, as the pixels
of flattened images do and the columns of a table (a flag, an age) do not. Only a scale shared by all
features gives one quantum; images keep one scale because a pixel's brightness must mean the same
everywhere, and std 0.5 because the images usually lie in -1..1.

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
_CHUNK = 1 << 22  # values looked at together
_SMALL_RANGE = 255
_IMAGE_STD = 0.5


def _chunks(rows: NDArray[Any]) -> range:
    return range(0, len(rows), max(1, _CHUNK // max(1, math.prod(rows.shape[1:]))))


def refuse_non_finite(rows: NDArray[Any], what: str) -> None:
    """Raise UserError with the number of NaN and infinite values and the place of the first."""
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
            "Drop those rows or fill the gaps: a model would learn them."
        )


@final
@dataclass(frozen=True)
class _Statistics:
    """Per-feature statistics of rows ``(N, *shape)``, each of shape ``shape``, in float64."""

    low: NDArray[np.float64]
    high: NDArray[np.float64]
    mean: NDArray[np.float64]
    variance: NDArray[np.float64]
    whole: bool  # every value is an integer

    @property
    def small_whole(self) -> bool:
        return self.whole and float(self.high.max() - self.low.min()) <= _SMALL_RANGE

    @property
    def one_unit(self) -> bool:
        """Small whole numbers whose features span comparable ranges."""
        span = self.high - self.low
        span = np.sort(span[span > 0])
        if not self.small_whole or not span.size:
            return False
        return bool(span[(span.size - 1) // 4] >= 0.5 * (self.high.max() - self.low.min()))


def _statistics(rows: NDArray[Any], what: str) -> _Statistics:
    """One pass in chunks; means and sums of squares are joined as in Chan, Golub and LeVeque (1983)."""
    low, high = np.full(rows.shape[1:], np.inf), np.full(rows.shape[1:], -np.inf)
    mean, squares = np.zeros(rows.shape[1:]), np.zeros(rows.shape[1:])
    whole, seen = True, 0
    chunks = _chunks(rows)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in chunks:
            part = np.asarray(rows[start : start + chunks.step], dtype=np.float64)
            low, high = np.minimum(low, part.min(axis=0)), np.maximum(high, part.max(axis=0))
            whole = whole and bool((part == np.rint(part)).all())
            new, total = len(part), seen + len(part)
            part_mean = part.mean(axis=0)
            delta = part_mean - mean
            squares += ((part - part_mean) ** 2).sum(axis=0) + delta**2 * (seen * new / total)
            mean += delta * (new / total)
            seen = total
    if not np.isfinite(squares).all():
        largest = max(abs(float(low.min())), abs(float(high.max())))
        raise UserError(f"{what} holds values up to {largest:.3g}, too large to scale. Divide them first.")
    return _Statistics(low, high, mean, squares / seen, whole)


def _scale_of(variance: NDArray[np.float64], span: NDArray[np.float64]) -> NDArray[np.float64]:
    """The std; where it underflows the span; for what does not vary 1 (rounding leaves its std above 0)."""
    std = np.sqrt(variance)
    return np.where(span > 0, np.where(std > 0, std, span), 1.0)


def _plain(values: NDArray[np.float64]) -> float | tuple[float, ...]:
    """One number where all are equal, else a flat tuple."""
    flat = values.ravel()
    return float(flat[0]) if (flat == flat[0]).all() else tuple(flat.tolist())


def _standardise(stats: _Statistics, image: bool, shared: bool) -> dict[str, Any]:
    span = stats.high - stats.low
    if image:
        mean = stats.mean.mean()
        variance = np.asarray((stats.variance + (stats.mean - mean) ** 2).mean())
        std = float(_scale_of(variance, np.asarray(stats.high.max() - stats.low.min())))
        return {"shift": float(mean), "scale": std / _IMAGE_STD}
    if shared:
        return {"shift": _plain(stats.mean), "scale": math.sqrt(stats.variance.mean())}
    return {"shift": _plain(stats.mean), "scale": _plain(_scale_of(stats.variance, span))}


def _range(low: NDArray[np.float64], high: NDArray[np.float64], shared: bool) -> dict[str, Any]:
    if shared:
        low, high = low.min(keepdims=True), high.max(keepdims=True)
    half = np.where(high > low, high / 2 - low / 2, 1.0)
    clip = (float(low.min()), float(high.max()))
    one = len(np.unique(low)) == len(np.unique(high)) == 1 and clip[0] < clip[1]
    return {"shift": _plain(low / 2 + high / 2), "scale": _plain(half), "clip": clip if one else None}


def choose_scaling(rows: NDArray[Any], layout: Layout, scale: str | None, what: str) -> tuple[Scaling, float | None]:
    """Return the scaling of finite rows ``(N, *shape)`` and the quantum in network units.

    Args:
        scale: one of ``SCALES``, or None for the automatic rule.
        what: how an error names the data.

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
    elif scale == "range" or (scale is None and image and stats.small_whole):
        fields = _range(stats.low, stats.high, shared=image or stats.one_unit)
    else:
        fields = _standardise(stats, image, shared=scale is None and stats.one_unit)
    scaling = Scaling(**fields, shape=shape, layout=layout)
    discrete = stats.small_whole and isinstance(scaling.scale, float)
    return scaling, 1 / scaling.scale if discrete and isinstance(scaling.scale, float) else None
