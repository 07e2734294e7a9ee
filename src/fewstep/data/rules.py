"""Chooses the scaling of an array.

The base distribution is ``N(0, I)``, so the data are scaled to values of order one. The rules by the kind of the rows
(:mod:`fewstep.data.arrays` tells which kind an array is):

=================================  ==========================================  =================
rows                               automatic scaling                           quantum
=================================  ==========================================  =================
vectors ``(D,)``                   per feature, mean 0 and std 1               None (D = 1: below)
vectors of small whole numbers     per-feature mean, one scale: the root mean  1 / scale
with features of one unit          square of the stds
sequences ``(T, D)``               as vectors of the D features, over all T    as vectors
uint8 images with C <= 4,          ``x / 127.5 - 1``, clip (0, 255)            2 / 255
raw uint8 rows
images and raw rows of small       smallest..largest -> -1..1, clip to them    2 / (max - min)
whole numbers
other images ``(C, H, W)``         one mean -> 0, one std -> 0.5               None
other raw rows                     one mean -> 0, one std -> 1                 None
=================================  ==========================================  =================

*Small whole numbers*: every value is an integer, whatever the dtype, and largest minus smallest value is at most
255. *Of one unit*: at least three quarters of the features that vary span at least half of the whole range. The
pixels of flattened images do; the columns of a table (a flag, an age) do not. A quantum exists only where all
features share one scale. All pixels of an image share one scale, so that equal brightness gives equal values at
every position; their std is 0.5, which puts most values in -1..1. Raw rows with one axis are vectors.

The user may choose: ``standardise`` (per feature for vectors and sequences, one mean and std for images and raw rows),
``range`` (smallest..largest -> -1..1; for uint8 images 0..255; one range for images, raw rows and vectors of one unit,
else per feature) or ``none``. Features that do not vary have scale 1. All statistics are over all rows; where a mask
marks valid entries, over those alone. They are computed in one pass over the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fewstep.data.lazy import RowSource, row_chunks
from fewstep.data.scaling import Kind, Layout, Scaling
from fewstep.errors import UserError, unknown

__all__ = ["SCALES", "choose_scaling", "refuse_non_finite", "valid_entries"]

SCALES = ("standardise", "range", "none")
_MAX_CHUNK_VALUES = 1 << 22  # values processed at a time; chosen, not tuned
MAX_DISCRETE_RANGE = 255  # the range of 8-bit pixels
_STD = {"image": 0.5, "raw": 1.0}  # std in network units of rows with one scale; chosen, not tuned
Floats = NDArray[np.float64]


@final
class _NonFinite:
    """Counts NaN and infinite values, block by block, and remembers the first."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def look(self, part: NDArray[Any], start: int, valid: NDArray[np.bool_] | None, drop: int | None) -> None:
        """Count those of a block whose first row is ``start``; ``drop`` is an axis that the file does not have."""
        if part.dtype.kind != "f":
            return
        bad = ~np.isfinite(part) if valid is None else ~np.isfinite(part) & valid
        found = int(bad.sum())
        if found and not self.count:
            place = np.unravel_index(int(bad.argmax()), bad.shape)
            index = [start + int(place[0]), *map(int, place[1:])]
            if drop is not None:
                del index[drop]
            self.first = f"the first is {part[place]} at index {index}"
        self.count += found

    def refuse(self, what: str, masked: bool = False) -> None:
        """Refuse the rows if there were any."""
        if self.count:
            where = " in entries that the mask marks as valid" if masked else ""
            raise UserError(
                f"{what} holds {self.count} value(s) that are NaN or infinite{where}; {self.first}. "
                "Drop those rows or fill the gaps: a loss on them is not finite."
            )


def refuse_non_finite(rows: RowSource, what: str) -> None:
    """Refuse rows with NaN or infinite values.

    Args:
        rows: ``(N, ...)`` of any real dtype.
        what: how the error names the rows.

    Raises:
        UserError: such values exist; the message gives their number and the index of the first.
    """
    if np.dtype(rows.dtype).kind != "f":
        return
    seen = _NonFinite()
    chunks = row_chunks(rows, _MAX_CHUNK_VALUES)
    for start in chunks:
        seen.look(np.asarray(rows[start : start + chunks.step]), start, None, None)
    seen.refuse(what)


@final
@dataclass(frozen=True)
class _Statistics:
    """Statistics over the valid values of every feature, in float64; all fields have one shape."""

    low: Floats  # infinite where no value is valid
    high: Floats
    mean: Floats
    variance: Floats
    count: Floats | None  # number of valid values of every feature; None: every row's
    integer: bool  # every value is an integer

    @property
    def span(self) -> Floats:
        """Largest minus smallest value; 0 where no value is valid."""
        return np.maximum(self.high - self.low, 0.0)

    @property
    def discrete(self) -> bool:
        """Small whole numbers (see the module docstring)."""
        return self.integer and float(self.high.max() - self.low.min()) <= MAX_DISCRETE_RANGE

    @property
    def one_unit(self) -> bool:
        """Small whole numbers of one unit (see the module docstring)."""
        span = np.sort(self.span[self.span > 0])
        if not self.discrete or not span.size:
            return False
        return bool(span[(span.size - 1) // 4] >= 0.5 * (self.high.max() - self.low.min()))

    def pooled(self, axes: tuple[int, ...] | None) -> _Statistics:
        """Those of features that are the same along some axes: positions of a sequence, pixels of an image (None)."""
        mean = self._average(self.mean, axes)
        variance = self._average(self.variance + (self.mean - mean) ** 2, axes)
        count = None if self.count is None else np.asarray(self.count.sum(axis=axes))
        low, high = np.asarray(self.low.min(axis=axes)), np.asarray(self.high.max(axis=axes))
        return _Statistics(low, high, mean, variance, count, self.integer)

    def _average(self, values: Floats, axes: tuple[int, ...] | None) -> Floats:
        if self.count is None:
            return np.asarray(values.mean(axis=axes))
        return np.asarray((values * self.count).sum(axis=axes) / np.maximum(self.count.sum(axis=axes), 1.0))


@final
class _Survey:
    """Adds up the statistics of blocks of rows, combined as in Chan, Golub and LeVeque (1983)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.low, self.high = np.full(shape, np.inf), np.full(shape, -np.inf)
        self.mean, self.squares, self.seen = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        self.integer = True

    def add(self, part: Floats, valid: NDArray[np.bool_] | None) -> None:
        """Add a block (n, *shape); ``valid`` marks the values that count."""
        kept = part if valid is None else np.where(valid, part, 0.0)
        low, high = (part, part) if valid is None else (np.where(valid, part, np.inf), np.where(valid, part, -np.inf))
        self.low, self.high = np.minimum(self.low, low.min(axis=0)), np.maximum(self.high, high.max(axis=0))
        self.integer = self.integer and bool((kept == np.rint(kept)).all())
        new = np.full(self.seen.shape, float(len(part))) if valid is None else valid.sum(axis=0, dtype=np.float64)
        total = self.seen + new
        some = np.maximum(total, 1.0)  # no division by 0 where no value is valid yet
        mean = kept.mean(axis=0) if valid is None else kept.sum(axis=0) / np.maximum(new, 1.0)
        delta = mean - self.mean
        squared = (kept - mean) ** 2 if valid is None else np.where(valid, kept - mean, 0.0) ** 2
        self.squares += squared.sum(axis=0) + delta**2 * (self.seen * new / some)
        self.mean += delta * (new / some)
        self.seen = total


def _statistics(rows: RowSource, mask: RowSource | None, dropped: int | None, what: str) -> _Statistics:
    """Compute the statistics in one pass over blocks; refuse values that are not finite or too large."""
    survey, bad = _Survey(tuple(rows.shape[1:])), _NonFinite()
    chunks = row_chunks(rows, _MAX_CHUNK_VALUES)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in chunks:
            part = np.asarray(rows[start : start + chunks.step])
            valid = None if mask is None else valid_entries(np.asarray(mask[start : start + chunks.step]), part.shape)
            bad.look(part, start, valid, dropped)
            survey.add(np.asarray(part, dtype=np.float64), valid)
    bad.refuse(what, masked=mask is not None)
    if not np.isfinite(survey.squares).all():
        largest = max(abs(float(survey.low.min())), abs(float(survey.high.max())))
        raise UserError(
            f"{what} holds values up to {largest:.3g}, too large to scale: their squares overflow float64. "
            "Divide them first."
        )
    count = None if mask is None else survey.seen
    variance = survey.squares / np.maximum(survey.seen, 1.0)
    return _Statistics(survey.low, survey.high, survey.mean, variance, count, survey.integer)


def valid_entries(mask: NDArray[Any], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A mask ``(n,)``, ``(n, T)``, ... as flags of the shape ``(n, *row)`` that its first axes agree with.

    >>> valid_entries(np.array([[1, 0]]), (1, 2, 3)).tolist()
    [[[True, True, True], [False, False, False]]]
    """
    flags = (mask != 0).reshape(*mask.shape, *(1,) * (len(shape) - mask.ndim))
    return np.broadcast_to(flags, shape)


def _scale_of(variance: Floats, span: Floats) -> Floats:
    """The std of each feature; the span where the std underflows to 0; 1 for a constant feature.

    A constant feature is recognised by its span: rounding can leave its computed std above 0.
    """
    std = np.sqrt(variance)
    return np.where(span > 0, np.where(std > 0, std, span), 1.0)


def _shared_or_each(values: Floats) -> float | tuple[float, ...]:
    """One number if all values are equal, else a flat tuple."""
    flat = values.ravel()
    return float(flat[0]) if (flat == flat[0]).all() else tuple(flat.tolist())


def _standardise(stats: _Statistics, std: float, shared: bool) -> dict[str, Any]:
    """Mean 0 and the given std per feature; one scale for all features if shared."""
    if shared:
        return {"shift": _shared_or_each(stats.mean), "scale": math.sqrt(float(stats._average(stats.variance, None)))}
    scale = _scale_of(stats.variance, stats.span)
    return {"shift": _shared_or_each(stats.mean), "scale": _shared_or_each(scale / std)}


def _range(stats: _Statistics, shared: bool) -> dict[str, Any]:
    """Map low..high to -1..1 per feature, or with one range for all if shared; clip where one range serves all."""
    seen = stats.high >= stats.low
    low, high = np.where(seen, stats.low, 0.0), np.where(seen, stats.high, 0.0)
    if shared:
        low, high = np.asarray(stats.low.min()), np.asarray(stats.high.max())
    half = np.where(high > low, high / 2 - low / 2, 1.0)
    clip = (float(low.min()), float(high.max()))
    one = len(np.unique(low)) == len(np.unique(high)) == 1 and clip[0] < clip[1]
    return {"shift": _shared_or_each(low / 2 + high / 2), "scale": _shared_or_each(half), "clip": clip if one else None}


def choose_scaling(
    rows: RowSource, kind: Kind, layout: Layout, scale: str | None, what: str, mask: RowSource | None = None
) -> tuple[Scaling, float | None]:
    """Choose the scaling of rows by the rules of the module.

    Args:
        rows: ``(N, *shape)``, finite where they are valid.
        kind: what a row is.
        layout: how the file arranges a row.
        scale: one of ``SCALES``, or None for the automatic rule.
        what: how errors name the data.
        mask: 1 for valid entries and 0 for padding, whose first axes are those of the rows; None: all are valid.

    Returns:
        The scaling, and the quantum in network units; None in place of the quantum for continuous data.

    Raises:
        UserError: ``scale`` is unknown, or valid values are too large, NaN or infinite.
    """
    if scale is not None and scale not in SCALES:
        raise unknown("data key 'scale'", scale, SCALES)
    shape = tuple(rows.shape[1:])
    pixels = rows.dtype == np.uint8 and (kind == "raw" or (kind == "image" and shape[0] <= 4))
    if pixels and scale in (None, "range"):
        return Scaling(127.5, 127.5, (0.0, 255.0), shape, layout), 2 / 255
    stats = _statistics(rows, mask, 1 if layout == "HW" else None, what)
    one_scale = kind in ("image", "raw")
    if kind != "vector":
        stats = stats.pooled(None if one_scale else tuple(range(len(shape) - 1)))
    if scale == "none":
        fields: dict[str, Any] = {}
    elif scale == "range" or (scale is None and one_scale and stats.discrete):
        fields = _range(stats, shared=one_scale or stats.one_unit)
    else:
        fields = _standardise(stats, _STD.get(kind, 1.0), shared=scale is None and not one_scale and stats.one_unit)
    scaling = Scaling(**fields, shape=shape, layout=layout)
    discrete = stats.discrete and isinstance(scaling.scale, float)
    return scaling, 1 / scaling.scale if discrete and isinstance(scaling.scale, float) else None
