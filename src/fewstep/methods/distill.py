"""Distillation by regression of the teacher's endpoint (Liu et al., arXiv:2209.03003, sec. 2.2).

    L(theta) = E_{x0} d( x0 + v_theta(x0, 0),  Phi_teacher(x0) )

An ODE teacher has one endpoint per noise, so every distance d has its minimum at the exact map. Start the student from
a reflowed network (``init``): one Euler step of it is already close to the teacher's map.

``steps: k`` trains a student for exactly k Euler steps, by ReFlow at the k times at which the student is called:

    L(theta) = E_{(x0, x1), t} d( v_theta(x_t, t), x1 - x0 ),   t uniform on {0, 1/k, ..., (k-1)/k}.

``progressive: N`` halves the number of steps from N to k, in one phase per halving (arXiv:2202.00512, alg. 2, for
velocities). One step of the student, of length 2h, regresses two steps of length h of the network u of the phase
before; in the first phase u is the teacher:

    v(x, t) = (u(x, t) + u(y, t + h)) / 2,   y = x + h u(x, t).

The points x lie on the trajectories of those steps from fresh noise, because the student is called there. (The paper
takes noised data. Their law is that of the trajectories only if u was trained on independent noise and data.) No pairs
are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fewstep.flow.couplings import Independent, Pair
from fewstep.flow.derivatives import rows_of
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.flow.paths import Linear
from fewstep.flow.precision import full_precision
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.options import PairOptions
from fewstep.methods.contract.stage import Needs, Phase, Plan, Spec, Stage, pair_needs
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.distances import find_distance
from fewstep.methods.families.straight_line import EndpointRegression
from fewstep.methods.training_pairs.batches import StoredBatches, stage_batches
from fewstep.methods.training_pairs.generate import PairRequest, build_pairs, pair_facts
from fewstep.solvers.maps import SampleRule


class DistillOptions(PairOptions):
    """Options of ``method: distill``."""

    samples: int = Field(500_000, gt=0, description="samples seen in the stage, over all phases")
    steps: int = Field(1, gt=0, description="number of Euler steps that the student is trained for")
    progressive: int | None = Field(
        None, gt=1, description="number of teacher steps, halved phase by phase down to 'steps'; default: no halving"
    )
    loss: Literal["l2", "l1", "huber"] = Field("l2", description="distance of the prediction to its target")

    @model_validator(mode="after")
    def _halves_to_steps(self) -> DistillOptions:
        if self.progressive is None:
            return self
        ratio = self.progressive // self.steps
        if self.progressive != ratio * self.steps or ratio < 2 or ratio & (ratio - 1):
            examples = ", ".join(str(self.steps * 2**power) for power in (1, 2, 3))
            raise ValueError(
                f"progressive: {self.progressive} does not halve to steps: {self.steps}: set it to steps times a "
                f"power of two, such as {examples}"
            )
        return self


@final
class GridRegression(Objective):
    """The loss ``E d(v(x_t, t), x1 - x0)`` at the times of k Euler steps.

    Args:
        student: the network ``v(x, t, **cond)``.
        steps: k; t is uniform on {0, 1/k, ..., (k-1)/k}.
        distance: d by name (:func:`~fewstep.methods.families.distances.find_distance`).
    """

    def __init__(self, student: nn.Module, steps: int, distance: str = "l2") -> None:
        self.modules = {"student": student}
        self.steps = steps
        self.distance = find_distance(distance)

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        t = (draws.uniform() * self.steps).floor().to(batch.x0) / self.steps
        x_t = Linear().interpolate(batch.x0, batch.x1, t)
        v = nets["student"](x_t, t, **batch.cond)
        return {"loss": self.distance(v, batch.x1 - batch.x0)}


def two_steps(flow: Velocity, x: Tensor, t: Tensor, h: float, cond: Mapping[str, Tensor]) -> Tensor:
    """The mean velocity of two Euler steps, ``(u(x, t) + u(x + h u(x, t), t + h)) / 2``, (B, ...).

    Args:
        flow: ``u(x, t, **cond)``.
        x: (B, ...).
        t: (B,).
        h: length of one step.
        cond: conditions of the rows.

    >>> two_steps(lambda x, t: x, torch.ones(1, 1), torch.zeros(1), 0.5, {}).item()
    1.25
    """
    u = flow(x, t, **cond)
    return 0.5 * (u + flow(x + h * u, t + h, **cond))


@final
class Halving(Objective):
    """The loss of one halving: a student's step regresses two steps of a frozen flow.

    Args:
        student: the network ``v(x, t, **cond)``.
        flow: the frozen flow ``u(x, t, **cond)``, sampled with ``2 steps`` Euler steps.
        steps: number of the student's Euler steps.
        distance: by name (:func:`~fewstep.methods.families.distances.find_distance`).
    """

    def __init__(self, student: nn.Module, flow: Velocity, steps: int, distance: str = "l2") -> None:
        self.modules = {"student": student}
        self.flow = flow
        self.steps = steps
        self.distance = find_distance(distance)

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        number = (draws.uniform() * self.steps).long().to(batch.x0.device)
        with full_precision(batch.x0):
            x, target = self.pieces(batch.x0, number, batch.cond)
        v = nets["student"](x, number.to(x) / self.steps, **batch.cond)
        return {"loss": self.distance(v, target)}

    def pieces(self, x0: Tensor, number: Tensor, cond: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The point where student step ``number`` begins on the flow's trajectory from x0, and the step's target there.

        Args:
            x0: noise (B, ...).
            number: number of the student's step, from 0, (B,).
            cond: conditions of the rows.

        Returns:
            x and the mean velocity of the flow's two steps from x, (B, ...) each.
        """
        length = 1.0 / self.steps
        x, target = x0.clone(), torch.empty_like(x0)
        for step in range(self.steps):
            rows = (number >= step).nonzero()[:, 0]  # rows that have not reached their own step yet
            t = torch.full((len(rows),), step * length, dtype=x0.dtype, device=x0.device)
            here = rows_of(cond, len(x0), rows)
            v = two_steps(self.flow, x[rows], t, 0.5 * length, here).to(x0)
            arrived = number[rows] == step
            target[rows[arrived]] = v[arrived]
            x[rows[~arrived]] += length * v[~arrived]
        return x, target


def plan(options: DistillOptions, stage: Stage) -> Plan:
    """One phase on generated pairs, or one per halving."""
    student = stage.build()
    assert stage.teacher is not None
    request = PairRequest("generated", options.pairs, options, stage.teacher, "distill")
    facts = pair_facts(request)

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        batches = StoredBatches(build_pairs(stage, request), facts, (stage.seed, stage.name))
        if options.steps == 1:
            return EndpointRegression(student, options.loss), batches
        return GridRegression(student, options.steps, options.loss), batches

    rule = SampleRule(kind="map", steps=(options.steps,), default_steps=options.steps)
    phases = halvings(options, stage, student) or [Phase("train", options.samples, prepare)]
    return Plan(student, phases, rule, facts)


def halving_schedule(options: DistillOptions) -> list[int]:
    """The students' numbers of steps, from half of ``progressive`` down to ``steps``; empty without ``progressive``."""
    count = 0 if options.progressive is None else round(math.log2(options.progressive // options.steps))
    return [options.steps * 2**power for power in reversed(range(count))]


def needs(options: DistillOptions) -> Needs:
    """The needs of a stage: pairs, or with ``progressive`` the flow's calls per sample, averaged over the phases.

    They are two calls for every student step up to the drawn one, so ``steps + 1`` in the mean.
    """
    halved = halving_schedule(options)
    if not halved:
        return pair_needs(options)
    return Needs(guidance=options.guidance, other_calls=round(sum(steps + 1 for steps in halved) / len(halved)))


def halvings(options: DistillOptions, stage: Stage, student: nn.Module) -> list[Phase]:
    """One phase for every number of steps of :func:`halving_schedule`, each with an equal share of the samples."""
    halved = halving_schedule(options)
    ends = [options.samples * place // len(halved) for place in range(1, len(halved) + 1)]
    return [
        Phase(f"steps-{number}", max(1, end - begin), _halver(options, stage, student, number))
        for number, begin, end in zip(halved, [0, *ends], ends, strict=False)
    ]


def _halver(
    options: DistillOptions, stage: Stage, student: nn.Module, steps: int
) -> Callable[[Teacher | None], tuple[Objective, Batches]]:
    """Prepares a halving, which learns from the student after the previous phase, or in the first from the teacher."""

    def prepare(previous: Teacher | None) -> tuple[Objective, Batches]:
        assert stage.teacher is not None
        if previous is None:
            flow = stage.teacher.guided(options.guidance)
        else:
            flow = previous.velocity
            student.load_state_dict(previous.state)  # its average, not its last weights
        # only the noise and the conditions of these rows are used
        batches = stage_batches(replace(stage, dequantise=0.0), Independent(stage.source), f"steps-{steps}")
        return Halving(student, flow, steps, options.loss), batches

    return prepare


SPEC = Spec(
    options=DistillOptions,
    plan=plan,
    summary="student of one or a few steps that regresses the teacher's endpoints",
    learns_from="teacher, pairs",
    makes="map",
    cite=("liu2023flow", "salimans2022progressive"),
    needs=needs,
)
