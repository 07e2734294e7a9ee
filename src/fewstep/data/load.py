"""Loads the data that the user names into a :class:`~fewstep.data.dataset.DataSet`.

``data`` is a built-in name, the path of a file or a folder, or a mapping with the keys:

- ``path``: ``.npy``, ``.npz``, idx (plain or ``.gz``), or a folder of images;
- ``labels``: whole numbers, one per row, or the path of a file that holds them;
- ``scale``: ``standardise``, ``range`` or ``none`` (see :mod:`fewstep.data.rules`);
- ``name``: without ``path``, the built-in name; with ``path``, the name that the data gets;
- ``rows``: number of rows, for the built-in sets that are drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fewstep.data.arrays import arrange_rows, read_npy, read_npz
from fewstep.data.builtin import DATA
from fewstep.data.dataset import DataSet
from fewstep.data.idx import is_idx, read_idx
from fewstep.data.image_folder import IMAGE_SUFFIXES, read_folder
from fewstep.data.labels import check_labels
from fewstep.data.rules import choose_scaling, refuse_non_finite
from fewstep.data.scaling import Layout, Scaling
from fewstep.errors import UserError, unknown, with_present_names

__all__ = ["from_array", "load_data"]

_KEYS = ("path", "labels", "scale", "name", "rows")
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
    array: ArrayLike, labels: ArrayLike | None = None, *, scale: str | None = None, name: str = "array"
) -> DataSet:
    """Make a data set of an array ``(N, D)``, ``(N, H, W)`` or ``(N, C, H, W)``.

    Args:
        array: the rows, real numbers.
        labels: whole numbers ``(N,)``, or None.
        scale: ``standardise``, ``range``, ``none``, or None for the automatic rule.
        name: the name that the data gets.

    Raises:
        UserError: the array or the labels cannot be used.

    >>> from_array(np.arange(12.0).reshape(6, 2)).scaling.shift
    (5.0, 6.0)
    """
    what = f"the data {name!r}"
    rows, layout = arrange_rows(np.asarray(array), what)
    return _assemble(name, rows, layout, labels, None, scale, what, f"the labels of {name!r}")


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
    name, what = str(fields.get("name", path.name)), repr(str(path))
    labels: ArrayLike | None = None
    label_names: tuple[str, ...] | None = None
    labels_what = f"{what} (its labels)"
    if path.is_dir():
        images = read_folder(path)
        rows, layout, labels, label_names = images.rows, images.layout, images.labels, images.label_names
    else:
        array, labels = _read_file(path)
        if array.ndim == 1 and array.dtype.kind in "iu" and "labels" not in fields:
            raise UserError(
                f"{what} has shape {array.shape}: one whole number per row. If these are labels, give the "
                "rows as 'path' and this file as 'labels'; if they are the data, use x.reshape(-1, 1)."
            )
        rows, layout = arrange_rows(array, what)
    if "labels" in fields:
        label_names = None
        labels, labels_what = _read_labels(fields["labels"])
    return _assemble(name, rows, layout, labels, label_names, fields.get("scale"), what, labels_what)


def _assemble(
    name: str,
    rows: NDArray[Any],
    layout: Layout,
    labels: ArrayLike | None,
    label_names: tuple[str, ...] | None,
    scale: str | None,
    what: str,
    labels_what: str,
) -> DataSet:
    """Check rows and labels, choose the scaling, and build the data set."""
    refuse_non_finite(rows if layout != "HW" else rows[:, 0], what)
    scaling, quantum = choose_scaling(rows, layout, scale, what)
    if labels is None:
        return DataSet(name, rows, scaling, quantum=quantum)
    numbers, values = check_labels(labels, len(rows), labels_what, what)
    return DataSet(name, rows, scaling, numbers, int(numbers.max()) + 1, label_names or values, quantum)


def _read_file(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read the rows of a file, and its labels if it has any; suffix, then content decide the format."""
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return read_npy(path), None
    if suffix == ".npz":
        return read_npz(path)
    try:
        with open(path, "rb") as file:
            head = file.read(6)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    if suffix == ".gz" or head[:2] == b"\x1f\x8b" or is_idx(head):
        return read_idx(path), None
    if head == b"\x93NUMPY":
        return read_npy(path), None
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
    array, inside = _read_file(path)
    return (array if inside is None else inside), repr(str(path))
