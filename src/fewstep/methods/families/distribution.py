r"""Distribution matching: a generator whose noised samples flow as the teacher's do.

Three networks: the generator ``x1 = G(z)``, the frozen teacher ``u*(x, t)``, and an online flow model ``s(x, t)`` that
flow matching trains on the generator's own samples. Noise ``eps`` of the path is drawn afresh, independent of z:

    x_t = alpha x1 + sigma eps,      c = d/dt x_t,      s -> v_theta(x, t) = E[c | x_t = x],

and the generator is to have ``v_theta = u*``, which holds where its samples have the teacher's law. (With z again as
the path's noise, v_theta would be the velocity of another coupling, and could not be compared with u*.) What a method
adds is one function of (x_t, c, u*, s), whose gradient in the generator's weights leads there: :class:`Divergence`.

Turns: ``online_turns`` updates of s, each on samples of its own, then one of the generator. Both have betas (0, .99):
what they follow moves. s is taught by the generator as it is, not by its average. It starts as the teacher, where there
is nothing to learn from the two, so it has a head start, and the generator's warm-up comes after that.

Average: Adam's normalised steps leave noise in s that does not shrink with the gap. With ``online_ema`` the generator
looks at the average of s instead, which has far less of it, and is late. Where the generator moves fast, as in its
first steps from a teacher, and its gradient goes through s (FGM, SiD), lateness diverges: it is for near starts.

Weights: with the teacher's data prediction ``f = a x_t + kappa u*``, rows are divided by ``mean |x1 - f| = kappa mean
|u* - c|``, without gradient (arXiv:2404.04057, eq. 23; a mean over the entries of a sample). Without that, steep times
near the data have all the weight. The mean of a few entries says more of c than of the time: a weight that goes with c
turns ``E w (s - c)``, which is to vanish where s is right, into a pull of its own, under which samples on the line
clump. So what Gaussian data would have at that time counts as PRIOR entries more.

Times: a direction in which samples differ by about a is decided where the noise is as large, at ``t = 1/(1 + a)``. The
brightness of an image, the mean of all its pixels, is read off x_t at all but the first times, where the two velocities
say nothing of it. A uniform law hardly corrects it; ``exponential:2.5`` has a quarter of the rows below t = .1.

With ``steps: k`` the generator is ``f(x, t) = x + (1 - t) v(x, t)`` at the times 0, 1/k, ..., and is sampled with fresh
noise between its calls. It is trained on the states that its own earlier calls lead to (arXiv:2405.14867, sec. 4.5).
Every call has an online model of its own: one for all would let a call make up for what another one lacks.
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
from fewstep.methods.contract.objective import Learning, Objective
from fewstep.methods.families.consistency_target import neighbour
from fewstep.methods.families.flow_map import where_rows
from fewstep.methods.families.target_average import TargetAverage
from fewstep.methods.guards.divergence import DivergenceGuard

BETAS = (0.0, 0.99)
PRIOR = 16  # entries that the weight's expected value counts as
FEW = 256  # rows on which gap and lag are measured


@final
@dataclass(frozen=True)
class Point:
    """Noised samples of the generator, and what the networks say there; (B, ...) each, times (B,).

    Attributes:
        x1: the generator's samples.
        x_t: noised.
        c: their velocity ``d/dt x_t``.
        teacher, online: u* and s at (x_t, t).
        t: the times.
        path: the affine path.
        spread: standard deviation of the data's entries.
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
        """``kappa^2 / mean |x1 - f|`` of every row, (B,), without gradient: what f-space losses with the weight ``1 /
        mean |x1 - f|`` have in terms of velocities. The mean has PRIOR entries more, of the value for Gaussian data."""
        miss = self.kappa * rows_mean((self.teacher - self.c).detach().abs())
        alpha, sigma = self.path.alpha(self.t), self.path.sigma(self.t)
        expected = math.sqrt(2 / math.pi) * self.spread * sigma / (alpha * self.spread).hypot(sigma)
        entries = self.c[0].numel()
        return self.kappa**2 * (entries + PRIOR) / (entries * miss + PRIOR * expected)

    @property
    def kappa(self) -> Tensor:
        """Weight of the velocity in the data prediction, ``1 - t`` on the line; (B,)."""
        return self.path.data_coefficients(self.t)[1]


class Divergence(Protocol):
    """What pulls the generator to the teacher.

    Attributes:
        through: whether its gradient goes through the teacher and the online model.
    """

    @property
    def through(self) -> bool: ...

    def __call__(self, point: Point) -> Tensor:
        """Losses of the rows, (B,)."""
        ...


class Made(NamedTuple):
    """Samples of the generator (B, ...), and the call that made each (B,)."""

    x1: Tensor
    which: Tensor


class Noised(NamedTuple):
    """Samples of the generator noised, ``x_t``, their velocity c, (B, ...) each, and the times t (B,), on the path."""

    x_t: Tensor
    c: Tensor
    t: Tensor
    path: AffinePath


OnlineLoss = Callable[[Velocity, Noised, Pair, Draws], Tensor]


def flow_matching_loss(s: Velocity, noised: Noised, batch: Pair, draws: Draws) -> Tensor:
    """``mean |s(x_t, t) - c|^2``."""
    return (s(noised.x_t, noised.t, **batch.cond).to(noised.c) - noised.c).square().mean()


def rows_mean(x: Tensor) -> Tensor:
    """Mean over the entries of every row, (B,)."""
    return x.flatten(1).mean(1)


@final
class PerCall(nn.Module):
    """An online model for every call of the generator: ``s(x, t, which=which, **cond)``.

    Args:
        model: copied.
        calls: their number.
    """

    def __init__(self, model: nn.Module, calls: int) -> None:
        super().__init__()
        self.models = nn.ModuleList(copy.deepcopy(model) for _ in range(calls))

    def forward(self, x: Tensor, t: Tensor, which: Tensor, **cond: Tensor) -> Tensor:
        out = x.new_zeros(x.shape)
        for call, model in enumerate(self.models):
            rows = (which == call).nonzero()[:, 0]
            if not len(rows):  # several processes wait for a gradient of every weight
                rows = rows.new_zeros(1)
                out = out + 0.0 * model(x[rows], t[rows], **rows_of(cond, len(x), rows)).to(x)
                continue
            found = model(x[rows], t[rows], **rows_of(cond, len(x), rows))
            out = out.index_copy(0, rows, found.to(x))
        return out


@final
class DistributionMatching(Objective):
    """The game described above.

    Args:
        student: the generator's network ``v(x, t, **cond)``.
        online: s, on the device of the stage; :class:`PerCall` for several calls.
        teacher: u*, whose parameters have no gradients.
        path: the teacher's path.
        divergence: the generator's loss.
        law: law of t before it is shrunk.
        latest: last time.
        spread: standard deviation of the data's entries.
        steps: calls of the generator.
        turns: of the online model per turn of the generator.
        head_start: optimiser steps before the generator's first turn.
        online_lr: its learning rate.
        online_ema: decay of its average.
        online_loss: its loss on noised samples of the generator.
        checkpointing: recompute u* and s in the backward pass.
        watch: looks at the generator now and then.
    """

    def __init__(
        self,
        student: nn.Module,
        online: nn.Module,
        teacher: Velocity,
        path: AffinePath,
        divergence: Divergence,
        law: TimeLaw,
        *,
        latest: float = 0.98,
        spread: float = 1.0,
        steps: int = 1,
        turns: int = 2,
        head_start: int = 0,
        online_lr: float | None = None,
        online_ema: float = 0.0,
        online_loss: OnlineLoss = flow_matching_loss,
        checkpointing: bool = False,
        watch: DivergenceGuard | None = None,
    ) -> None:
        self.modules = {"student": student, "online": online}
        self.learning = {"student": Learning(None, BETAS, head_start), "online": Learning(online_lr, BETAS)}
        self.teacher, self.path, self.divergence, self.law = teacher, path, divergence, law
        self.latest, self.spread, self.steps, self.checkpointing = latest, spread, steps, checkpointing
        self._turns = turns
        self.online_loss = online_loss
        self.follower = TargetAverage(online, online_ema) if online_ema else None
        self.state = {} if self.follower is None else self.follower.state
        self.watch = watch
        if watch is not None:
            self.checks, self.state = watch.checks, {**self.state, **watch.state}

    def turns(self, step: int) -> tuple[str, ...]:
        return ("online",) * self._turns + (("student",) if step >= self.learning["student"].begins else ())

    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        if self.follower is not None:
            self.follower.update()
        if role == "online":
            with torch.no_grad():
                made = self.generate(draws.normal(batch.x0.shape[1:]).to(batch.x0), batch.cond, draws)
            return self.learn(made, batch, draws)
        made = self.generate(batch.x0, batch.cond, draws)
        with torch.set_grad_enabled(self.divergence.through):
            point = self.point(made, batch.cond, draws)
        rows = self.divergence(point)
        gap = point.teacher.detach() - point.online.detach()
        return {"loss": rows.mean(), "gap": gap.square().mean()}

    def generate(self, z: Tensor, cond: Mapping[str, Any], draws: Draws) -> Made:
        """``G(z)``; of several calls, one that is drawn for every row, at the state that the earlier ones lead to."""
        student = self.modules["student"]
        which = torch.zeros(len(z)) if self.steps == 1 else (draws.uniform() * self.steps).floor()
        x, which = z, which.to(z)
        with torch.no_grad():
            for call in range(self.steps - 1):
                t = torch.full_like(which, call / self.steps)
                y = neighbour(x, student(x, t, **cond).to(x), t, torch.ones_like(t))
                eps = draws.normal(z.shape[1:]).to(z)
                x = where_rows(which > call, self.path.interpolate(eps, y, t + 1 / self.steps), x)
        t = which / self.steps
        return Made(neighbour(x, student(x, t, **cond).to(x), t, torch.ones_like(t)), which)

    def online(self, which: Tensor, *, learns: bool = False) -> Velocity:
        """s of the calls that made the rows: the model that learns, or what the generator looks at."""
        model = self.modules["online"] if learns or self.follower is None else self.follower.module
        return model if self.steps == 1 else functools.partial(model, which=which)

    def noised(self, x1: Tensor, draws: Draws) -> Noised:
        """With times and noise that nothing else has seen."""
        t = self.latest * self.law.sample(draws.uniform()).to(x1)
        eps = draws.normal(x1.shape[1:]).to(x1)
        return Noised(self.path.interpolate(eps, x1, t), self.path.target(eps, x1, t), t, self.path)

    def point(self, made: Made, cond: Mapping[str, Any], draws: Draws) -> Point:
        """The samples noised, and both velocities there."""
        x_t, c, t, path = self.noised(made.x1, draws)
        networks = self.teacher, self.online(made.which)
        teacher, online = (self._call(network, x_t, t, cond).to(x_t) for network in networks)
        return Point(made.x1, x_t, c, teacher, online, t, path, self.spread)

    def _call(self, network: Velocity, x: Tensor, t: Tensor, cond: Mapping[str, Any]) -> Tensor:
        if not (self.checkpointing and x.requires_grad):
            return network(x, t, **cond)
        found: Tensor = checkpoint(lambda x: network(x, t, **cond), x, use_reentrant=False)
        return found

    def learn(self, made: Made, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        """The online model's loss on samples of the generator."""
        online = self.online(made.which, learns=True)
        return {"loss": self.online_loss(online, self.noised(made.x1, draws), batch, draws)}

    @torch.no_grad()
    def check(self, ema: Mapping[str, Tensor]) -> dict[str, float]:
        assert self.watch is not None, "it is only called with one"
        rows, few = self.watch.rows, slice(FEW)
        device = next(iter(ema.values())).device
        cond = {name: value[few].to(device) for name, value in rows.cond.items()}
        draws = Draws(self.watch.generator(), len(rows.x0[few]))
        point = self.point(self.generate(rows.x0[few].to(device), cond, draws), cond, draws)
        apart = point.teacher - point.online
        gap = float(apart.square().mean())
        lag = abs(float((apart * (point.online - point.c)).mean())) / max(gap, torch.finfo(torch.float32).tiny)
        return {**self.watch.look(ema), "gap": gap, "lag": lag}

    def best(self) -> Mapping[str, Tensor] | None:
        return None if self.watch is None else self.watch.best()
