"""The rows of a stream as blocks: read from the loader, checked, without the held-out rows, in network units."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.axes import Arranged
from fewstep.data.columns import Columns, Key, Wanted, choose_columns, columns_of
from fewstep.data.condition_arrays import check_conditions, check_mask, numpy_of
from fewstep.data.dataset import LABEL, DataSet, as_tensor, held_out_mask, splitmix64, without_padding
from fewstep.data.lazy import row_chunks
from fewstep.data.loaders import Loader
from fewstep.errors import UserError

__all__ = ["Block", "Preparation", "Prepared", "RawBlocks", "row_hashes"]


@final
@dataclass(frozen=True)
class Block:
    """One batch of the loader.

    Attributes:
        columns: values ``(n, ...)`` by key.
        epoch: number of the pass, from 0.
        row: number of its first row in the pass.
        before: the loader's own state before it was read, or None.
    """

    columns: dict[Key, NDArray[Any]]
    epoch: int
    row: int
    before: Any = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def from_row(self, start: int) -> Block:
        """Without its first ``start`` rows."""
        return Block({key: values[start:] for key, values in self.columns.items()}, self.epoch, self.row + start, None)


@final
@dataclass(frozen=True)
class Prepared:
    """Rows as training takes them.

    Attributes:
        x: float32 ``(n, *shape)`` in network units.
        cond: conditions by name, each ``(n, ...)``.
        block: the block that they are from; None for rows of the reservoir.
    """

    x: Tensor
    cond: dict[str, Tensor]
    block: Block | None = None


@final
class RawBlocks:
    """Reads batches from a loader, pass after pass.

    Args:
        loader: the loader.
        wanted: which columns to take.
        batched: whether an item is a batch; otherwise it is one row.
        what: how errors name the stream.
    """

    def __init__(self, loader: Loader, wanted: Wanted, batched: bool, what: str) -> None:
        self.loader, self._wanted, self._batched, self._what = loader, wanted, batched, what
        self.columns: Columns | None = None

    def passes(self, epoch: int = 0, row: int = 0) -> Iterator[Block]:
        """The blocks from an epoch on; ``row`` is the number of the first row, of a loader sent to a position."""
        while True:
            read = 0
            for block in self.one_pass(epoch, row):
                read += len(block)
                yield block
            if not read and not row:
                raise UserError(
                    f"{self._what} gave no rows in pass {epoch + 1}. It must give them again in every pass."
                )
            epoch, row = epoch + 1, 0

    def one_pass(self, epoch: int, row: int = 0) -> Iterator[Block]:
        """The blocks of one pass."""
        items = self.loader.begin(epoch)
        while True:
            before = self.loader.state()
            item = next(items, None)
            if item is None:
                return
            columns = self._read(item, row)
            block = Block(columns, epoch, row, before)
            if len(block):
                yield block
            row += len(block)

    def _read(self, item: Any, row: int) -> dict[Key, NDArray[Any]]:
        """The wanted columns of an item, each (n, ...)."""
        parts = columns_of(item, self._what)
        if self.columns is None:
            self.columns = choose_columns(self._wanted, parts, self._what)
        missing = [key for key in self.columns.keys if key not in parts]
        if missing:
            raise UserError(f"{self._what}: the item at row {row} has no part {missing[0]!r}; earlier ones had it.")
        found = {key: numpy_of(parts[key]) for key in self.columns.keys}
        if not self._batched:
            return {key: values[None] for key, values in found.items()}
        lengths = {key: len(values) if values.ndim else -1 for key, values in found.items()}
        if len(set(lengths.values())) > 1 or found[self.columns.x].ndim < 2:
            shapes = ", ".join(f"{key!r}: {values.shape}" for key, values in found.items())
            raise UserError(
                f"{self._what}: the item at row {row} is no batch: its parts have the shapes {shapes}, and each must "
                "have one row per sample, the rows (n, ...). Give batches (DataLoader, .batch(n)), or say "
                "batched=False if every item is one row."
            )
        return found


def row_hashes(x: Tensor) -> NDArray[np.uint64]:
    """A 64-bit number for every row, equal for rows that are equal bit for bit.

    A multilinear hash: the sum of the row's 32-bit words, each times a fixed odd number, modulo 2^64, mixed by
    splitmix64. Different rows have equal numbers with probability about 2^-63 (Lemire and Kaser, "Strongly universal
    string hashing is fast", arXiv:1202.4961).

    Args:
        x: float32 ``(n, ...)``.
    """
    words = np.ascontiguousarray(x.numpy()).reshape(len(x), -1).view(np.uint32)
    odd = splitmix64(np.arange(words.shape[1])) | np.uint64(1)
    chunks = row_chunks(words)
    sums = [(words[i : i + chunks.step] * odd).sum(axis=1, dtype=np.uint64) for i in chunks]
    return splitmix64(np.concatenate(sums)) if sums else np.empty(0, np.uint64)


def _hashes_of(data: DataSet, index: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The hashes of chosen rows of a data set, in pieces."""
    step = row_chunks(data.rows).step
    return np.concatenate([row_hashes(data.network_rows(index[i : i + step])) for i in range(0, len(index), step)])


@final
class Preparation:
    """Makes training rows of blocks: checks them as the reservoir was checked, converts them, drops held-out rows.

    Args:
        reservoir: the first rows of the stream.
        columns: which key of a block holds what.
        what: how errors name the stream.
    """

    def __init__(self, reservoir: DataSet, columns: Columns, what: str) -> None:
        self.reservoir, self._columns, self._what = reservoir, columns, what
        self._held_out = held_out_mask(len(reservoir))
        held, kept = _hashes_of(reservoir, reservoir.held_out), _hashes_of(reservoir, reservoir.train)
        # a held-out row that also occurs among the training rows is one of the data's repeated rows: it is kept
        self._hashes = np.setdiff1d(held, kept)

    def prepare(self, block: Block) -> Prepared:
        """The training rows of a block.

        Raises:
            UserError: another shape or dtype than the reservoir's, values that are not finite, an unknown label, or a
                mask that is none.
        """
        data, what = self.reservoir, f"{self._what}, batch at row {block.row} of pass {block.epoch + 1},"
        raw = block.columns[self._columns.x]
        if raw.shape[1:] not in (data.data_shape, data.shape):
            raise UserError(f"{what} has rows of shape {raw.shape[1:]}, and earlier ones had {data.data_shape}.")
        arranged = data.scaling.arrange(raw)
        conditions = {name: block.columns[key] for name, key in self._columns.conditions.items()}
        self._check_shapes(conditions, what)
        checked = check_conditions(conditions, len(raw), what)
        checked = check_mask(data.mask, checked, Arranged(arranged, data.scaling.layout, "raw"), what)
        with np.errstate(over="ignore", invalid="ignore"):
            x = data.scaling.normalise(arranged)
        if data.mask is not None:
            x = without_padding(x, np.asarray(checked[data.mask][:]))
        bad = (~torch.isfinite(x.flatten(1)).all(1)).nonzero()
        if len(bad):
            raise UserError(f"{what} holds a value that is NaN or infinite, in its row {int(bad[0])}. Drop such rows.")
        cond = {name: as_tensor(np.asarray(values[:])) for name, values in checked.items()}
        if data.labels is not None and self._columns.label is not None:
            cond = {LABEL: torch.from_numpy(self.labels(block.columns[self._columns.label], what)), **cond}
        keep = self._kept(block, x)
        if bool(keep.all()):
            return Prepared(x, cond, block)
        return Prepared(x[keep], {name: values[keep] for name, values in cond.items()}, block)

    def _check_shapes(self, conditions: dict[str, NDArray[Any]], what: str) -> None:
        for name, values in conditions.items():
            known = self.reservoir.conditions[name].shape[1:]
            if values.shape[1:] != known and name != self.reservoir.mask:
                raise UserError(f"{what} has condition {name!r} of shape {values.shape[1:]}; earlier ones had {known}.")

    def labels(self, raw: NDArray[Any], what: str) -> NDArray[np.int64]:
        """The labels of a block as ``0 .. classes - 1``, in the order of the reservoir's.

        Raises:
            UserError: a label that the reservoir does not have.
        """
        names = self.reservoir.label_names
        values = np.arange(self.reservoir.classes) if names is None else np.asarray(names)
        place = np.minimum(np.searchsorted(values, raw), len(values) - 1).reshape(-1)
        wrong = np.flatnonzero(values[place] != raw.reshape(-1))
        if wrong.size:
            raise UserError(
                f"{what} has the label {raw.reshape(-1)[wrong[0]]}, which is not among the {len(values)} labels of the "
                "reservoir (the stream's first rows). Say how many there are, classes=…, with labels 0 to classes - 1, "
                "or give a larger reservoir."
            )
        return place.astype(np.int64)

    def _kept(self, block: Block, x: Tensor) -> Tensor:
        """Flags (n,): not in a held-out place of the pass, and not equal to a held-out row."""
        rows = np.arange(block.row, block.row + len(block))
        keep = ~(rows < len(self._held_out))
        inside = ~keep
        keep[inside] = ~self._held_out[rows[inside]]
        keep &= ~np.isin(row_hashes(x), self._hashes)
        return torch.from_numpy(keep)
