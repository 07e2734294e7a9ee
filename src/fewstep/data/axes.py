"""What the axes of an array of rows mean.

=============  ==========================  ==================================================================
``layout``     array                       row in the network
=============  ==========================  ==================================================================
``image``      ``(N, H, W)``               ``(1, H, W)``
``image``      ``(N, C, H, W)``            ``(C, H, W)``
``sequence``   ``(N, T, D)``               ``(T, D)``: T positions with D features each
``raw``        ``(N, ...)``                the shape as it is, e.g. ``(C, F, H, W)`` latents of video
=============  ==========================  ==================================================================

Without a layout, ``(N, D)`` are vectors and ``(N, C, H, W)`` are images. An array ``(N, A, B)`` is an image only where
it can hardly be anything else:

1. its values are whole numbers with a range of at most 255 (any dtype): pixels;
2. or ``A == B >= 8``: a square picture of real numbers.

Everything else with three axes is refused with a message that asks for ``layout: image`` or ``layout: sequence``:
trajectories ``(N, 64, 16)`` and point clouds ``(N, 128, 3)`` would otherwise be taken for pictures with 64 x 16 and
128 x 3 pixels, scaled by one number and given to a network of convolutions, and nothing would say so. A sequence with
``T == D >= 8`` or of small whole numbers needs ``layout: sequence``. Arrays with five axes or more need
``layout: raw``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fewstep.data.arrays import refuse_dtype
from fewstep.data.lazy import LazyRows, RowSource, row_chunks
from fewstep.data.rules import MAX_DISCRETE_RANGE
from fewstep.data.scaling import Kind, Layout
from fewstep.errors import UserError, unknown

__all__ = ["LAYOUTS", "Arranged", "arrange_decoded", "arrange_rows", "check_layout"]

LAYOUTS = ("raw", "image", "sequence")
MIN_SQUARE = 8  # the smallest side of a square array of real numbers that is taken for a picture; chosen, not tuned
_NUMBERS = {"image": (3, 4), "sequence": (3,)}
_AXES = {"image": "(N, H, W) or (N, C, H, W)", "sequence": "(N, T, D)", "raw": "(N, ...)"}


@final
@dataclass(frozen=True)
class Arranged:
    """Rows in the network's shape.

    Attributes:
        rows: ``(N, *shape)``.
        layout: how the file arranges a row.
        kind: what a row is, which decides its scaling.
    """

    rows: RowSource
    layout: Layout
    kind: Kind


def check_layout(layout: str | None) -> None:
    """Refuse a word that names no layout.

    Raises:
        UserError: it is neither None nor one of ``LAYOUTS``.
    """
    if layout is not None and layout not in LAYOUTS:
        raise unknown("data key 'layout'", layout, LAYOUTS)


def arrange_rows(array: RowSource, what: str, layout: str | None = None) -> Arranged:
    """Bring an array to rows of the network's shape.

    Args:
        array: the rows, real numbers; may be memory-mapped or lazy.
        what: how errors name the array.
        layout: what its axes mean, see the table of the module; None: by its rules.

    Raises:
        UserError: axes that the layout does not have, or that mean different things without one; fewer than 2 rows,
            empty rows, channels last, or a dtype that is not real.

    >>> found = arrange_rows(np.zeros((5, 8, 8)), "the data")
    >>> found.rows.shape, found.layout, found.kind
    ((5, 1, 8, 8), 'HW', 'image')
    """
    check_layout(layout)
    shape = tuple(array.shape)
    refuse_dtype(np.dtype(array.dtype), what)
    _refuse_empty(shape, what)
    if layout is None:
        layout = _guess(array, what)
    elif len(shape) not in _NUMBERS.get(layout, (len(shape),)):
        raise UserError(
            f"{what} has shape {shape}, and layout {layout!r} is for {_AXES[layout]}. "
            + (
                "Leave layout out: rows of one axis are vectors."
                if len(shape) == 2
                else "layout 'raw' keeps any shape."
            )
        )
    if layout == "image" and len(shape) == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        raise UserError(
            f"{what} has shape {shape}, which looks like (N, H, W, C), and (N, C, H, W) is expected. "
            "Use x.transpose(0, 3, 1, 2), or layout 'raw' if the rows are no pictures."
        )
    if layout == "image" and len(shape) == 3:
        return Arranged(_with_channel(array), "HW", "image")
    kind: Kind = "vector" if len(shape) == 2 else "image" if layout == "image" else "raw"
    return Arranged(_native(array), "same", "sequence" if layout == "sequence" else kind)


def _refuse_empty(shape: tuple[int, ...], what: str) -> None:
    """Refuse what has no rows or no values."""
    size = math.prod(shape)
    if len(shape) < 2:
        hint = f" {size} numbers are {size} rows of 1 feature: use x.reshape(-1, 1)."
        raise UserError(
            f"{what} has shape {shape}, and rows (N, features) or images (N, H, W) are needed."
            + (hint if shape else " Save an array of rows.")
        )
    if size == 0:
        raise UserError(f"{what} is empty: its shape is {shape}. Give at least 2 rows.")
    if shape[0] < 2:
        raise UserError(f"{what} has 1 row (shape {shape}), and at least 2 are needed.")


def _guess(array: RowSource, what: str) -> str:
    """The layout of an array that came without one."""
    shape = tuple(array.shape)
    if len(shape) > 4:
        raise UserError(
            f"{what} has shape {shape}, and what rows with {len(shape) - 1} axes mean is not known. Say "
            "'layout: raw' to keep the shape, or give vectors: x.reshape(len(x), -1)."
        )
    if len(shape) != 3:
        return "raw" if len(shape) == 2 else "image"
    if shape[1] == shape[2] >= MIN_SQUARE or _small_whole_numbers(array):
        return "image"
    raise UserError(
        f"{what} has shape {shape}: rows of {shape[1]} x {shape[2]} real numbers can be pictures or sequences, and the "
        f"two are scaled and trained differently. Say 'layout: sequence' for {shape[1]} positions with {shape[2]} "
        f"features each, 'layout: image' for pictures of {shape[1]} x {shape[2]} pixels, or 'layout: raw' for "
        "neither (in Python: fs.as_data(…, layout='raw'))."
    )


def _small_whole_numbers(array: RowSource) -> bool:
    """Whether all values are whole numbers with a range of at most 255; reading ends where they are not."""
    dtype = np.dtype(array.dtype)
    if dtype == np.uint8 or dtype == np.int8 or dtype.kind == "b":
        return True
    low, high = math.inf, -math.inf
    chunks = row_chunks(array)
    for start in chunks:
        part = np.asarray(array[start : start + chunks.step])
        if part.dtype.kind == "f" and not bool((part == np.rint(part)).all()):  # also where values are NaN
            return False
        low, high = min(low, float(part.min())), max(high, float(part.max()))
        if not high - low <= MAX_DISCRETE_RANGE:
            return False
    return True


def _native(array: RowSource) -> RowSource:
    """The array in the machine's byte order; a lazy one stays lazy."""
    if isinstance(array, np.ndarray) and not array.dtype.isnative:
        return array.astype(array.dtype.newbyteorder("="))
    return array if isinstance(array, (np.ndarray, LazyRows)) else LazyRows(array)


def _with_channel(array: RowSource) -> RowSource:
    """(N, H, W) as (N, 1, H, W)."""
    native = _native(array)
    if isinstance(native, np.ndarray):
        return native[:, None]
    return LazyRows(native, _insert_channel, (1, *native.shape[1:]))


def _insert_channel(block: NDArray[Any]) -> NDArray[Any]:
    return block[:, None]


def arrange_decoded(rows: RowSource, what: str, layout: str | None) -> Arranged:
    """Rows in the network's shape; decoded images, bytes (N, H, W, C), are brought to (N, C, H, W).

    Args:
        rows: the rows, see :func:`arrange_rows`.
        what: how errors name them.
        layout: what their axes mean, or None.

    Raises:
        UserError: as there.
    """
    shape = tuple(rows.shape)
    images = rows.dtype == np.uint8 and layout in (None, "image") and len(shape) == 4 and shape[0] > 1
    if images and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        return Arranged(LazyRows(rows, _channels_first, (shape[3], *shape[1:3])), "HWC", "image")
    return arrange_rows(rows, what, layout)


def _channels_first(block: NDArray[Any]) -> NDArray[Any]:
    return np.moveaxis(block, -1, 1)
