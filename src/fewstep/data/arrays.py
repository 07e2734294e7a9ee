"""Reads arrays from ``.npy`` and ``.npz`` files and refuses what cannot be data.

Nothing is unpickled: an array of Python objects is refused. Large ``.npy`` files are memory-mapped.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.data.scaling import Layout
from fewstep.errors import UserError

__all__ = ["arrange_rows", "read_npy", "read_npz"]

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


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read the data and the labels from a ``.npz`` file.

    The data is the only array of the file, or the array called ``x``, ``data`` or ``images``. The labels are
    the array called ``y`` or ``labels``.

    Returns:
        Data and labels; None in place of labels that are not in the file.

    Raises:
        UserError: the file cannot be read, is not a ``.npz`` file, is truncated, or its keys do not tell which
            array is the data.
    """
    try:
        _check_magic(path, b"PK", ".npz")
        # the file is opened here because np.load does not close a file that is not an archive
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            data, labels = _choose_keys(path, list(archive.files))
            return _read_member(path, archive, data), None if labels is None else _read_member(path, archive, labels)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}. Write it again with numpy.savez.") from error


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


def arrange_rows(array: NDArray[Any], what: str) -> tuple[NDArray[Any], Layout]:
    """Bring an array to ``(N, D)`` or ``(N, C, H, W)`` and return the layout that its rows had.

    Args:
        array: vectors ``(N, D)``, images of one channel ``(N, H, W)``, or images ``(N, C, H, W)``.
        what: how errors name the array.

    Raises:
        UserError: another number of dimensions, fewer than 2 rows, empty rows, channels last, or a dtype
            that is not real.

    >>> rows, layout = arrange_rows(np.zeros((5, 8, 8)), "the data")
    >>> rows.shape, layout
    ((5, 1, 8, 8), 'HW')
    """
    refuse_dtype(array.dtype, what)
    shape = tuple(array.shape)
    if array.ndim < 2:
        hint = f" {array.size} numbers are {array.size} rows of 1 feature: use x.reshape(-1, 1)."
        raise UserError(
            f"{what} has shape {shape}, and rows (N, features) or images (N, H, W) are needed."
            + (hint if array.ndim else " Save an array of rows.")
        )
    if array.ndim > 4:
        raise UserError(
            f"{what} has shape {shape}: rows with {array.ndim - 1} dimensions are not supported. "
            "Use (N, features), (N, H, W) or (N, C, H, W), e.g. x.reshape(len(x), -1)."
        )
    if array.size == 0:
        raise UserError(f"{what} is empty: its shape is {shape}. Give at least 2 rows.")
    if len(array) < 2:
        raise UserError(f"{what} has 1 row (shape {shape}), and at least 2 are needed.")
    if array.ndim == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) > 4:
        raise UserError(
            f"{what} has shape {shape}, which looks like (N, H, W, C), and (N, C, H, W) is expected. "
            "Use x.transpose(0, 3, 1, 2)."
        )
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return (array[:, None], "HW") if array.ndim == 3 else (array, "same")
