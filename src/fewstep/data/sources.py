"""Data of any kind as a :class:`~fewstep.data.dataset.DataSet`: what the Python functions take as ``data=``.

==========================================  ============================================================
``data=``                                   how it is read
==========================================  ============================================================
a ``DataSet``                               unchanged
a built-in name, a path, a mapping          :func:`fewstep.data.load.load_data`
an array, a tensor, a memory-mapped file,   rows as they are; other sources are read where rows are asked
another row source (zarr, HDF5)             for (:mod:`fewstep.data.lazy`)
a mapping of arrays, a tuple of arrays      columns by name, by position
a map-style ``torch`` data set              items when they are asked for: a tensor, a tuple or a dictionary
a Hugging Face ``datasets.Dataset``         columns by name, from its memory-mapped file
==========================================  ============================================================

Which column is what is decided by :mod:`fewstep.data.columns`. Rows that are not in memory are read again for every
use: once for the scaling (unless they are 8-bit pixels), once for the fingerprint, once for the labels of a map-style
data set, and then batch by batch. The last block read is kept, so that the rows and the conditions of one batch cost
one reading. Loaders and generators give rows in order only: they are wrapped by :func:`fewstep.data.stream.stream`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, final, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fewstep.data.assemble import Parts, assemble
from fewstep.data.axes import arrange_decoded
from fewstep.data.builtin import DATA
from fewstep.data.columns import Columns, Key, Wanted, choose_columns, columns_of
from fewstep.data.condition_arrays import as_rows, numpy_of
from fewstep.data.dataset import DataSet
from fewstep.data.lazy import LazyRows, RowSource, row_chunks
from fewstep.data.load import from_array, load_data
from fewstep.data.stream import Stream
from fewstep.errors import UserError

__all__ = ["BlockReader", "ColumnRows", "as_data"]

_PROBED_ROWS = 2  # rows read to learn names, shapes and types
KEPT_ROWS = 512  # a block of at most so many items is kept for its other columns; chosen, not tuned
LABEL_BLOCK = 1024  # items read at a time for their labels; chosen, not tuned


@runtime_checkable
class HuggingFace(Protocol):
    """What is used of ``datasets.Dataset``: https://huggingface.co/docs/datasets/package_reference/main_classes."""

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        ...

    def with_format(self, type: str | None = None, columns: list[str] | None = None) -> Any:
        """A view whose items are dictionaries of NumPy arrays."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: Any, /) -> Any: ...


def as_data(
    source: Any,
    *,
    x: Key | None = None,
    label: Key | None = None,
    conditions: Any = None,
    mask: str | None = None,
    layout: str | None = None,
    scale: str | None = None,
    name: str | None = None,
) -> DataSet:
    """Make a data set of whatever the user has.

    Args:
        source: see the table of the module.
        x: which column holds the rows; None: found by its name or position.
        label: which column holds the labels; None: likewise, if there is one.
        conditions: for columns, their names, or a mapping from the network's names to columns; for arrays, a mapping
            from names to arrays; for paths, as in a recipe.
        mask: which condition marks valid entries with 1 and padding with 0.
        layout: ``image``, ``sequence`` or ``raw``, see :mod:`fewstep.data.axes`.
        scale: ``standardise``, ``range``, ``none``, or None for the automatic rule.
        name: the name that the data gets.

    Raises:
        UserError: the source is of no known kind, gives rows in order only, or cannot be used.

    >>> data = as_data({"x": np.zeros((6, 2)), "obs": np.ones((6, 3))}, conditions=["obs"])
    >>> data.shape, data.condition_names
    ((2,), ('obs',))
    """
    if isinstance(source, DataSet):
        said = {"x": x, "label": label, "conditions": conditions, "mask": mask, "layout": layout, "scale": scale}
        _refuse_said(said, "a DataSet, which has its own")
        return source
    if isinstance(source, Stream):
        source.refuse("uses of the data as a data set")
    _refuse_ordered(source)
    if isinstance(source, (str, os.PathLike)) or (isinstance(source, Mapping) and not _holds_arrays(source)):
        _refuse_said({"x": x, "label": label}, "a name or a path: its arrays are found by their names")
        keys = {"conditions": conditions, "mask": mask, "layout": layout, "scale": scale, "name": name}
        return load_data(_merged(source, keys))
    if isinstance(source, (Mapping, tuple, Dataset, HuggingFace)):
        return _from_columns(source, Wanted(x, label, conditions), mask, layout, scale, name)
    if isinstance(source, (np.ndarray, Tensor, RowSource, Sequence)):
        _refuse_said({"x": x, "label": label}, "one array, which has no columns")
        given = _condition_arrays(conditions)
        called = "array" if name is None else name
        return from_array(source, conditions=given, mask=mask, layout=layout, scale=scale, name=called)
    raise UserError(
        f"data is a {type(source).__name__}, which cannot be read. Give a name, a path, an array or tensor, a mapping "
        "of arrays, a torch Dataset, a Hugging Face dataset, or fs.stream(loader)."
    )


def _refuse_said(said: Mapping[str, Any], kind: str) -> None:
    """Refuse arguments that have no meaning for this kind of source."""
    for key, value in said.items():
        if value is not None:
            raise UserError(f"{key}={value!r} was given, and the data is {kind}. Leave {key} out.")


def _refuse_ordered(source: Any) -> None:
    """Refuse sources that give rows in order only."""
    ordered = isinstance(source, (DataLoader, IterableDataset, Iterator))
    if ordered or (callable(source) and not isinstance(source, (Dataset, HuggingFace, RowSource))):
        raise UserError(
            f"data is a {type(source).__name__}, which gives rows in its own order only. Wrap it: "
            "fs.stream(loader, x=…, conditions=…)."
        )


def _holds_arrays(source: Mapping[Any, Any]) -> bool:
    """Whether a mapping holds the data itself, not where to find them."""
    kinds = (str, os.PathLike, int, float, type(None))
    return bool(source) and "path" not in source and not any(isinstance(value, kinds) for value in source.values())


def _merged(source: Any, keys: Mapping[str, Any]) -> Any:
    """A name, path or mapping with the given keys added."""
    said = {key: value for key, value in keys.items() if value is not None}
    if isinstance(source, Mapping):
        twice = [key for key in said if source.get(key) is not None]
        if twice:
            raise UserError(f"data key {twice[0]!r} is given twice: in the mapping and as an argument. Remove one.")
        return {**source, **said}
    if isinstance(source, str) and source in DATA:
        if "name" in said:
            raise UserError(f"name={said['name']!r} was given, and {source!r} is built-in data, whose name is fixed.")
        return {"name": source, **said}
    return {"path": source, **said}


def _condition_arrays(conditions: Any) -> Mapping[str, Any] | None:
    if conditions is None or isinstance(conditions, Mapping):
        return conditions
    if not conditions:
        return None
    raise UserError(
        f"conditions={conditions!r} names columns, and the data is one array. Give the values: "
        "conditions={'obs': array}, or the data as a mapping of arrays."
    )


@final
class BlockReader:
    """Reads the items of a map-style data set, column by column, and keeps the last block.

    Args:
        source: the data set.
        what: how errors name it.
    """

    def __init__(self, source: Any, what: str) -> None:
        self.source, self.what = source, what
        self._last: tuple[bytes, dict[Key, list[Any]]] | None = None

    def __len__(self) -> int:
        return len(self.source)

    def column(self, key: Key, index: Any) -> NDArray[Any]:
        """The values of a column, (n, ...), at an ascending array of indices or a slice.

        Raises:
            UserError: items differ in their parts or shapes.
        """
        wanted = np.arange(*index.indices(len(self))) if isinstance(index, slice) else np.asarray(index)
        if len(wanted) <= KEPT_ROWS:
            return self._stack(key, wanted, self._block(wanted))
        # of many rows only this column is kept: the others may be far larger
        pieces = (wanted[i : i + KEPT_ROWS] for i in range(0, len(wanted), KEPT_ROWS))
        return np.concatenate([self._stack(key, piece, self._block(piece)) for piece in pieces])

    def _stack(self, key: Key, wanted: NDArray[Any], block: dict[Key, list[Any]]) -> NDArray[Any]:
        found = [numpy_of(value) for value in block.get(key, ())]
        if len(found) < len(wanted):
            raise UserError(f"{self.what}: an item among rows {wanted[0]} to {wanted[-1]} has no part {key!r}.")
        shapes = sorted({value.shape for value in found}, key=str)
        if len(shapes) > 1:
            raise UserError(
                f"{self.what}: the parts {key!r} of its items have different shapes, {shapes[0]} and {shapes[-1]}. Pad "
                "or crop them to one, and mark the padding with a mask."
            )
        return np.stack(found)

    def _block(self, wanted: NDArray[Any]) -> dict[Key, list[Any]]:
        mark = wanted.astype(np.int64).tobytes()
        if self._last is None or self._last[0] != mark:
            items = [columns_of(self.source[int(row)], self.what) for row in wanted]
            keys = items[0].keys() if items else ()
            self._last = mark, {key: [item[key] for item in items if key in item] for key in keys}
        return self._last[1]


@final
class ColumnRows:
    """One column of a source as rows that are read when they are asked for.

    Args:
        read: gives the values of the rows of an index.
        num: number of rows.
    """

    def __init__(self, read: Any, num: int) -> None:
        self._read, self._num = read, num
        first = self[0:1]
        self.dtype, self.shape = first.dtype, (num, *first.shape[1:])

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: Any) -> NDArray[Any]:
        """The values of the rows of a slice or an ascending array of indices."""
        found: NDArray[Any] = self._read(index)
        return found


def _from_columns(
    source: Any, wanted: Wanted, mask: str | None, layout: str | None, scale: str | None, name: str | None
) -> DataSet:
    """A data set of a source with columns."""
    called = type(source).__name__ if name is None else name
    what = f"the data {called!r}"
    columns, rows = _open(source, wanted, what)
    labels = None if columns.label is None else _whole(rows[columns.label])
    arranged = arrange_decoded(rows[columns.x], what, layout)
    conditions = {name: rows[key] for name, key in columns.conditions.items()}
    return assemble(Parts(called, arranged, what, labels, None, f"the labels of {called!r}", conditions, mask, scale))


def _open(source: Any, wanted: Wanted, what: str) -> tuple[Columns, dict[Key, RowSource]]:
    """The columns of a source, and the rows of each that is used."""
    if isinstance(source, (TensorDataset, tuple)):
        source = dict(enumerate(source.tensors if isinstance(source, TensorDataset) else source))
    if isinstance(source, Mapping):
        held = {key: as_rows(value) for key, value in source.items()}
        columns = choose_columns(wanted, held, what)
        return columns, {key: held[key] for key in columns.keys}
    num = _length(source, what)
    if isinstance(source, HuggingFace):
        probe = source.with_format("numpy")[:_PROBED_ROWS]
        columns = choose_columns(wanted, probe, what)
        view = source.with_format("numpy", columns=[str(key) for key in columns.keys])
        return columns, {key: LazyRows(ColumnRows(_column_of(view, key, what), num)) for key in columns.keys}
    item = columns_of(source[0], what)
    columns = choose_columns(wanted, item, what)
    reader = BlockReader(source, what)
    return columns, {
        key: LazyRows(ColumnRows(lambda index, key=key: reader.column(key, index), num)) for key in columns.keys
    }


def _length(source: Any, what: str) -> int:
    try:
        num = len(source)
    except (TypeError, NotImplementedError) as error:
        raise UserError(
            f"{what} has no length, and rows are read by number. Give it __len__, or use fs.stream for rows in order."
        ) from error
    if num < 2:
        raise UserError(f"{what} has {num} row(s), and at least 2 are needed.")
    return num


def _column_of(view: Any, key: Key, what: str) -> Any:
    """How a column of a Hugging Face data set is read."""

    def read(index: Any) -> NDArray[Any]:
        found = np.asarray(view[index if isinstance(index, slice) else np.asarray(index).tolist()][key])
        if found.dtype.hasobject:
            raise UserError(
                f"{what}: the rows of column {key!r} have different shapes. Pad or crop them to one, and mark the "
                "padding with a mask."
            )
        return found

    return read


def _whole(rows: RowSource) -> NDArray[Any]:
    """A whole column in memory."""
    chunks = row_chunks(rows, LABEL_BLOCK)
    return np.concatenate([np.asarray(rows[start : start + chunks.step]) for start in chunks])
