"""Distribution matching distillation (Yin et al., arXiv:2311.18828; without its regression: arXiv:2405.14867).

The gradient of the reverse Kullback-Leibler divergence between the noised laws, in the generator's samples, is

    dKL/dx1 = alpha (score_generator - score_teacher)(x_t),

and the two networks give the scores. ``weight: kl`` is that; the default divides by ``mean |x1 - f_T|`` instead:
``(f_S - f_T) / mean |x1 - f_T|``. The networks are not differentiated, so a step is cheaper than flow generator
matching's, and no gradient goes through the online model's errors: it learns at twice the rate, and is averaged. The
divergence seeks modes: it forgives one that is missing more than a sample that is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from pydantic import Field
from torch import Tensor

from fewstep.flow.paths import expand_time
from fewstep.methods.contract.stage import Plan, Spec, Stage
from fewstep.methods.families.distribution import Point, rows_mean
from fewstep.methods.families.distribution_stage import MatchingOptions, matching_needs, plan_matching


class DMDOptions(MatchingOptions):
    """Options of ``method: dmd``."""

    online_lr: float = Field(2e-3, gt=0, description="peak learning rate of the online model")
    online_ema: float = Field(
        0.8,
        ge=0,
        lt=1,
        description="decay of the online model's average, which the generator is compared with; 0: the model itself",
    )
    weight: Literal["normalised", "kl"] = Field("normalised", description="of times; kl: the divergence's own")


@final
@dataclass(frozen=True)
class DMD:
    """``|x1 - sg(x1 - g)|^2 / 2``, whose gradient in x1 is g.

    Args:
        normalised: ``g = (f_S - f_T) / mean |x1 - f_T|``; else ``alpha`` times the difference of the scores.
    """

    normalised: bool = True
    through: bool = False

    def __call__(self, point: Point) -> Tensor:
        apart = (point.online - point.teacher).detach()
        if self.normalised:  # f_S - f_T = kappa (s - u*), over kappa mean |u* - c|
            weight = point.weight / point.kappa
        else:
            weight = point.path.alpha(point.t) * point.path.score_coefficients(point.t)[1]
        g = expand_time(weight, apart) * apart
        return 0.5 * rows_mean((point.x1 - (point.x1 - g).detach()).square())


def plan(options: DMDOptions, stage: Stage) -> Plan:
    """As :func:`~fewstep.methods.families.distribution_stage.plan_matching`."""
    return plan_matching(options, stage, DMD(options.weight == "normalised"))


SPEC = Spec(
    options=DMDOptions,
    plan=plan,
    summary="one call: scores of generator and teacher pull the samples, cheaper and mode-seeking",
    learns_from="teacher, data for labels",
    makes="map",
    cite=("yin2024one", "yin2024improved"),
    needs=matching_needs,
    starts_from_maps=True,
)
