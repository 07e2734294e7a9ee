"""What a method is given to plan a stage, the plan, and a method's line in the registry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, final

import torch
from torch import Tensor, nn

from fewstep.data.dataset import DataSet
from fewstep.flow.couplings import Facts, Pair, Source
from fewstep.methods.contract.objective import Batches, Objective
from fewstep.methods.contract.options import Options
from fewstep.methods.contract.teacher import Teacher
from fewstep.solvers.maps import SampleRule


class World(Protocol):
    """The processes that work together."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def barrier(self) -> None: ...
    def average(self, value: Tensor) -> Tensor: ...
    def say(self, message: str) -> None: ...
    def progress(self, total: int, done: int, label: str) -> Any: ...


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


@final
@dataclass(frozen=True)
class Spec:
    """A method's line in the registry.

    Attributes:
        options: its options.
        plan: makes the plan of a stage.
        summary: one line for ``fewstep list methods``.
        needs: what it learns from, in words.
        cite: keys into :mod:`fewstep.citations`.
        context: context values or channels its networks take, from the options and the data's shape.
        changes: entries of the network's configuration that the options set, from the options and the data's shape;
            refuses a shape that the options have no meaning for, before anything is trained.
        makes: ``velocity``, which later stages can learn from, or ``map`` or ``features``, which they cannot.
        network: resolves the stage's network where that is no velocity network, from the options and the data.
        online_calls: the teacher's network calls for every sample seen in training, from the options.
        starts_from_maps: whether ``init`` may name a one-step map, whose network is called as the student's.
    """

    options: type[Options]
    plan: Callable[[Any, Stage], Plan]
    summary: str
    needs: str
    cite: tuple[str, ...]
    context: Callable[[Any, tuple[int, ...]], int] = lambda options, shape: 0
    changes: Callable[[Any, tuple[int, ...]], dict[str, Any]] = lambda options, shape: {}
    makes: Literal["velocity", "map", "features"] = "velocity"
    network: Callable[[Any, DataSet], dict[str, Any]] | None = None
    online_calls: Callable[[Any], int] = lambda options: 0
    starts_from_maps: bool = False
