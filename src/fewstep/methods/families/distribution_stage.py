"""A stage of distribution matching: its options, its start, and :mod:`~fewstep.methods.families.distribution`.

Distribution matching moves a generator's samples towards the teacher's, and fills a mode only slowly where no sample is
near it. The teacher's first call puts all samples near the data's mean, and runs that started there lost modes (recall
.59 and .80 on digits). So a first phase distils a consistency model: blurred, with every mode, without pairs
(:mod:`~fewstep.methods.families.consistency_loss`). A student with ``init`` skips that phase.
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
from fewstep.methods.contract.objective import Batches, Learning, Objective
from fewstep.methods.contract.options import require_teacher
from fewstep.methods.contract.stage import Needs, Phase, Plan, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.consistency_loss import Consistency
from fewstep.methods.families.distribution import (
    DistributionMatching,
    Divergence,
    OnlineLoss,
    PerCall,
    Setting,
    flow_matching_loss,
)
from fewstep.methods.families.velocity_source import LawOfTime, MapOptions, velocity_source
from fewstep.methods.guards.divergence import DivergenceGuard
from fewstep.solvers.maps import SampleRule

START_HALVINGS = 4  # of the gap in the first phase, which needs every mode but no accuracy


class MatchingOptions(MapOptions):
    """Options that the methods of this family share."""

    samples: int = Field(400_000, gt=0, description="samples seen in the stage, over both phases")
    start: float = Field(0.25, ge=0, lt=1, description="share of them in a first phase of consistency distillation")
    start_lr: float = Field(2e-3, gt=0, description="peak learning rate of that phase")
    lr: float = Field(5e-4, gt=0, description="peak learning rate of the generator")
    ema: float = Field(0.995, ge=0, lt=1, description="largest decay of the generator's weight average, per step")
    online_lr: float = Field(1e-3, gt=0, description="peak learning rate of the online model")
    online_ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the online model's average, which the generator is compared with; 0: the model itself",
    )
    online_turns: int = Field(2, gt=0, description="updates of the online model per update of the generator")
    head_start: float = Field(
        0.05, ge=0, lt=1, description="share of the second phase in which the online model learns alone"
    )
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
    """A copy of the teacher that learns; of several calls, one copy for every call."""
    assert isinstance(teacher.velocity, nn.Module), "a teacher is a network"
    model = copy.deepcopy(teacher.velocity).requires_grad_(True)
    return model if steps == 1 else PerCall(model, steps)


def plan_matching(
    options: MatchingOptions, stage: Stage, divergence: Divergence, online_loss: OnlineLoss = flow_matching_loss
) -> Plan:
    """Two phases: consistency distillation (``start``), then distribution matching (``game``).

    The batches are data rows, of which the labels are used, and the rows where the method's loss takes them.

    Raises:
        UserError: a teacher whose states are not noised data, guidance it cannot take, or a base that is not Gaussian.
    """
    source, teacher = velocity_source(options, stage), stage.teacher
    assert teacher is not None
    if not stage.source.gaussian:
        raise UserError(
            f"method {options.method!r} noises the generator's samples with fresh Gaussian noise, and this recipe has "
            "another base: leave 'base' out, or distil with 'distill'."
        )
    student, first = stage.build(), int(options.start * options.samples)

    def start(_: Teacher | None) -> tuple[Objective, Batches]:
        objective = Consistency(student.to(stage.world.device), source, make_time_law("uniform"), START_HALVINGS)
        objective.learning = {"student": Learning(options.start_lr)}
        return objective, source.batches()

    def match(previous: Teacher | None) -> tuple[Objective, Batches]:
        if previous is not None:
            student.load_state_dict(previous.state)  # its average, not its last weights
        guard = DivergenceGuard(student, stage, advice(options))
        online = online_model(teacher, options.steps).to(stage.world.device)
        assert source.velocity is not None
        setting = make_setting(options, float(guard.rows.x1.std()))
        objective = DistributionMatching(
            student, online, source.velocity, source.path, divergence, setting, online_loss, guard
        )
        return objective, source.batches()

    phases = [Phase("start", first, start)] if first else []
    phases.append(Phase("game", options.samples - first, match))
    return Plan(student, phases, generator_rule(options.steps), source.facts, path=source.path_name)


def make_setting(options: MatchingOptions, spread: float) -> Setting:
    """The constants of the second phase; ``spread`` is the standard deviation of the data's values."""
    return Setting(
        make_time_law(options.time),
        latest=options.latest,
        spread=spread,
        steps=options.steps,
        online_turns=options.online_turns,
        head_start=int(options.head_start * (1 - options.start) * options.samples / options.batch_size),
        online_lr=options.online_lr,
        online_ema=options.online_ema,
        checkpointing=options.checkpointing,
    )


def advice(options: MatchingOptions) -> str:
    """What to change when training diverges."""
    return (
        f"Raise online_turns (now {options.online_turns}), or lower lr (now {options.lr:g}) or online_lr (now "
        f"{options.online_lr:g})."
    )


def generator_rule(steps: int) -> SampleRule:
    """A generator of k calls at 0, 1/k, … can be sampled with every divisor of k calls too."""
    divisors = tuple(number for number in range(1, steps + 1) if steps % number == 0)
    sampler: Literal["euler", "restart"] = "euler" if steps == 1 else "restart"
    return SampleRule(kind="map", steps=divisors, default_steps=steps, sampler=sampler)


def matching_needs(options: MatchingOptions) -> Needs:
    """Network calls per sample beside the generator's own update; a backward pass counts as two calls."""
    generated = options.online_turns * options.steps + (options.steps - 1)
    calls = generated + 3 * (options.online_turns + 1 + calls_at(options.guidance))
    return Needs(guidance=options.guidance, teacher_calls=calls)
