"""What a method is given to plan a stage, the plan, and a method's line in the registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn

from fewstep.data.dataset import DataSet
from fewstep.flow.couplings import Facts, Pair, Source
from fewstep.methods.contract.objective import Batches, Objective
from fewstep.methods.contract.options import Options, PairOptions
from fewstep.methods.contract.teacher import Teacher
from fewstep.networks import default_network, resolve
from fewstep.solvers.maps import SampleRule


class World(Protocol):
    """The processes that work together."""

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
        """Where this process computes."""
        ...

    def barrier(self) -> None:
        """Wait for all processes."""

    def average(self, value: Tensor) -> Tensor:
        """The mean of a tensor over the processes, without a graph."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the global batch, without a graph."""
        ...

    def say(self, message: str) -> None:
        """Print a line, once for all processes."""

    def progress(self, total: int, done: int, label: str) -> Any:
        """A progress display over ``total`` units of which ``done`` are done."""


@final
@dataclass(frozen=True)
class Stage:
    """What a method is given to plan a stage.

    Attributes:
        name: the stage's name in the recipe.
        folder: its folder, for pairs and the like.
        data: the training data.
        source: the base distribution ``x0 ~ p0``.
        seed: the recipe's seed.
        conditional: whether networks see the labels.
        network: the resolved network configuration of the student.
        build: makes the student, started from the stage's initial weights.
        teacher: the teacher, None for a method without one.
        dequantise: standard deviation of the noise added to discrete data, network units.
        world: the processes at work.
        find: the folder of an earlier stage by its name; any other word is returned as it is.
    """

    name: str
    folder: Path
    data: DataSet
    source: Source
    seed: int
    conditional: bool
    network: dict[str, Any]
    build: Callable[[], nn.Module]
    teacher: Teacher | None
    dequantise: float
    world: World
    find: Callable[[str], str] = str


@final
@dataclass(frozen=True)
class Phase:
    """A part of a stage with one objective and one set of batches.

    Attributes:
        name: used in messages and folder names.
        samples: samples seen in the phase.
        prepare: called when the phase begins, with the student as the previous phase left it (its EMA as a frozen
            teacher; None in the first phase); may take minutes, and must be resumable.
    """

    name: str
    samples: int
    prepare: Callable[[Teacher | None], tuple[Objective, Batches]]


@final
@dataclass(frozen=True)
class Plan:
    """A stage made concrete.

    Attributes:
        student: the module that is trained and kept.
        phases: what happens, in order.
        rule: how the result is sampled.
        facts: what is true of the coupling the result was trained on.
        examples: for a base made from data: starts and contexts to sample from, kept with the model.
        null_trained: whether the network has learned without labels too, which guidance needs.
        path: the affine path it was trained on, which data- and noise-form solvers need.
        features: digest of the features in its loss, which must not judge it.
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
    """The pairs of a method that makes none."""
    return 0


@final
@dataclass(frozen=True)
class Needs:
    """What a stage asks for, read off its options before anything runs.

    Attributes:
        guidance: weight that is baked into the result; 1 is none.
        features: the feature network in its loss, in the recipe's word; None for none.
        pairs: the number of pairs that are made for it, from the number of training rows.
        pair_calls: network calls per pair; None where the error gate chooses them.
        teacher_calls: network calls of frozen networks per sample seen in training.
    """

    guidance: float = 1.0
    features: str | None = None
    pairs: Callable[[int], int] = no_pairs
    pair_calls: int | None = None
    teacher_calls: int = 0


def pair_needs(options: PairOptions, pairs: Callable[[int], int] | None = None) -> Needs:
    """What a stage that learns from pairs needs: ``options.pairs`` of them, or what ``pairs`` says."""
    return Needs(guidance=options.guidance, pairs=pairs or (lambda rows: options.pairs), pair_calls=options.nfe)


def velocity_network(
    options: Options, data: DataSet, config: Mapping[str, Any], classes: int, **changes: Any
) -> dict[str, Any]:
    """The resolved configuration of a velocity network, :func:`fewstep.networks.resolve`.

    Args:
        options: of the stage.
        data: the training data.
        config: what the recipe says of the network; empty takes the default for the data's shape.
        classes: number of labels that the network sees, 0 for none.
        changes: ``context=`` and entries of the configuration that the method sets.
    """
    context = changes.pop("context", 0)
    chosen = config or default_network(data.shape)
    return resolve({**chosen, **changes}, data.shape, classes=classes, context=context)


@final
@dataclass(frozen=True)
class Spec:
    """A method's line in the registry.

    Attributes:
        options: its options.
        plan: makes the plan of a stage.
        summary: one line for ``fewstep list methods``.
        learns_from: what it learns from, in words.
        cite: keys into :mod:`fewstep.citations`.
        makes: ``velocity``, which later stages can learn from, or ``map`` or ``features``, which they cannot.
        needs: what a stage asks for, from its options.
        network: the resolved configuration of the student's network, called as :func:`velocity_network`. It refuses a
            shape for which the options have no meaning, before anything is trained.
        starts_from_maps: whether ``init`` may name a one-step map, whose network is called as the student's.
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
