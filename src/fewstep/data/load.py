"""Loads the data that the user names into a :class:`~fewstep.data.dataset.DataSet`.

``data`` is a built-in name, the path of a file or a folder, or a mapping with the keys:

- ``path``: ``.npy``, ``.npz``, idx (plain or ``.gz``), or a folder of images;
- ``labels``: whole numbers, one per row, or the path of a file that holds them;
- ``conditions``: what the network is told about each row beside its label. A list of names of further arrays of the
  ``.npz`` file (``[obs, mask]``), or a mapping from names to ``.npy`` files (``{obs: obs.npy}``, large ones are
  memory-mapped). Each has one row per row of the data, and its name is that of the network's argument. A ``.npz`` file
  with further arrays that are not listed is refused: nothing in it is dropped unsaid;
- ``mask``: which of the conditions marks the valid entries of a row with 1 and padding with 0: ``(N,)``, ``(N, T)`` or
  of the shape of the rows. The scaling is then that of the valid entries, and padding is 0 in the network whatever the
  file holds there, NaN included;
- ``layout``: what the axes mean: ``image`` for ``(N, H, W)`` and ``(N, C, H, W)``, ``sequence`` for ``(N, T, D)``,
  ``raw`` for any shape, kept as it is. Without it :mod:`fewstep.data.axes` decides, and refuses what it cannot tell;
- ``scale``: ``standardise``, ``range`` or ``none`` (see :mod:`fewstep.data.rules`);
- ``name``: without ``path``, the built-in name; with ``path``, the name that the data gets;
- ``rows``: number of rows, for the built-in sets that are drawn.

Arrays, tensors and data sets of other libraries come in through :func:`fewstep.data.sources.as_data`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fewstep.data.arrays import Archive, read_npy, read_npz
from fewstep.data.assemble import Parts, assemble
from fewstep.data.axes import Arranged, arrange_rows, check_layout
from fewstep.data.builtin import DATA
from fewstep.data.condition_arrays import as_rows, condition_names, read_conditions
from fewstep.data.dataset import DataSet
from fewstep.data.idx import is_idx, read_idx
from fewstep.data.image_folder import IMAGE_SUFFIXES, read_folder
from fewstep.data.lazy import RowSource
from fewstep.data.scaling import Scaling
from fewstep.errors import UserError, unknown, with_present_names

__all__ = ["from_array", "load_data"]

_KEYS = ("path", "labels", "conditions", "mask", "layout", "scale", "name", "rows")
_FORMER = {"samples": "rows"}  # former key: present key
_FORMATS = "a .npy or .npz array (N, ...), an idx file (plain or .gz) or a folder of images"


def load_data(spec: str | os.PathLike[str] | Mapping[str, Any] | NDArray[Any], *, seed: int = 0) -> DataSet:
    """Load a built-in set, a file, a folder of images or an array.

    Args:
        spec: a built-in name, a path, a mapping (see the module), or an array of rows. A built-in name takes
            precedence over a file of the same name in the current folder; ``./name`` means the file.
        seed: seed of the built-in sets that are drawn; other data do not depend on it.

    Returns:
        The data, with labels where the source has them and the scaling of :mod:`fewstep.data.rules`.

    Raises:
        UserError: the name, path or a key is unknown, or the content cannot be used.

    >>> data = load_data({"name": "moons", "rows": 100})
    >>> data.shape, data.classes, len(data)
    ((2,), 2, 100)
    """
    if isinstance(spec, np.ndarray):
        return from_array(spec)
    fields = with_present_names("data key", spec, _FORMER) if isinstance(spec, Mapping) else _fields(spec)
    for key in fields:
        if key not in _KEYS:
            raise unknown("data key", key, _KEYS)
    fields = {key: value for key, value in fields.items() if value is not None}
    if "path" not in fields:
        return _load_builtin(fields, seed)
    if "rows" in fields:
        raise UserError(
            "data key 'rows' is for built-in data that is drawn, and 'path' is given. Remove one of the two."
        )
    return _load_path(_as_path(fields["path"]), fields)


def from_array(
    array: ArrayLike | Tensor | RowSource,
    labels: ArrayLike | None = None,
    *,
    scale: str | None = None,
    name: str = "array",
    conditions: Mapping[str, Any] | None = None,
    mask: str | None = None,
    layout: str | None = None,
) -> DataSet:
    """Make a data set of an array of rows ``(N, ...)``.

    Args:
        array: the rows, real numbers: an array, a tensor, a memory-mapped file or another row source, which is read
            only where rows are asked for (:mod:`fewstep.data.lazy`).
        labels: whole numbers ``(N,)``, or None.
        scale: ``standardise``, ``range``, ``none``, or None for the automatic rule.
        name: the name that the data gets.
        conditions: further conditions by name: arrays ``(N, ...)`` of the same kinds, or paths of ``.npy`` files.
        mask: which condition marks valid entries with 1 and padding with 0.
        layout: ``image``, ``sequence`` or ``raw``, see :mod:`fewstep.data.axes`.

    Raises:
        UserError: the array, the labels or the conditions cannot be used, or the axes are ambiguous.

    >>> from_array(np.arange(12.0).reshape(6, 2)).scaling.shift
    (5.0, 6.0)
    """
    what = f"the data {name!r}"
    rows = arrange_rows(as_rows(array), what, layout)
    given = read_conditions(conditions, {}, what)
    return assemble(Parts(name, rows, what, labels, None, f"the labels of {name!r}", given, mask, scale))


def _fields(spec: Any) -> dict[str, Any]:
    """Turn a plain name or path into the mapping it is short for."""
    if not isinstance(spec, (str, os.PathLike)):
        raise UserError(f"data must be a built-in name, a path or a mapping with 'path' or 'name', got {spec!r}.")
    return {"name": spec} if isinstance(spec, str) and spec in DATA else {"path": spec}


def _as_path(path: Any) -> Path:
    """Expand ``~`` and refuse a path that does not exist."""
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"data key 'path' must be a path, got {path!r}.")
    found = Path(path)
    if str(found).startswith("~"):
        found = Path(os.path.expanduser(found))
    if os.path.exists(found):  # also False, not an error, for a name too long for the file system
        return found
    word = str(path)
    if len(found.parts) == 1 and not found.suffix:
        error = unknown("data", word, DATA)
        raise UserError(f"{error} Or give the path of {_FORMATS}: the current folder has no file {word!r}.")
    raise UserError(
        f"there is no file or folder {word!r}. Give a built-in name ({', '.join(sorted(DATA))}) "
        f"or the path of {_FORMATS}."
    )


def _rows(value: Any) -> int:
    """Check the value of the key 'rows'."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 2:
        raise UserError(f"data key 'rows' must be a whole number of at least 2, got {value!r}.")
    return int(value)


def _load_builtin(fields: Mapping[str, Any], seed: int) -> DataSet:
    """Draw or load a built-in set; discrete sets are scaled by their possible range."""
    if "name" not in fields:
        raise UserError(f"data needs a 'path', or a 'name' out of {', '.join(sorted(DATA))}.")
    name = fields["name"]
    if not isinstance(name, str) or name not in DATA:
        raise UserError(f"{unknown('data', name, DATA)} Or give 'path': {_FORMATS}.")
    if "labels" in fields:
        raise UserError(f"data key 'labels' goes with a 'path'; the built-in {name!r} brings its own.")
    for key in ("conditions", "mask", "layout"):
        if key in fields:
            raise UserError(f"data key {key!r} goes with a 'path'; the built-in {name!r} has none. Remove the key.")
    entry = DATA[name]
    if entry.rows is None and "rows" in fields:
        raise UserError(f"data key 'rows': {name!r} is a fixed set. Remove the key.")
    num = _rows(fields["rows"]) if "rows" in fields else entry.rows or 0
    array, labels = entry.make(num, np.random.Generator(np.random.PCG64(seed)))
    data = from_array(array, labels, scale=fields.get("scale"), name=name)
    if entry.value_range is None or fields.get("scale") not in (None, "range"):
        return data
    low, high = entry.value_range
    middle, half = (low + high) / 2, (high - low) / 2
    scaling = Scaling(middle, half, (low, high), data.shape, data.scaling.layout)
    return DataSet(name, data.rows, scaling, data.labels, data.classes, data.label_names, 1 / half)


def _load_path(path: Path, fields: Mapping[str, Any]) -> DataSet:
    """Load a file or an image folder; the key 'labels' replaces labels that the file holds."""
    name, what, layout = str(fields.get("name", path.name)), repr(str(path)), fields.get("layout")
    check_layout(layout)
    given = fields.get("conditions")
    label_names: tuple[str, ...] | None = None
    labels: ArrayLike | None
    inside: dict[str, NDArray[Any]] = {}
    if path.is_dir():
        rows, labels, label_names = _read_images(path, layout)
    else:
        found = _read_file(path, () if isinstance(given, Mapping) else condition_names(given))
        if found.rows.ndim == 1 and found.rows.dtype.kind in "iu" and "labels" not in fields:
            raise UserError(
                f"{what} has shape {found.rows.shape}: one whole number per row. If these are labels, give the "
                "rows as 'path' and this file as 'labels'; if they are the data, use x.reshape(-1, 1)."
            )
        rows, labels, inside = arrange_rows(found.rows, what, layout), found.labels, found.conditions
    labels_what = f"{what} (its labels)"
    if "labels" in fields:
        label_names = None
        labels, labels_what = _read_labels(fields["labels"])
    conditions = read_conditions(given, inside, what)
    mask, scale = fields.get("mask"), fields.get("scale")
    return assemble(Parts(name, rows, what, labels, label_names, labels_what, conditions, mask, scale))


def _read_images(folder: Path, layout: str | None) -> tuple[Arranged, NDArray[np.int64] | None, tuple[str, ...] | None]:
    """Read a folder of images: rows, labels and their names."""
    if layout not in (None, "image"):
        raise UserError(f"data key 'layout': {str(folder)!r} is a folder of images, not {layout!r}. Remove the key.")
    images = read_folder(folder)
    return Arranged(images.rows, images.layout, "image"), images.labels, images.label_names


def _read_file(path: Path, conditions: Sequence[str] | None = ()) -> Archive:
    """Read the arrays of a file; suffix, then content decide the format.

    Of a ``.npz`` file the named conditions are read too, and further arrays are refused; None: they are left alone.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return Archive(read_npy(path))
    if suffix == ".npz":
        return read_npz(path, conditions)
    try:
        with open(path, "rb") as file:
            head = file.read(6)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    if suffix == ".gz" or head[:2] == b"\x1f\x8b" or is_idx(head):
        return Archive(read_idx(path))
    if head == b"\x93NUMPY":
        return Archive(read_npy(path))
    if suffix in IMAGE_SUFFIXES:
        raise UserError(f"{str(path)!r} is one image. Give the folder that holds the images.")
    raise UserError(f"{str(path)!r} has a format that is not supported (it begins with {head!r}). Give {_FORMATS}.")


def _read_labels(source: Any) -> tuple[ArrayLike, str]:
    """Return the labels that the key 'labels' gives, and the name that errors use for them."""
    if not isinstance(source, (str, os.PathLike)):
        return source, "data key 'labels'"
    path = Path(os.path.expanduser(source))
    if not path.is_file():
        raise UserError(f"data key 'labels': there is no file {str(source)!r}.")
    found = _read_file(path, None)
    return (found.rows if found.labels is None else found.labels), repr(str(path))
