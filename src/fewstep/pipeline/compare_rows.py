"""Rows of the data in a comparison: the reference, and the conditions that samples are drawn with."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.dataset import LABEL, DataSet, without_padding
from fewstep.data.lazy import row_chunks
from fewstep.data.sources import as_data
from fewstep.data.stream import Stream
from fewstep.errors import UserError
from fewstep.flow.noise import integer_rows
from fewstep.generator.conditions import ROW_DRAW
from fewstep.metrics import moment_matched_gaussian
from fewstep.metrics.rows import pick

MIN_ROWS = 6  # k-nearest-neighbour metrics (k = 5) need more rows than neighbours
MAX_ROWS = 20_000  # rows of a split that are read; chosen, not tuned
LOOKED_AT = 1024  # rows looked at in one piece for a value that differs; chosen, not tuned

Index = NDArray[np.int64]
Cond = dict[str, Tensor]


@final
@dataclass(frozen=True)
class Control:
    """Samples that cost no model.

    Attributes:
        x: ``(num, *shape)`` in network units.
        cond: further conditions of the data by name, each ``(num, ...)``, read when they are asked for.
    """

    x: Tensor
    cond: Conditions


@final
class Conditions:
    """Conditions of chosen rows of the data, read when they are first asked for.

    Args:
        data: the data.
        index: numbers of the rows, (num,).
    """

    def __init__(self, data: DataSet, index: Index) -> None:
        self.data, self.index = data, index
        self._read: Cond = {}

    @classmethod
    def drawn(cls, data: DataSet, num: int, seed: int) -> Conditions:
        """Of training rows drawn with equal chances: row ``i`` is a function of (seed, i)."""
        return cls(data, data.train[integer_rows(num, len(data.train), seed=seed, draw=ROW_DRAW).numpy()])

    def of(self, names: Iterable[str], num: int) -> Cond:
        """The first ``num`` rows of the conditions ``names``, each ``(num, ...)``; labels are class numbers.

        Raises:
            UserError: they do not fit into this machine's memory.
        """
        wanted = tuple(names)
        missing = [name for name in wanted if name not in self._read]
        self._check_memory(missing)
        self._read |= self.data.cond_rows(self.index, missing)
        return {name: self._read[name][:num] for name in wanted}

    def labels(self, num: int) -> list[Any]:
        """The labels of the first ``num`` rows as the data names them."""
        numbers, names = self.of([LABEL], num)[LABEL].tolist(), self.data.label_names
        return numbers if names is None else [names[k] for k in numbers]

    def without_padding(self, x: Tensor) -> Tensor:
        """Samples (num, ...) in network units with zeros where the mask of their rows marks padding."""
        if self.data.mask is None:
            return x
        return without_padding(x, self.of([self.data.mask], len(x))[self.data.mask].numpy())

    def _check_memory(self, names: Sequence[str]) -> None:
        """Refuse conditions that do not fit into memory: those of all samples are kept."""
        beside = [self.data.conditions[name] for name in names if name != LABEL]
        size = len(self.index) * sum(math.prod(rows.shape[1:]) for rows in beside) * 4
        if size > memory():
            raise UserError(
                f"the conditions {', '.join(names)} of {len(self.index):,} samples take {size / 2**30:.0f} GiB, and "
                f"this machine has {memory() / 2**30:.0f} GiB of memory: compare fewer samples, samples=…."
            )


def memory() -> float:
    """Bytes of this machine's memory; infinity where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return math.inf


@final
@dataclass(frozen=True)
class ReferenceRows:
    """The rows that samples are scored against, in network units.

    Attributes:
        data: the data.
        index: numbers of the training rows that were read, ascending.
        train: these rows, float32 ``(n, *shape)``.
        held_out: held-out rows, float32 ``(m, *shape)``.
        whole: whether these are all rows of the data.
    """

    data: DataSet
    index: Index
    train: Tensor
    held_out: Tensor
    whole: bool

    @classmethod
    def read(cls, data: DataSet, max_rows: int) -> ReferenceRows:
        """Read at most ``max_rows`` rows of each split, evenly spaced by index, in blocks."""
        index, beside = spaced(data.train, max_rows), spaced(data.held_out, max_rows)
        whole = len(index) + len(beside) == len(data)
        return cls(data, index, network_rows(data, index), network_rows(data, beside), whole)

    def describe(self, origin: str) -> str:
        """Which rows these are, in words."""
        split = f"training split of {len(self.data.train)} rows"
        if len(self.index) < len(self.data.train):
            split = f"{len(self.index)} of the {len(self.data.train)} rows of the training split, evenly spaced"
        return f"{self.data.name}, {split}{origin}"

    def gaussian(self, num: int, seed: int, drawn: Conditions) -> Control:
        """The Gaussian with the moments of the rows, with the conditions that models are given, and their padding."""
        return Control(drawn.without_padding(moment_matched_gaussian(self.train, num, seed)), drawn)

    def training(self, num: int) -> Control:
        """Training rows, with their own conditions."""
        chosen = pick(len(self.train), num)
        return Control(self.train[torch.as_tensor(chosen)], Conditions(self.data, self.index[chosen]))


def spaced(index: Index, most: int) -> Index:
    """At most ``most`` entries of an index, evenly spaced.

    >>> spaced(np.arange(10), 4).tolist()
    [0, 3, 6, 9]
    """
    if len(index) <= most:
        return index
    return index[np.linspace(0, len(index) - 1, most).round().astype(np.int64)]


def network_rows(data: DataSet, index: Index) -> Tensor:
    """The rows ``index`` in network units, float32 ``(n, *shape)``, read in blocks."""
    x, step = torch.empty(len(index), *data.shape), row_chunks(data.rows).step
    for start in range(0, len(index), step):
        x[start : start + step] = data.network_rows(index[start : start + step])
    return x


def open_reference(data: Any) -> tuple[DataSet, str, bool]:
    """The data set of what the user gave, where its rows are from, and whether a network of the user's own is in the
    data's own units.

    A network of the user's own was trained in the units that :func:`fewstep.train` gives it: those of an array as it
    is, and network units of named data, files, data sets and streams.
    """
    if isinstance(data, Stream):
        rows = data.reservoir
        return rows, f", of the {len(rows)} rows that the stream keeps", False
    named = isinstance(data, (str, Path, DataSet)) or (isinstance(data, Mapping) and bool({"path", "name"} & set(data)))
    return as_data(data), "", not named


def check_reference(data: DataSet) -> None:
    """Refuse data with too few rows for the metrics, or whose rows are all equal."""
    if len(data.train) < MIN_ROWS:
        raise UserError(
            f"the data {data.name!r} has {len(data.train)} training rows (a tenth is held out), and a comparison "
            f"needs at least {MIN_ROWS}: give more rows."
        )
    first = data.rows[data.train[0]]
    # rows are read in pieces, and reading ends at the first row that differs: large data stay on disk
    step = min(LOOKED_AT, row_chunks(data.rows).step)
    pieces = (data.train[i : i + step] for i in range(0, len(data.train), step))
    if all(bool((data.rows[piece] == first).all()) for piece in pieces):
        raise UserError(
            f"all training rows of {data.name!r} are equal: there is no distribution to learn or to compare."
        )
