"""Reproducible randomness: every draw is a function of integers, never of global state.

Sample noise is drawn in blocks of 256 rows, one generator per (seed, block, draw), so that sample ``i`` is
the same whatever the number of samples, the batch size or the number of processes. Training draws are a
function of (seed, stage, samples seen). Both go through :func:`mix`, a splitmix64 hash of the parts.

Some code must use torch's global generators: weight initialisation and dropout draw from nothing else. It runs inside
:func:`isolated_rng`, which puts their state back.
"""

from __future__ import annotations

import contextlib
import hashlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from fewstep.errors import UserError

BLOCK = 256
_MASK = (1 << 64) - 1


def mix(*parts: int | str) -> int:
    """Hash integers and words into 63 bits (splitmix64 finaliser, chained over the parts).

    Words are reduced by SHA-256, so the result does not depend on Python's per-process string hash. (torch's
    CPU generator is seeded by the lower 32 bits of what it is given.)

    >>> mix(0, "init") == mix(0, "init") != mix(1, "init")
    True
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        if isinstance(part, str):
            part = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
        state = (state + (operator.index(part) & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator_for(*parts: int | str) -> torch.Generator:
    """Return a fresh CPU generator seeded with ``mix(*parts)``."""
    return torch.Generator().manual_seed(mix(*parts))


@contextlib.contextmanager
def isolated_rng(device: torch.device | str | None = None) -> Iterator[None]:
    """Restore the state of torch's global random generators on leaving the block.

    ``torch.random.fork_rng()`` without ``devices`` saves and restores the generator of every GPU of the machine, which
    starts a CUDA context on each of them. This saves the CPU's generator and at most one GPU's.

    Args:
        device: the CUDA device whose generator is restored too; ``cuda`` means the current one. None or any other
            device: the CPU's generator alone.

    >>> before = torch.get_rng_state()
    >>> with isolated_rng():
    ...     _ = torch.manual_seed(0), torch.randn(3)
    >>> torch.equal(torch.get_rng_state(), before)
    True
    """
    device = torch.device("cpu" if device is None else device)
    devices: list[int] = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        yield


def noise_rows(
    num: int,
    shape: Sequence[int],
    *,
    seed: int,
    start: int = 0,
    draw: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw rows ``start … start+num`` of the infinite N(0, I) table of (``seed``, ``draw``).

    Args:
        num: number of rows.
        shape: shape of one row.
        seed: the user's seed.
        start: index of the first row.
        draw: which table: 0 is the base noise, higher numbers are later draws of the same samples.
        dtype: of the result; the draw itself is always float32, so that all dtypes see the same noise.

    Returns:
        ``(num, *shape)`` on the CPU.

    Raises:
        UserError: ``num`` or ``start`` is negative.

    >>> bool((noise_rows(3, (2,), seed=0, start=5) == noise_rows(9, (2,), seed=0)[5:8]).all())
    True
    """
    return block_rows(
        num,
        start,
        lambda block: torch.randn(BLOCK, *shape, generator=generator_for(seed, block, draw)),
        empty=torch.empty(0, *shape),
    ).to(dtype)


def integer_rows(num: int, high: int, *, seed: int, start: int = 0, draw: int = 0) -> Tensor:
    """Draw rows ``start … start+num`` of a table of uniform integers in ``[0, high)``, (num,) int64.

    Blocks, ``seed`` and ``draw`` as in :func:`noise_rows`.
    """
    return block_rows(
        num,
        start,
        lambda block: torch.randint(high, (BLOCK,), generator=generator_for(seed, block, draw)),
        empty=torch.empty(0, dtype=torch.long),
    )


def block_rows(num: int, start: int, draw_block: Callable[[int], Tensor], empty: Tensor) -> Tensor:
    """Cut rows ``start … start+num`` out of the sequence of blocks ``draw_block(0), draw_block(1), …``.

    Args:
        num: number of rows.
        start: index of the first row.
        draw_block: gives block k, 256 rows.
        empty: returned for ``num = 0``: no rows, in the shape of the others.

    Raises:
        UserError: ``num`` or ``start`` is negative.
    """
    if num < 0 or start < 0:
        raise UserError(f"rows are counted from 0: num={num} and start={start} must not be negative.")
    if num == 0:
        return empty
    first, last = start // BLOCK, (start + num - 1) // BLOCK
    rows = torch.cat([draw_block(block) for block in range(first, last + 1)])
    offset = start - first * BLOCK
    return rows[offset : offset + num]


def equal_share(count: int, rows: slice, batch: int) -> slice:
    """The share of ``count`` rows that belongs to the process which has ``rows`` of a batch.

    >>> equal_share(10, slice(2, 4), 8)
    slice(2, 5, None)
    """
    return slice(rows.start * count // batch, rows.stop * count // batch)


@final
class Draws:
    """The random draws of one training step: made for the global batch, then cut to this process's rows.

    Args:
        generator: seeded by the caller as a function of (seed, stage, samples seen).
        batch: rows of the global batch.
        rows: this process's rows, all of them when None.
        valid: 1 for valid entries of this process's samples and 0 for padding, in a shape that multiplies samples
            (b, ...); None without a mask.
    """

    def __init__(
        self, generator: torch.Generator, batch: int, rows: slice | None = None, valid: Tensor | None = None
    ) -> None:
        self.generator = generator
        self.batch = batch
        self.rows = rows
        self.valid = valid

    def of(self, batch: int) -> Draws:
        """Draws for rows beside the batch: ``batch`` of them in all, of which this process has an equal share."""
        rows = None if self.rows is None else equal_share(batch, self.rows, self.batch)
        return Draws(self.generator, batch, rows)

    def uniform(self) -> Tensor:
        """``(b,)`` draws of U[0, 1)."""
        draw = torch.rand(self.batch, generator=self.generator)
        return draw if self.rows is None else draw[self.rows]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """``(b, *shape)`` draws of N(0, I) for samples of that shape; their padding is zero."""
        draw = torch.randn(self.batch, *shape, generator=self.generator)
        return self.masked(draw if self.rows is None else draw[self.rows])

    def masked(self, x: Tensor) -> Tensor:
        """Samples x (b, ...) with zeros at their padding."""
        return x if self.valid is None else x * self.valid.to(x)
