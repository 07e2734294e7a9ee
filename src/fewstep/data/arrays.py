"""Arrays from ``.npy`` and ``.npz`` files, and what is refused of them.

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

LARGE = 1 << 26  # bytes from which a .npy file is mapped and not read
_DATA_KEYS = ("x", "data", "images")
_LABEL_KEYS = ("y", "labels")
_AGAIN = "Write it again with numpy.save."


def _begins(path: Path, magic: bytes, kind: str) -> None:
    """Refuse a file that does not begin as its kind does; ``np.load`` would take it for a pickle."""
    with open(path, "rb") as file:
        head = file.read(len(magic))
    if not head:
        raise UserError(f"{str(path)!r} is empty (0 bytes). {_AGAIN}")
    if head != magic:
        raise UserError(f"{str(path)!r} is not a {kind} file: it begins with {head!r}. {_AGAIN}")


def refuse_dtype(dtype: np.dtype[Any], what: str) -> None:
    """Refuse everything but real numbers and booleans."""
    if dtype.hasobject:
        raise UserError(
            f"{what} holds Python objects (dtype {dtype}), which would have to be unpickled. "
            "Save numbers: numpy.save(path, numpy.stack(rows).astype('float32'))."
        )
    if dtype.kind == "c":
        raise UserError(
            f"{what} is complex ({dtype}), and flows are real. "
            "Stack the parts as features: numpy.stack([x.real, x.imag], axis=-1)."
        )
    if dtype.kind not in "fiub":
        raise UserError(f"{what} has dtype {dtype}, and numbers are needed. Convert it, e.g. astype('float32').")


def _check_header(path: Path) -> int:
    """Refuse a bad header or a wrong length before anything is allocated; return the bytes of content."""
    with open(path, "rb") as file:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, _, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"version {version} of the format, which plain arrays do not need")
        refuse_dtype(dtype, repr(str(path)))
        wanted = file.tell() + math.prod(shape) * dtype.itemsize
    found = path.stat().st_size
    if found < wanted:
        raise UserError(
            f"{str(path)!r} is truncated: its header promises shape {shape}, {wanted} bytes, "
            f"and {found} were found. {_AGAIN}"
        )
    return wanted


def read_npy(path: Path) -> NDArray[Any]:
    """Read a ``.npy`` file, memory-mapped (read only) when it is large.

    Raises:
        UserError: the file cannot be read, is junk or truncated, or does not hold real numbers.
    """
    try:
        _begins(path, b"\x93NUMPY", ".npy")
        large = _check_header(path) >= LARGE
        array: NDArray[Any] = np.load(path, mmap_mode="r" if large else None, allow_pickle=False)
    except UserError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}. {_AGAIN}") from error
    return array


def _pick(path: Path, keys: list[str]) -> tuple[str, str | None]:
    """The keys of the data and of the labels in a ``.npz`` file."""
    if len(keys) == 1:
        return keys[0], None
    data = [key for key in _DATA_KEYS if key in keys]
    labels = [key for key in _LABEL_KEYS if key in keys]
    if len(data) != 1 or len(labels) > 1:
        raise UserError(
            f"{str(path)!r} holds the arrays {', '.join(map(repr, keys)) or '(none)'}, and it is not clear "
            "which is the data. Save one array, or the data as 'x' (or 'data', 'images') and the labels as "
            "'y' (or 'labels')."
        )
    return data[0], labels[0] if labels else None


def read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Read the data, and the labels where there are any, from a ``.npz`` file.

    The data is the only array, or the one called ``x``, ``data`` or ``images``; labels are ``y`` or
    ``labels``.

    Raises:
        UserError: the file cannot be read, is junk or truncated, or the keys do not say what is what.
    """
    try:
        _begins(path, b"PK", ".npz")
        # opened here, because numpy leaves a file that is no archive open
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            data, labels = _pick(path, list(archive.files))
            return _member(path, archive, data), None if labels is None else _member(path, archive, labels)
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {str(path)!r}: {error}. Write it again with numpy.savez.") from error


def _member(path: Path, archive: Any, key: str) -> NDArray[Any]:
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
    """Bring an array to ``(N, D)`` or ``(N, C, H, W)`` and say how its own rows were laid out.

    ``(N, D)`` is a set of vectors, ``(N, H, W)`` of images with one channel, ``(N, C, H, W)`` of images.

    Raises:
        UserError: another number of dimensions, fewer than 2 rows, empty rows, channels last, or a dtype
            that is not real.
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
