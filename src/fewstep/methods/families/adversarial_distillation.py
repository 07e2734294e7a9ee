"""Distillation by several objectives at once: near the teacher, alike in features, and not to be told from real ones.

    L(theta) = d(G(z), x_T) + lambda_p d_features(G(z), x_T) + lambda_adv L_adv(D(G(z))),    G(z) = z + v_theta(z, 0)

with ``x_T`` the teacher's endpoint of the noise ``z``. The two players take turns: the discriminator ``D`` learns
first, on samples of the student as it is; its slope is held down by R1 and R2 (arXiv:1801.04406, eq. 9; 2501.05441,
eq. 5), without which its scores grow without bound. ``lambda_adv`` follows the pulls of the terms
(:mod:`fewstep.methods.families.gradient_balance`) and starts from zero, so that an untrained discriminator pulls at
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn

from fewstep.flow.couplings import Pair
from fewstep.flow.noise import Draws
from fewstep.methods.contract.objective import Learning, Objective
from fewstep.methods.contract.stage import World
from fewstep.methods.families.adversarial import AdversarialLoss, slope
from fewstep.methods.families.distances import Distance
from fewstep.methods.families.gradient_balance import RunningRatio, combine_terms, last_layer, term_gradients
from fewstep.methods.families.straight_line import one_step
from fewstep.methods.guards.coverage import CoverageGuard

Real = Literal["teacher", "data", "both"]


@final
@dataclass(frozen=True)
class Adversary:
    """The adversarial term.

    Attributes:
        discriminator: scores (B,) of samples.
        loss: what the players minimise.
        share: the term's pull, as a share of the other terms'.
        gamma: weight of R1 + R2 is ``gamma / 2``.
        every: steps between two penalties, each then weighted so many times.
        turns: the discriminator's turns per turn of the student.
        real: what counts as real: the teacher's endpoints, data rows, or half of each.
        ramp: student's turns over which ``share`` rises from zero.
        learning: how the players learn.
    """

    discriminator: nn.Module
    loss: AdversarialLoss
    share: float
    gamma: float
    every: int
    turns: int
    real: Real
    ramp: int
    learning: dict[str, Learning]


@final
class MultiObjective(Objective):
    """The loss above; without ``perceptual`` or ``adversary`` that term is missing.

    Args:
        student: ``v(x, t, **cond)``, called at t = 0.
        distance: between endpoints.
        perceptual: per-sample distance of features ``(x, y) -> (B,)``, already weighted.
        adversary: the adversarial term.
        monitor: looks whether the student still covers what the teacher makes.
        world: the processes at work.
    """

    def __init__(
        self,
        student: nn.Module,
        distance: Distance,
        perceptual: Callable[[Tensor, Tensor], Tensor] | None,
        adversary: Adversary | None,
        monitor: CoverageGuard | None,
        world: World,
    ) -> None:
        self.modules = {"student": student}
        self.distance, self.perceptual, self.adversary = distance, perceptual, adversary
        self.monitor, self.world = monitor, world
        self.last = last_layer(student)
        self.ratio = RunningRatio()
        self.turn = torch.zeros((), dtype=torch.long)
        if adversary is not None:
            self.modules["discriminator"] = adversary.discriminator
            self.learning = adversary.learning
            self.state = {**self.ratio.state, "turn": self.turn}
        if monitor is not None:
            self.checks = monitor.checks
            self.state = {**self.state, **monitor.state}

    def turns(self, step: int) -> tuple[str, ...]:
        if self.adversary is None:
            return ("student",)
        return (*["discriminator"] * self.adversary.turns, "student")

    def loss(self, role: str, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        if role == "student":
            return self._student(batch, draws)
        assert self.adversary is not None, "only an adversary has another role"
        return self._discriminator(self.adversary, batch, draws)

    def check(self, ema: dict[str, Tensor]) -> dict[str, float]:  # type: ignore[override]
        assert self.monitor is not None, "checks are the monitor's"
        judge = None if self.adversary is None else self.adversary.discriminator
        return self.monitor.look(ema, judge)

    def best(self) -> Mapping[str, Tensor] | None:
        return None if self.monitor is None else self.monitor.best()

    def _endpoint(self, batch: Pair) -> Tensor:
        return one_step(self.modules["student"], batch.x0, batch.cond)

    def _student(self, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        fake = self._endpoint(batch)
        with torch.autocast(fake.device.type, enabled=False):  # losses and what they look through stay in float32
            fake = fake.float() if fake.dtype == torch.bfloat16 else fake
            terms = {"reconstruction": self.distance(fake, batch.x1)}
            if self.perceptual is not None:
                terms["perceptual"] = self.perceptual(fake, batch.x1).mean()
            if self.adversary is None and len(terms) == 1:
                return {"loss": terms["reconstruction"]}
            if self.adversary is not None:
                terms["adversarial"] = self._deceive(self.adversary, fake, batch, draws)
            found = term_gradients(fake, self.last, terms, self.world)
            if self.adversary is None:
                return combine_terms(fake, found, {})
            share = self.adversary.share * min(1.0, int(self.turn) / max(1, self.adversary.ramp))
            self.turn.add_(1)
            scale = share * self.ratio.update(found.rest, found.pulls["adversarial"])
            return {**combine_terms(fake, found, {"adversarial": scale}), "weight/adversarial": fake.new_tensor(scale)}

    def _deceive(self, adversary: Adversary, fake: Tensor, batch: Pair, draws: Draws) -> Tensor:
        """The generator's side of the adversarial term."""
        real, label = real_rows(adversary.real, batch, draws)
        judge = self.modules["discriminator"]
        with torch.no_grad():
            target = judge(real, label)
        return adversary.loss.generator(target, judge(fake, batch.cond.get("label")))

    def _discriminator(self, adversary: Adversary, batch: Pair, draws: Draws) -> dict[str, Tensor]:
        with torch.no_grad():
            fake = self._endpoint(batch).to(batch.x0.dtype)
        real, label = real_rows(adversary.real, batch, draws)
        seen = torch.cat([real, fake]).detach().requires_grad_(adversary.gamma > 0)
        labels = None if label is None else torch.cat([label, batch.cond["label"]])
        with torch.autocast(seen.device.type, enabled=False):
            scores = self.modules["discriminator"](seen, labels)
            on_real, on_fake = scores.chunk(2)
            terms = {"game": adversary.loss.discriminator(on_real, on_fake)}
            total = terms["game"]
            if adversary.gamma > 0 and int(self.turn) % adversary.every == 0:
                terms["penalty"] = slope(scores, seen)  # of both halves: (R1 + R2) / 2
                total = total + adversary.every * adversary.gamma * terms["penalty"]
        gap = (on_real - on_fake).mean()
        return {"loss": total, "gap": gap.detach(), **{name: term.detach() for name, term in terms.items()}}


def real_rows(real: Real, batch: Pair, draws: Draws) -> tuple[Tensor, Tensor | None]:
    """The rows that count as real, and their labels."""
    own = batch.cond.get("label")
    if real == "teacher":
        return batch.x1, own
    data, label = batch.beside["real"], batch.beside.get("real_label")
    if real == "data":
        return data, label
    half = draws.uniform().to(data.device) < 0.5
    rows = torch.where(half.view(-1, *(1,) * (data.ndim - 1)), data, batch.x1)
    return rows, None if own is None or label is None else torch.where(half, label, own)
