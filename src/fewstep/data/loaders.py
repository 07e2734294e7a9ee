"""A loader that gives batches in order: how it is started again, what is known of its order, and its own state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, final, runtime_checkable

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from fewstep.data.plain_state import NotPlain, from_plain, to_plain
from fewstep.errors import UserError

__all__ = ["HasEpoch", "HasState", "Loader", "known_order"]


@runtime_checkable
class HasEpoch(Protocol):
    """A loader, sampler or data set whose order is a function of the epoch that it is told."""

    def set_epoch(self, epoch: int) -> Any:
        """Tell it the number of the epoch that begins, from 0."""
        ...


@runtime_checkable
class HasState(Protocol):
    """A loader that can tell and take up its position."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last item that it gave."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Go on from that position with the next ``iter()``."""
        ...


def _sampler(loader: DataLoader[Any]) -> Any:
    """What decides the order of a map-style loader."""
    batches = loader.batch_sampler
    if not isinstance(batches, BatchSampler):
        return loader.sampler if batches is None else batches
    usual = type(batches).__module__.split(".")[0] in ("torch", "torchdata")
    return batches.sampler if usual else batches


def known_order(loader: Any) -> tuple[bool, str]:
    """Whether a second run gives the same rows in the same order, as far as the loader tells, and a sentence on it.

    >>> known_order(DataLoader([1, 2, 3], shuffle=True))[0]
    False
    """
    if not isinstance(loader, DataLoader):
        return False, "whether it gives the same rows in the same order again cannot be told from outside"
    if isinstance(loader.dataset, IterableDataset):
        return False, "the order of its iterable data set cannot be told from outside"
    sampler = _sampler(loader)
    if isinstance(sampler, HasEpoch):
        return True, "its sampler's order is a function of the epoch"
    if isinstance(sampler, SequentialSampler):
        return True, "its order is that of the data set"
    if isinstance(sampler, RandomSampler):
        if sampler.generator is not None:
            return True, "its order is drawn by the generator that it was given"
        return (
            False,
            "it shuffles with a new seed in every run; give DataLoader a generator=torch.Generator() with a seed",
        )
    return False, f"the order of its sampler {type(sampler).__name__} cannot be told from outside"


@final
class Loader:
    """Starts a loader again for every epoch, and keeps its state.

    Args:
        source: an iterable of batches, or a function that returns an iterator.
        restart: makes an iterable for a further pass, for a source that cannot be iterated twice.
        what: how errors name it.

    Attributes:
        can_restart: whether it can be iterated from its start again.
    """

    def __init__(self, source: Any, restart: Callable[[], Iterable[Any]] | None, what: str) -> None:
        self.source, self.what = source, what
        self._started = False
        function = callable(source) and not isinstance(source, Iterable)
        if not function and not isinstance(source, Iterable):
            raise UserError(
                f"{what} is a {type(source).__name__}, which cannot be iterated. Give a DataLoader, an iterable of "
                "batches, or a function that returns an iterator of batches."
            )
        self._function = function
        self._again: Callable[[], Iterable[Any]] | None = source if function else restart
        once = isinstance(source, Iterator)
        self.can_restart = not once or restart is not None
        self._told = [part for part in _parts(source) if isinstance(part, HasEpoch)]
        self._generators = _generators(source)
        self._seeds = [generator.get_state() for generator in self._generators]
        # a generator goes on drawing in later epochs, and the loader's own state does not bring that back
        usable = isinstance(source, HasState) and self.can_restart and not self._generators
        self._stateful: HasState | None = source if usable else None
        # a loader that was sent to a position may begin there again in every epoch; torch's loaders do not
        returns = usable and not isinstance(source, DataLoader)
        self._start = source.state_dict() if returns else None
        self._loaded = self._moved = False

    def rewind(self) -> None:
        """Bring the generators that draw the order back to where they were when the stream was made."""
        for generator, state in zip(self._generators, self._seeds, strict=True):
            generator.set_state(state)

    def begin(self, epoch: int) -> Iterator[Any]:
        """An iterator over the batches of an epoch.

        Raises:
            UserError: it cannot be iterated a second time.
        """
        if self._started and not self.can_restart:
            raise UserError(
                f"{self.what} is an iterator, which ends and cannot be started again. Give what makes it: the "
                "DataLoader, the generator function without calling it, or restart=function."
            )
        if self._moved and not self._loaded and self._stateful is not None and self._start is not None:
            self._stateful.load_state_dict(copy.deepcopy(self._start))
        self._loaded = False
        for part in self._told:
            part.set_epoch(epoch)
        first, self._started = not self._started, True
        made = self.source if self._again is None or (first and not self._function) else self._again()
        return iter(made)

    def state(self) -> Any:
        """Its position as JSON values; None where it has none that can be kept so."""
        if self._stateful is None:
            return None
        try:
            return to_plain(self._stateful.state_dict())
        except NotPlain:
            self._stateful = None
            return None

    def load_state(self, state: Any) -> bool:
        """Go on from a position with the next :meth:`begin`; False where it cannot."""
        if self._stateful is None:
            return False
        self._started = self._loaded = self._moved = True
        self._stateful.load_state_dict(from_plain(state))
        return True


def _parts(source: Any) -> list[Any]:
    """A loader and what it is made of."""
    if not isinstance(source, DataLoader):
        return [source]
    return [source, source.sampler, source.batch_sampler, source.dataset]


def _generators(source: Any) -> list[torch.Generator]:
    """The generators that draw the order of a loader, each once."""
    if not isinstance(source, DataLoader):
        return []
    found = [source.generator]
    sampler = _sampler(source) if not isinstance(source.dataset, IterableDataset) else None
    if isinstance(sampler, RandomSampler):
        found.append(sampler.generator)
    return list({id(one): one for one in found if one is not None}.values())
