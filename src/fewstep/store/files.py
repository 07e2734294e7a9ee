"""Files that are either whole or absent.

A file is written beside its destination under a temporary name, flushed to the disk (``fsync``), and
then renamed over the destination with ``os.replace``, which POSIX makes atomic; at last the folder is
flushed, so that the new name survives a power cut. Whoever opens the destination sees the old content
or the new one, never a part of it.

Temporary names are ``.tmp-<16 hex digits>-<name>``. An error, Ctrl-C included, removes the temporary
file; after a SIGKILL it stays behind, and :func:`clean_temporaries` finds it by its name. The original
suffix stays at the end, for writers that choose a format by it.
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
    "make_folder",
    "read_json",
    "write_array",
    "write_bytes",
    "write_json",
    "write_text",
]

_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}-.+", re.DOTALL)
_KEPT_NAME = 120  # bytes of the final name kept in the temporary one; file systems allow 255 in all


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Make a folder with its parents, or leave it as it is, and return it.

    Raises:
        UserError: a component of the path is a file (it is named), or the folder cannot be made or
            written to.
    """
    folder = Path(path)
    for part in (*reversed(folder.parents), folder):
        # lstat of 'file/below' says "not a folder" on its own; going down from the root finds the culprit
        if os.path.lexists(part) and not part.is_dir():
            kind = "a broken link" if part.is_symlink() and not part.exists() else "a file, not a folder"
            raise UserError(
                f"cannot make the folder {str(folder)!r}: {str(part)!r} is {kind}. "
                "Choose another path, or move that file away."
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
    """Follow links, make the folder, and refuse what a file must not replace."""
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise UserError(f"cannot write the file {str(path)!r}: it is a folder. Give the name of a file.")
    if target.exists() and not target.is_file():
        raise UserError(f"cannot write the file {str(path)!r}: it is a device or a pipe, not a plain file.")
    make_folder(target.parent)
    return target


def _temporary_name(name: str) -> str:
    kept = name.encode("utf-8", "surrogateescape")[-_KEPT_NAME:].decode("utf-8", "ignore")
    return f".tmp-{secrets.token_hex(8)}-{kept or 'file'}"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the destination's folder; what the block writes there becomes ``path``.

    The folder is made where it is missing. A link is followed, so it stays a link. When the block
    raises, the temporary file is removed and the destination stays as it was.

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
    # Some file systems and Windows refuse to flush a folder; the file itself is whole either way.
    with contextlib.suppress(OSError):
        _flush(target.parent, os.O_RDONLY)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` atomically. Raises UserError where the file cannot be written (disk full, ...)."""
    with atomic_file(path) as temporary:
        try:
            temporary.write_bytes(data)
        except OSError as error:
            raise UserError(f"cannot write the file {str(path)!r}: {_reason(error)}.") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` atomically, in UTF-8 and with line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def _plain(value: Any) -> Any:
    """Turn numpy numbers, arrays, paths and tuples into JSON's own types, and NaN and infinity into null."""
    if isinstance(value, Mapping):
        keys = [str(key) for key in value]
        if len(set(keys)) != len(keys):
            raise TypeError(f"keys of a JSON object must differ as strings, got {list(value)!r}")
        return {key: _plain(item) for key, item in zip(keys, value.values(), strict=True)}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write ``obj`` atomically as JSON: sorted keys, two spaces of indent, a line end at the end.

    JSON has no NaN and no infinity, and many readers refuse a file that holds them. They are written as
    ``null``: a metric that is undefined must not lose the other numbers of a long run. Numpy numbers
    and arrays, paths and tuples are written as the JSON values they mean; keys become strings.

    Raises:
        UserError: the file cannot be written.
        TypeError: ``obj`` holds something that has no JSON form (a mistake of the calling code).
    """
    text = json.dumps(_plain(obj), indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def write_array(path: str | os.PathLike[str], array: ArrayLike) -> None:
    """Write an array atomically in the ``.npy`` format, to ``path`` exactly (no suffix is added).

    Raises:
        UserError: the file cannot be written, or the array holds Python objects, which would be pickled.
    """
    array = np.asarray(array)
    if array.dtype.hasobject:
        raise UserError(
            f"cannot write the file {str(path)!r}: the array holds Python objects (dtype {array.dtype}), "
            "and fewstep never pickles. Convert it to numbers, e.g. array.astype('float32')."
        )
    with atomic_file(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                np.save(file, array, allow_pickle=False)
        except OSError as error:
            raise UserError(f"cannot write the file {str(path)!r}: {_reason(error)}.") from error


def _refuse_constant(token: str) -> Any:
    raise ValueError(f"it holds {token}, which is not JSON")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing, unreadable, empty, truncated or not JSON; file and cause are named.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {_reason(error)}.") from error
    if not data.strip():
        raise UserError(f"cannot read {str(path)!r}: the file is empty. It was cut off; write it again.")
    try:
        return json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {str(path)!r}: not whole JSON ({error}). "
            "The file is truncated or of another kind; restore it or write it again."
        ) from error


def as_read(value: Any) -> Any:
    """What reading it back from a JSON file gives: lists for tuples, text for keys."""
    return json.loads(json.dumps(value))


def clean_temporaries(folder: str | os.PathLike[str], *, older_than: float = 0.0) -> int:
    """Remove the temporary files that a killed process left in ``folder`` itself; return how many.

    Only plain files whose names are of the form this module gives are touched, and no sub-folder is
    entered. ``older_than`` (seconds since the last change) spares files that another process is writing
    just now: with several writers in one folder, give it. A folder that does not exist has none.
    """
    removed = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if not (_TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)):
                continue
            with contextlib.suppress(OSError):  # gone already, or not ours to remove
                if time.time() - entry.stat().st_mtime >= older_than:
                    os.unlink(entry.path)
                    removed += 1
    return removed
