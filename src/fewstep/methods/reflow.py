"""ReFlow with a mixed buffer (Liu et al., arXiv:2209.03003, alg. 1).

Each round: the EMA teacher, frozen for the round, carries noise to synthetic endpoints; the student, started from the
teacher's weights, regresses the straight-line velocity of a buffer in which a sample is such a pair with probability
``p`` and otherwise has a *real* endpoint. ``p`` rises over the rounds (``mix``). What x0 goes with a real endpoint
decides the outcome, because only the coupling decides straightness:

- ``inverted``: x0 is the image's own noise, the teacher's flow run backwards. Both halves of the buffer lie on one
  deterministic coupling.
- ``independent``: fresh noise. The optimal v(x, 0) is then (1 - p) v_ind + p v_syn, so one Euler step returns
  (1 - p) E[x1] + p T(x0): in one Gaussian dimension its standard deviation is p s.
- ``anneal``: independent, with p raised to 1 over the last part of the last round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, field_validator, model_validator
from torch import nn

from fewstep.flow.couplings import Facts, Independent
from fewstep.flow.paths import Linear
from fewstep.flow.time_laws import make_time_law
from fewstep.methods.base import (
    Batches,
    Objective,
    PairOptions,
    Phase,
    Plan,
    SampleRule,
    Spec,
    Stage,
    Teacher,
)
from fewstep.methods.batches import DataBatches, MixedBatches, StoredBatches
from fewstep.methods.pairs import PairRequest, build_pairs, has_base_law, pair_facts
from fewstep.methods.straight_line import VelocityRegression


class ReflowOptions(PairOptions):
    """Options of ``method: reflow``."""

    samples: int = Field(800_000, gt=0, description="samples seen in the stage, over all rounds")
    rounds: int = Field(1, gt=0)
    mix: tuple[float, ...] = Field((0.4, 0.9), description="probability of a synthetic pair, first to last round")
    real: Literal["inverted", "independent", "anneal"] = Field(
        "inverted", description="the x0 that goes with a real endpoint"
    )
    real_pairs: int | None = Field(None, gt=0, description="inverted pairs per round; default: the training rows")
    time: str = Field("uniform", description="law of t")
    loss: Literal["l2", "l1", "huber"] = "l2"

    @field_validator("mix", mode="before")
    @classmethod
    def _one_number(cls, value: object) -> object:
        return (value,) if isinstance(value, int | float | str) else value

    @model_validator(mode="after")
    def _known_time(self) -> ReflowOptions:
        make_time_law(self.time)
        return self

    @model_validator(mode="after")
    def _mix_in_range(self) -> ReflowOptions:
        if not self.mix or any(not 0.0 < p <= 1.0 for p in self.mix):
            raise ValueError(f"mix must hold probabilities in (0, 1], got {list(self.mix)}")
        if len(self.mix) > 2 and len(self.mix) != self.rounds:
            raise ValueError(
                f"mix has {len(self.mix)} values for {self.rounds} rounds: give one, two, or one per round"
            )
        return self

    def shares(self) -> list[float]:
        """``p`` of every round: raised linearly from the first to the last value; one round uses the last."""
        if len(self.mix) == self.rounds:
            return list(self.mix)
        if self.rounds == 1:
            return [self.mix[-1]]
        return [float(p) for p in np.linspace(self.mix[0], self.mix[-1], self.rounds)]


def share_law(p: float, samples: int, anneal: bool) -> Callable[[int], float]:
    """``p`` as a function of samples seen in the round; annealed, it rises to 1 between 60 % and 80 % of the round."""
    if not anneal:
        return lambda seen: p
    return lambda seen: p + (1.0 - p) * float(np.clip((seen / samples - 0.6) / 0.2, 0.0, 1.0))


def plan(options: ReflowOptions, stage: Stage) -> Plan:
    """One phase per round."""
    student = stage.build()
    assert stage.teacher is not None
    shares = options.shares()
    per_round = -(-options.samples // options.rounds)
    phases = []
    for number, p in enumerate(shares, start=1):
        samples = min(per_round, options.samples - per_round * (number - 1))
        last = number == options.rounds
        law = share_law(p, samples, anneal=last and options.real == "anneal")
        phases.append(Phase(f"round-{number}", samples, _preparer(options, stage, student, number, p, law)))
    deterministic = shares[-1] == 1.0 or options.real in ("inverted", "anneal")
    facts = Facts(
        independent=False,
        deterministic=deterministic,
        teacher=stage.teacher.digest,
        guidance=None if options.guidance == 1.0 else options.guidance,
    )
    return Plan(student, phases, SampleRule(), facts)


def _preparer(
    options: ReflowOptions,
    stage: Stage,
    student: nn.Module,
    number: int,
    p: float,
    law: Callable[[int], float],
) -> Callable[[Teacher | None], tuple[Objective, Batches]]:
    """What the round does before it trains: make its pairs."""

    def prepare(previous: Teacher | None) -> tuple[Objective, Batches]:
        teacher = previous or stage.teacher
        assert teacher is not None
        # guidance is baked in by the first round; later rounds learn from a teacher that has it
        used = options if previous is None else options.model_copy(update={"guidance": 1.0})
        batches = make_buffer(used, stage, teacher, f"round-{number}", p, law)
        objective = VelocityRegression(student, Linear(), make_time_law(options.time), options.loss)
        return objective, batches

    return prepare


def make_buffer(
    options: ReflowOptions, stage: Stage, teacher: Teacher, tag: str, p: float, law: Callable[[int], float]
) -> Batches:
    """The round's buffer of synthetic and real pairs."""
    request = PairRequest("generated", options.pairs, options, teacher, tag)
    facts = pair_facts(request)
    key = (stage.seed, stage.name, tag)
    synthetic = StoredBatches(build_pairs(stage, request), facts, (*key, "generated"))
    if p == 1.0:
        return synthetic
    if options.guidance != 1.0 or teacher.guidance not in (None, 1.0):
        # a guided flow does not end at the data's law, so data have no noise of their own under it
        stage.world.say("note: guided endpoints follow another law than the data: real endpoints are left out.")
        return synthetic
    real: Batches
    if options.real == "inverted":
        rows = options.real_pairs or min(len(stage.data.train), options.pairs)
        request = PairRequest("inverted", rows, options, teacher, tag)
        store = build_pairs(stage, request)
        if not has_base_law(store):
            stage.world.say(
                "warning: the data invert to noise much smaller than the base's, as memorised data do: real "
                "endpoints are left out. More data, or a teacher trained for less, would bring them in."
            )
            return synthetic
        real = StoredBatches(store, facts, (*key, "inverted"))
    else:
        real = DataBatches(stage.data, Independent(stage.source), stage.conditional, stage.dequantise, (*key, "real"))
        facts = replace(facts, deterministic=False)
    return MixedBatches(synthetic, real, law, facts)


SPEC = Spec(
    options=ReflowOptions,
    plan=plan,
    summary="straighten a teacher on its own (noise, endpoint) pairs",
    needs="teacher, pairs, data",
    cite=("liu2023flow",),
)
