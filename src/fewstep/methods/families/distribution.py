r"""Distribution matching: train a generator until its noised samples move as the teacher's do.

There are three networks: the generator ``x1 = G(z)``, the frozen teacher ``u*(x, t)``, and an online flow model
``s(x, t)``, which flow matching trains on the generator's own samples. The noise ``eps`` of the path is drawn afresh,
independent of z:

    x_t = alpha x1 + sigma eps,      c = d/dt x_t,      s approximates v_theta(x, t) = E[c | x_t = x].

The aim is ``v_theta = u*``, which holds where the generator's samples have the teacher's law. (With z as the noise of
the path, v_theta would be the velocity of another coupling, which cannot be compared with u*.) A method adds one
function of (x_t, c, u*, s), whose gradient in the generator's weights leads there: :class:`Divergence`.

Turns: every optimiser step has ``online_turns`` updates of s, each on samples of its own, then one of the generator.
Both use AdamW with betas (0, .99), because their targets move. The online model learns from the generator's present
weights. It starts as a copy of the teacher; the gap ``u* - s`` is then mostly noise, so the online model learns alone
for a while (``head_start``), and the generator's warm-up begins after that.

Precision: u* and s nearly agree at the end, so their difference is taken in float32 (in bfloat16 its square was up to
eleven times too large), and without dropout, which would make two equal networks differ.

Average of s: Adam's normalised steps leave noise in s that does not shrink with the gap. With ``online_ema`` the
generator compares itself with an average of s, which has less of that noise but lags behind. A lagging average makes
training diverge when the generator moves fast and its gradient goes through s (FGM, SiD); use it there only from a good
initialisation.

Weights of rows: with the teacher's data prediction ``f = a x_t + kappa u*``, rows are divided by ``mean |x1 - f| =
kappa mean |u* - c|``, without gradient (arXiv:2404.04057, eq. 23; the mean is over the values of a sample). Without it,
the steep times near the data dominate. In few dimensions that weight correlates with the noise target c. Then
``E[w (s - c)]`` is not zero even for the exact s, and samples collapse into clumps (one skewed mixture in one
dimension: W1 .28; the bias was 42 % of the term's size). PRIOR_VALUES further values with the Gaussian expectation
reduce the correlation (to 6 %).

Law of the times: a direction in which samples differ by about a is decided where the noise is about as large, at
``t = 1/(1 + a)``. The mean brightness of an image is visible in x_t at all but the first times, where the two
velocities then say nothing about it. With uniform times the images' mean is off by .03 (energy distance .15 instead of
.03 on Fashion-MNIST); ``exponential:2.5`` puts a quarter of the rows below t = .1.

With ``steps: k`` the generator is ``f(x, t) = x + (1 - t) v(x, t)`` at the times 0, 1/k, …, and is sampled with fresh
noise between its calls. It is trained on the states that its own earlier calls lead to (arXiv:2405.14867, sec. 4.5).
Every call has an online model of its own. One model for all calls would let a call make up for the error of another
(W1 .22 instead of .06 on a mixture in one dimension).
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fewstep.flow.couplings import Pair
from fewstep.flow.derivatives import rows_of
from fewstep.flow.field import Velocity
from fewstep.flow.noise import Draws
from fewstep.flow.paths import AffinePath
from fewstep.flow.time_laws import TimeLaw
from fewstep.methods.contract.objective import Learning, Networks, Objective, Terms
from fewstep.methods.families.consistency_loss import neighbour
from fewstep.methods.families.flow_map import where_rows
from fewstep.methods.families.target_average import TargetAverage
from fewstep.methods.guards.divergence import DivergenceGuard

BETAS = (0.0, 0.99)  # of AdamW, both networks (arXiv:2311.18828)
PRIOR_VALUES = 16  # values of a sample that the weight's expectation counts as: see "Weights of rows"
MEASURED_ROWS = 256  # on which gap and lag are measured at a check


@final
@dataclass(frozen=True)
class Point:
    """Noised samples of the generator and both velocities there; (B, ...) each, times (B,).

    Attributes:
        x1: the generator's samples.
        x_t: the same, noised.
        c: their velocity ``d/dt x_t``.
        teacher, online: u* and s at (x_t, t).
        t: the times.
        path: the affine path.
        spread: standard deviation of the data's values.
    """

    x1: Tensor
    x_t: Tensor
    c: Tensor
    teacher: Tensor
    online: Tensor
    t: Tensor
    path: AffinePath
    spread: float = 1.0

    @property
    def weight(self) -> Tensor:
        """``kappa^2 / mean |x1 - f|`` of every row, (B,), without gradient.

        That is the weight ``1 / mean |x1 - f|`` of a loss of data predictions, for a loss of velocities. The mean
        contains PRIOR_VALUES further values, each the expectation for Gaussian data.
        """
        miss = self.kappa * rows_mean((self.teacher - self.c).detach().abs())
        alpha, sigma = self.path.alpha(self.t), self.path.sigma(self.t)
        expected = math.sqrt(2 / math.pi) * self.spread * sigma / (alpha * self.spread).hypot(sigma)
        values = self.c[0].numel()
        return self.kappa**2 * (values + PRIOR_VALUES) / (values * miss + PRIOR_VALUES * expected)

    @property
    def kappa(self) -> Tensor:
        """Weight of the velocity in the data prediction, (B,): ``1 - t`` on the linear path."""
        return self.path.data_coefficients(self.t)[1]


class Divergence(Protocol):
    """A distance between the generator's flow and the teacher's, by its gradient in the generator.

    Attributes:
        through: whether the gradient goes through the teacher and the online model.
    """

    @property
    def through(self) -> bool: ...

    def __call__(self, point: Point) -> Tensor:
        """Losses of the rows, (B,)."""
        ...


class Made(NamedTuple):
    """Samples of the generator (B, ...), and the number of the call that made each (B,)."""

    x1: Tensor
    which: Tensor


class Noised(NamedTuple):
    """Noised samples ``x_t`` and their velocity c, (B, ...) each, at the times t (B,) of the path."""

    x_t: Tensor
    c: Tensor
    t: Tensor
    path: AffinePath


OnlineLoss = Callable[[Velocity, Noised, Pair, Draws], Tensor]


def flow_matching_loss(s: Velocity, noised: Noised, batch: Pair, draws: Draws) -> Tensor:
    """``mean |s(x_t, t) - c|^2``."""
    return (s(noised.x_t, noised.t, **batch.cond).to(noised.c) - noised.c).square().mean()


def rows_mean(x: Tensor) -> Tensor:
    """Mean over the values of every row, (B,)."""
    return x.flatten(1).mean(1)


@final
class PerCall(nn.Module):
    """An online model for every call of the generator: ``s(x, t, which=which, **cond)``.

    Args:
        model: copied.
        calls: number of copies.
    """

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.models = nn.ModuleList(copy.deepcopy(model) for _ in range(calls))

    def forward(self, x: Tensor, t: Tensor, which: Tensor, **cond: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        for call, model in enumerate(self.models):
            rows = (which == call).nonzero()[:, 0]
            if not len(rows):  # data-parallel training waits for a gradient of every weight
                rows = rows.new_zeros(1)
                out = out + 0.0 * model(x[rows], t[rows], **rows_of(cond, len(x), rows)).to(x)
                continue
            found = model(x[rows], t[rows], **rows_of(cond, len(x), rows))
            out = out.index_copy(0, rows, found.to(x))
        return out


@final
@dataclass(frozen=True)
class Setting:
    """The constants of :class:`DistributionMatching`.

    Attributes:
        law: law of t before it is shrunk to [0, latest].
        latest: last time.
        spread: standard deviation of the data's values.
        steps: calls of the generator.
        online_turns: updates of the online model per update of the generator.
        head_start: optimiser steps before the generator's first turn.
        online_lr: peak learning rate of the online model; None takes the stage's.
        online_ema: decay of the online model's average, per update of it; 0 uses the model itself.
        checkpointing: recompute u* and s in the backward pass.
    """

    law: TimeLaw
    latest: float = 0.98
    spread: float = 1.0
    steps: int = 1
    online_turns: int = 2
    head_start: int = 0
    online_lr: float | None = None
    online_ema: float = 0.0
    checkpointing: bool = False


@final
class DistributionMatching(Objective):
    """The loss of the module's docstring.

    Args:
        student: the generator's network ``v(x, t, **cond)``.
        online: s, on the device of the stage; :class:`PerCall` for several calls.
        teacher: u*, whose parameters have no gradients.
        path: the teacher's path.
        divergence: the generator's loss.
        setting: the constants.
        online_loss: the online model's loss on noised samples of the generator.
        guard: checks the generator now and then.
    """

    def __init__(
        self,
        student: nn.Module,
        online: nn.Module,
        teacher: Velocity,
        path: AffinePath,
        divergence: Divergence,
        setting: Setting,
        online_loss: OnlineLoss = flow_matching_loss,
        guard: DivergenceGuard | None = None,
    ) -> None:
        self.modules = {"student": student, "online": online}
        self.learning = {
            "student": Learning(None, BETAS, setting.head_start),
            "online": Learning(setting.online_lr, BETAS, dropout=False),
        }
        self.teacher, self.path, self.divergence, self.setting = teacher, path, divergence, setting
        self.online_loss, self.guard = online_loss, guard
        self.online_average = TargetAverage(online, setting.online_ema) if setting.online_ema else None
        self.state = {} if self.online_average is None else self.online_average.state
        if self.online_average is not None:
            self.online_average.module.eval()  # compared with the teacher: no dropout
        if guard is not None:
            self.checks, self.state = guard.checks, {**self.state, **guard.state}

    def turns(self, step: int) -> tuple[str, ...]:
        return ("online",) * self.setting.online_turns + (("student",) if step >= self.setting.head_start else ())

    def loss(self, role: str, nets: Networks, batch: Pair, draws: Draws, done: float) -> Terms:
        if role == "online":
            with torch.no_grad():
                z = draws.normal(batch.x0.shape[1:]).to(batch.x0)
                made = self.generate(nets["student"], z, batch.cond, draws)
            s = self.of_call(nets["online"], made.which)
            return {"loss": self.online_loss(s, self.noised(made.x1, draws), batch, draws)}
        made = self.generate(nets["student"], batch.x0, batch.cond, draws)
        with torch.set_grad_enabled(self.divergence.through):
            point = self.point(nets["online"], made, batch.cond, draws)
        rows = self.divergence(point)
        gap = point.teacher.detach() - point.online.detach()
        return {"loss": rows.mean(), "gap": gap.square().mean()}

    def after_step(self, role: str) -> None:
        if role == "online" and self.online_average is not None:
            self.online_average.update()

    def generate(self, student: Velocity, z: Tensor, cond: Mapping[str, Any], draws: Draws) -> Made:
        """``G(z)``. Of several calls, one is drawn for every row, at the state that the earlier calls lead to."""
        steps = self.setting.steps
        which = torch.zeros(len(z)) if steps == 1 else (draws.uniform() * steps).floor()
        x, which = z, which.to(z)
        with torch.no_grad():
            for call in range(steps - 1):
                t = torch.full_like(which, call / steps)
                y = neighbour(x, student(x, t, **cond).to(x), t, torch.ones_like(t))
                eps = draws.normal(z.shape[1:]).to(z)
                x = where_rows(which > call, self.path.interpolate(eps, y, t + 1 / steps), x)
        t = which / steps
        return Made(neighbour(x, student(x, t, **cond).to(x), t, torch.ones_like(t)), which)

    def of_call(self, model: nn.Module, which: Tensor) -> Velocity:
        """The online model of the calls that made the rows."""
        return model if self.setting.steps == 1 else functools.partial(model, which=which)

    def noised(self, x1: Tensor, draws: Draws) -> Noised:
        """The samples at fresh times, with fresh noise."""
        t = self.setting.latest * self.setting.law.sample(draws.uniform()).to(x1)
        eps = draws.normal(x1.shape[1:]).to(x1)
        return Noised(self.path.interpolate(eps, x1, t), self.path.target(eps, x1, t), t, self.path)

    def point(self, online: nn.Module, made: Made, cond: Mapping[str, Any], draws: Draws) -> Point:
        """The samples noised, and both velocities there, in float32."""
        x_t, c, t, path = self.noised(made.x1, draws)
        compared = online if self.online_average is None else self.online_average.module
        with torch.autocast(x_t.device.type, enabled=False):
            networks = self.teacher, self.of_call(compared, made.which)
            teacher, other = (self._call(network, x_t, t, cond).to(x_t) for network in networks)
        return Point(made.x1, x_t, c, teacher, other, t, path, self.setting.spread)

    def _call(self, network: Velocity, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        if not (self.setting.checkpointing and x.requires_grad):
            return network(x, t, **cond)
        found: Tensor = checkpoint(lambda x: network(x, t, **cond), x, use_reentrant=False)
        return found

    @torch.no_grad()
    def check(self, ema: Mapping[str, Tensor]) -> dict[str, float]:
        assert self.guard is not None, "it is only called with one"
        device = next(iter(ema.values())).device
        pair = self.guard.rows.head(MEASURED_ROWS).to(device)
        draws = Draws(self.guard.generator(), len(pair.x0))
        made = self.generate(self.modules["student"], pair.x0, pair.cond, draws)
        point = self.point(self.modules["online"], made, pair.cond, draws)
        apart = point.teacher - point.online
        gap = float(apart.square().mean())
        lag = abs(float((apart * (point.online - point.c)).mean())) / max(gap, torch.finfo(torch.float32).tiny)
        return {**self.guard.look(ema), "gap": gap, "lag": lag}

    def best(self) -> Mapping[str, Tensor] | None:
        return None if self.guard is None else self.guard.best()
