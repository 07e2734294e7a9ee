"""Flow generator matching (Huang et al., arXiv:2410.19310): the exact gradient of the distance between two flows.

The goal is ``E |v_theta(x_t) - u*(x_t)|^2`` over the generator's own noised samples, whose velocity v_theta is not
known. Its gradient is that of

    L1 = |u* - s|^2,     L2 = 2 (u* - s)(s - c),     L = L1 + L2 = (u* - s)(u* + s - 2 c) = |u* - c|^2 - |s - c|^2,

at ``s = v_theta``, with s's weights held and the gradient going through x_t into both networks, and through c. (From
``E f(x_t) v_theta(x_t) = E f(x_t) c`` for every f, differentiated.) The value of L is zero in the mean of c where
``s = u*``, and may be negative.

``weight: normalised`` divides every row as :mod:`~fewstep.methods.families.distribution` says: without it (``none``)
the gradient is the goal's exactly, and on digits training is slow and starves classes (energy .3 instead of .012).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from pydantic import Field
from torch import Tensor

from fewstep.methods.contract.stage import Plan, Spec, Stage
from fewstep.methods.families.distribution import Point, rows_mean
from fewstep.methods.families.distribution_stage import MatchingOptions, matching_needs, plan_matching


class FGMOptions(MatchingOptions):
    """Options of ``method: fgm``."""

    weight: Literal["normalised", "none"] = Field("normalised", description="of rows; none: the exact gradient")


@final
@dataclass(frozen=True)
class FGM:
    """``w (u* - s)(u* + s - 2 c)``.

    Args:
        normalised: with the weight w; without, it is 1.
    """

    normalised: bool = True
    through: bool = True

    def __call__(self, point: Point) -> Tensor:
        teacher, online, c = point.teacher, point.online, point.c
        rows = rows_mean((teacher - online) * (teacher + online - 2 * c))
        return point.weight * rows if self.normalised else rows


def plan(options: FGMOptions, stage: Stage) -> Plan:
    """As :func:`~fewstep.methods.families.distribution_stage.plan_matching`."""
    return plan_matching(options, stage, FGM(options.weight == "normalised"))


SPEC = Spec(
    options=FGMOptions,
    plan=plan,
    summary="one call: the generator's flow becomes the teacher's, by the exact gradient of their distance",
    learns_from="teacher, data for labels",
    makes="map",
    cite=("huang2024flow",),
    needs=matching_needs,
    starts_from_maps=True,
)
