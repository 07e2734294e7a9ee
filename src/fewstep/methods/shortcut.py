"""Shortcut models: one step of length d equals two steps of length d/2 (Frans et al., arXiv:2410.12557).

Lengths are ``d = 1, 1/2, …, 2^-K`` and steps start at multiples of their length. With ``u(x, t, t + d)``:

    rows of the smallest length (a share 1 - ``composed``):   | u(x_t, t, t + 2^-K) - v |^2,
    the others, d = 2^-j with j uniform on 0 … K - 1:      | u(x_t, t, t + d) - sg[ (b1 + b2) / 2 ] |^2,
        b1 = u(x_t, t, t + d/2),   b2 = u(x_t + (d/2) b1, t + d/2, t + d),

with v the velocity of the data pair or of a teacher. There is no derivative. A step of the smallest length is an Euler
step, so the learned map is that of ``2^K`` Euler steps. It is sampled in ``1, 2, 4, … 2^K`` equal steps. Two
differences to the paper: targets are computed with the present weights (there: with their average), and the network's
input is d (there: its logarithm).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, final

import torch
from pydantic import Field
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Batches, Networks, Objective, Terms
from fewstep.methods.contract.stage import Phase, Plan, Spec, Stage
from fewstep.methods.contract.teacher import Teacher
from fewstep.methods.families.flow_map import Times, composition_target, replace_off_diagonal, weighted_square
from fewstep.methods.families.velocity_source import (
    MapOptions,
    VelocitySource,
    map_needs,
    two_time_network,
    velocity_source,
)
from fewstep.solvers.maps import SampleRule


class ShortcutOptions(MapOptions):
    """Options of ``method: shortcut``."""

    old_names: ClassVar[Mapping[str, str]] = {"share": "composed"}

    levels: int = Field(5, gt=0, le=10, description="K: the smallest step has the length 2^-K")
    composed: float = Field(0.25, gt=0, lt=1, description="share of rows whose target is two steps of half the length")


def draw_steps(levels: int, composed: float, draws: Draws, like: Tensor) -> Times:
    """Draw steps from t to r = t + d.

    Args:
        levels: K.
        composed: probability of a length above the smallest.
        draws: the random numbers of B rows.
        like: a tensor whose dtype and device the times get.

    Returns:
        The times; ``diagonal`` marks the steps of the smallest length, whose target is the velocity.
    """
    smallest = (draws.uniform() >= composed).to(like.device)
    level = (draws.uniform() * levels).floor().to(like)
    number = torch.where(smallest, float(2**levels), 2.0**level)  # of steps, 1 / d
    t = (draws.uniform().to(like) * number).floor() / number
    return Times(t, t + 1 / number, smallest)


@final
class Shortcut(Objective):
    """The loss of the module's docstring.

    Args:
        student: ``u(x, t, r=r, **cond)``.
        source: the velocity v, a teacher's or the data pairs'.
        levels: K.
        composed: share of rows whose target is two steps of half the length.
    """

    def __init__(self, student: nn.Module, source: VelocitySource, levels: int = 5, composed: float = 0.25) -> None:
        self.modules = {"student": student}
        self.source, self.levels, self.composed = source, levels, composed

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        steps = draw_steps(self.levels, self.composed, draws, batch.x1)
        x_t = self.source.path.interpolate(batch.x0, batch.x1, steps.t)
        u = nets["student"](x_t, steps.t, r=steps.r, **batch.cond)
        return {"loss": weighted_square(u - self.target(nets["student"], batch, x_t, steps))}

    def target(self, network: Velocity, batch: Pair, x_t: Tensor, steps: Times) -> Tensor:
        """The velocity for the smallest steps, ``(b1 + b2) / 2`` for the others; (B, ...), without a graph.

        Args:
            network: the student.
            batch: the pairs.
            x_t: (B, ...) at ``steps.t``.
            steps: the steps, as :func:`draw_steps`.
        """

        def make(_: Tensor, x: Tensor, longer: Times, cond: Mapping[str, Any]) -> Tensor:
            return composition_target(network, x, longer, (longer.t + longer.r) / 2, cond)

        return replace_off_diagonal(self.source.velocity_at(batch, x_t, steps.t), x_t, steps, batch.cond, make)


def plan(options: ShortcutOptions, stage: Stage) -> Plan:
    """One phase on data rows.

    Raises:
        UserError: as :func:`~fewstep.methods.families.velocity_source.velocity_source`.
    """
    source, student = velocity_source(options, stage), stage.build()

    def prepare(_: Teacher | None) -> tuple[Objective, Batches]:
        return Shortcut(student, source, options.levels, options.composed), source.batches()

    steps = tuple(2**level for level in range(options.levels + 1))
    rule = SampleRule(kind="map", steps=steps, default_steps=1, sampler="chain")
    return Plan(student, [Phase("train", options.samples, prepare)], rule, source.facts, path=source.path_name)


SPEC = Spec(
    options=ShortcutOptions,
    plan=plan,
    summary="1, 2, 4, ... steps: one step is trained to equal two steps of half its length",
    learns_from="data; teacher optional",
    makes="map",
    cite=("frans2025one",),
    needs=map_needs,
    network=two_time_network,
)
