"""Flow generator matching with real data, without a discriminator (arXiv:2509.22459).

The online model s is trained on the generator's samples and on real ones, whose targets have different factors:

    a |s(x_t) - (b/a) c|^2 + (1 - a) |s(y_t) - ((1 - b)/(1 - a)) d|^2,      y_t real data noised, d its velocity.

If the two laws agree, the minimum is the flow's velocity for every a and b. The generator's loss is

    a |u* - (b/a) c|^2 - a |s - (b/a) c|^2.

With ``a = b = 1`` it is flow generator matching. With b/a other than 1 the real data enter s with another factor than
the generator's samples, and so correct errors of the teacher.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pydantic import Field, model_validator
from torch import Tensor

from fewstep.flow.couplings import Pair
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.methods.contract.stage import Plan, Spec, Stage
from fewstep.methods.families.distribution import Noised, Point, rows_mean
from fewstep.methods.families.distribution_stage import MatchingOptions, matching_needs, plan_matching


class RealUIDOptions(MatchingOptions):
    """Options of ``method: realuid``."""

    alpha: float = Field(0.94, gt=0, lt=1, description="weight a of the generator's samples; real data have 1 - a")
    ratio: float = Field(0.98, gt=0, description="b/a: factor of the targets on the generator's samples")

    @model_validator(mode="after")
    def _unguided(self) -> RealUIDOptions:
        if self.guidance != 1.0:
            raise ValueError("the guided law is not that of the real data: leave guidance out, or use 'fgm'")
        return self


@final
@dataclass(frozen=True)
class RealUID:
    """The loss ``w a mean (u* - s)(u* + s - 2 (b/a) c)`` per row.

    Attributes:
        alpha: a.
        ratio: b/a.
        through: True: the gradient passes through both networks.
    """

    alpha: float
    ratio: float
    through: bool = True

    def __call__(self, point: Point) -> Tensor:
        teacher, online = point.teacher, point.online
        rows = rows_mean((teacher - online) * (teacher + online - 2 * self.ratio * point.c))
        return self.alpha * point.weight * rows

    def online(self, s: Velocity, noised: Noised, batch: Pair, draws: Draws) -> Tensor:
        """The online model's loss, a scalar, on the generator's samples and on real rows at the same times.

        Args:
            s: the online model.
            noised: noised samples of the generator.
            batch: the real rows ``x1``.
            draws: the random numbers of the real rows' noise.
        """
        x_t, c, t, path = noised
        noise = draws.normal(batch.x1.shape[1:]).to(batch.x1)
        y_t, d = path.interpolate(noise, batch.x1, t), path.target(noise, batch.x1, t)
        generated = (s(x_t, t, **batch.cond).to(x_t) - self.ratio * c).square().mean()
        share = (1 - self.alpha * self.ratio) / (1 - self.alpha)
        return self.alpha * generated + (1 - self.alpha) * (s(y_t, t, **batch.cond).to(y_t) - share * d).square().mean()


def plan(options: RealUIDOptions, stage: Stage) -> Plan:
    """The plan of :func:`~fewstep.methods.families.distribution_stage.plan_matching` with these losses."""
    matching = RealUID(options.alpha, options.ratio)
    return plan_matching(options, stage, matching, matching.online)


SPEC = Spec(
    options=RealUIDOptions,
    plan=plan,
    summary="one call: flow generator matching that also learns from real data, without a discriminator",
    learns_from="teacher, data",
    makes="map",
    cite=("kornilov2025universal",),
    needs=matching_needs,
    starts_from_maps=True,
)
