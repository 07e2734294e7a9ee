"""Score identity distillation (Zhou et al., arXiv:2404.04057, eq. 23), on flows.

With the data predictions ``f_T`` of the teacher and ``f_S`` of the online model at ``x_t``,

    L = (f_T - f_S)((f_T - x1) - alpha (f_T - f_S)) / m,      m = mean |x1 - f_T| without gradient,

where the gradient passes through x_t into both networks. In velocities, ``f_T - f_S = kappa (u* - s)`` and
``f_T - x1 = kappa (u* - c)``, with ``u* - c = (u* - s) + (s - c)``. So ``L = w ((1 - alpha) L1 + L2 / 2)`` with
``w = kappa^2 / m`` and the two terms of flow generator matching (:mod:`fewstep.methods.fgm`). For alpha = 1/2 it is
half of that method's loss, for alpha = 1 half of its second term alone, and for larger alpha the first term is
subtracted. The default is alpha = 1, with more early times than in the other methods: on digits its recall was the
highest of the family (.96; ``benchmarks/2026-11-30-few-step.md``).
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

    time: LawOfTime = Field("exponential:2", description="law of t / latest: uniform, logit_normal:m,s, …")
    alpha: float = Field(1.0, ge=-1, le=2, description="weight of the first term is 1 - alpha; the paper has 1 to 1.2")


@final
@dataclass(frozen=True)
class SiD:
    """The loss ``w mean (u* - s)((u* - c) - alpha (u* - s))`` per row, ``w`` the weight of the point.

    Attributes:
        alpha: as in the module's docstring.
        through: True: the gradient passes through both networks.
    """

    alpha: float = 1.0
    through: bool = True

    def __call__(self, point: Point) -> Tensor:
        difference = point.teacher - point.online
        return point.weight * rows_mean(difference * ((point.teacher - point.c) - self.alpha * difference))


def plan(options: SiDOptions, stage: Stage) -> Plan:
    """The plan of :func:`~fewstep.methods.families.distribution_stage.plan_matching` with this loss."""
    return plan_matching(options, stage, SiD(options.alpha))


SPEC = Spec(
    options=SiDOptions,
    plan=plan,
    summary="one call: the loss of fgm with the first of its two terms left out or subtracted",
    learns_from="teacher, data for labels",
    makes="map",
    cite=("zhou2024score",),
    needs=matching_needs,
    starts_from_maps=True,
)
