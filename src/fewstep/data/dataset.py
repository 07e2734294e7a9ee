"""A data set with random access: rows in their own units, conditions, a scaling, and a fixed held-out split.

The held-out rows are chosen by a hash of the row's index alone: row ``i`` is held out where
``splitmix64(i) < 2**64 / 10`` (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014). So the split depends on no seed and no library version: every stage and every run on the same data
has the same split, and rows added at the end leave the split of the earlier rows unchanged. With ten rows or
fewer no row has such a hash, and the row with the smallest hash is held out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.lazy import RowSource
from fewstep.data.scaling import Layout, Scaling
from fewstep.errors import UserError

__all__ = ["DataSet", "Indices", "Layout", "Scaling", "as_tensor", "held_out_mask", "splitmix64", "without_padding"]

LABEL = "label"  # name of the class label among the conditions
Indices = NDArray[np.integer[Any]] | Tensor | Sequence[int] | slice
HELD_OUT_EVERY = 10  # one row in ten is held out; chosen, not tuned
_MAX_HASHED_BYTES = 1 << 24  # content is hashed in pieces of at most 16 MiB; chosen, not tuned


def splitmix64(index: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """The first output of the splitmix64 generator whose state is ``index``, elementwise.

    ``z = i + 0x9E37...; z = (z ^ z >> 30) * 0xBF58...; z = (z ^ z >> 27) * 0x94D0...; z ^ z >> 31``.

    Source: Steele, Lea and Flood (2014), see the module docstring.
    """
    z = index.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def held_out_mask(num: int) -> NDArray[np.bool_]:
    """Which of ``num`` rows are held out: 10 % on average, at least one row and never all of them.

    Returns:
        ``(num,)``, True for a held-out row.
    """
    assert num >= 2, "a data set has at least two rows"
    hashes = splitmix64(np.arange(num))
    mask = hashes < np.uint64(2**64 // HELD_OUT_EVERY)
    if not mask.any():
        mask[hashes.argmin()] = True
    if mask.all():
        mask[hashes.argmax()] = False
    return mask


def _digest_rows(digest: Any, rows: RowSource) -> None:
    """Add the content of rows to a digest, in pieces."""
    step = max(1, _MAX_HASHED_BYTES // max(1, rows.dtype.itemsize * math.prod(rows.shape[1:])))
    for start in range(0, len(rows), step):
        digest.update(np.ascontiguousarray(rows[start : start + step]).view(np.uint8).data)


def without_padding(x: Tensor, mask: NDArray[Any]) -> Tensor:
    """Rows (n, ...) with 0 where the mask (n,), (n, T), ... is 0, whatever stands there, NaN included.

    >>> without_padding(torch.tensor([[math.nan, 2.0]]), np.array([[0, 1]]))
    tensor([[0., 2.]])
    """
    valid = torch.from_numpy(np.array(mask != 0))
    return x.masked_fill(~valid.reshape(*valid.shape, *(1,) * (x.ndim - valid.ndim)), 0.0)


def as_tensor(values: NDArray[Any]) -> Tensor:
    """A copy of condition values as a tensor: int64 for whole numbers, bool for flags, float32 for other numbers."""
    kinds: dict[str, type[np.generic]] = {"b": np.bool_, "i": np.int64, "u": np.int64}
    return torch.from_numpy(np.array(values, dtype=kinds.get(values.dtype.kind, np.float32)))


def _as_index(indices: Indices) -> Any:
    if isinstance(indices, Tensor):
        return indices.detach().cpu().numpy()
    return indices if isinstance(indices, slice) else np.asarray(indices, dtype=np.intp)


@final
@dataclass(frozen=True, eq=False)
class DataSet:
    """Rows ``(N, *shape)``, their labels, and the scaling to network units and back.

    Args:
        name: a built-in name, or the name of the file.
        rows: ``(N, *shape)`` in the data's own units and dtype; may be memory-mapped or any other row source
            (:mod:`fewstep.data.lazy`).
        scaling: to network units and back; its ``shape`` is that of the rows.
        labels: int64 ``(N,)`` in ``0 .. classes - 1``, or None.
        classes: number of labels; 0 without labels.
        label_names: the labels as the file gives them, where they are not ``0 .. classes - 1``; else None.
        quantum: distance between neighbouring values in *network* units when the data is discrete with
            one step for all features (digits 1/8, 8-bit pixels 2/255); None for continuous data.
        conditions: further conditions by name, each ``(N, ...)``: observations, embeddings, masks; may be
            row sources too. ``label`` is not among them.
        mask: name of the condition that marks the valid entries of a row with 1 and padding with 0; None for none.
            Padding is zero in network units.
    """

    name: str
    rows: RowSource
    scaling: Scaling
    labels: NDArray[np.int64] | None = None
    classes: int = 0
    label_names: tuple[str | int, ...] | None = None
    quantum: float | None = None
    conditions: Mapping[str, RowSource] = field(default_factory=dict)
    mask: str | None = None

    def __post_init__(self) -> None:
        if len(self.rows) < 2:
            raise UserError(
                f"data {self.name!r} has {len(self.rows)} row(s). At least 2 are needed: one to train on, one held out."
            )
        assert self.scaling.shape == self.rows.shape[1:], "the scaling has the shape of the rows"
        assert (self.labels is None) == (self.classes == 0), "labels and classes come together"
        assert self.labels is None or self.labels.shape == (len(self.rows),), "one label per row"
        assert LABEL not in self.conditions, "labels have a field of their own"
        assert all(len(values) == len(self.rows) for values in self.conditions.values()), "one condition per row"
        assert self.mask is None or self.mask in self.conditions, "the mask is one of the conditions"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row for the network: ``(D,)``, ``(T, D)``, ``(C, H, W)``, ..."""
        return tuple(self.rows.shape[1:])

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one row in the file, which is also that of the samples written."""
        assert self.scaling.data_shape is not None
        return self.scaling.data_shape

    @cached_property
    def train(self) -> NDArray[np.int64]:
        """Indices of the training rows, ascending."""
        return np.flatnonzero(~held_out_mask(len(self.rows))).astype(np.int64)

    @cached_property
    def held_out(self) -> NDArray[np.int64]:
        """Indices of the held-out rows, ascending."""
        return np.flatnonzero(held_out_mask(len(self.rows))).astype(np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over dtype, shape, content, labels and conditions, in hexadecimal.

        It is equal for equal content, whatever the file format. It does not depend on the scaling. All rows and
        conditions are read once, in blocks: the first use takes as long as reading the data.
        """
        digest = hashlib.sha256()
        digest.update(f"{self.rows.dtype.str} {self.rows.shape}\n".encode())
        _digest_rows(digest, self.rows)
        if self.labels is not None:
            digest.update(b"labels\n")
            digest.update(np.ascontiguousarray(self.labels).view(np.uint8).data)
        for name, values in sorted(self.conditions.items()):
            digest.update(f"{name} {values.dtype.str} {values.shape} {name == self.mask}\n".encode())
            _digest_rows(digest, values)
        return digest.hexdigest()

    def network_rows(self, indices: Indices) -> Tensor:
        """The rows ``indices`` in network units: float32 ``(n, *shape)``.

        Raises:
            IndexError: an index is outside the rows.
        """
        chosen = _as_index(indices)
        if self.mask is None:
            return self.scaling.normalise(self.rows[chosen])
        with np.errstate(over="ignore", invalid="ignore"):  # padding may hold anything
            x = self.scaling.normalise(self.rows[chosen])
        return without_padding(x, self.conditions[self.mask][chosen])

    @property
    def condition_names(self) -> tuple[str, ...]:
        """Names of all conditions, ``label`` first where there are labels."""
        return ((LABEL,) if self.labels is not None else ()) + tuple(self.conditions)

    def cond_rows(self, indices: Indices, names: Iterable[str]) -> dict[str, Tensor]:
        """The conditions of the rows ``indices``, each (n, ...) int64, bool or float32.

        Args:
            indices: row numbers.
            names: which conditions.
        """
        found: dict[str, Tensor] = {}
        for name in names:
            labels = self.label_rows(indices) if name == LABEL else None
            found[name] = as_tensor(self.conditions[name][_as_index(indices)]) if labels is None else labels
        return found

    def label_rows(self, indices: Indices) -> Tensor | None:
        """The labels of the rows ``indices``: int64 ``(n,)``, or None without labels."""
        if self.labels is None:
            return None
        return torch.from_numpy(np.array(self.labels[_as_index(indices)], dtype=np.int64))

    def train_rows(self) -> Tensor:
        """All training rows in network units: float32 ``(n, *shape)``."""
        return self.network_rows(self.train)

    def held_out_rows(self) -> Tensor:
        """All held-out rows in network units: float32 ``(n, *shape)``."""
        return self.network_rows(self.held_out)
