"""Data that come as a stream of batches: a ``DataLoader``, a WebDataset, a generator function.

A stream keeps its first rows, the *reservoir*, as a data set with random access. The reservoir decides the scaling, and
serves whatever needs chosen rows: guards, the conditions of pairs, comparisons. Training takes the rows in the order in
which they come, pass after pass, and keeps no more than one batch of the loader beyond what it was asked for.

Held-out rows. One row in ten of the reservoir is held out, by the hash of its number as in every data set. Training
never gets a row that equals one of them bit for bit, in whatever order the loader gives its rows, and it skips the
held-out places of every pass. So a loader that gives the same values in every pass never shows a held-out row. This
does not hold where the loader both reorders its rows and changes them at random (augmentation): a changed copy of a
held-out row may then be trained on. A held-out row whose equal is also among the reservoir's training rows is a
repeated row of the data, and its copies are not skipped.

Resumption. ``rows(start, count)`` is a function of ``start`` where the loader gives the same rows again; a run goes on
by the loader's own state where it has one that keeps its order over several passes, else by reading and skipping.
``Stream.promise`` says in a sentence what holds for this loader.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewstep.data.assemble import Parts, assemble
from fewstep.data.axes import arrange_decoded
from fewstep.data.columns import Key, Wanted
from fewstep.data.dataset import DataSet
from fewstep.data.labels import check_labels
from fewstep.data.loaders import Loader, known_order
from fewstep.data.scaling import Scaling
from fewstep.data.stream_rows import Block, Preparation, Prepared, RawBlocks
from fewstep.errors import UserError

__all__ = ["Stream", "stream"]

RESERVOIR = 8192  # rows of a reservoir whose size is not given; chosen, not tuned
MAX_RESERVOIR_BYTES = 1 << 28  # and at most 256 MiB of them; chosen, not tuned
LEAST_RESERVOIR = 256  # but at least so many rows; chosen, not tuned
PIECE = 1024  # rows of the reservoir given at a time; chosen, not tuned


def stream(
    loader: Any,
    *,
    x: Key | None = None,
    conditions: Any = None,
    label: Key | None = None,
    mask: str | None = None,
    reservoir: int | None = None,
    name: str = "stream",
    scale: str | None = None,
    layout: str | None = None,
    classes: int | None = None,
    batched: bool = True,
    repeatable: bool | None = None,
    restart: Callable[[], Iterable[Any]] | None = None,
) -> Stream:
    """Make training data of a loader that gives batches in order.

    The first rows are read at once.

    Args:
        loader: an iterable of batches (``DataLoader``, WebDataset, iterable data set), or a function that returns an
            iterator of batches. A batch is a dictionary, a tuple or a tensor; every part is ``(n, ...)``.
        x: which part holds the rows; None: found by its name or position (:mod:`fewstep.data.columns`).
        conditions: the parts that are conditions: names, or a mapping from the network's names to parts. For tuples,
            names of the parts after the rows, in order.
        label: which part holds the class labels.
        mask: which condition marks valid entries with 1 and padding with 0.
        reservoir: how many of the first rows are kept; None: 8,192, or fewer where they would take over 256 MiB.
        name: the name that the data gets.
        scale: ``standardise``, ``range``, ``none``, or None for the automatic rule; statistics are the reservoir's.
        layout: ``image``, ``sequence`` or ``raw``, see :mod:`fewstep.data.axes`.
        classes: number of labels, which are then ``0 .. classes - 1``; None: those that occur in the reservoir.
        batched: whether items are batches; False: every item is one row.
        repeatable: whether iterating again gives the same rows in the same order; None: as far as the loader tells.
        restart: makes an iterable for every further pass, for a loader that is an iterator.

    Raises:
        UserError: the loader cannot be iterated, its parts cannot be told apart, or its rows cannot be used.

    >>> made = stream(lambda: (torch.full((4, 2), float(i)) for i in range(10)), scale="none")
    >>> made.rows(0, 3)[0].tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    what = f"the stream {name!r}"
    if reservoir is not None and (isinstance(reservoir, bool) or not isinstance(reservoir, int) or reservoir < 2):
        raise UserError(f"reservoir must be a whole number of at least 2, got {reservoir!r}.")
    blocks = RawBlocks(Loader(loader, restart, what), Wanted(x, label, conditions), batched, what)
    first, rest = _fill(blocks, reservoir, what)
    assert blocks.columns is not None
    arranged = arrange_decoded(first[blocks.columns.x], what, layout)
    given = {called: first[key] for called, key in blocks.columns.conditions.items()}
    data = assemble(Parts(name, arranged, what, conditions=given, mask=mask, scale=scale))
    if blocks.columns.label is not None:
        data = _labelled(data, first[blocks.columns.label], classes, what)
    exact, reason = known_order(loader)
    if repeatable is not None:
        exact, reason = repeatable, f"repeatable={repeatable} says so"
    made = Stream(blocks, data, rest, exact, reason)
    made.scale_named = scale is not None
    return made


def _fill(blocks: RawBlocks, reservoir: int | None, what: str) -> tuple[dict[Key, NDArray[Any]], Iterator[Block]]:
    """Read the first rows, by column; return them with the blocks that follow."""
    taken: list[Block] = []
    count, wanted = 0, reservoir or RESERVOIR
    source = blocks.one_pass(0)
    for block in source:
        if not taken and reservoir is None:
            row = sum(values[:1].nbytes for values in block.columns.values())
            wanted = min(RESERVOIR, max(LEAST_RESERVOIR, MAX_RESERVOIR_BYTES // max(1, row)))
        taken.append(block)
        count += len(block)
        if count >= wanted:
            break
    if not taken:
        raise UserError(f"{what} gave no rows. Give a loader that gives batches.")
    over = [taken[-1].from_row(len(taken[-1]) - (count - wanted))] if count > wanted else []
    keys = taken[0].columns.keys()
    try:
        rows = {key: np.concatenate([block.columns[key] for block in taken])[:wanted] for key in keys}
    except ValueError as error:
        raise UserError(f"{what}: its batches have rows of different shapes: {error}. Pad or crop them.") from error
    return rows, itertools.chain(over, source, blocks.passes(1))


def _labelled(data: DataSet, labels: NDArray[Any], classes: int | None, what: str) -> DataSet:
    """The data with labels: 0 .. classes - 1, or those that occur."""
    numbers, names = check_labels(labels, len(data), f"the labels of {what}", what)
    if classes is None:
        return dataclasses.replace(data, labels=numbers, classes=int(numbers.max()) + 1, label_names=names)
    given = np.asarray(labels).astype(np.int64)
    if given.max() >= classes:
        raise UserError(f"{what} has the label {given.max()}, and classes={classes} allows 0 to {classes - 1}.")
    return dataclasses.replace(data, labels=given, classes=classes)


@final
class Stream:
    """Rows in the order of a loader, with a reservoir of its first rows; made by :func:`stream`.

    Args:
        blocks: reads the loader.
        reservoir: the first rows.
        rest: the blocks that follow those rows, of the iterator that read them.
        exact: whether iterating again gives the same rows.
        reason: what is known of the loader's order.

    Attributes:
        reservoir: the first rows, as a data set with random access.
        exact_resume: whether a resumed run gets the rows that an uninterrupted one would get, bit for bit.
        promise: a sentence that says so, with the reason.
        scale_named: whether the user named a scale; otherwise a model's own scaling takes precedence.
    """

    def __init__(self, blocks: RawBlocks, reservoir: DataSet, rest: Iterator[Block], exact: bool, reason: str) -> None:
        self.reservoir = reservoir
        self.scale_named = False
        self._blocks, self._what = blocks, f"the stream {reservoir.name!r}"
        self._rest: Iterator[Block] | None = rest
        self.exact_resume = exact
        self.promise = self._say(exact, reason)
        self._preparation = self._new_preparation()
        self._walk: Iterator[Prepared] | None = None
        self._now, self._used, self._position = Prepared(torch.empty(0), {}), 0, 0

    def _say(self, exact: bool, reason: str) -> str:
        if not self._blocks.loader.can_restart:
            return f"{self._what}: it is an iterator, so it gives one pass, and a stopped run needs a new iterator."
        if exact:
            return f"{self._what}: a resumed run gets the same rows bit for bit if the data do not change ({reason})."
        return f"{self._what}: a resumed run may get other rows than an uninterrupted one: {reason}."

    @property
    def name(self) -> str:
        """The name of the data."""
        return self.reservoir.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one row for the network."""
        return self.reservoir.shape

    @property
    def scaling(self) -> Scaling:
        """The scaling to network units, from the reservoir's statistics."""
        return self.reservoir.scaling

    @property
    def position(self) -> int:
        """Number of training rows given so far: the ``start`` that needs neither skipping nor a new start."""
        return self._position

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the reservoir where the loader repeats its rows; else of the rows' form alone.

        The form is the shapes and types of the rows and conditions.
        """
        if self.exact_resume:
            return self.reservoir.fingerprint
        rows = {"": self.reservoir.rows, **self.reservoir.conditions}
        form = [(name, values.dtype.str, values.shape[1:]) for name, values in sorted(rows.items())]
        return hashlib.sha256(repr((form, self.reservoir.mask, self.reservoir.classes)).encode()).hexdigest()

    def use_scaling(self, scaling: Scaling) -> None:
        """Take the scaling of an earlier run in place of the reservoir's, whose rows may be others this time.

        Raises:
            UserError: it is for rows of another shape.
        """
        if scaling.shape != self.shape:
            raise UserError(f"{self._what} has rows of shape {self.shape}, and the scaling is for {scaling.shape}.")
        self.reservoir = dataclasses.replace(self.reservoir, scaling=scaling)
        self._preparation = self._new_preparation()
        self._now, self._used = Prepared(torch.empty(0), {}), 0
        self._walk, self._position = None, 0

    def _new_preparation(self) -> Preparation:
        assert self._blocks.columns is not None
        return Preparation(self.reservoir, self._blocks.columns, self._what)

    def rows(self, start: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Training rows ``start … start + count`` of the repeated stream, and their conditions.

        Rows are numbered without the held-out ones, over all passes. A ``start`` beyond the position skips; one before
        it starts the loader again and skips.

        Args:
            start: number of the first row, 0 or more.
            count: how many, 1 or more.

        Returns:
            Rows in network units, float32 ``(count, *shape)``, and conditions by name, each ``(count, ...)``.

        Raises:
            UserError: the loader cannot be started again, ends, or gives rows that cannot be used.
        """
        assert start >= 0, "rows are numbered from 0"
        assert count >= 1, "one row at least"
        try:
            if self._walk is None or start < self._position:
                self._restart()
            self._advance(start - self._position, None)
            parts: list[Prepared] = []
            self._advance(count, parts)
        except BaseException:
            self._walk = None  # what was read of a failed call is lost: the next one starts again
            raise
        if len(parts) == 1:
            return parts[0].x, parts[0].cond
        names = parts[0].cond
        return torch.cat([part.x for part in parts]), {n: torch.cat([part.cond[n] for part in parts]) for n in names}

    def _advance(self, count: int, parts: list[Prepared] | None) -> None:
        """Go on by ``count`` rows, which are added to ``parts`` if given."""
        assert self._walk is not None
        while count > 0:
            if self._used == len(self._now.x):
                self._now, self._used = next(self._walk), 0
                continue
            end = min(self._used + count, len(self._now.x))
            if parts is not None:
                chosen = slice(self._used, end)
                cond = {name: values[chosen] for name, values in self._now.cond.items()}
                parts.append(Prepared(self._now.x[chosen], cond))
            count -= end - self._used
            self._position += end - self._used
            self._used = end

    def _restart(self) -> None:
        """Go back to the first row."""
        self._walk, self._now, self._used, self._position = self._from_start(), Prepared(torch.empty(0), {}), 0, 0

    def _from_start(self) -> Iterator[Prepared]:
        """All training rows: those of the reservoir, then those that follow it in the loader."""
        data = self.reservoir
        for start in range(0, len(data.train), PIECE):
            index = data.train[start : start + PIECE]
            yield Prepared(data.network_rows(index), data.cond_rows(index, data.condition_names))
        rest, self._rest = self._rest, None
        yield from self._prepared(self._after_reservoir() if rest is None else rest)

    def _after_reservoir(self) -> Iterator[Block]:
        """The loader from its start, without the rows of the reservoir."""
        self._blocks.loader.rewind()
        for block in self._blocks.passes():
            inside = len(self.reservoir) - block.row if block.epoch == 0 else 0
            if inside < len(block):
                yield block.from_row(inside) if inside > 0 else block

    def _prepared(self, blocks: Iterator[Block]) -> Iterator[Prepared]:
        epoch, given = 0, 1
        for block in blocks:
            if block.epoch != epoch:
                if not given:
                    raise UserError(f"{self._what} has no training rows in pass {epoch + 1}: all equal held-out rows.")
                epoch, given = block.epoch, 0
            prepared = self._preparation.prepare(block)
            given += len(prepared.x)
            yield prepared

    def state(self) -> dict[str, Any] | None:
        """Where the stream stands, as JSON values for :meth:`restore`; None where the loader has no state of its own.

        None also while the rows are those of the reservoir, and where the state cannot be written as JSON.
        """
        block = self._now.block
        if block is None or block.before is None:
            return None
        place = {"position": self._position, "epoch": block.epoch, "row": block.row, "used": self._used}
        return {**place, "loader": block.before}

    def restore(self, state: dict[str, Any] | None, position: int) -> None:
        """Go on at a position of an earlier run; without a state of the loader, rows are read and skipped.

        Args:
            state: what :meth:`state` gave at that position, or None.
            position: number of training rows that the earlier run had taken.
        """
        assert position >= 0, "a number of rows"
        fits = state is not None and state.get("position") == position
        if state is None or not fits or not self._blocks.loader.load_state(state["loader"]):
            self._skip_to(position)
            return
        self._rest = None
        self._walk = self._prepared(self._blocks.passes(state["epoch"], state["row"]))
        self._now, self._used, self._position = next(self._walk), int(state["used"]), position

    def _skip_to(self, position: int) -> None:
        if self._walk is None or position < self._position:
            self._restart()
        self._advance(position - self._position, None)

    def refuse(self, what: str) -> NoReturn:
        """Refuse a use that needs chosen rows.

        Args:
            what: the use, as the subject of a sentence ("pairs of real rows").

        Raises:
            UserError: always; it names the stream, the reason and the ways out.
        """
        raise UserError(
            f"{what} need chosen rows, and {self._what} gives rows in its own order only. Give data with random access "
            f"(an array, a .npy file, a torch Dataset, a Hugging Face dataset), or the stream's first "
            f"{len(self.reservoir)} rows: data=stream.reservoir."
        )
