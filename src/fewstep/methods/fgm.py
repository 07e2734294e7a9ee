"""Flow generator matching (Huang et al., arXiv:2410.19310): the exact gradient of the distance between two flows.

The distance to be minimised is ``E |v_theta(x_t) - u*(x_t)|^2`` over the generator's noised samples, whose velocity
v_theta is not known. Its gradient in the generator's weights equals that of ``E L``,

    L1 = |u* - s|^2,     L2 = 2 (u* - s)(s - c),     L = L1 + L2 = (u* - s)(u* + s - 2 c) = |u* - c|^2 - |s - c|^2,

at ``s = v_theta``, where the weights of s are constant and the gradient passes through x_t into both networks and
through c. (This follows from the derivative of ``E f(x_t) v_theta(x_t) = E f(x_t) c``, which holds for every f.) L is
zero where ``s = u*``, and it may be negative.

``weight: normalised`` multiplies every row by the weight of :mod:`~fewstep.methods.families.distribution`. With
``none`` the gradient is exactly that of the distance. On digits, training was then slow and produced too few samples of
some classes (energy distance .3 instead of .012).
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

    weight: Literal["normalised", "none"] = Field(
        "normalised", description="weight of each row; normalised: 1 / mean |x1 - f_T|; none: 1, the exact gradient"
    )


@final
@dataclass(frozen=True)
class FGM:
    """The loss ``w mean (u* - s)(u* + s - 2 c)`` per row.

    Attributes:
        normalised: w is :attr:`~fewstep.methods.families.distribution.Point.weight`; if False, ``w = 1``.
        through: True: the gradient passes through both networks.
    """

    normalised: bool = True
    through: bool = True

    def __call__(self, point: Point) -> Tensor:
        teacher, online, c = point.teacher, point.online, point.c
        rows = rows_mean((teacher - online) * (teacher + online - 2 * c))
        return point.weight * rows if self.normalised else rows


def plan(options: FGMOptions, stage: Stage) -> Plan:
    """The plan of :func:`~fewstep.methods.families.distribution_stage.plan_matching` with this loss."""
    return plan_matching(options, stage, FGM(options.weight == "normalised"))


SPEC = Spec(
    options=FGMOptions,
    plan=plan,
    summary="one call: minimises the distance between the flows of generator and teacher by its exact gradient",
    learns_from="teacher, data for labels",
    makes="map",
    cite=("huang2024flow",),
    needs=matching_needs,
    starts_from_maps=True,
)
