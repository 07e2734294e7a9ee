"""Reads arrays from ``.npy`` and ``.npz`` files and refuses what cannot be data.

Nothing is unpickled: an array of Python objects is refused. Large ``.npy`` files are memory-mapped. What the axes of an
array mean is decided in :mod:`fewstep.data.axes`.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UserError, unknown

__all__ = ["Archive", "read_npy", "read_npz", "refuse_dtype"]

MIN_MAPPED_BYTES = 1 << 26  # a .npy file of at least 64 MiB is memory-mapped; chosen, not tuned
_DATA_KEYS = ("x", "data", "images")
_LABEL_KEYS = ("y", "labels")
_REWRITE = "Write it again with numpy.save."


def _check_magic(path: Path, magic: bytes, kind: str) -> None:
    """Refuse a file that does not begin with the magic bytes of its format: ``np.load`` would try to unpickle it."""
    with open(path, "rb") as file:
        head = file.read(len(magic))
    if not head:
        raise UserError(f"{str(path)!r} is empty (0 bytes). {_REWRITE}")
    if head != magic:
        raise UserError(f"{str(path)!r} is not a {kind} file: it begins with {head!r}. {_REWRITE}")


def refuse_dtype(dtype: np.dtype[Any], what: str) -> None:
    """Refuse every dtype but real numbers and booleans.

    Args:
        dtype: the dtype of the array.
        what: how the error names the array.

    Raises:
        UserError: Python objects, complex numbers, text, times or records.
    """
    if dtype.hasobject:
        raise UserError(
            f"{what} holds Python objects (dtype {dtype}). Reading them would mean unpickling, which can run code. "
            "Save numbers: numpy.save(path, numpy.stack(rows).astype('float32'))."
        )
    if dtype.kind == "c":
        raise UserError(
            f"{what} is complex ({dtype}), and a flow needs real numbers. "
            "Stack the parts as features: numpy.stack([x.real, x.imag], axis=-1)."
        )
    if dtype.kind not in "fiub":
        raise UserError(f"{what} has dtype {dtype}, and numbers are needed. Convert it, e.g. astype('float32').")


def _check_header(path: Path) -> int:
    """Check the header and the length before memory is allocated; return the bytes that the file must have."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} of the .npy format is not supported; arrays of numbers use 1.0 or 2.0")
        refuse_dtype(dtype, repr(str(path)))
        wanted = file.tell() + math.prod(shape) * dtype.itemsize
    found = path.stat().st_size
    if found < wanted:
        raise UserError(
            f"{str(path)!r} is truncated: its header gives shape {shape}, {wanted} bytes, "
            f"and {found} were found. {_REWRITE}"
        )
    return wanted


def read_npy(path: Path) -> NDArray[Any]:
    """Read a ``.npy`` file; one of at least ``MIN_MAPPED_BYTES`` is memory-mapped, read only.

    Raises:
        UserError: the file cannot be read, is not a ``.npy`` file, is truncated, or does not hold real numbers.
    """
    try:
        _check_magic(path, b"\x93NUMPY", ".npy")
        mapped = _check_header(path) >= MIN_MAPPED_BYTES
        array: NDArray[Any] = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
    except UserError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}. {_REWRITE}") from error
    return array


def _choose_keys(path: Path, keys: list[str]) -> tuple[str, str | None]:
    """Return the keys of the data and of the labels in a ``.npz`` file."""
    if len(keys) == 1:
        return keys[0], None
    data = [key for key in _DATA_KEYS if key in keys]
    labels = [key for key in _LABEL_KEYS if key in keys]
    if len(data) != 1 or len(labels) > 1:
        raise UserError(
            f"{str(path)!r} holds the arrays {', '.join(map(repr, keys)) or '(none)'}, and it is not clear "
            "which of them is the data. Save one array, or the data as 'x' (or 'data', 'images') and the labels as "
            "'y' (or 'labels')."
        )
    return data[0], labels[0] if labels else None


@final
@dataclass(frozen=True)
class Archive:
    """The arrays of a file.

    Attributes:
        rows: the data.
        labels: the labels; None where the file has none.
        conditions: the further arrays that were asked for, by name.
    """

    rows: NDArray[Any]
    labels: NDArray[Any] | None = None
    conditions: dict[str, NDArray[Any]] = field(default_factory=dict)


def read_npz(path: Path, conditions: Sequence[str] | None = ()) -> Archive:
    """Read the data, the labels and the conditions from a ``.npz`` file.

    The data is the only array of the file that is no condition, or the array called ``x``, ``data`` or ``images``. The
    labels are the array called ``y`` or ``labels``.

    Args:
        path: the file.
        conditions: the names of further arrays to read; every array must be data, labels or one of these. None: data
            and labels alone are read, whatever else the file holds.

    Raises:
        UserError: the file cannot be read, is not a ``.npz`` file, is truncated, its keys do not tell which array is
            the data, a condition is not there, or further arrays are not named.
    """
    try:
        _check_magic(path, b"PK", ".npz")
        # the file is opened here because np.load does not close a file that is not an archive
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            keys = list(archive.files)
            for name in conditions or ():
                if name not in keys:
                    raise UserError(f"data key 'conditions': {unknown(f'array of {str(path)!r}:', name, keys)}")
            data, labels = _choose_keys(path, [key for key in keys if key not in (conditions or ())])
            if conditions is not None:
                _refuse_further(path, [key for key in keys if key not in (data, labels, *conditions)], conditions)
            return Archive(
                _read_member(path, archive, data),
                None if labels is None else _read_member(path, archive, labels),
                {name: _read_member(path, archive, name) for name in conditions or ()},
            )
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}. Write it again with numpy.savez.") from error


def _refuse_further(path: Path, further: Sequence[str], conditions: Sequence[str]) -> None:
    """Refuse arrays that are neither data nor labels nor named as conditions."""
    if further:
        raise UserError(
            f"{str(path)!r} also holds {', '.join(map(repr, further))}, and training would not see it: name it with "
            f"'conditions: [{', '.join([*conditions, *further])}]' (and 'mask: NAME' if it marks padding), or save the "
            "file without it."
        )


def _read_member(path: Path, archive: Any, key: str) -> NDArray[Any]:
    """Read one array of a ``.npz`` file; Python objects are refused."""
    what = f"{str(path)!r}, array {key!r},"
    try:
        array = archive[key]
    except ValueError as error:
        if "pickle" in str(error) or "bject" in str(error):
            refuse_dtype(np.dtype(object), what)
        raise
    if not isinstance(array, np.ndarray):
        raise UserError(f"{what} is not a NumPy array. Write the file with numpy.savez.")
    refuse_dtype(array.dtype, what)
    return array
