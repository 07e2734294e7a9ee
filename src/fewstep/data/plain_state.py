"""The state of a loader as JSON values and back: tensors, arrays, bytes and tuples are written with their kind."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NotPlain", "from_plain", "to_plain"]

_KIND = "__kind__"


class NotPlain(TypeError):
    """A value that has no form in JSON."""


def to_plain(value: Any) -> Any:
    """A value as JSON values; :func:`from_plain` restores it.

    Raises:
        NotPlain: it holds something other than numbers, texts, lists, tuples, mappings with text keys, bytes,
            arrays and tensors.

    >>> from_plain(to_plain({"a": (1, b"x")}))
    {'a': (1, b'x')}
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, dict):
        if not all(isinstance(key, str) and key != _KIND for key in value):
            raise NotPlain("a mapping with keys that are no texts")
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    if isinstance(value, tuple):
        return {_KIND: "tuple", "items": [to_plain(item) for item in value]}
    if isinstance(value, bytes):
        return {_KIND: "bytes", "data": base64.b64encode(value).decode()}
    if isinstance(value, (np.ndarray, np.generic, Tensor)):
        array = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)
        if array.dtype.kind not in "fiub":
            raise NotPlain(f"an array of dtype {array.dtype}")
        data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
        kind = "tensor" if isinstance(value, Tensor) else "array"
        return {_KIND: kind, "dtype": array.dtype.str, "shape": list(array.shape), "data": data}
    raise NotPlain(type(value).__name__)


def from_plain(value: Any) -> Any:
    """The value that :func:`to_plain` wrote.

    Args:
        value: JSON values.
    """
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: from_plain(item) for key, item in value.items()}
    if kind == "tuple":
        return tuple(from_plain(item) for item in value["items"])
    data = base64.b64decode(value["data"])
    if kind == "bytes":
        return data
    array = np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    return torch.from_numpy(array) if kind == "tensor" else array
