"""The straight-line family: regress the velocity of the straight line between paired points.

    L(theta) = E_{(x0, x1) ~ pi, t} w(t) d(v_theta(x_t, t), x1 - x0),     x_t = (1 - t) x0 + t x1

(Liu et al., arXiv:2209.03003, eq. 1; Lipman et al., arXiv:2210.02747, eq. 14.) Its minimiser under the squared
distance is ``v*(x, t) = E[x1 - x0 | x_t = x]``. Flow matching, ReFlow and one-step distillation differ only in the
coupling ``pi``, the law of ``t`` and the distance d.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, final

import torch
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.field import Velocity, null_rows
from fewstep.flow.noise import Draws
from fewstep.flow.paths import AffinePath
from fewstep.flow.time_laws import TimeLaw
from fewstep.methods.contract.objective import Networks, Objective, Terms
from fewstep.methods.families.distances import Loss, Plain, Residual, find_distance
from fewstep.methods.families.flow_map import where_rows


def drop_conditions(
    cond: Mapping[str, Tensor], nulls: Mapping[str, Any], share: float, draws: Draws
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Replace all conditions that have a null by it, row by row with a given probability, for classifier-free guidance.

    Args:
        cond: conditions by name, each (B, ...).
        nulls: the nulls by name, numbers or tensors of one row's shape.
        share: the probability.
        draws: the random numbers.

    Returns:
        The conditions, and which rows were replaced, (B,); None where no condition has a null or the share is 0.

    Source: arXiv:2207.12598, alg. 1.
    """
    named = [name for name in nulls if name in cond]
    if share == 0.0 or not named:
        return dict(cond), None
    dropped = draws.uniform().to(cond[named[0]].device) < share
    null = null_rows({name: nulls[name] for name in named}, cond)
    return {**cond, **{name: where_rows(dropped, null[name], cond[name]) for name in named}}, dropped


def one_step(velocity: Velocity, x0: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """``G(x0) = x0 + v(x0, 0)``, (B, ...): one Euler step from t = 0 to t = 1.

    Args:
        velocity: ``v(x, t, **cond)``.
        x0: (B, ...).
        cond: conditions of the rows.

    >>> one_step(lambda x, t: 2 * x, torch.ones(1, 1), {}).item()
    3.0
    """
    start = torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    return x0 + velocity(x0, start, **cond)


@final
class VelocityRegression(Objective):
    """The family's loss ``E d(v(x_t, t), d/dt x_t)``.

    Args:
        student: the network ``v(x, t, **cond)``.
        path: the affine path; the target is the derivative of ``x_t``.
        law: the law of t.
        distance: d by name, as :func:`~fewstep.methods.families.distances.find_distance`, or a loss of the residual.
        label_dropout: probability with which the conditions of a row are replaced by their nulls.
        nulls: the nulls by name.
    """

    def __init__(
        self,
        student: nn.Module,
        path: AffinePath,
        law: TimeLaw,
        distance: str | Loss = "l2",
        label_dropout: float = 0.0,
        nulls: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.modules = {"student": student}
        self.path = path
        self.law = law
        self.compare = Plain(find_distance(distance)) if isinstance(distance, str) else distance
        self.label_dropout = label_dropout
        self.nulls = nulls

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        t = self.law.sample(draws.uniform()).to(batch.x1)
        cond, _ = drop_conditions(batch.cond, self.nulls, self.label_dropout, draws)
        x_t = self.path.interpolate(batch.x0, batch.x1, t)
        v = nets["student"](x_t, t, **cond)
        return self.compare(Residual(v, self.path.target(batch.x0, batch.x1, t), x_t, batch.x1, t))


@final
class EndpointRegression(Objective):
    """The loss ``E d(x0 + v(x0, 0), x1)`` of the one-step map; its minimum for deterministic pairs is the exact map.

    Args:
        student: the network ``v(x, t, **cond)``.
        distance: d by name, as :func:`~fewstep.methods.families.distances.find_distance`.

    Source: Liu et al., arXiv:2209.03003, sec. 2.2 "Distillation".
    """

    def __init__(self, student: nn.Module, distance: str = "l2") -> None:
        self.modules = {"student": student}
        self.distance = find_distance(distance)

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        return {"loss": self.distance(one_step(nets["student"], batch.x0, batch.cond), batch.x1)}
