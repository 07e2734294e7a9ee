"""The units of the network and the units of the data.

The user's file holds values in its own units, and the network needs values of order one. An affine map converts
between them,

    network = (data - shift) / scale,        data = network * scale + shift,

with one number for all features, one per feature, or one per entry of the last axis: the D features of a sequence
``(T, D)`` have one shift and one scale at all times. The conversion to data can clip values to the range that the
data's units allow (pixels: 0 to 255).

The same object converts between the two *layouts* of a row. The network's row has the shape ``shape``:
``(D,)`` for vectors, ``(C, H, W)`` for images, ``(T, D)`` for sequences, any for ``raw`` rows. The
file's own row has ``data_shape``:

==========  ====================  =========================================
layout      row in the file       used for
==========  ====================  =========================================
``same``    ``shape`` itself      vectors, sequences, raw rows, ``(N, C, H, W)`` arrays
``HW``      ``(H, W)``, C = 1     idx files, ``(N, H, W)`` arrays, grey image folders
``HWC``     ``(H, W, C)``         colour image folders
==========  ====================  =========================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.errors import UserError, unknown

__all__ = ["Kind", "Layout", "Scaling"]

Layout = Literal["same", "HW", "HWC"]
Kind = Literal["vector", "image", "sequence", "raw"]  # what a row is
_MAX_CHUNK_VALUES = 1 << 22  # values converted through float64 at a time; chosen, not tuned


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """Return one finite number or a flat tuple of them, as floats; scales must be positive."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    many = isinstance(value, Sequence) and not isinstance(value, str)
    try:
        numbers = tuple(float(item) for item in (value if many else [value]))
    except (TypeError, ValueError) as error:
        raise UserError(f"scaling: {name} must be a number or a flat list of numbers, got {value!r}.") from error
    if not numbers or not all(map(math.isfinite, numbers)):
        raise UserError(f"scaling: {name} must be finite, got {value!r}.")
    if name == "scale" and min(numbers) <= 0:
        raise UserError(f"scaling: scale must be greater than 0, got {value!r}.")
    return numbers if many else numbers[0]


def _range(clip: Any) -> tuple[float, float]:
    """Return the two ends of a clipping range."""
    numbers = _numbers("clip", clip)
    if not isinstance(numbers, tuple) or len(numbers) != 2 or numbers[0] >= numbers[1]:
        raise UserError(f"scaling: clip must be [lowest, highest] in the data's units, got {clip!r}.")
    return numbers[0], numbers[1]


def _shape(shape: Any) -> tuple[int, ...]:
    """Return the shape of a row as a tuple."""
    sizes = tuple(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else ()
    whole = all(isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size > 0 for size in sizes)
    if not sizes or not whole:
        raise UserError(f"scaling: shape must be a list of positive whole numbers, got {shape!r}.")
    return tuple(int(size) for size in sizes)


@final
@dataclass(frozen=True)
class Scaling:
    """``network = (data - shift) / scale``, and back with ``data = clip(network * scale + shift)``.

    Args:
        shift: one number, or a flat list with one per entry of ``shape`` or of its last axis, in the data's units.
        scale: likewise, greater than 0.
        clip: ``(lowest, highest)`` in the data's units, applied by :meth:`to_data` only; None: no clipping.
        shape: the network's row shape; None: any shape, and rows keep the shape they have.
        layout: how the file arranges a row, see the table of the module.

    Raises:
        UserError: a value is not finite, a scale is not positive, the shape is not one, or a length does not fit it.

    >>> Scaling(shift=127.5, scale=127.5, clip=(0, 255)).to_network(torch.tensor([[0.0, 255.0]]))
    tensor([[-1.,  1.]])
    """

    shift: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0
    clip: tuple[float, float] | None = None
    shape: tuple[int, ...] | None = None
    layout: Layout = "same"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shift", _numbers("shift", self.shift))
        object.__setattr__(self, "scale", _numbers("scale", self.scale))
        if self.clip is not None:
            object.__setattr__(self, "clip", _range(self.clip))
        if self.shape is not None:
            object.__setattr__(self, "shape", _shape(self.shape))
        if self.layout not in get_args(Layout):
            raise unknown("layout of rows", self.layout, get_args(Layout))
        self._check_shape()

    def _check_shape(self) -> None:
        """Refuse a shape that the layout, the shift or the scale does not fit."""
        if self.layout != "same" and (self.shape is None or len(self.shape) != 3):
            raise UserError(f"scaling: layout {self.layout} needs a shape (C, H, W), got {self.shape}.")
        if self.layout == "HW" and self.shape is not None and self.shape[0] != 1:
            raise UserError(f"scaling: layout HW has one channel, and the shape {self.shape} has {self.shape[0]}.")
        for name, value in (("shift", self.shift), ("scale", self.scale)):
            if isinstance(value, tuple) and (
                self.shape is None or len(value) not in (math.prod(self.shape), self.shape[-1])
            ):
                raise UserError(f"scaling: {name} has {len(value)} numbers, and the rows have shape {self.shape}.")

    @property
    def data_shape(self) -> tuple[int, ...] | None:
        """The shape of a row in the file; None when ``shape`` is None."""
        if self.shape is None or self.layout == "same":
            return self.shape
        channels, height, width = self.shape
        return (height, width) if self.layout == "HW" else (height, width, channels)

    def arrange(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Rows ``(N, *data_shape)`` as a view ``(N, *shape)``, in their own units and dtype.

        Rows that already have the network's shape are returned unchanged. Colour images whose height and width
        equal the number of channels have the same shape in both layouts; they are read in the file's layout.

        Raises:
            UserError: the rows have another shape.
        """
        if self.shape is None or (self.layout == "same" and rows.shape[1:] == self.shape):
            return rows
        if rows.shape[1:] == self.data_shape:
            return rows[:, None] if self.layout == "HW" else np.moveaxis(rows, -1, 1)
        if rows.shape[1:] == self.shape:
            return rows
        raise UserError(
            f"these rows have shape {rows.shape[1:]}, and the data has rows of shape {self.data_shape}"
            + ("." if self.layout == "same" else f" (inside the network {self.shape}).")
        )

    def normalise(self, rows: NDArray[Any]) -> Tensor:
        """``(rows - shift) / scale`` of rows ``(N, *shape)``, computed in float64, returned in float32."""
        out = np.empty(rows.shape, np.float32)
        shift, scale = self._array(self.shift), self._array(self.scale)
        step = max(1, _MAX_CHUNK_VALUES // max(1, math.prod(rows.shape[1:])))
        for start in range(0, len(rows), step):
            out[start : start + step] = (rows[start : start + step].astype(np.float64) - shift) / scale
        return torch.from_numpy(out)

    def to_network(self, rows: NDArray[Any] | Tensor) -> Tensor:
        """Convert rows ``(N, *data_shape)`` or ``(N, *shape)`` of any real dtype to float32 ``(N, *shape)``.

        Raises:
            UserError: the rows have another shape.
        """
        if isinstance(rows, Tensor):
            rows = rows.detach().cpu()
            rows = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()  # numpy has no bfloat16
        array = np.asarray(rows)
        return self.normalise(self.arrange(array))

    def to_data(self, x: Tensor) -> Tensor:
        """Convert network rows ``(N, *shape)`` to data rows ``(N, *data_shape)``, float32 on the CPU.

        Raises:
            UserError: the rows have another shape.
        """
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise UserError(
                f"the rows have shape {tuple(x.shape[1:])}, and the data has rows of shape {self.shape} in the network."
            )
        x = x.detach().to("cpu")
        out = torch.empty(x.shape, dtype=torch.float32)
        shift, scale = (torch.as_tensor(self._array(value)) for value in (self.shift, self.scale))
        step = max(1, _MAX_CHUNK_VALUES // max(1, math.prod(x.shape[1:])))
        for start in range(0, len(x), step):
            values = x[start : start + step].to(torch.float64) * scale + shift
            out[start : start + step] = values if self.clip is None else values.clamp(*self.clip)
        if self.layout == "HW":
            return out[:, 0]
        return out.movedim(1, -1).contiguous() if self.layout == "HWC" else out

    def _array(self, value: float | tuple[float, ...]) -> NDArray[np.float64]:
        """A shift or scale as a float64 array that broadcasts over rows."""
        array = np.asarray(value, np.float64)
        if isinstance(value, float) or self.shape is None or len(value) != math.prod(self.shape):
            return array  # one number, or one per entry of the last axis
        return array.reshape(self.shape)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; :meth:`from_dict` restores them exactly."""

        def plain(value: Any) -> Any:
            return list(value) if isinstance(value, tuple) else value

        names = ("shift", "scale", "clip", "shape", "layout")
        return {name: plain(getattr(self, name)) for name in names}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Scaling:
        """Build a scaling from the mapping of :meth:`as_dict`; missing keys have their defaults.

        Raises:
            UserError: a key is unknown or a value is wrong.
        """
        known = ("shift", "scale", "clip", "shape", "layout")
        for key in fields:
            if key not in known:
                raise unknown("scaling key", key, known)
        return Scaling(**fields)
