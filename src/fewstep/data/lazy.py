"""Rows that are read only where they are asked for.

A *row source* has ``shape``, ``dtype``, ``len()`` and ``source[index]``, which gives an ``ndarray`` of the rows of an
array of indices or of a slice. Arrays and memory-mapped files are row sources; so are zarr and HDF5 arrays.
:class:`LazyRows` makes any of them one that behaves as ``DataSet.rows`` must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["LazyRows", "RowSource", "row_chunks"]

_MAX_CHUNK_VALUES = 1 << 22  # values processed at a time; chosen, not tuned
Array = NDArray[Any]


@runtime_checkable
class RowSource(Protocol):
    """Rows ``(N, ...)`` that can be read by index."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Number of rows, then the shape of one."""
        ...

    @property
    def dtype(self) -> Any:
        """Type of the values."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


def row_chunks(rows: RowSource, values: int = _MAX_CHUNK_VALUES) -> range:
    """First rows of chunks of at most ``values`` values (one row at least); the step is the number of rows of a chunk.

    >>> row_chunks(np.zeros((5, 2)), 4)
    range(0, 5, 2)
    """
    return range(0, len(rows), max(1, values // max(1, math.prod(rows.shape[1:]))))


@final
class LazyRows:
    """Rows of a source, each read when it is asked for, in another arrangement if wanted.

    The source is asked for slices, and for ascending indices without repetition: files are then read in order, and
    HDF5 allows nothing else.

    Args:
        source: the rows ``(N, ...)``.
        arrange: makes the block ``(n, *shape)`` of a block of the source's rows; None: as they are.
        shape: of one arranged row; None: as the source's.
        dtype: of the arranged rows; None: the source's, in the machine's byte order.

    >>> LazyRows(np.arange(6).reshape(3, 2))[[2, 0, 2]].tolist()
    [[4, 5], [0, 1], [4, 5]]
    """

    def __init__(
        self,
        source: RowSource,
        arrange: Callable[[Array], Array] | None = None,
        shape: tuple[int, ...] | None = None,
        dtype: Any = None,
    ) -> None:
        self._source, self._arrange = source, arrange
        self.shape = (len(source), *(source.shape[1:] if shape is None else shape))
        self.dtype = np.dtype(source.dtype if dtype is None else dtype).newbyteorder("=")

    @property
    def ndim(self) -> int:
        """Number of axes, that of the rows included."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        """The rows of a slice or of an array of indices or of flags ``(n, *shape)``; one row ``shape`` of a number."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1 and start < stop:
                return self._read(slice(start, stop))
            index = np.arange(start, stop, step)
        wanted = np.asarray(index)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        wanted = wanted.astype(np.intp)
        if wanted.size and (wanted.min() < -len(self) or wanted.max() >= len(self)):
            raise IndexError(f"row {wanted.min()} or {wanted.max()} is outside the {len(self)} rows")
        flat = np.where(wanted < 0, wanted + len(self), wanted).ravel()
        if not flat.size:
            return np.empty((*wanted.shape, *self.shape[1:]), self.dtype)
        once, inverse = np.unique(flat, return_inverse=True)
        return self._read(once)[inverse].reshape(*wanted.shape, *self.shape[1:])

    def _read(self, index: slice | Array) -> Array:
        block = np.asarray(self._source[index])
        arranged = block if self._arrange is None else self._arrange(block)
        return arranged.astype(self.dtype, copy=False)
