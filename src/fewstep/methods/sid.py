"""Score identity distillation (Zhou et al., arXiv:2404.04057, eq. 23), on flows.

With the data predictions ``f_T`` of the teacher and ``f_S`` of the online model at ``x_t``,

    L = w (f_T - f_S)((f_T - x1) - alpha (f_T - f_S)),      w = 1 / mean |x1 - f_T| without gradient,

the gradient going through x_t into both networks. In velocities, ``f_T - f_S = kappa (u* - s)`` and ``f_T - x1 =
kappa (u* - c)``: L is ``kappa^2 w ((1 - alpha) L1 + L2 / 2)`` of flow generator matching's two terms. At alpha = 1/2
it is half of that method's loss; at alpha = 1 it is the second term alone, and above, the first one is subtracted. The
second term alone is the one that keeps variety, and with more of the early times it keeps more of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from pydantic import Field
from torch import Tensor

from fewstep.methods.contract.stage import Plan, Spec, Stage
from fewstep.methods.families.distribution import Point, rows_mean
from fewstep.methods.families.distribution_stage import MatchingOptions, matching_needs, plan_matching
from fewstep.methods.families.velocity_source import LawOfTime


class SiDOptions(MatchingOptions):
    """Options of ``method: sid``."""

    time: LawOfTime = Field("exponential:2", description="law of the path's times, shrunk to [0, latest]")
    alpha: float = Field(1.0, ge=-1, le=2, description="1/2 is half of fgm; 1 to 1.2 are the paper's")


@final
@dataclass(frozen=True)
class SiD:
    """``w kappa^2 (u* - s)((u* - c) - alpha (u* - s))``.

    Args:
        alpha: as above.
    """

    alpha: float = 1.0
    through: bool = True

    def __call__(self, point: Point) -> Tensor:
        apart = point.teacher - point.online
        return point.weight * rows_mean(apart * ((point.teacher - point.c) - self.alpha * apart))


def plan(options: SiDOptions, stage: Stage) -> Plan:
    """As :func:`~fewstep.methods.families.distribution_stage.plan_matching`."""
    return plan_matching(options, stage, SiD(options.alpha))


SPEC = Spec(
    options=SiDOptions,
    plan=plan,
    summary="one call: flow generator matching with its first term weighed down or subtracted",
    learns_from="teacher, data for labels",
    makes="map",
    cite=("zhou2024score",),
    needs=matching_needs,
    starts_from_maps=True,
)
