r"""Distribution matching: train a generator until the flow of its noised samples has the teacher's velocity.

There are three networks: the generator ``x1 = G(z)``, the frozen teacher ``u*(x, t)``, and an online model ``s(x, t)``,
which is trained by flow matching on the generator's samples. The noise ``eps`` of the path is drawn independently of z:

    x_t = alpha x1 + sigma eps,      c = d/dt x_t,      s approximates v_theta(x, t) = E[c | x_t = x].

The generator's samples have the teacher's law if ``v_theta = u*``. (With z instead of eps, v_theta would be the
velocity of a dependent coupling, and u*, trained on independent noise, could not be compared with it.) A method is one
function of (x1, x_t, c, u*, s), a :class:`Divergence`, which the generator minimises.

Updates: every training step has ``online_turns`` updates of s, then one update of the generator. Every update of s
draws its own z; the generator's update takes the batch's noise. Times and eps are new in each, labels are the batch's.
Both networks use AdamW with betas (0, .99) (arXiv:2311.18828), because the target of either network changes during
training. The online model is trained on the generator's present weights, not on their average. It starts as a copy of
the teacher, so ``u* - s`` is 0 at first, and then mostly the noise of its updates until s has learned the generator's
law. So it is trained alone in the first steps (``head_start``), and the generator's warm-up begins after them.

Precision: u* and s become nearly equal, so for their difference both are evaluated in float32; in bfloat16 its mean
square was up to eleven times too large. Both are evaluated without dropout, which would make two equal networks differ.
The generator's own call and the loss that trains s keep the precision of the stage.

Average of s: Adam divides every step by the gradient's size, so the noise that it leaves in s does not decrease with
``u* - s``. With ``online_ema`` the generator's loss uses an average of the weights of s. The average has less noise,
but it lags behind s. FGM, SiD and RealUID differentiate s; with a lagging average they diverge while the generator
moves fast, so give them one only from a good initialisation. DMD does not differentiate s, and has an average by
default.

Weights of rows: let ``f_T = b x_t + kappa u*`` be the teacher's data prediction (b and kappa: ``data_coefficients`` of
the path; 1 and ``1 - t`` on the linear path). Rows are divided by ``m = mean |x1 - f_T| = kappa mean |u* - c|``, a mean
over the values of the sample, without gradient (arXiv:2404.04057, eq. 23). Without this weight the rows with t near 1
dominate, where velocities vary fastest in x. In few dimensions m correlates with the target c. Some losses contain
``s - c`` (FGM, SiD, RealUID); there ``E[w (s - c)]`` is then not zero even for the exact s, and samples collapse to a
few points. Measured on a skewed mixture in one dimension: ``|E w (s - c)| / E |w (s - c)|`` = .42, and W1 of the
generator .28. So m is averaged with PRIOR_VALUES further values, each its expectation for Gaussian data, which reduces
the ratio to .06. DMD's loss has no such term; it divides ``f_S - f_T`` by the same m. In one dimension the prior
dominates m, and the weight is nearly a function of t alone.

Distribution of t: how often a feature occurs is learned at times where the noise in the feature is about as large as
the feature itself. For a feature whose standard deviation over the data is a times that of unit noise, that is near
``t = 1/(1 + a)``. An example is the mean brightness of an image: noise hardly changes a mean of many pixels, so a is
large. At later times x_t shows the brightness in spite of the noise. Both u* and s keep it, so ``u* - s`` does not
depend on how often a brightness occurs among the generator's samples. On Fashion-MNIST the energy distance was .15 with
uniform times, with the images' mean off by .03, and .03 with more early times: ``exponential:2.5`` puts a quarter of
the rows below t = .1.

With ``steps: k`` the generator is ``G(x, t) = x + (1 - t) v(x, t)`` at the times 0, 1/k, …, and it is sampled with
fresh noise between its calls. In training, the state of a call is computed by the generator's earlier calls
(arXiv:2405.14867, sec. 4.5). Every call has its own online model. With one online model for all calls only the mixture
of their samples would be matched, so that one call could compensate for the error of another (measured on a mixture in
one dimension: W1 .22 instead of .06).
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

BETAS = (0.0, 0.99)  # of AdamW, for generator and online model (arXiv:2311.18828)
PRIOR_VALUES = 16  # further values in the mean of the rows' weight: bias .06 instead of .42 ("Weights of rows")
MEASURED_ROWS = 256  # rows on which gap and lag are measured at a check; chosen, not tuned


@final
@dataclass(frozen=True)
class Point:
    """Noised samples of the generator, and the velocities of teacher and online model there.

    Attributes:
        x1: the generator's samples, (B, ...).
        x_t: the noised samples ``alpha x1 + sigma eps``, (B, ...).
        c: their velocity ``d/dt x_t``, (B, ...).
        teacher, online: ``u*(x_t, t)`` and ``s(x_t, t)``, (B, ...) each.
        t: the times, (B,).
        path: the affine path.
        spread: standard deviation of the data's values, in network units.
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
    def mean_error(self) -> Tensor:
        """``m = mean |x1 - f_T|`` of every row, averaged with its prior, (B,), without gradient.

        ``(D kappa mean |u* - c| + P E) / (D + P)``: D is the number of values of a sample, P is PRIOR_VALUES, and
        ``E = sqrt(2 / pi) spread sigma / sqrt(alpha^2 spread^2 + sigma^2)`` is the expectation for Gaussian data.
        """
        found = self.kappa * rows_mean((self.teacher - self.c).detach().abs())
        alpha, sigma = self.path.alpha(self.t), self.path.sigma(self.t)
        expected = math.sqrt(2 / math.pi) * self.spread * sigma / (alpha * self.spread).hypot(sigma)
        values = self.c[0].numel()
        return (values * found + PRIOR_VALUES * expected) / (values + PRIOR_VALUES)

    @property
    def weight(self) -> Tensor:
        """``w = kappa^2 / m`` of every row, (B,), without gradient.

        That is the weight ``1 / m`` of a loss of data predictions, for a loss of velocities: a difference of velocities
        times kappa is one of data predictions.
        """
        return self.kappa**2 / self.mean_error

    @property
    def kappa(self) -> Tensor:
        """Coefficient of the velocity in the data prediction, (B,): ``1 - t`` on the linear path."""
        return self.path.data_coefficients(self.t)[1]


class Divergence(Protocol):
    """The generator's loss. Its gradient in the generator's weights is that of a divergence between the two laws; its
    value is not a divergence and may be negative.
    """

    @property
    def through(self) -> bool:
        """Whether the gradient passes through the teacher and the online model to x_t."""
        ...

    def __call__(self, point: Point) -> Tensor:
        """The losses of the rows of a point, (B,)."""
        ...


class Made(NamedTuple):
    """Samples of the generator.

    Attributes:
        x1: the samples, (B, ...).
        which: the number of the generator's call that made each, from 0, (B,).
    """

    x1: Tensor
    which: Tensor


class Noised(NamedTuple):
    """Noised samples of the generator.

    Attributes:
        x_t: ``alpha x1 + sigma eps``, (B, ...).
        c: ``d/dt x_t``, (B, ...).
        t: the times, (B,).
        path: the affine path.
    """

    x_t: Tensor
    c: Tensor
    t: Tensor
    path: AffinePath


OnlineLoss = Callable[[Velocity, Noised, Pair, Draws], Tensor]


def flow_matching_loss(s: Velocity, noised: Noised, batch: Pair, draws: Draws) -> Tensor:
    """The online model's loss ``mean |s(x_t, t) - c|^2``, a scalar.

    Args:
        s: the online model.
        noised: noised samples of the generator.
        batch: rows of the data; their conditions are those of the samples.
        draws: random numbers, not used by this loss.
    """
    return (s(noised.x_t, noised.t, **batch.cond).to(noised.c) - noised.c).square().mean()


def rows_mean(x: Tensor) -> Tensor:
    """Mean over the values of every row of x (B, ...), (B,).

    >>> rows_mean(torch.tensor([[1.0, 3.0]]))
    tensor([2.])
    """
    return x.flatten(1).mean(1)


@final
class PerCall(nn.Module):
    """One online model for every call of the generator: ``s(x, t, which=which, **cond)``.

    Args:
        model: the network that is copied.
        calls: number of copies.
    """

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.models = nn.ModuleList(copy.deepcopy(model) for _ in range(calls))

    def forward(self, x: Tensor, t: Tensor, which: Tensor, **cond: Tensor) -> Tensor:
        """The velocity at x (B, ...) and t (B,), of copy number ``which`` (B,) in every row."""
        out = x.new_zeros(x.shape)
        for call, model in enumerate(self.models):
            rows = (which == call).nonzero()[:, 0]
            if not len(rows):  # data-parallel training needs a gradient of every weight: call it on one row, times zero
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
        law: law of ``t / latest``.
        latest: largest t.
        spread: standard deviation of the data's values, in network units.
        steps: number of the generator's calls, k.
        online_turns: updates of the online model per update of the generator.
        head_start: optimiser steps before the generator's first update.
        online_lr: peak learning rate of the online model; None takes the stage's ``lr``.
        online_ema: decay, per update, of the online model's average, which the generator's loss uses; 0: no average.
        checkpointing: recompute u* and s in the backward pass, which saves memory.
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
    """The losses of the generator (role ``student``) and of the online model (role ``online``), as described above.

    Args:
        student: the generator's network ``v(x, t, **cond)``.
        online: s, on the device of the stage; a :class:`PerCall` for several calls.
        teacher: u*, whose parameters have no gradients.
        path: the teacher's affine path.
        divergence: the generator's loss.
        setting: the constants.
        online_loss: the online model's loss on noised samples of the generator.
        guard: measures the generator's samples at the checks; None for no checks.
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
        """``G(z)``. With several calls, one is drawn for every row; the calls before it compute its state x.

        Args:
            student: the generator's network.
            z: noise (B, ...).
            cond: conditions of the rows.
            draws: random numbers of the drawn call and of the noise between calls.
        """
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
        """The online model ``s(x, t, **cond)`` that belongs, in every row, to call number ``which`` (B,)."""
        return model if self.setting.steps == 1 else functools.partial(model, which=which)

    def noised(self, x1: Tensor, draws: Draws) -> Noised:
        """The samples x1 (B, ...) at newly drawn times, with newly drawn noise."""
        t = self.setting.latest * self.setting.law.sample(draws.uniform()).to(x1)
        eps = draws.normal(x1.shape[1:]).to(x1)
        return Noised(self.path.interpolate(eps, x1, t), self.path.target(eps, x1, t), t, self.path)

    def point(self, online: nn.Module, made: Made, cond: Mapping[str, Any], draws: Draws) -> Point:
        """The samples with new noise, and both velocities there, computed in float32.

        Args:
            online: s; its average is used instead if there is one.
            made: samples of the generator.
            cond: conditions of the rows.
            draws: random numbers of times and noise.
        """
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
        """The guard's measurements, ``gap = E |u* - s|^2`` and ``lag = |E (u* - s)(s - c)| / gap``.

        The guard measures the generator with its averaged weights, at its first call. Gap and lag are measured on
        samples of its present weights, with the s that its loss uses: the average, if there is one. Given x_t,
        ``s - c`` has the mean ``s - v_theta``, which is the error of s. So lag is the part of this error along
        ``u* - s``, relative to the gap: 0 for the exact s. (RealUID trains s otherwise: there it is not.)
        """
        assert self.guard is not None, "the number of checks is 0 without a guard"
        device = next(iter(ema.values())).device
        pair = self.guard.rows.head(MEASURED_ROWS).to(device)
        draws = Draws(self.guard.generator(), len(pair.x0))
        made = self.generate(self.modules["student"], pair.x0, pair.cond, draws)
        point = self.point(self.modules["online"], made, pair.cond, draws)
        difference = point.teacher - point.online
        gap = float(difference.square().mean())
        lag = abs(float((difference * (point.online - point.c)).mean())) / max(gap, torch.finfo(torch.float32).tiny)
        return {**self.guard.look(ema), "gap": gap, "lag": lag}

    def best(self) -> Mapping[str, Tensor] | None:
        return None if self.guard is None else self.guard.best()
