"""The pair store: pairs (x0, x1) on disk, in shards, resumable, memory-mapped, with a manifest.

A store is a folder with ``manifest.json`` and shards ``00000.safetensors`` … of :data:`SHARD_ROWS` rows
each, which hold ``x0``, ``x1`` and, for conditional pairs, ``label``. A shard is written atomically, so a
generation that was killed continues with the missing shards. The manifest records how the pairs were made: the
request, and values that were determined when the store was made (such as the number of solver steps). A store
with another request is refused. Rows are split into a training and a held-out part (1 in 32) by a hash of the
row number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import UserError
from fewstep.store.files import atomic_file, make_folder, read_json, write_json

SHARD_ROWS = 2048  # chosen, not tuned
HELD_OUT_EVERY = 32  # one row in 32 is held out; chosen, not tuned
MAX_MEMORY_BYTES = 1 << 30  # stores up to 1 GiB are read into memory, larger ones stay memory-mapped; not tuned

Columns = dict[str, Tensor]
Resolve = Callable[[Tensor], Columns]  # numbers of data rows (B,) -> their conditions
ROW = "row"  # column of row numbers, from which conditions are looked up in the data


def held_out_mask(rows: int) -> np.ndarray:
    """Which of the rows of a store are held out, by a fixed multiplicative hash of the row number.

    Args:
        rows: number of rows.

    Returns:
        ``(rows,)``, True for a held-out row; row 0 is always a training row.
    """
    index = np.arange(rows, dtype=np.uint64)
    mask = ((index * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) % np.uint64(HELD_OUT_EVERY) == 0
    mask[0] = False  # a store of one row must have a training row
    return mask


@final
class PairRows:
    """Chosen rows of a store, read from memory or from memory-mapped shards.

    Args:
        shards: the columns of every shard, each ``(rows of the shard, ...)``.
        index: row numbers in the store ``(N,)``.
        resolve: gives the conditions of data rows (B,), for stores that hold row numbers in their place.
    """

    def __init__(self, shards: list[Columns], index: Tensor, resolve: Resolve | None = None) -> None:
        self.index = index
        self._resolve = resolve
        size = sum(column.nbytes for shard in shards for column in shard.values())
        self._whole: Columns | None = None
        self._shards = shards
        if size <= MAX_MEMORY_BYTES:
            self._whole = {name: torch.cat([s[name] for s in shards])[index] for name in shards[0]}

    def __len__(self) -> int:
        return len(self.index)

    def columns(self, rows: Tensor) -> Columns:
        """The columns ``x0``, ``x1`` and conditions of the given rows ``(B,)``, counted in this part."""
        if self._whole is not None:
            found = {name: column.index_select(0, rows) for name, column in self._whole.items()}
        else:
            found = self._gather(self.index[rows])
        if self._resolve is not None and ROW in found:
            found |= self._resolve(found.pop(ROW))
        return found

    def _gather(self, rows: Tensor) -> Columns:
        """Copy rows of the store from its memory-mapped shards."""
        shard_of, offset = rows // SHARD_ROWS, rows % SHARD_ROWS
        out = {
            name: torch.empty(len(rows), *column.shape[1:], dtype=column.dtype)
            for name, column in self._shards[0].items()
        }
        for number in shard_of.unique().tolist():
            here = shard_of == number
            for name, column in out.items():
                column[here] = self._shards[number][name][offset[here]]
        return out


@final
class PairStore:
    """A folder of pairs.

    Args:
        folder: path of the folder.
        request: what the pairs are and how they are made; equal requests give equal bytes.
        rows: number of pairs.
        resolve: gives the conditions of data rows (B,), for pairs that hold row numbers in their place.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], rows: int, resolve: Resolve | None = None) -> None:
        self.folder = folder
        self.resolve = resolve
        self.request = dict(request)
        self.rows = rows

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // SHARD_ROWS)

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest on disk; empty if there is none."""
        return read_json(self._manifest_path) if self._manifest_path.exists() else {}

    @property
    def _manifest_path(self) -> Path:
        return self.folder / "manifest.json"

    @property
    def complete(self) -> bool:
        """Whether every shard exists and the checks were passed."""
        return bool(self.manifest.get("complete")) and not self.missing()

    def open(self, determine: Callable[[], Mapping[str, Any]] = dict) -> None:
        """Make the store, or check that the one on disk was made by the same request.

        Args:
            determine: called for a new store only; gives values for the manifest beside the request, such as the
                number of solver steps.

        Raises:
            UserError: the pairs on disk were made by another request (teacher, solver, guidance, ...).
        """
        wanted = {**self.request, "rows": self.rows}
        manifest = self.manifest
        if not manifest:
            make_folder(self.folder)
            write_json(self._manifest_path, {"request": {**wanted, **determine()}, "complete": False})
            return
        found = manifest.get("request", {})
        for key in sorted(wanted):
            if found.get(key) != wanted[key]:
                raise UserError(
                    f"the pairs in {self.folder} were made with {key} = {found.get(key)!r}, and "
                    f"{wanted[key]!r} is wanted now: delete that folder or use another --out."
                )

    def shard_path(self, number: int) -> Path:
        """Path of a shard's file."""
        return self.folder / f"{number:05d}.safetensors"

    def missing(self) -> list[int]:
        """Numbers of the shards that do not exist yet."""
        return [n for n in range(self.shards) if not self.shard_path(n).exists()]

    def shard_range(self, number: int) -> tuple[int, int]:
        """First row and number of rows of a shard."""
        start = number * SHARD_ROWS
        return start, min(SHARD_ROWS, self.rows - start)

    def write_shard(self, number: int, columns: Columns) -> None:
        """Write one shard atomically.

        Args:
            number: the number of the shard.
            columns: ``x0``, ``x1`` and conditions of its rows, see :meth:`shard_range`.
        """
        from safetensors.torch import save_file

        with atomic_file(self.shard_path(number)) as path:
            save_file({name: column.contiguous() for name, column in columns.items()}, path)

    def finish(self, checks: Mapping[str, Any]) -> None:
        """Mark the store complete, with the results of the checks on its pairs."""
        write_json(self._manifest_path, {**self.manifest, "complete": True, "checks": dict(checks)})

    def read(self, choose: Callable[[np.ndarray], np.ndarray]) -> PairRows:
        """The rows for which ``choose(held_out_mask)`` is True.

        Raises:
            UserError: a shard is missing, damaged or too short.
        """
        shards = [self._read_shard(number) for number in range(self.shards)]
        index = np.flatnonzero(choose(held_out_mask(self.rows)))
        return PairRows(shards, torch.from_numpy(index), self.resolve)

    def _read_shard(self, number: int) -> Columns:
        """Read one shard, memory-mapped; refuse a damaged or short one."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self.shard_path(number)
        try:
            columns = load_file(path)
        except (SafetensorError, OSError) as error:
            raise self._unreadable(path, error) from error
        count = self.shard_range(number)[1]
        if not {"x0", "x1"} <= set(columns) or any(len(column) != count for column in columns.values()):
            raise self._unreadable(path, f"it does not hold x0 and x1 of {count} rows")
        return columns

    def _unreadable(self, path: Path, why: object) -> UserError:
        return UserError(
            f"the pair file {path} cannot be read ({why}): delete it, and the same command will make it again."
        )

    def training_rows(self) -> PairRows:
        """The training rows, which losses use."""
        return self.read(lambda held_out: ~held_out)

    def held_out_rows(self) -> PairRows:
        """The held-out rows, which only checks use."""
        return self.read(lambda held_out: held_out)
