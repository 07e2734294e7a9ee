"""The idx format of the MNIST family, plain or gzipped.

A file is ``00 00 <type> <ndim>``, then ``ndim`` sizes as big-endian 32-bit integers, then the values in C
order and big-endian (LeCun, Cortes and Burges, "The MNIST database", section "File formats").
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fewstep.errors import UserError

__all__ = ["is_idx", "read_idx"]

_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_READ_BYTES = 1 << 20  # one read asks for at most 1 MiB; chosen, not tuned
_Bytes = BinaryIO | gzip.GzipFile


def is_idx(head: bytes) -> bool:
    """Whether the first four bytes of a file are those of an idx file."""
    return len(head) >= 4 and head[:2] == b"\0\0" and head[2] in _TYPES and 1 <= head[3] <= 8


def _read_up_to(file: _Bytes, count: int) -> bytes:
    """Read at most ``count`` bytes; of a truncated gzip stream, the bytes before its end."""
    pieces: list[bytes] = []
    while count > 0:
        try:
            piece = file.read(min(count, _MAX_READ_BYTES))
        except EOFError:
            break
        if not piece:
            break
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _parse(file: _Bytes, path: Path) -> NDArray[Any]:
    """Read header and values; refuse another format and a wrong length."""
    head = _read_up_to(file, 4)
    if not is_idx(head):
        raise UserError(
            f"{str(path)!r} is not an idx file: it begins with {head!r}, and an idx file "
            "begins with the four bytes 00 00 <type> <dimensions>. Give an idx file, .npy, .npz or an image folder."
        )
    dtype, dims = np.dtype(_TYPES[head[2]]), head[3]
    sizes = _read_up_to(file, 4 * dims)
    header = 4 + 4 * dims
    if len(sizes) < 4 * dims:
        raise UserError(
            f"{str(path)!r} is truncated: its header takes {header} bytes, and {4 + len(sizes)} were found. "
            "Download or write it again."
        )
    shape = tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
    wanted = math.prod(shape) * dtype.itemsize
    body = _read_up_to(file, wanted + 1)  # one byte more shows that a file is too long
    if len(body) != wanted:
        found = f"{header + len(body)} were found" if len(body) < wanted else "the file has more"
        kind = "truncated" if len(body) < wanted else "too long"
        raise UserError(
            f"{str(path)!r} is {kind}: its header gives shape {shape}, {header + wanted} bytes, "
            f"and {found}. Download or write it again."
        )
    return np.frombuffer(bytearray(body), dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def read_idx(path: Path) -> NDArray[Any]:
    """Read an idx file; one that begins with gzip's magic number is unpacked.

    Returns:
        The array in the machine's byte order, of the shape that the header gives.

    Raises:
        UserError: the file cannot be read, has another format, is truncated or is too long; the message gives
            the bytes expected and found.

    Source: LeCun, Cortes and Burges, "The MNIST database", section "File formats".
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(2)
            file.seek(0)
            if magic != b"\x1f\x8b":
                if path.suffix.lower() == ".gz":
                    raise UserError(f"{str(path)!r} is not a gzip file: it begins with {magic!r}.")
                return _parse(file, path)
            with gzip.GzipFile(fileobj=file) as unpacked:
                return _parse(unpacked, path)
    except (OSError, zlib.error) as error:  # gzip.BadGzipFile is an OSError
        raise UserError(f"cannot read {str(path)!r}: {error}. Download or write it again.") from error
