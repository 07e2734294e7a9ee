"""A stage of distribution matching: its options, its start, and :mod:`~fewstep.methods.families.distribution`.

The game pulls a generator's samples to where the teacher would have them: modes that no sample is near stay empty for
long. The teacher's own first call, the natural start otherwise, has all its samples in one place. So a first phase
distils a consistency model (:mod:`~fewstep.methods.consistency`), which is blurred but has every mode, and needs no
pairs. A student with ``init`` has its start already.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator
from torch import nn

from fewstep.errors import UserError
from fewstep.flow.field import calls_at
from fewstep.flow.time_laws import make_time_law
from fewstep.methods.consistency import Consistency
from fewstep.methods.contract.objective import Batches, Learning, Objective
from fewstep.methods.contract.options import require_teacher
from fewstep.methods.contract.stage import Phase, Plan, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.distribution import (
    DistributionMatching,
    Divergence,
    OnlineLoss,
    PerCall,
    flow_matching_loss,
)
from fewstep.methods.families.velocity_source import LawOfTime, MapOptions, VelocitySource, velocity_source
from fewstep.methods.guards.divergence import DivergenceGuard
from fewstep.solvers.maps import SampleRule

START_STAGES = 4  # halvings of the start's gap: a map that has all modes, not an exact one


class MatchingOptions(MapOptions):
    """Options that the methods of this family share."""

    samples: int = Field(400_000, gt=0, description="samples of the start and of the generator's part of the game")
    start: float = Field(0.25, ge=0, lt=1, description="share of them in a first phase of consistency distillation")
    start_lr: float = Field(2e-3, gt=0, description="peak learning rate of that phase")
    lr: float = Field(5e-4, gt=0, description="peak learning rate of the generator")
    ema: float = Field(0.995, ge=0, lt=1, description="largest decay of the generator's weight average, per step")
    online_lr: float = Field(1e-3, gt=0, description="peak learning rate of the online model")
    online_ema: float = Field(
        0.0, ge=0, lt=1, description="decay of the online model's average, at which the generator looks; 0: at itself"
    )
    online_turns: int = Field(2, gt=0, description="updates of the online model per update of the generator")
    head_start: float = Field(0.05, ge=0, lt=1, description="share of the game in which the online model learns alone")
    steps: int = Field(1, gt=0, le=16, description="calls the generator is made for, with fresh noise between them")
    time: LawOfTime = Field("exponential:1", description="law of the path's times, shrunk to [0, latest]")
    latest: float = Field(0.98, gt=0, le=1, description="last time: nearer the data, velocities are all noise")
    checkpointing: bool = Field(False, description="recompute the frozen networks in the backward pass: less memory")

    @model_validator(mode="before")
    @classmethod
    def _started_already(cls, fields: Any) -> Any:
        return {"start": 0.0, **fields} if isinstance(fields, Mapping) and fields.get("init") else fields

    @model_validator(mode="after")
    def _has_a_teacher(self) -> MatchingOptions:
        require_teacher(self)
        return self


def online_model(teacher: Teacher, steps: int) -> nn.Module:
    """A copy of the teacher that learns, one for every call."""
    assert isinstance(teacher.velocity, nn.Module), "a teacher is a network"
    model = copy.deepcopy(teacher.velocity).train().requires_grad_(True)
    return model if steps == 1 else PerCall(model, steps)


def plan_matching(
    options: MatchingOptions, stage: Stage, divergence: Divergence, online_loss: OnlineLoss = flow_matching_loss
) -> Plan:
    """The start and the game, on data rows, of which labels are used, and where the method says so the rows.

    Raises:
        UserError: a teacher whose states are not noised data, guidance it cannot take, or a base that is no Gaussian.
    """
    source, teacher = velocity_source(options, stage), stage.teacher
    assert teacher is not None
    if not stage.source.gaussian:
        raise UserError(
            f"method {options.method!r} noises the generator's samples with fresh Gaussian noise, and this recipe has "
            "another base: leave 'base' out, or distil with 'distill'."
        )
    student, first = stage.build(), int(options.start * options.samples)

    def begin(_: Teacher | None) -> tuple[Objective, Batches]:
        total = -(-first // options.batch_size)
        objective = Consistency(student.to(stage.world.device), source, make_time_law("uniform"), total, START_STAGES)
        objective.learning = {"student": Learning(options.start_lr)}
        return objective, source.batches()

    def play(previous: Teacher | None) -> tuple[Objective, Batches]:
        if previous is not None:
            student.load_state_dict(previous.state)  # its average, not its last weights
        watch = DivergenceGuard(student, stage, advice(options))
        return game(options, stage, student, source, divergence, online_loss, watch), source.batches()

    phases = [Phase("start", first, begin)] if first else []
    phases.append(Phase("game", options.samples - first, play))
    return Plan(student, phases, generator_rule(options.steps), source.facts, path=source.path_name)


def game(
    options: MatchingOptions,
    stage: Stage,
    student: nn.Module,
    source: VelocitySource,
    divergence: Divergence,
    online_loss: OnlineLoss,
    watch: DivergenceGuard,
) -> DistributionMatching:
    """The objective of the second phase."""
    assert stage.teacher is not None
    assert source.velocity is not None
    return DistributionMatching(
        student,
        online_model(stage.teacher, options.steps).to(stage.world.device),
        source.velocity,
        source.path,
        divergence,
        make_time_law(options.time),
        latest=options.latest,
        spread=float(watch.rows.x1.std()),
        steps=options.steps,
        turns=options.online_turns,
        head_start=int(options.head_start * (1 - options.start) * options.samples / options.batch_size),
        online_lr=options.online_lr,
        online_ema=options.online_ema,
        online_loss=online_loss,
        checkpointing=options.checkpointing,
        watch=watch,
    )


def advice(options: MatchingOptions) -> str:
    """What to change when the game goes wrong."""
    return (
        f"Raise online_turns (now {options.online_turns}), or lower lr (now {options.lr:g}) or online_lr (now "
        f"{options.online_lr:g})."
    )


def generator_rule(steps: int) -> SampleRule:
    """A generator of k calls at 0, 1/k, ... is one of every divisor of k calls too."""
    divisors = tuple(number for number in range(1, steps + 1) if steps % number == 0)
    sampler: Literal["euler", "restart"] = "euler" if steps == 1 else "restart"
    return SampleRule(kind="map", steps=divisors, default_steps=steps, sampler=sampler)


def online_calls(options: MatchingOptions) -> int:
    """Network calls of a sample of the game beside the generator's own update, a backward pass counted as two."""
    generated = options.online_turns * options.steps + (options.steps - 1)
    return generated + 3 * (options.online_turns + 1 + calls_at(options.guidance))
