"""What a method gets to plan a stage (:class:`Stage`), what it returns (:class:`Plan`), and its registry entry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn

from fewstep.data.dataset import LABEL, DataSet, Indices
from fewstep.flow.couplings import Facts, Pair, Source
from fewstep.methods.contract.objective import Batches, Objective
from fewstep.methods.contract.options import Options, PairOptions
from fewstep.methods.contract.teacher import Teacher
from fewstep.networks import default_network, resolve
from fewstep.solvers.maps import SampleRule


class Stream(Protocol):
    """Training rows that can be read in order only."""

    @property
    def position(self) -> int:
        """Rows that were handed out so far."""
        ...

    @property
    def fingerprint(self) -> str:
        """Digest of what a resumed run must find again."""
        ...

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of it, as JSON values; None where it has no state of its own."""
        ...

    def restore(self, state: dict[str, Any] | None, position: int) -> None:
        """Go to a position, by the state that was kept or by skipping rows."""

    def rows(self, start: int, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Rows ``start … start + count`` in network units, (count, ...), and their conditions."""
        ...

    @property
    def promise(self) -> str:
        """What a resumed training promises, in a sentence."""
        ...

    def refuse(self, what: str) -> None:
        """Raise the error that ``what`` needs random access."""


class World(Protocol):
    """The processes that train together; one process is the usual case."""

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        ...

    @property
    def size(self) -> int:
        """The number of processes."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        ...

    def barrier(self) -> None:
        """Wait until all processes have called it."""

    def average(self, value: Tensor) -> Tensor:
        """The mean over the processes of a tensor of equal shape in each, without a graph."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, (size * B, ...) of (B, ...), in the order of the global batch, without a graph."""
        ...

    def say(self, message: str) -> None:
        """Print a line, from the first process alone."""

    def progress(self, total: int, done: int, label: str) -> Any:
        """A progress display, a context manager, over ``total`` units of which ``done`` are done."""


@final
@dataclass(frozen=True)
class Stage:
    """What a method gets to plan a stage.

    Attributes:
        name: the stage's name in the recipe.
        folder: its folder; pairs are written below it.
        data: the training data.
        source: the base distribution ``x0 ~ p0``.
        seed: the recipe's seed.
        conditions: names of the conditions that networks are given, ``label`` first; empty for none.
        network: the resolved network configuration of the student.
        build: makes the student, with the stage's initial weights.
        teacher: the teacher; None for a stage without one.
        dequantise: standard deviation of the noise added to discrete data, in network units.
        world: the processes that train together.
        find: for options that name an earlier stage or a path: the folder of the stage of that name; a word that names
            no stage is returned unchanged.
        nulls: what replaces a condition in an unconditional call, by name: a number, or a tensor of one row's shape.
        stream: the stream that the training rows come from; ``data`` then holds its first rows. None for data with
            random access.
    """

    name: str
    folder: Path
    data: DataSet
    source: Source
    seed: int
    conditions: tuple[str, ...]
    network: dict[str, Any]
    build: Callable[[], nn.Module]
    teacher: Teacher | None
    dequantise: float
    world: World
    find: Callable[[str], str] = str
    nulls: Mapping[str, Any] = field(default_factory=dict)
    stream: Stream | None = None

    @property
    def conditional(self) -> bool:
        """Whether networks are given any condition."""
        return bool(self.conditions)

    @property
    def classes(self) -> int:
        """Number of classes whose labels networks are given, 0 for none."""
        return self.data.classes if LABEL in self.conditions else 0

    def cond_rows(self, indices: Indices) -> dict[str, Tensor]:
        """The conditions of these rows of the data, each (n, ...)."""
        return self.data.cond_rows(indices, self.conditions)

    def require_random_access(self, what: str) -> None:
        """Refuse ``what`` for a stream, whose rows can be read in order only.

        Raises:
            UserError: the data are a stream; the message says why.
        """
        if self.stream is not None:
            self.stream.refuse(what)


@final
@dataclass(frozen=True)
class Phase:
    """A part of a stage with one objective and one source of batches.

    Attributes:
        name: used in messages and folder names.
        samples: samples seen in the phase.
        prepare: called when the phase begins. Its argument is the student after the previous phase, with averaged
            weights, as a frozen teacher; None in the first phase. It may take minutes, for example to make pairs, and
            must go on where it stopped when it is called again.
    """

    name: str
    samples: int
    prepare: Callable[[Teacher | None], tuple[Objective, Batches]]


@final
@dataclass(frozen=True)
class Plan:
    """How a stage trains, and what holds for the model that it makes.

    Attributes:
        student: the module that is trained and kept.
        phases: the phases, in order.
        rule: how the result is sampled.
        facts: what holds for the coupling that the result was trained on.
        examples: for a base made from data, start points and contexts to sample from; kept with the model.
        null_trained: whether the network was also trained with the null label, which guidance needs.
        path: name of the affine path that it was trained on; solvers in data or noise form need it.
        features: digest of the features in its loss. A score by the same features would be biased, so they are refused
            in a comparison.
    """

    student: nn.Module
    phases: list[Phase]
    rule: SampleRule
    facts: Facts
    examples: Pair | None = None
    null_trained: bool = False
    path: str = "linear"
    features: str | None = None


def no_pairs(rows: int) -> int:
    """The number of pairs of a method that makes none: 0 for any number of training rows.

    >>> no_pairs(1000)
    0
    """
    return 0


@final
@dataclass(frozen=True)
class Needs:
    """What a stage needs, computed from its options before anything runs.

    Attributes:
        guidance: weight of the teacher's guidance that the result learns; 1 is none.
        features: the feature network in its loss, as the recipe names it; None for none.
        pairs: the number of pairs that are made for it, as a function of the number of training rows.
        pair_calls: network calls per pair; None if they are chosen by the pairs' error.
        other_calls: network calls per sample seen, beside those of the student's own update; a backward pass counts as
            two.
    """

    guidance: float = 1.0
    features: str | None = None
    pairs: Callable[[int], int] = no_pairs
    pair_calls: int | None = None
    other_calls: int = 0


def pair_needs(options: PairOptions, pairs: Callable[[int], int] | None = None) -> Needs:
    """The needs of a stage that learns from stored pairs.

    Args:
        options: of the stage.
        pairs: number of pairs as a function of the number of training rows; None for ``options.pairs``.
    """
    return Needs(guidance=options.guidance, pairs=pairs or (lambda rows: options.pairs), pair_calls=options.nfe)


def context_size(data: DataSet) -> int:
    """Number of values (vectors) or channels (images) of the data's condition ``context``, 0 without one."""
    return data.conditions["context"].shape[1] if "context" in data.conditions else 0


def velocity_network(
    options: Options, data: DataSet, config: Mapping[str, Any], classes: int, **changes: Any
) -> dict[str, Any]:
    """The resolved configuration of a velocity network ``v(x, t)``, by :func:`fewstep.networks.resolve`.

    Args:
        options: of the stage.
        data: the training data.
        config: the network as the recipe describes it; empty for the default for the data's shape.
        classes: number of classes whose labels the network is given, 0 for none.
        changes: ``context=`` and entries of the configuration that the method sets.
    """
    context = changes.pop("context", 0) or context_size(data)
    chosen = config or default_network(data.shape)
    return resolve({**chosen, **changes}, data.shape, classes=classes, context=context)


@final
@dataclass(frozen=True)
class Spec:
    """A method's registry entry.

    Attributes:
        options: the class of its options.
        plan: makes the plan of a stage from options and stage.
        summary: one line for ``fewstep list methods``.
        learns_from: what it learns from, in words.
        cite: keys into :mod:`fewstep.citations`.
        makes: ``velocity``, which later stages can learn from, or ``map`` or ``features``, which they cannot.
        needs: the needs of a stage, from its options.
        network: returns the resolved configuration of the student's network; same arguments as
            :func:`velocity_network`. It refuses data whose shape the options do not fit, before anything is trained.
        starts_from_maps: whether ``init`` may name a one-step map. The map's network must have the student's signature.
    """

    options: type[Options]
    plan: Callable[[Any, Stage], Plan]
    summary: str
    learns_from: str
    cite: tuple[str, ...]
    makes: Literal["velocity", "map", "features"] = "velocity"
    needs: Callable[[Any], Needs] = lambda options: Needs()
    network: Callable[[Any, DataSet, Mapping[str, Any], int], dict[str, Any]] = velocity_network
    starts_from_maps: bool = False
