"""What a method is.

A method's :class:`Spec` names its options and makes a :class:`Plan` for a stage: the student it trains and a list of
phases. A :class:`Phase` prepares an :class:`Objective` (modules by role, whose turn it is, the loss) and the batches it
learns from. The trainer knows roles, turns and samples seen; it knows no paper.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, final

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fewstep.data.dataset import DataSet
from fewstep.errors import UserError
from fewstep.flow.couplings import Facts, Pair, Source
from fewstep.flow.field import Guided, Velocity
from fewstep.flow.grids import explicit_times, make_grid
from fewstep.flow.noise import Draws
from fewstep.solvers.tables import find_solver


class Options(BaseModel):
    """Options every stage has; a method's own options extend them. Unknown keys are refused.

    Progress is measured in samples seen: ``samples`` is the stage's total over all its phases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    method: str
    teacher: str | None = Field(None, description="the stage this one learns from")
    init: str | None = Field(None, description="the stage whose EMA weights the student starts from")
    network: dict[str, Any] | str | None = Field(None, description="overrides the recipe's network")
    samples: int = Field(1_000_000, gt=0, description="samples seen in the stage, over all phases")
    batch_size: int = Field(256, gt=0)
    lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW; warm-up, then cosine to zero")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of a phase's samples in linear warm-up")
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    ema: float = Field(0.998, ge=0, lt=1, description="largest decay of the weight average, per step")
    precision: Literal["fp32", "bf16"] = "fp32"


def require_teacher(options: Options) -> None:
    """Refuse a stage that names no teacher, of a method that cannot do without."""
    if options.teacher is None:
        raise ValueError(f"method {options.method!r} learns from a teacher: add 'teacher: STAGE'")


def require_whole_steps(solver: str, nfe: int) -> None:
    """Refuse a number of calls that is no whole number of the solver's steps."""
    calls = find_solver(solver).calls
    if nfe % calls:
        raise ValueError(f"nfe = {nfe} is no multiple of the {calls} calls that a step of {solver!r} makes")


def baked_in(guidance: float) -> float | None:
    """A stage's guidance as its model's facts have it: None where there is none."""
    return None if guidance == 1.0 else guidance


class PairOptions(Options):
    """Options of methods that learn from pairs (noise, teacher's endpoint)."""

    pairs: int = Field(20_000, gt=0, description="generated pairs per round")
    solver: str = Field("rk4", description="the solver that makes the pairs")
    grid: str = Field("uniform", description="the named time grid of those solves")
    nfe: int | None = Field(None, gt=0, description="network calls per pair; chosen by the error gate when absent")
    tolerance: float = Field(0.02, gt=0, description="largest relative endpoint error of the pairs")
    guidance: float = Field(1.0, ge=0, description="teacher's guidance, baked into the pairs")

    @model_validator(mode="after")
    def _needs_teacher(self) -> PairOptions:
        require_teacher(self)
        return self

    @model_validator(mode="after")
    def _known_solver(self) -> PairOptions:
        if self.solver in ("auto", "fitted"):
            raise ValueError("pairs are made in both directions by a solver of known order: name one, such as 'rk4'")
        solver = find_solver(self.solver)
        if solver.stochastic:
            raise ValueError(f"solver {self.solver!r} adds noise, and a pair is a noise with its one endpoint")
        if not solver.converges:
            raise ValueError(f"solver {self.solver!r} follows straight flows only: make pairs with another, as 'rk4'")
        if explicit_times(self.grid) is not None:
            raise ValueError(f"pairs need a named grid, for any number of steps (got {self.grid!r})")
        make_grid(self.grid, 2)
        if self.nfe is not None:
            require_whole_steps(self.solver, self.nfe)
        return self


@final
@dataclass(frozen=True)
class Learning:
    """How one role learns, where it differs from the stage's options.

    Attributes:
        lr: peak learning rate; None is the stage's. Warm-up and cosine are the stage's too.
        betas: of AdamW.
        begins: optimiser steps of the phase before the role's first turn; its warm-up begins there.
    """

    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    begins: int = 0


@final
class Collapse(UserError):
    """Training goes so badly that going on is a waste."""


class Objective(ABC):
    """The loss of a phase and the modules it trains.

    Attributes:
        modules: the trained modules by role; ``student`` is the one that is kept. In a role's turn its own module
            has gradients (averaged over the processes), all others are frozen.
        learning: how roles learn that differ from the stage's options.
        state: tensors beside the modules' that later steps depend on, changed in place; checkpoints keep them.
        checks: how often in the phase :meth:`check` is called, evenly.
    """

    modules: dict[str, nn.Module]
    learning: Mapping[str, Learning] = MappingProxyType({})
    state: Mapping[str, Tensor] = MappingProxyType({})
    checks: int = 0

    def turns(self, step: int) -> tuple[str, ...]:
        """The roles that learn at optimiser step ``step`` of the phase, in order."""
        return ("student",)

    @abstractmethod
    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        """Named scalar terms; ``"loss"`` is the one that is minimised for ``role``."""

    def check(self, ema: Mapping[str, Tensor]) -> dict[str, float]:
        """Named numbers that tell how training goes, from the student's averaged weights.

        Raises:
            Collapse: it goes so badly that going on is a waste; says what to change.
        """
        return {}

    def best(self) -> Mapping[str, Tensor] | None:
        """The student's averaged weights at the best of the checks, where they are kept."""
        return None


class Batches(Protocol):
    """Where a phase's training pairs come from."""

    facts: Facts

    def batch(self, start: int, count: int, generator: torch.Generator) -> Pair:
        """The global batch of samples ``start … start + count`` of the phase; a function of its arguments alone."""
        ...


@final
@dataclass(frozen=True)
class Teacher:
    """A frozen model that a stage learns from: EMA weights, eval mode, no gradients.

    Attributes:
        velocity: ``v(x, t, **cond)``.
        digest: hash of its weights.
        guidance: guidance already baked into its weights, or None.
        guidable: whether it has learned without labels too.
        path: the affine path it was trained on.
        name: what to call it in messages.
        independent: whether it was trained on noise independent of the data, so that the path has its marginals.
    """

    velocity: Velocity
    digest: str
    guidance: float | None = None
    name: str = "teacher"
    state: Mapping[str, Tensor] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    guidable: bool = True
    path: str = "linear"
    independent: bool = True

    def follows_data(self, scale: float) -> bool:
        """Whether its endpoints, with guidance ``scale``, are to have the law of the data."""
        return scale == 1.0 and self.guidance in (None, 1.0)

    def require_noised_data(self, method: str) -> None:
        """Refuse to be asked at noised data where its own states are others."""
        if not self.independent:
            raise UserError(
                f"method {method!r} asks the teacher at noised data, and {self.name!r} does not pass through "
                "those: it was trained on dependent pairs (reflow, optimal transport ...). Learn from a flow_matching "
                "stage with 'coupling: independent'."
            )

    def guided(self, scale: float) -> Velocity:
        """The velocity with guidance ``scale``; refuses to guide twice."""
        if scale == 1.0:
            return self.velocity
        if self.guidance not in (None, 1.0):
            raise UserError(
                f"guidance {scale} asked of {self.name!r}, which already has guidance {self.guidance} baked in: "
                "guiding twice is wrong. Leave guidance out of this stage, or learn from the unguided teacher."
            )
        if not self.guidable:
            raise UserError(
                f"guidance {scale} asked of {self.name!r}, which never learned without labels: guidance compares the "
                "two. Bake it in from the teacher that was trained with label_dropout."
            )
        return Guided(self.velocity, scale)


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
class SampleRule:
    """How a finished network is sampled.

    Attributes:
        kind: ``velocity`` (any solver, any number of steps), ``map`` (its own sampler), or ``features`` (no sampler).
        steps: the step counts it was made for; None for any.
        multiple: multiples of these step counts are right too.
        default_steps: steps when the user names none.
        sampler: of a map: ``euler``: one call ``v(x, t)`` per step; ``chain``: one call ``u(x, t, r)`` per step, to the
            step's end; ``restart``: to the data and back to fresh noise.
    """

    kind: Literal["velocity", "map", "features"] = "velocity"
    steps: tuple[int, ...] | None = None
    default_steps: int = 50
    multiple: bool = False
    sampler: Literal["euler", "chain", "restart"] = "euler"


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
