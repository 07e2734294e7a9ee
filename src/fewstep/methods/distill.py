"""One-step distillation by regression of the teacher's endpoint (Liu et al., arXiv:2209.03003, sec. 2.2).

    L(theta) = E_{x0} d( x0 + v_theta(x0, 0),  Phi_teacher(x0) )

An ODE teacher has one endpoint per noise, so the exact map is the optimum of every distance. A student started from a
reflowed network (``init``) starts near it, since there the teacher's map is almost its own Euler step.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

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
from fewstep.methods.batches import StoredBatches
from fewstep.methods.pairs import PairRequest, build_pairs, pair_facts
from fewstep.methods.straight_line import EndpointRegression


class DistillOptions(PairOptions):
    """Options of ``method: distill``."""

    samples: int = Field(500_000, gt=0, description="samples seen in the stage")
    loss: Literal["l2", "l1", "huber"] = "l2"


def plan(options: DistillOptions, stage: Stage) -> Plan:
    """One phase on generated pairs."""
    student = stage.build()
    assert stage.teacher is not None
    request = PairRequest("generated", options.pairs, options, stage.teacher, "distill")
    facts = pair_facts(request)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        batches = StoredBatches(build_pairs(stage, request), facts, (stage.seed, stage.name))
        return EndpointRegression(student, options.loss), batches

    rule = SampleRule(kind="map", steps=(1,), default_steps=1)
    return Plan(student, [Phase("train", options.samples, prepare)], rule, facts)


SPEC = Spec(
    options=DistillOptions,
    plan=plan,
    summary="one-step student that regresses the teacher's endpoints",
    needs="teacher, pairs",
    makes="map",
    cite=("liu2023flow",),
)
