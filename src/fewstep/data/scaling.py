"""The units of the network and the units of the data.

A network sees values of the order of one, the user's file holds whatever it holds; an affine map goes
between the two,

    network = (data - shift) / scale,        data = network * scale + shift,

with one number for all features or one per feature. On the way back values can be clipped to the range
that the data's units allow (pixels: 0 to 255).

The same object also knows the two *layouts* of a row. The network's row has the shape ``shape``:
``(D,)`` for vectors, ``(C, H, W)`` for images. The file's own row has ``data_shape``:

==========  ====================  =========================================
layout      row in the file       where
==========  ====================  =========================================
``same``    ``shape`` itself      vectors, ``(N, C, H, W)`` arrays
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

__all__ = ["Layout", "Scaling"]

Layout = Literal["same", "HW", "HWC"]
_CHUNK = 1 << 22  # values converted through float64 at a time


def _numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """Check one number or a flat list of numbers."""
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
    numbers = _numbers("clip", clip)
    if not isinstance(numbers, tuple) or len(numbers) != 2 or numbers[0] >= numbers[1]:
        raise UserError(f"scaling: clip must be [lowest, highest] in the data's units, got {clip!r}.")
    return numbers[0], numbers[1]


@final
@dataclass(frozen=True)
class Scaling:
    """``network = (data - shift) / scale``, and back with ``data = clip(network * scale + shift)``.

    Args:
        shift: one number, or a flat list with one per feature of ``shape``, in the data's units.
        scale: likewise, greater than 0.
        clip: ``(lowest, highest)`` in the data's units, applied by :meth:`to_data` only; None: no clipping.
        shape: the network's row shape; None: any, rows are passed through in the shape they have.
        layout: how the file arranges a row, see the module's table.

    Raises:
        UserError: a value is not finite, a scale is not positive, or lengths and shapes contradict.
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
            object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if self.layout not in get_args(Layout):
            raise unknown("layout of rows", self.layout, get_args(Layout))
        self._check_shape()

    def _check_shape(self) -> None:
        if self.layout != "same" and (self.shape is None or len(self.shape) != 3):
            raise UserError(f"scaling: layout {self.layout} needs a shape (C, H, W), got {self.shape}.")
        if self.layout == "HW" and self.shape is not None and self.shape[0] != 1:
            raise UserError(f"scaling: layout HW has one channel, and the shape {self.shape} has more.")
        for name, value in (("shift", self.shift), ("scale", self.scale)):
            if isinstance(value, tuple) and (self.shape is None or len(value) != math.prod(self.shape)):
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

        Rows that have the network's shape already are returned as they are; where the two shapes are the
        same tuple but the layouts differ (colour images as wide and high as they have channels), they
        are taken for the file's layout.
        """
        if self.shape is None or (self.layout == "same" and rows.shape[1:] == self.shape):
            return rows
        if rows.shape[1:] == self.data_shape:
            return rows[:, None] if self.layout == "HW" else np.moveaxis(rows, -1, 1)
        if rows.shape[1:] == self.shape:
            return rows
        raise UserError(
            f"these rows have shape {rows.shape[1:]}, and this data has rows of shape {self.data_shape}"
            + ("." if self.layout == "same" else f" (inside the network {self.shape}).")
        )

    def normalise(self, rows: NDArray[Any]) -> Tensor:
        """``(rows - shift) / scale`` in float64, as float32; rows are ``(N, *shape)``."""
        out = np.empty(rows.shape, np.float32)
        shift, scale = self._array(self.shift), self._array(self.scale)
        step = max(1, _CHUNK // max(1, math.prod(rows.shape[1:])))
        for start in range(0, len(rows), step):
            out[start : start + step] = (rows[start : start + step].astype(np.float64) - shift) / scale
        return torch.from_numpy(out)

    def to_network(self, rows: NDArray[Any] | Tensor) -> Tensor:
        """Rows ``(N, *data_shape)`` or ``(N, *shape)`` of any real dtype -> float32 ``(N, *shape)``.

        Raises:
            UserError: the rows have another shape.
        """
        if isinstance(rows, Tensor):
            rows = rows.detach().cpu()
            rows = (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()  # numpy has no bfloat16
        array = np.asarray(rows)
        return self.normalise(self.arrange(array))

    def to_data(self, x: Tensor) -> Tensor:
        """Network rows ``(N, *shape)`` -> data rows ``(N, *data_shape)``, float32 and on the CPU.

        Raises:
            UserError: the rows have another shape.
        """
        if self.shape is not None and tuple(x.shape[1:]) != self.shape:
            raise UserError(f"rows of shape {tuple(x.shape[1:])} came, and this data has {self.shape}.")
        x = x.detach().to("cpu")
        out = torch.empty(x.shape, dtype=torch.float32)
        shift, scale = (torch.as_tensor(self._array(value)) for value in (self.shift, self.scale))
        step = max(1, _CHUNK // max(1, math.prod(x.shape[1:])))
        for start in range(0, len(x), step):
            values = x[start : start + step].to(torch.float64) * scale + shift
            out[start : start + step] = values if self.clip is None else values.clamp(*self.clip)
        if self.layout == "HW":
            return out[:, 0]
        return out.movedim(1, -1).contiguous() if self.layout == "HWC" else out

    def _array(self, value: float | tuple[float, ...]) -> NDArray[np.float64]:
        array = np.asarray(value, np.float64)
        return array if isinstance(value, float) or self.shape is None else array.reshape(self.shape)

    def as_dict(self) -> dict[str, Any]:
        """The fields as JSON values; :meth:`from_dict` takes them back without loss."""

        def plain(value: Any) -> Any:
            return list(value) if isinstance(value, tuple) else value

        names = ("shift", "scale", "clip", "shape", "layout")
        return {name: plain(getattr(self, name)) for name in names}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> Scaling:
        """Build a scaling from :meth:`as_dict`'s mapping; keys left out have their defaults.

        Raises:
            UserError: a key is unknown or a value is wrong.
        """
        known = ("shift", "scale", "clip", "shape", "layout")
        for key in fields:
            if key not in known:
                raise unknown("scaling key", key, known)
        return Scaling(**fields)
