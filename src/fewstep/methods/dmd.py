"""Distribution matching distillation (Yin et al., arXiv:2311.18828; without its regression: arXiv:2405.14867).

The gradient of the reverse Kullback-Leibler divergence between the noised laws, in the generator's samples, is

    dKL/dx1 = alpha (score_generator - score_teacher)(x_t).

The scores are computed from the velocities s and u*. ``weight: kl`` uses this gradient. The default uses
``(f_S - f_T) / m`` instead, with the data predictions f_T of the teacher and f_S of the online model; m is the mean of
``|x1 - f_T|`` with its prior (:mod:`~fewstep.methods.families.distribution`, "Weights of rows"). The networks are not
differentiated, so a step takes less time than one of flow generator matching, and errors of the online model are not
amplified by a derivative. Therefore the online model's learning rate is twice that of the family, and its weights are
averaged. The reverse divergence is mode-seeking: a missing mode adds less to it than samples outside of the data.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal, final

from pydantic import Field
from torch import Tensor

from fewstep.flow.paths import expand_time
from fewstep.methods.contract.stage import Plan, Spec, Stage
from fewstep.methods.families.distribution import Point, rows_mean
from fewstep.methods.families.distribution_stage import ONLINE_EMA, MatchingOptions, matching_needs, plan_matching


class DMDOptions(MatchingOptions):
    """Options of ``method: dmd``."""

    online_lr: float = Field(2e-3, gt=0, description="peak learning rate of the online model")
    online_ema: float = Field(0.8, ge=0, lt=1, description=ONLINE_EMA)
    weight: Literal["normalised", "kl"] = Field(
        "normalised",
        description="weight of each row; normalised: 1 / m, where m is about mean |x1 - f_T|; kl: the paper's",
    )


@final
@dataclass(frozen=True)
class DMD:
    """The loss ``mean |x1 - sg(x1 - g)|^2 / 2`` per row, whose gradient in x1 is g over the number of values.

    Attributes:
        normalised: ``g = (f_S - f_T) / m``; if False, ``g = alpha (score_generator - score_teacher)``.
        through: False: the networks are not differentiated.
    """

    normalised: bool = True
    through: bool = False

    def __call__(self, point: Point) -> Tensor:
        difference = (point.online - point.teacher).detach()
        if self.normalised:  # f_S - f_T = kappa (s - u*)
            factor = point.kappa / point.mean_error
        else:
            factor = point.path.alpha(point.t) * point.path.score_coefficients(point.t)[1]
        g = expand_time(factor, difference) * difference
        return 0.5 * rows_mean((point.x1 - (point.x1 - g).detach()).square())


def plan(options: DMDOptions, stage: Stage) -> Plan:
    """The plan of :func:`~fewstep.methods.families.distribution_stage.plan_matching` with this loss."""
    return plan_matching(options, stage, DMD(options.weight == "normalised"))


SPEC = Spec(
    options=DMDOptions,
    plan=plan,
    summary="one call: descends the reverse KL divergence to the teacher's law; cheaper than fgm and mode-seeking",
    learns_from="teacher, data for labels",
    makes="map",
    cite=("yin2024one", "yin2024improved"),
    needs=functools.partial(matching_needs, through=False),
    starts_from_maps=True,
)
