"""The stages of distribution matching: options, a first phase, and :mod:`~fewstep.methods.families.distribution`.

Distribution matching moves samples from one mode of the data to another only slowly. With the teacher's own weights the
generator's samples all lie near the data's mean, and some runs that started there ended without some of the modes: on
digits, one seed of three had a recall of .80 with SiD and of .59 with DMD, instead of .93 or more. So a first phase
distils a consistency model (:mod:`~fewstep.methods.families.consistency_loss`), whose samples are blurred but have
every mode; it needs no pairs. A student with ``init`` has no first phase.
"""

from __future__ import annotations

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
from fewstep.networks.foreign import trainable_copy
from fewstep.solvers.maps import SampleRule

START_HALVINGS = 4  # of the gap in the first phase: it needs all modes, not accuracy; chosen, not tuned

ONLINE_EMA = "decay, per update, of the online model's weight average in the student's loss; 0: present weights"


class MatchingOptions(MapOptions):
    """Options that the methods of this family share."""

    samples: int = Field(400_000, gt=0, description="samples seen in the stage, over all phases")
    start: float = Field(0.25, ge=0, lt=1, description="share of the samples in a phase of consistency distillation")
    start_lr: float = Field(2e-3, gt=0, description="peak learning rate of the student in that phase")
    lr: float = Field(5e-4, gt=0, description="peak learning rate of the student: warm-up, then cosine to zero")
    ema: float = Field(0.995, ge=0, lt=1, description="largest decay of the student's weight average, per step")
    online_lr: float = Field(1e-3, gt=0, description="peak learning rate of the online model")
    online_ema: float = Field(0.0, ge=0, lt=1, description=ONLINE_EMA)
    online_turns: int = Field(2, gt=0, description="updates of the online model per update of the student")
    head_start: float = Field(
        0.05, ge=0, lt=1, description="share of the second phase in which only the online model is trained"
    )
    steps: int = Field(1, gt=0, le=16, description="calls of the student per sample, with fresh noise between them")
    time: LawOfTime = Field("exponential:1", description="law of t / latest: uniform, logit_normal:m,s, …")
    latest: float = Field(0.98, gt=0, le=1, description="largest t; differences of velocities near t = 1 are noise")
    checkpointing: bool = Field(False, description="recompute teacher and online model in the backward pass")

    @model_validator(mode="before")
    @classmethod
    def _no_start_with_init(cls, fields: Any) -> Any:
        return {"start": 0.0, **fields} if isinstance(fields, Mapping) and fields.get("init") else fields

    @model_validator(mode="after")
    def _has_a_teacher(self) -> MatchingOptions:
        require_teacher(self)
        return self


def online_model(teacher: Teacher, steps: int) -> nn.Module:
    """The online model: a trainable copy of the teacher, or for several calls a :class:`PerCall` of such copies.

    Args:
        teacher: of the stage.
        steps: number of the generator's calls.
    """
    assert isinstance(teacher.velocity, nn.Module), "a teacher is a network"
    model = trainable_copy(teacher.velocity)
    return model if steps == 1 else PerCall(model, steps)


def plan_matching(
    options: MatchingOptions, stage: Stage, divergence: Divergence, online_loss: OnlineLoss = flow_matching_loss
) -> Plan:
    """Two phases: consistency distillation (``start``), then distribution matching (``game``: the generator and the
    online model are trained against each other).

    The batches are data rows with independent noise. The generator takes noise and labels from them; the rows
    themselves are used in the first phase and by an ``online_loss`` that needs them.

    Args:
        options: of the stage.
        stage: the stage.
        divergence: the generator's loss.
        online_loss: the online model's loss.

    Raises:
        UserError: the teacher was trained on dependent pairs or cannot be guided, or the base is not Gaussian.
    """
    source, teacher = velocity_source(options, stage), stage.teacher
    assert teacher is not None
    if not stage.source.gaussian:
        raise UserError(
            f"method {options.method!r} adds Gaussian noise to the generator's samples, and the teacher of this recipe "
            "was trained on another base: leave 'base' out, or distil with 'distill'."
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
    """The constants of the second phase.

    Args:
        options: of the stage.
        spread: standard deviation of the data's values, in network units.
    """
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
    """The options to change when training diverges, for the message."""
    return (
        f"Raise online_turns (now {options.online_turns}), or lower lr (now {options.lr:g}) or online_lr (now "
        f"{options.online_lr:g})."
    )


def generator_rule(steps: int) -> SampleRule:
    """How a generator with calls at 0, 1/k, … is sampled: with k calls, or with any divisor of k.

    Args:
        steps: k. One call is an Euler step; between several calls fresh noise is added (``restart``).

    >>> generator_rule(4).steps
    (1, 2, 4)
    """
    divisors = tuple(number for number in range(1, steps + 1) if steps % number == 0)
    sampler: Literal["euler", "restart"] = "euler" if steps == 1 else "restart"
    return SampleRule(kind="map", steps=divisors, default_steps=steps, sampler=sampler)


def matching_needs(options: MatchingOptions, through: bool = True) -> Needs:
    """Network calls per sample seen, beside those of the student's own update: the mean over both phases.

    In the first phase the teacher makes a Heun step (two calls). In the second, every update of the online model runs
    the generator (``steps`` calls) and the online model forward and backward (three calls; a backward pass counts as
    two). The generator's update runs its first ``steps - 1`` calls, and both other networks.

    Args:
        options: of the stage.
        through: whether the loss differentiates the teacher and the online model, so that they run backward too.
    """
    teacher = calls_at(options.guidance)
    compared = (3 if through else 1) * (1 + teacher)
    matching = options.online_turns * (options.steps + 3) + (options.steps - 1) + compared
    calls = options.start * 2 * teacher + (1 - options.start) * matching
    return Needs(guidance=options.guidance, other_calls=round(calls))
