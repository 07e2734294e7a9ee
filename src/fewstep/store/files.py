"""Atomic files: a file has its old content or its whole new content, never a part of it.

A file is written in the folder of its destination under a temporary name, flushed to the disk (``fsync``), and
renamed to the destination with ``os.replace``, which POSIX makes atomic. The folder is flushed last, so that the
new name survives a power failure.

Temporary names are ``.tmp-<16 hex digits>-<name>``. An error, Ctrl-C included, removes the temporary
file; after a SIGKILL it remains, and :func:`clean_temporaries` removes it. The temporary name keeps the
suffix, because some writers choose the format by it.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fewstep.errors import UserError

__all__ = [
    "atomic_file",
    "clean_temporaries",
    "json_line",
    "make_folder",
    "read_json",
    "write_array",
    "write_bytes",
    "write_json",
    "write_text",
]

_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}-.+", re.DOTALL)
_MAX_KEPT_BYTES = 120  # of the final name, kept in the temporary one; file systems allow names of 255 bytes


def _reason(error: OSError) -> str:
    """The cause of an error without the path, for messages that name the path themselves."""
    return error.strerror or str(error) or type(error).__name__


def _flush(path: Path, flags: int) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder and its parents where they are missing, and return its path.

    Raises:
        UserError: a component of the path is a file (the message names it), or the folder cannot be made or
            written to.
    """
    folder = Path(path)
    for part in (*reversed(folder.parents), folder):
        # checked from the root downwards, so that the message names the component that is a file
        if os.path.lexists(part) and not part.is_dir():
            kind = "a broken link" if part.is_symlink() and not part.exists() else "a file, not a folder"
            raise UserError(
                f"cannot make the folder {str(folder)!r}: {str(part)!r} is {kind}. "
                "Choose another path, or move that file."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the folder {str(folder)!r}: {_reason(error)}. Choose a path that can be written to."
        ) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"the folder {str(folder)!r} cannot be written to: no permission. "
            "Choose another path, or change its permissions."
        )
    return folder


def _destination(path: str | os.PathLike[str]) -> Path:
    """Resolve links, make the folder, and refuse a destination that is a folder, device or pipe."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"cannot write the file {str(path)!r}: it is a folder. Give the name of a file.")
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write the file {str(path)!r}: it is a device or a pipe, not a plain file.")
    make_folder(target.parent)
    return target


def _temporary_name(name: str) -> str:
    """A new random name that ends with the last bytes of ``name``."""
    kept = name.encode("utf-8", "surrogateescape")[-_MAX_KEPT_BYTES:].decode("utf-8", "ignore")
    return f".tmp-{secrets.token_hex(8)}-{kept or 'file'}"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path for the block to write to; after the block it is renamed to ``path``.

    The folder is made where it is missing. If ``path`` is a link, the file that it points to is replaced. If the
    block raises, the temporary file is removed and the destination is unchanged.

    Raises:
        UserError: the destination is a folder or a device, or it cannot be written to.
        FileNotFoundError: the block wrote nothing (a mistake of the calling code).
    """
    target = _destination(path)
    temporary = target.parent / _temporary_name(target.name)
    try:
        yield temporary
        if not temporary.is_file():
            raise FileNotFoundError(f"nothing was written to the temporary file for {str(path)!r}")
        try:
            _flush(temporary, os.O_RDWR)
            os.replace(temporary, target)
        except OSError as error:
            raise UserError(f"cannot write the file {str(path)!r}: {_reason(error)}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    # Windows and some file systems cannot flush a folder; the file is complete without it.
    with contextlib.suppress(OSError):
        _flush(target.parent, os.O_RDONLY)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` atomically.

    Raises:
        UserError: the file cannot be written (disk full, no permission, ...).
    """
    with atomic_file(path) as temporary:
        try:
            temporary.write_bytes(data)
        except OSError as error:
            raise UserError(f"cannot write the file {str(path)!r}: {_reason(error)}.") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` atomically, in UTF-8 and with its line ends unchanged.

    Raises:
        UserError: the file cannot be written.
    """
    write_bytes(path, text.encode("utf-8"))


def _json_value(value: Any) -> Any:
    """Turn numpy numbers, arrays, paths and tuples into JSON's own types, and NaN and infinity into null."""
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        if len(set(keys)) != len(keys):
            raise TypeError(f"keys of a JSON object must differ as strings, got {list(value)!r}")
        return {key: _json_value(item) for key, item in zip(keys, value.values(), strict=True)}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _json_value(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` atomically as JSON: sorted keys, an indent of two spaces, a final line end.

    NaN and infinity are written as ``null``, because JSON has neither and many readers refuse a file that holds
    them. Numpy numbers and arrays, paths and tuples become JSON numbers, lists and strings; keys become strings.

    Raises:
        UserError: the file cannot be written.
        TypeError: ``obj`` holds a value that JSON cannot express (a mistake of the calling code).
    """
    text = json.dumps(_json_value(obj), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def json_line(obj: Any) -> str:
    """``obj`` as JSON on one line, without a line end; keys are sorted, NaN and infinity become ``null``."""
    return json.dumps(_json_value(obj), sort_keys=True, allow_nan=False)


def write_array(path: str | os.PathLike[str], array: ArrayLike) -> None:
    """Write an array atomically in the ``.npy`` format, to ``path`` exactly (no suffix is added).

    Raises:
        UserError: the file cannot be written, or the array holds Python objects, which would be pickled.
    """
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise UserError(
            f"cannot write the file {str(path)!r}: the array holds Python objects (dtype {array.dtype}), "
            "and fewstep does not pickle. Convert it to numbers, e.g. array.astype('float32')."
        )
    with atomic_file(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)
        except OSError as error:
            raise UserError(f"cannot write the file {str(path)!r}: {_reason(error)}.") from error


def _refuse_constant(token: str) -> Any:
    """Refuse NaN and Infinity, which json.loads would accept."""
    raise ValueError(f"it holds {token}, which is not JSON")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, unreadable, empty, truncated or not JSON; the message names file and cause.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {_reason(error)}.") from error
    if not data.strip():
        raise UserError(f"cannot read {str(path)!r}: the file is empty. Restore it or write it again.")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {str(path)!r}: it is not complete JSON ({error}). "
            "The file is truncated or has another format; restore it or write it again."
        ) from error


def json_round_trip(value: Any) -> Any:
    """The value as it is after writing to JSON and reading back: tuples become lists, keys become strings.

    >>> json_round_trip({1: (2, 3)})
    {'1': [2, 3]}
    """
    return json.loads(json.dumps(value))


def clean_temporaries(folder: str | os.PathLike[str], *, older_than: float = 0.0) -> int:
    """Remove the temporary files that a killed process left in ``folder``, but not in its sub-folders.

    Only plain files with a temporary name of this module are removed.

    Args:
        folder: the folder; it need not exist.
        older_than: remove only files that were last changed at least so many seconds ago. With several processes
            that write to the folder, give a time in which none leaves its file unchanged.

    Returns:
        The number of files removed.
    """
    removed = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not (_TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
                continue
            with contextlib.suppress(OSError):  # removed by another process, or not permitted
                if time.time() - entry.stat().st_mtime >= older_than:
                    os.unlink(entry.path)
                    removed += 1
    return removed
