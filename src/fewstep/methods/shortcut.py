"""Shortcut models: a step of length d does what two of length d/2 do (Frans et al., arXiv:2410.12557).

Lengths are ``d = 1, 1/2, …, 2^-K`` and steps start at multiples of their length. With ``u(x, t, t + d)``:

    rows of the smallest length (a share 1 - ``share``):   | u(x_t, t, t + 2^-K) - v |^2,
    the others, d = 2^-j with j uniform on 0 … K - 1:      | u(x_t, t, t + d) - sg[ (b1 + b2) / 2 ] |^2,
        b1 = u(x_t, t, t + d/2),   b2 = u(x_t + (d/2) b1, t + d/2, t + d),

v the velocity of the data pair or of a teacher. There is no derivative. A step of the smallest length is an Euler step,
so the map learned is that of ``2^K`` Euler steps, and it is sampled in ``1, 2, 4, … 2^K`` equal steps. Targets come
from the weights as they are (the paper: their average), and the network sees ``d`` itself (the paper: its logarithm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Batches, Objective
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.flow_map import Times, caller, composition_target, off_diagonal, weighted_square
from fewstep.methods.families.velocity_source import (
    MapOptions,
    VelocitySource,
    teacher_calls,
    two_time,
    velocity_source,
)
from fewstep.solvers.maps import SampleRule


class ShortcutOptions(MapOptions):
    """Options of ``method: shortcut``."""

    levels: int = Field(5, gt=0, le=10, description="K: the smallest step is 2^-K")
    share: float = Field(0.25, gt=0, lt=1, description="share of the rows that learn from two smaller steps")


def draw_steps(levels: int, share: float, draws: Draws, like: Tensor) -> Times:
    """Steps t to r = t + d; ``diagonal`` marks those of the smallest length, which learn the velocity."""
    smallest = (draws.uniform() >= share).to(like.device)
    level = (draws.uniform() * levels).floor().to(like)
    number = torch.where(smallest, float(2**levels), 2.0**level)  # of steps, 1 / d
    t = (draws.uniform().to(like) * number).floor() / number
    return Times(t, t + 1 / number, smallest)


@final
class Shortcut(Objective):
    """The loss above.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        source: where the velocity comes from.
        levels: K.
        share: share of the rows that learn from two smaller steps.
    """

    def __init__(self, student: nn.Module, source: VelocitySource, levels: int = 5, share: float = 0.25) -> None:
        self.modules = {"student": student}
        self.source, self.levels, self.share = source, levels, share
        self.average = caller(self.modules)

    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        steps = draw_steps(self.levels, self.share, draws, batch.x1)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, steps.t)
        u = self.modules["student"](x_t, steps.t, r=steps.r, **batch.cond)
        return {"loss": weighted_square(u - self.target(batch, x_t, steps))}

    def target(self, batch: Pair, x_t: Tensor, steps: Times) -> Tensor:
        """The velocity for the smallest steps, the mean of two half steps for the others; without a graph."""

        def make(_: Tensor, x: Tensor, apart: Times, cond: Mapping[str, Any]) -> Tensor:
            return composition_target(self.average, x, apart, (apart.t + apart.r) / 2, cond)

        return off_diagonal(self.source.velocity_at(batch, x_t, steps.t), x_t, steps, batch.cond, make)


def plan(options: ShortcutOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: as :func:`~fewstep.methods.families.velocity_source.velocity_source`.
    """
    source, student = velocity_source(options, stage), stage.build()

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        return Shortcut(student, source, options.levels, options.share), source.batches()

    steps = tuple(2**level for level in range(options.levels + 1))
    rule = SampleRule(kind="map", steps=steps, default_steps=1, sampler="chain")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, source.facts, path=source.path_name)


SPEC = Spec(
    options=ShortcutOptions,
    plan=plan,
    summary="1, 2, 4, ... steps: one step does what two of half its length do",
    needs="data; teacher optional",
    makes="map",
    cite=("frans2025one",),
    changes=two_time,
    online_calls=teacher_calls,
)
