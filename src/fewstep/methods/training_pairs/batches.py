"""Batches of training pairs as functions of (seed, samples seen): data rows with noise, stored pairs, mixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor

from fewstep.data.dataset import LABEL, DataSet
from fewstep.errors import UserError
from fewstep.flow.couplings import Coupling, Facts, Pair
from fewstep.flow.noise import generator_for
from fewstep.methods.contract.objective import Batches
from fewstep.methods.contract.stage import Stage
from fewstep.networks.foreign import spread
from fewstep.store.pairs import PairStore


class Order(Protocol):
    """The order in which the rows of a data set or store are used."""

    def indices(self, start: int, count: int) -> Tensor:
        """The row numbers of samples ``start … start + count``, (count,)."""
        ...


@final
class EpochOrder:
    """Row numbers in shuffled epochs: every row once per epoch, in an order that is a function of (key, epoch).

    Args:
        rows: number of rows.
        key: seed of the order, with any number of parts.

    >>> EpochOrder(3, (0, "a")).indices(0, 3).sort().values
    tensor([0, 1, 2])
    """

    def __init__(self, rows: int, key: tuple[int | str, ...]) -> None:
        self.rows = rows
        self.key = key
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.long)

    def indices(self, start: int, count: int) -> Tensor:
        """The row numbers of samples ``start … start + count``, (count,)."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.rows)
            if epoch != self._epoch:
                self._order = torch.randperm(self.rows, generator=generator_for(*self.key, "epoch", epoch))
                self._epoch = epoch
            part = self._order[offset : offset + count]
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@final
class GroupedOrder:
    """Row numbers in shuffled epochs of groups; the rows of a group have one class.

    An epoch has ``ceil(n / size)`` groups of a class with n rows, so the shares of the classes are those of the data up
    to one group. The last group of a class is filled with rows of that class that are drawn a second time. The order is
    a function of (key, epoch).

    Args:
        labels: class of every row, (N,).
        size: rows in a group.
        key: seed of the order, with any number of parts.
    """

    def __init__(self, labels: Tensor, size: int, key: tuple[int | str, ...]) -> None:
        self.size, self.key = size, key
        self._classes = [(labels == kind).nonzero()[:, 0] for kind in labels.unique().tolist()]
        self._groups = sum(-(-len(rows) // size) for rows in self._classes)
        self._order = EpochOrder(self._groups, (*key, "groups"))
        self._epoch, self._rows = -1, torch.empty(0, size, dtype=torch.long)

    def indices(self, start: int, count: int) -> Tensor:
        """The row numbers of samples ``start … start + count``, (count,).

        Raises:
            UserError: ``start`` or ``count`` is not a multiple of the group's size.
        """
        if start % self.size or count % self.size:
            raise UserError(
                f"batches of {count} rows do not consist of whole groups of {self.size}: set batch_size to a multiple "
                f"of {self.size}."
            )
        first, last, parts = start // self.size, (start + count) // self.size, []
        while first < last:
            epoch = first // self._groups
            stop = min(last, (epoch + 1) * self._groups)
            parts.append(self._epoch_rows(epoch)[self._order.indices(first, stop - first)].flatten())
            first = stop
        return torch.cat(parts)

    def _epoch_rows(self, epoch: int) -> Tensor:
        """The groups of an epoch, (groups, size)."""
        if epoch != self._epoch:
            self._rows = torch.cat([self._cut(rows, number, epoch) for number, rows in enumerate(self._classes)])
            self._epoch = epoch
        return self._rows

    def _cut(self, rows: Tensor, number: int, epoch: int) -> Tensor:
        generator = generator_for(*self.key, "class", number, epoch)
        order = rows[torch.randperm(len(rows), generator=generator)]
        more = rows[torch.randint(len(rows), (-len(rows) % self.size,), generator=generator)]
        return torch.cat([order, more]).view(-1, self.size)


@final
class DataBatches:
    """Rows of a data set, paired with base noise by a coupling.

    Args:
        data: the data set; its training split is used.
        coupling: makes x0 for the rows.
        conditions: names of the conditions that the pairs have.
        dequantise: standard deviation of the Gaussian noise added to the rows, in network units.
        key: seed of the order of the rows, with any number of parts.
        group: number of consecutive rows that have one class; batches must start at multiples of it.

    Attributes:
        facts: what holds for the coupling.
    """

    CACHE_BYTES = 1 << 30  # up to this size the rows are kept in memory as float32; chosen, not tuned

    def __init__(
        self,
        data: DataSet,
        coupling: Coupling,
        conditions: Sequence[str],
        dequantise: float,
        key: tuple[int | str, ...],
        group: int = 1,
    ) -> None:
        self.coupling = coupling
        self.facts = coupling.facts
        self.dequantise = dequantise
        self._data = data
        self._train = torch.as_tensor(data.train)
        self._conditions = tuple(conditions)
        self._order: Order = EpochOrder(len(self._train), key)
        labels = data.label_rows(data.train) if LABEL in self._conditions else None
        if labels is not None and group > 1:
            self._order = GroupedOrder(labels, group, key)
        # a small data set is kept in memory in network units; a large one is converted batch by batch
        small = len(self._train) * 4 * int(torch.Size(data.shape).numel()) <= self.CACHE_BYTES
        self._rows = data.network_rows(data.train) if small else None

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The pairs of samples ``start … start + count``."""
        index = self._order.indices(start, count)
        x1 = (
            self._rows.index_select(0, index)
            if self._rows is not None
            else self._data.network_rows(self._train[index].numpy())
        )
        if self.dequantise:
            x1 = x1 + self.dequantise * torch.randn(x1.shape, generator=generator)
        cond = self._data.cond_rows(self._train[index], self._conditions)
        return without_padding(self.coupling.pair(x1, cond, generator), self._data.mask)


@final
class StreamBatches:
    """Rows of a stream, in its order, paired with base noise by a coupling.

    Args:
        stage: gives stream, conditions and noise on discrete data.
        coupling: makes x0 for the rows.

    Attributes:
        facts: what holds for the coupling.
    """

    def __init__(self, stage: Stage, coupling: Coupling) -> None:
        assert stage.stream is not None, "the data are a stream"
        self.coupling, self.facts = coupling, coupling.facts
        self._stage, self._stream = stage, stage.stream
        self._origin: int | None = None  # row of the stream that is the first sample of the phase

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The pairs of samples ``start … start + count``; a phase goes on where the stream is at its first batch."""
        if self._origin is None:
            self._origin = self._stream.position - start
        x1, cond = self._stream.rows(self._origin + start, count)
        if self._stage.dequantise:
            x1 = x1 + self._stage.dequantise * torch.randn(x1.shape, generator=generator)
        kept = {name: cond[name] for name in self._stage.conditions}
        return without_padding(self.coupling.pair(x1, kept, generator), self._stage.data.mask)


def stage_batches(stage: Stage, coupling: Coupling, *tag: str, group: int = 1) -> DataBatches | StreamBatches:
    """Training rows of a stage, paired with base noise by a coupling.

    Args:
        stage: the stage.
        coupling: makes x0 for the rows.
        tag: tells several orders of one stage apart.
        group: number of consecutive rows that have one class.

    Raises:
        UserError: ``group`` > 1 for a stream with labels.
    """
    if stage.stream is not None:
        if group > 1 and LABEL in stage.conditions:
            stage.require_random_access("a batch of several rows of one class")
        return StreamBatches(stage, coupling)
    key: tuple[int | str, ...] = (stage.seed, stage.name, *tag)
    return DataBatches(stage.data, coupling, stage.conditions, stage.dequantise, key, group)


def without_padding(pair: Pair, mask: str | None) -> Pair:
    """The pair with zeros at the padding of x0 and x1.

    Args:
        pair: the pairs.
        mask: name of the condition with the valid entries; None for none.
    """
    if mask is None or mask not in pair.cond:
        return pair
    valid = spread(pair.cond[mask], pair.x1)
    return replace(pair, x0=pair.x0 * valid, x1=pair.x1 * valid)


@final
class StoredBatches:
    """Pairs from the training rows of a store, in shuffled epochs.

    Args:
        store: a complete store.
        facts: what holds for the coupling of its pairs.
        key: seed of the order, with any number of parts.
    """

    def __init__(self, store: PairStore, facts: Facts, key: tuple[int | str, ...]) -> None:
        self.facts = facts
        self._pairs = store.training_rows()
        self._order = EpochOrder(len(self._pairs), key)

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The pairs of samples ``start … start + count``."""
        columns = self._pairs.columns(self._order.indices(start, count))
        return Pair(columns.pop("x0"), columns.pop("x1"), columns)


@final
@dataclass
class MixedBatches:
    """Every sample is a synthetic pair with probability ``p(start)`` and a real one otherwise: ReFlow's mixed buffer.

    Args:
        synthetic: pairs that the teacher generated.
        real: pairs whose endpoint is a data row.
        share: p as a function of the samples seen.
        facts: what holds for the coupling of the mixture.
    """

    synthetic: Batches
    real: Batches
    share: Callable[[int], float]
    facts: Facts

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The pairs of samples ``start … start + count``, with the p of ``start``."""
        keep = torch.rand(count, generator=generator) < self.share(start)
        # both sides make the whole batch, so that the random numbers of one do not depend on the other's share
        synthetic, real = (
            self.synthetic.batch(start, count, generator),
            self.real.batch(start, count, generator),
        )
        return Pair(
            x0=_choose(keep, synthetic.x0, real.x0),
            x1=_choose(keep, synthetic.x1, real.x1),
            cond={name: _choose(keep, synthetic.cond[name], real.cond[name]) for name in synthetic.cond},
        )


@final
class BesideBatches:
    """Pairs that carry unrelated data rows in ``beside["real"]``, and their labels in ``beside["real_label"]``.

    Args:
        pairs: the pairs.
        data: gives the data rows, as the endpoints of its pairs.
    """

    def __init__(self, pairs: Batches, data: Batches) -> None:
        self.facts = pairs.facts
        self._pairs, self._data = pairs, data

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The pairs of samples ``start … start + count``, with as many data rows."""
        pair, data = self._pairs.batch(start, count, generator), self._data.batch(start, count, generator)
        beside = {"real": data.x1, **{f"real_{name}": value for name, value in data.cond.items()}}
        return replace(pair, beside=beside)


def _choose(keep: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    return torch.where(keep.view(-1, *(1,) * (yes.ndim - 1)), yes, no)
